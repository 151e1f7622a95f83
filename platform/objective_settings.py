"""Settings of the objective: what a student is taught, and by how much of each.

Import from ``settings``.
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from driftline.platform.data_settings import Settings


class ObjectiveSettings(Settings):
    """(1-a) CE + a t^2 KL(teacher || student), equation (1) (papers.md S0.16, A0.10)."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the frozen teacher's soft labels; 1 ignores the clicks."""
    temperature: PositiveFloat = 2.0
    tau_squared: bool = True
    """Multiply the soft loss by t^2, so that its gradient does not fade with t."""
    divergence: Literal["kl", "reverse_kl", "logit_mse"] = "kl"
    """``kl`` is KL(teacher || student); ``reverse_kl`` the paper's literal order of arguments."""
