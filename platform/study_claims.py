"""What a paper claims about a study, in a form that data can contradict."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, model_validator

from driftline.platform.data_settings import Settings
from driftline.platform.study_measures import MEASURES

MeasureName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class StudyOrdering(Settings):
    """One claim of a paper about this study, in a form that data can contradict.

    Exactly one of: ``order``; ``better`` and ``than``; ``agrees_with``; ``linear``.
    """

    claim: str
    """In words, as the table prints it."""
    source: str
    """Where it is made, such as ``S0.32``."""
    measure: MeasureName = "id_auc"
    order: tuple[str, ...] = ()
    """Expressions over variants, ascending; see ``study_contrasts``."""
    better: str | None = None
    than: str | None = None
    by: NonNegativeFloat = 0.0
    """``better`` must beat ``than`` by at least this, in the measure's unit."""
    agrees_with: MeasureName | None = None
    """The ranking of ``among`` by ``measure`` is the ranking by this one."""
    among: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    """The measure grows along a straight line in ``x`` over these variants."""
    at: Literal["each"] | None = None
    """``each``: one verdict for every value of the grid, instead of one for their mean."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        forms = {
            "order": bool(self.order),
            "better and than": self.better is not None or self.than is not None,
            "agrees_with and among": self.agrees_with is not None or bool(self.among),
            "linear": bool(self.linear),
        }
        if sum(forms.values()) != 1:
            said = [name for name, given in forms.items() if given]
            raise ValueError(f"needs exactly one of {list(forms)}, got {said or 'none'}")
        if (self.better is None) != (self.than is None):
            raise ValueError("better and than need each other")
        if (self.agrees_with is None) != (not self.among):
            raise ValueError("agrees_with and among need each other")
        if len(self.order) == 1 or len(self.among) == 1 or 0 < len(self.linear) < 3:
            raise ValueError("order and among need two entries or more, linear three")
        if self.by and self.better is None:
            raise ValueError("by belongs to better and than")
        return self

    @property
    def steps(self) -> tuple[tuple[str, str], ...]:
        """Neighbours of the order as (lower, higher) in value."""
        if self.better is not None and self.than is not None:
            than = f"{self.than} + {self.by:f}" if self.by else self.than
            if MEASURES[self.measure].better == "lower":
                return ((f"{self.better} + {self.by:f}" if self.by else self.better, self.than),)
            return ((than, self.better),)
        return tuple(pairwise(self.order))

    @property
    def terms(self) -> tuple[str, ...]:
        """Every expression it holds."""
        pair = tuple(term for term in (self.better, self.than) if term is not None)
        return (*self.order, *pair, *self.among, *self.linear)
