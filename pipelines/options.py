"""What commands share: their options, and settings and moments read from them."""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from driftline.platform.errors import SettingsError
from driftline.platform.settings import DriftlineSettings, load_settings
from driftline.platform.windows import parse_time
from driftline.platform.workspace import Workspace

Config = Annotated[Path, typer.Argument(help="Settings file, e.g. configs/demo.yaml.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: a.b=value.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
AsOf = Annotated[
    str | None, typer.Option("--as-of", help="Event time, ISO 8601; the end of the log if absent.")
]


def market_settings(config: Path, overrides: list[str] | None) -> DriftlineSettings:
    """Settings with every tier known; ``auto`` tiers come from ``driftline scales``."""
    from driftline.features.scales import resolve_tiers

    settings = load_settings(config, overrides=overrides or [])
    return resolve_tiers(settings, Workspace.of(settings).scales)


def checked_settings(config: Path, overrides: list[str] | None) -> DriftlineSettings:
    """Settings of a market with a checked log; found out before anything is started."""
    from driftline.features.log import ImpressionLog

    settings = market_settings(config, overrides)
    ImpressionLog.open(Workspace.of(settings).clean, settings)
    return settings


def moment(settings: DriftlineSettings, as_of: str | None) -> datetime:
    """The time asked for, else the end of the log: an archived log has no "now"."""
    from driftline.features.log import ImpressionLog

    if as_of is not None:
        return event_time(as_of)
    return ImpressionLog.open(Workspace.of(settings).clean, settings).span.end


def event_time(text: str) -> datetime:
    """A moment given on the command line.

    Raises:
        SettingsError: it is none.
    """
    try:
        return parse_time(text)
    except ValueError as error:
        raise SettingsError(f"--as-of: {error}") from error


def aligned(pairs: list[tuple[str, Any]]) -> str:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in pairs)
