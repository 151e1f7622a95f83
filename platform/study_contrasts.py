"""Linear expressions over the cells of a study, as in ``0.24 * (full - random)``.

A cell is named ``variant`` or, in a study with a grid, ``variant@value``; ``cell:measure`` looks at
another measure than the claim's own. Differences of differences ("the gain is largest at 48") and
shares of a gain are linear in this sense, so one test serves all claims of the papers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

TOKEN: Final = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?)"
    r"|(?P<name>[a-z][a-z0-9_]*(?:@[a-z0-9_]+)?(?::[a-z][a-z0-9_]*)?)"
    r"|(?P<sign>[-+*()]))"
)


@dataclass(frozen=True)
class Contrast:
    """A constant and a weighted sum of cells."""

    weights: Mapping[str, float]
    """Weight of each cell name, as written: ``name``, ``name@value``, either with ``:measure``."""
    constant: float = 0.0

    def plus(self, other: "Contrast", *, times: float = 1.0) -> "Contrast":
        """This and a multiple of another; weights that cancel disappear."""
        names = dict.fromkeys((*self.weights, *other.weights))
        summed = {n: self.weights.get(n, 0.0) + times * other.weights.get(n, 0.0) for n in names}
        kept = {name: weight for name, weight in summed.items() if weight}
        return Contrast(kept, self.constant + times * other.constant)

    def times(self, factor: float) -> "Contrast":
        """All of it by a factor."""
        return Contrast({}).plus(self, times=factor)

    @property
    def is_constant(self) -> bool:
        """Whether it is a mere number."""
        return not self.weights


def parse_contrast(text: str) -> Contrast:
    """Read an expression of cell names, numbers, ``+``, ``-``, ``*`` and brackets.

    Raises:
        ValueError: it cannot be read, or two cells are multiplied.
    """
    return _Reader(text).read()


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[str] = []
        place = 0
        while place < len(text.rstrip()):
            found = TOKEN.match(text, place)
            if found is None:
                raise self._wrong(f"cannot read {text[place:].strip()[:20]!r}")
            self.tokens.append(found.group().strip())
            place = found.end()

    def read(self) -> Contrast:
        found = self._sum()
        if self.tokens:
            raise self._wrong(f"did not expect {self.tokens[0]!r}")
        return found

    def _sum(self) -> Contrast:
        found = self._product().times(-1) if self._took("-") else self._product()
        while self.tokens and self.tokens[0] in "+-":
            factor = -1 if self.tokens.pop(0) == "-" else 1
            found = found.plus(self._product(), times=factor)
        return found

    def _product(self) -> Contrast:
        found = self._factor()
        while self._took("*"):
            other = self._factor()
            if found.is_constant:
                found, other = other, found
            if not other.is_constant:
                raise self._wrong("two cells cannot be multiplied")
            found = found.times(other.constant)
        return found

    def _factor(self) -> Contrast:
        if not self.tokens:
            raise self._wrong("it ends too early")
        if self._took("("):
            found = self._sum()
            if not self._took(")"):
                raise self._wrong("a bracket is not closed")
            return found
        token = self.tokens.pop(0)
        if token in "-+*)":
            raise self._wrong(f"did not expect {token!r}")
        return Contrast({}, float(token)) if token[0].isdigit() else Contrast({token: 1.0})

    def _took(self, sign: str) -> bool:
        took = bool(self.tokens) and self.tokens[0] == sign
        if took:
            self.tokens.pop(0)
        return took

    def _wrong(self, why: str) -> ValueError:
        return ValueError(
            f"{self.text!r} is no expression over variants: {why}; write for example "
            "'kd', 'pd@tiny - pf@tiny' or '0.24 * (full - random)'"
        )
