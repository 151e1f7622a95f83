"""The command ``driftline search``."""

from pathlib import Path
from typing import Annotated

import typer

from driftline.pipelines.console import Output, progress_bar


def search(
    config: Annotated[Path, typer.Argument(help="Settings file, e.g. configs/demo.yaml.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a search that was killed.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: a.b=value.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Try strategies of initialisation, distillation and fine-tuning; write the winner's file."""
    from driftline.features.log import ImpressionLog
    from driftline.features.scales import resolve_tiers
    from driftline.pipelines.search import WINNER, run_search
    from driftline.platform.ray_runtime import ray_session
    from driftline.platform.settings import load_settings
    from driftline.platform.workspace import Workspace

    settings = load_settings(config, overrides=set_ or [])
    workspace = Workspace.of(settings)
    settings = resolve_tiers(settings, workspace.scales)
    ImpressionLog.open(workspace.clean, settings)
    with ray_session(settings.ray), progress_bar("search") as progress:
        found = run_search(settings, resume=resume, progress=progress)
    Output(json_).show(f"{found.text}\nwinner in {found.folder / WINNER}", found.figures)
