"""The command ``driftline search``."""

from typing import Annotated

import typer

from driftline.pipelines.console import Output, progress_bar
from driftline.pipelines.options import Config, Json, Set, checked_settings


def search(
    config: Config,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a search that was killed.")
    ] = False,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Try strategies of initialisation, distillation and fine-tuning; write the winner's file."""
    from driftline.pipelines.search import WINNER, run_search
    from driftline.platform.ray_runtime import ray_session

    settings = checked_settings(config, set_)
    with ray_session(settings.ray), progress_bar("search") as progress:
        found = run_search(settings, resume=resume, progress=progress)
    Output(json_).show(f"{found.text}\nwinner in {found.folder / WINNER}", found.figures)
