"""A study: one market, several variants, several seeds, and what the papers claim about them.

One YAML file is one study; ``driftline study FILE`` gives its table, its plot and a verdict on each
claim. Everything that can be wrong with a study is found here, before anything is trained.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from driftline.platform.data_settings import Settings, SliceHours
from driftline.platform.errors import SettingsError
from driftline.platform.study_claims import StudyOrdering
from driftline.platform.study_contrasts import Contrast, parse_contrast
from driftline.platform.study_measures import MEASURES
from driftline.platform.study_parts import (
    Form,
    Grid,
    Name,
    Overrides,
    StrategyName,
    StudyColumn,
    StudyPlot,
    StudyValue,
    StudyVariant,
)
from driftline.platform.yaml_text import read_yaml


@dataclass(frozen=True)
class StudyCell:
    """One model to train for each seed: a variant, at one value of the grid if there is one."""

    name: str
    label: str
    variant: str
    value: str | None
    form: Form
    strategy: StrategyName | None
    teacher: str | None
    overrides: tuple[tuple[str, Any], ...]
    """In order of application."""
    x: float | None


class StudySettings(Settings):
    """One study."""

    name: Name
    title: str
    source: tuple[str, ...] = ()
    """Where the papers ask this, such as ``S0.31``."""
    about: str = ""
    """What the table asks, and where we differ from the paper."""
    market: Path
    """Settings file of the market, relative to this file."""
    overrides: Overrides = Field(default={}, alias="set")
    """Settings for all variants, by dotted path."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (1, 2, 3)
    variants: Annotated[dict[Name, StudyVariant], Field(min_length=1)]
    each: Grid = Field(default={})
    """A grid: every variant at each of these values, as ``variant@value``."""
    baseline: str
    columns: Annotated[tuple[StudyColumn, ...], Field(min_length=1)]
    orderings: tuple[StudyOrdering, ...] = ()
    plot: StudyPlot = StudyPlot()
    test_hours: SliceHours = 24.0
    """Length of the test slice at the end of the log; students learn from what comes before."""
    num_bootstrap: PositiveInt = 200
    """Resamples of the requests, for the part of the interval that the test rows cause."""

    @field_validator("columns", mode="before")
    @classmethod
    def _bare_names(cls, raw: Any) -> Any:
        if isinstance(raw, list | tuple):
            return [{"measure": each} if isinstance(each, str) else each for each in raw]
        return raw

    @cached_property
    def cells(self) -> dict[str, StudyCell]:
        """All models of the study by name, in the order of the table."""
        return {cell.name: cell for cell in self._cells()}

    def _cells(self) -> Iterator[StudyCell]:
        for name, variant in self.variants.items():
            grid = self.each if self.each and variant.each else {None: StudyValue()}
            for value_name, value in grid.items():
                labels = [variant.label or name, value.label or value_name]
                sets = (self.overrides, variant.overrides, value.overrides)
                yield StudyCell(
                    name=name if value_name is None else f"{name}@{value_name}",
                    label=" · ".join(label for label in labels if label),
                    variant=name,
                    value=value_name,
                    form=variant.form,
                    strategy=variant.strategy,
                    teacher=variant.teacher,
                    overrides=tuple(pair for overrides in sets for pair in overrides.items()),
                    x=variant.x if value_name is None else value.x,
                )

    def resolve(self, term: str, *, measure: str, at: str | None = None) -> Contrast:
        """The expression over ``cell:measure`` names.

        A variant that the grid multiplies stands for itself at the value ``at``, or for the mean
        over all values.

        Raises:
            ValueError: not an expression; no such variant, value or measure.
        """
        written = parse_contrast(term)
        found = Contrast({}, written.constant)
        for name, weight in written.weights.items():
            cell, _, own = name.partition(":")
            if own and own not in MEASURES:
                raise ValueError(f"{term!r}: {_unknown('measure', own, MEASURES)}")
            names = self._cell_names(cell, at=at)
            mean = Contrast({f"{n}:{own or measure}": 1 / len(names) for n in names})
            found = found.plus(mean, times=weight)
        return found

    def _cell_names(self, name: str, *, at: str | None) -> list[str]:
        variant = self.variants.get(name)
        if variant is not None and self.each and variant.each:
            return [f"{name}@{value}" for value in ([at] if at else self.each)]
        if name not in self.cells:
            raise ValueError(_unknown("variant", name, (*self.variants, *self.cells)))
        return [name]

    def ends_of(self, cell: StudyCell, column: StudyColumn) -> tuple[str, str] | None:
        """The cells that a share is taken between, at the same value of the grid."""
        if column.between is None:
            return None
        first, last = (self._cell_names(name, at=cell.value) for name in column.between)
        return (first[0], last[0]) if len(first) == len(last) == 1 else None

    def baseline_of(self, cell: StudyCell, column: StudyColumn) -> str | None:
        """The cell that a delta is taken to, at the same value of the grid.

        None where there is no such cell: a reference row outside the grid has no counterpart.
        """
        names = self._cell_names(column.baseline or self.baseline, at=cell.value)
        return names[0] if len(names) == 1 else None

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        mistakes: list[str] = []
        if len(set(self.seeds)) < len(self.seeds):
            mistakes.append(f"seeds: each counts once, got {list(self.seeds)}")
        measures = {f"columns.{i}.measure": c.measure for i, c in enumerate(self.columns)}
        measures |= {"plot.measure": self.plot.measure}
        measures |= {"plot.x_measure": self.plot.x_measure} if self.plot.x_measure else {}
        for i, ordering in enumerate(self.orderings):
            measures[f"orderings.{i}.measure"] = ordering.measure
            if ordering.agrees_with:
                measures[f"orderings.{i}.agrees_with"] = ordering.agrees_with
        for path, name in measures.items():
            if name not in MEASURES:
                mistakes.append(f"{path}: {_unknown('measure', name, MEASURES)}")
        mistakes += self._baseline_mistakes() if not mistakes else []
        mistakes += [
            f"orderings.{i}: {why}"
            for i, each in enumerate(self.orderings)
            for why in self._ordering_mistakes(each)
        ]
        if self.plot.kind == "line" and self.plot.x_measure is None:
            without = [name for name, cell in self.cells.items() if self._on_axis(cell)]
            if without:
                mistakes.append(f"plot: a line needs x, {without} have none")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def _on_axis(self, cell: StudyCell) -> bool:
        """A cell that should have a place on the axis and has none."""
        multiplied = bool(self.each) and self.variants[cell.variant].each
        return cell.x is None and (multiplied or not self.each)

    def _baseline_mistakes(self) -> list[str]:
        found = []
        named: list[tuple[str, str]] = [("baseline", self.baseline)]
        for i, column in enumerate(self.columns):
            named += [(f"columns.{i}.baseline", column.baseline)] if column.baseline else []
            named += [(f"columns.{i}.between", name) for name in column.between or ()]
        for path, name in named:
            try:
                self._cell_names(name, at=next(iter(self.each), None))
            except ValueError as error:
                found.append(f"{path}: {error}")
        return found

    def _ordering_mistakes(self, ordering: StudyOrdering) -> list[str]:
        found = []
        if ordering.at and not self.each:
            found.append("at: each needs a grid, this study has none")
        for term in ordering.terms:
            try:
                self.resolve(term, measure=ordering.measure)
            except ValueError as error:
                found.append(str(error))
        for name in (*ordering.among, *ordering.linear):
            if name not in self.cells:
                found.append(_unknown("variant", name, self.cells))
            elif ordering.linear and self.cells[name].x is None:
                found.append(f"linear needs x, {name!r} has none")
        return list(dict.fromkeys(found))


def load_study(path: Path, *, seeds: Sequence[int] | None = None) -> StudySettings:
    """Read a study. ``extends: FILE`` takes over all keys of another one that are not given.

    Args:
        path: YAML file.
        seeds: Instead of the file's.

    Raises:
        SettingsError: no such file, not YAML, an unknown key, variant, value or measure.
    """
    raw = _read(path, seen=())
    if seeds:
        raw["seeds"] = list(seeds)
    try:
        return StudySettings.model_validate(raw)
    except ValidationError as error:
        lines = [_describe(detail) for detail in error.errors()]
        raise SettingsError(f"study {path}:\n  " + "\n  ".join(lines)) from error


def _read(path: Path, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise SettingsError(f"study {path} extends itself, by way of {[str(p) for p in seen]}")
    try:
        raw = read_yaml(path.read_text())
    except OSError as error:
        raise SettingsError(f"study {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"study {path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise SettingsError(f"study {path} must hold a mapping of keys, got {raw!r:.60}")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    source = path.parent / str(parent)
    base = _read(source, seen=(*seen, path))
    if "market" in base and "market" not in raw:
        raw["market"] = str(source.parent / base["market"])
    return base | raw | {"set": (base.get("set") or {}) | (raw.get("set") or {})}


def _describe(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    text = str(detail["msg"]).removeprefix("Value error, ")
    shown = detail["type"] in ("missing", "extra_forbidden", "value_error")
    return f"{path}: {text}".removeprefix(": ") + (
        "" if shown else f", got {detail['input']!r:.80}"
    )


def _unknown(what: str, name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    return f"no {what} {name!r}, there are {sorted(set(known))}"
