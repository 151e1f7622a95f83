"""The command ``driftline skew``."""

from pathlib import Path
from typing import Annotated

import typer

from driftline.pipelines.console import Output


def skew(
    config: Annotated[Path, typer.Argument(help="Settings file, e.g. configs/demo.yaml.")],
    hours: Annotated[int, typer.Option(min=1, help="Newest logged hours of event time.")] = 24,
    sample: Annotated[int, typer.Option(min=1, help="So many decisions (ads) of them.")] = 2_000,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: a.b=value.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compute logged decisions again offline: does the server see what training sees?"""
    from driftline.features.scales import resolve_tiers
    from driftline.pipelines.skew import check_skew, skew_text
    from driftline.platform.settings import load_settings
    from driftline.platform.workspace import Workspace

    settings = load_settings(config, overrides=set_ or [])
    settings = resolve_tiers(settings, Workspace.of(settings).scales)
    report = check_skew(settings, hours=hours, sample=sample)
    Output(json_).show(skew_text(report), report.to_json())
