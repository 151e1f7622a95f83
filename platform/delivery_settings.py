"""Settings of delivery: when a canary is promoted or withdrawn, what a shadow may cost."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from driftline.platform.data_settings import Settings, Share


class DeliverySettings(Settings):
    """Rules for a canary; see ``pipelines/traffic_decision.py``.

    Errors and times are counted by the servers, so they are judged without any log. Clicks, NE and
    calibration need the decision log and the clicks that came back (``serving.decision_log``; raise
    its ``sample_rate`` while a canary runs on little traffic).
    """

    automatic: bool = True
    """``driftline up`` decides by itself; else ``driftline traffic CONFIG --decide`` does."""
    canary_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of the request keys, for a refreshed bundle; only with ``gate.promote: canary``."""
    decide_seconds: PositiveFloat = 60.0
    """How often ``driftline up`` looks."""
    confidence: Share = 0.95
    """Of every statement, over all looks together: look as often as you like."""
    min_impressions: PositiveInt = 2_000
    """Of each arm, with known labels; before that clicks, NE and calibration say nothing."""
    min_clicks: PositiveInt = 50
    """The same for clicks."""
    min_keys: PositiveInt = 100
    """The same for request keys, which are what was drawn by lot."""
    min_hours: NonNegativeFloat = 1.0
    """A canary is not promoted before it has had its share for so long, in hours."""
    promote_when: Literal["not_worse", "better", "never"] = "not_worse"
    """``not_worse``: NE and click rate are shown to be within the bounds below. ``better``: the
    click rate is shown to be higher, too. ``never``: that is left to a person."""
    max_ne_excess: Annotated[float, Field(ge=0)] = 0.01
    """The canary's NE may be larger than the champion's by this much."""
    max_ctr_drop: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Its click rate may be smaller by this share of the champion's."""
    calibration_range: tuple[PositiveFloat, PositiveFloat] = (0.8, 1.25)
    """Allowed mean prediction / click rate of the canary."""
    max_error_share: Share = 0.001
    """Of the canary's answers that failed, beyond the champion's."""
    max_p99_ratio: Annotated[float, Field(ge=1)] = 1.5
    """Its 99th percentile of time in the replica may be larger than the champion's by this
    factor."""
    max_shadow_load: Share = 0.2
    """Share of one core that a replica spends on shadows; what does not fit is dropped, counted."""
    max_shadow_waiting: PositiveInt = 256
    """Requests that wait for the shadows; one more is dropped and counted."""
    health_seconds: PositiveFloat = 2.0
    """How often a replica writes down the errors and times of a canary and its champion."""
