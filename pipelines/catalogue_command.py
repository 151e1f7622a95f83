"""The command ``driftline catalogue``."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from driftline.pipelines.console import Output, progress_bar
from driftline.platform.errors import SettingsError
from driftline.platform.windows import parse_time

catalogue_app = typer.Typer(help="Products that come and change.", no_args_is_help=True)


@catalogue_app.callback()
def catalogue() -> None:
    """Products that come and change."""


@catalogue_app.command("encode")
def encode(
    config: Annotated[Path, typer.Argument(help="Settings file, e.g. configs/demo.yaml.")],
    as_of: Annotated[
        str | None, typer.Option("--as-of", help="Event time, ISO 8601; the end of the log.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: a.b=value.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Encode new and edited texts for the live bundles; servers take them within a second."""
    from driftline.features.log import ImpressionLog
    from driftline.features.scales import resolve_tiers
    from driftline.pipelines.catalogue_vectors import encode_catalogue
    from driftline.platform.settings import load_settings
    from driftline.platform.workspace import Workspace

    settings = load_settings(config, overrides=set_ or [])
    workspace = Workspace.of(settings)
    settings = resolve_tiers(settings, workspace.scales)
    end = ImpressionLog.open(workspace.clean, settings).span.end
    with progress_bar("encode") as progress:
        report = encode_catalogue(settings, as_of=_time(as_of) if as_of else end, progress=progress)
    width = max(len(name) for name, _ in report.rows())
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in report.rows())
    Output(json_).show(text, report.to_json())


def _time(text: str) -> datetime:
    try:
        return parse_time(text)
    except ValueError as error:
        raise SettingsError(f"--as-of: {error}") from error
