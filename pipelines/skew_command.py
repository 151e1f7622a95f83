"""The command ``driftline skew``."""

from typing import Annotated

import typer

from driftline.pipelines.console import Output
from driftline.pipelines.options import Config, Json, Set, market_settings


def skew(
    config: Config,
    hours: Annotated[int, typer.Option(min=1, help="Newest logged hours of event time.")] = 24,
    sample: Annotated[int, typer.Option(min=1, help="So many decisions (ads) of them.")] = 2_000,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Compute logged decisions again offline: does the server see what training sees?"""
    from driftline.pipelines.skew import check_skew, skew_text

    settings = market_settings(config, set_)
    report = check_skew(settings, hours=hours, sample=sample)
    Output(json_).show(skew_text(report), report.to_json())
