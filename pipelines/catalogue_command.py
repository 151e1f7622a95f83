"""The command ``driftline catalogue``."""

import typer

from driftline.pipelines.console import Output, progress_bar
from driftline.pipelines.options import (
    AsOf,
    Config,
    Json,
    Set,
    aligned,
    market_settings,
    moment,
)

catalogue_app = typer.Typer(help="Products that come and change.", no_args_is_help=True)


@catalogue_app.callback()
def catalogue() -> None:
    """Products that come and change."""


@catalogue_app.command("encode")
def encode(
    config: Config,
    as_of: AsOf = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Encode new and edited texts for the live bundles; servers take them within a second."""
    from driftline.pipelines.catalogue_vectors import encode_catalogue

    settings = market_settings(config, set_)
    asked = moment(settings, as_of)
    with progress_bar("encode") as progress:
        report = encode_catalogue(settings, as_of=asked, progress=progress)
    Output(json_).show(aligned(report.rows()), report.to_json())
