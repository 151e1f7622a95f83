"""Names of what can be looked at inside a model while it runs."""

from dataclasses import dataclass
from typing import Literal

FeatureKind = Literal["hidden", "attention", "scores", "cls", "module"]


@dataclass(frozen=True, order=True)
class FeatureKey:
    """One tensor of a model's forward pass."""

    kind: FeatureKind
    """``hidden``: states of all positions ``[B, T, H]``. ``cls``: the same at position 0
    ``[B, H]``. ``attention``: probabilities ``[B, A, T, T]`` of A heads. ``scores``: the same
    before the softmax. ``module``: output of any module, rows first ``[B, ...]``."""
    place: int | str
    """Layer: 0 is the embedding output (hidden, cls), 1 the first layer. Or a module's path."""

    def __str__(self) -> str:
        """For example ``hidden.3``; names a file of the teacher's store."""
        return f"{self.kind}.{self.place}"
