"""The ``driftline`` command: one line a step. Start reading at ``run``."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from driftline.pipelines.catalogue_command import catalogue_app
from driftline.pipelines.console import Output, progress_bar, quiet_libraries, set_up_logging
from driftline.pipelines.delivery_commands import deploy, rollback, traffic
from driftline.pipelines.options import (
    AsOf,
    Config,
    Json,
    Set,
    aligned,
    checked_settings,
    event_time,
    market_settings,
    moment,
)
from driftline.pipelines.search_command import search
from driftline.pipelines.skew_command import skew
from driftline.platform.artefacts import read_json
from driftline.platform.errors import DriftlineError, SettingsError
from driftline.platform.settings import DriftlineSettings, load_settings
from driftline.platform.workspace import Workspace

app = typer.Typer(
    name="driftline",
    help="Keep a factorised click-through-rate model fresh: run, refresh, judge, serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
ingest_app = typer.Typer(help="Bring a log into the form of the contract.", no_args_is_help=True)
features_app = typer.Typer(help="The feature store: one view a drift tier.", no_args_is_help=True)
refresh_app = typer.Typer(help="Refresh a part of the student.", no_args_is_help=True)
app.add_typer(ingest_app, name="ingest")
app.add_typer(features_app, name="features")
app.add_typer(refresh_app, name="refresh")
app.add_typer(catalogue_app, name="catalogue")


@app.command()
def run(config: Config, set_: Set = None, json_: Json = False) -> None:
    """The whole loop: data, features, teacher, student, replay, serving, report."""
    from driftline.pipelines.run import run_all

    settings = load_settings(config, overrides=set_ or [])
    result = run_all(settings, progress_bar=progress_bar)
    Output(json_).show(result.text, result.figures)


@app.command()
def plan(config: Config, set_: Set = None, json_: Json = False) -> None:
    """What would happen: tiers, clocks, schedule, model sizes, paths. Runs nothing."""
    from driftline.features.scales import resolve_tiers
    from driftline.pipelines.plan import make_plan, plan_text

    settings = load_settings(config, overrides=set_ or [])
    if any(f.tier == "auto" for f in settings.features):
        settings = resolve_tiers(settings, Workspace.of(settings).scales)
    found = make_plan(settings)
    Output(json_).show(plan_text(found), found)


@app.command()
def simulate(
    config: Config, out: Path | None = None, set_: Set = None, json_: Json = False
) -> None:
    """Write a drifting market with known click probabilities (source.kind: simulate)."""
    from driftline.features.simulate import simulate as run_simulation

    settings = load_settings(config, overrides=set_ or [])
    with progress_bar("simulate") as progress:
        report = run_simulation(settings, _log_folder(settings, out), progress=progress)
    _show(json_, report)


@ingest_app.command("mind")
def ingest_mind(
    config: Config,
    source: Annotated[Path | None, typer.Argument(help="Folder with the two .tsv files.")] = None,
    out: Path | None = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Read the published MIND layout: behaviors.tsv and news.tsv."""
    from driftline.pipelines.run import ingest

    settings = load_settings(config, overrides=set_ or [])
    if settings.source.kind != "mind":
        raise SettingsError(f"source.kind must be 'mind' for this, got {settings.source.kind!r}")
    if source is not None:
        found = settings.source.model_copy(update={"path": source})
        settings = settings.model_copy(update={"source": found})
    with progress_bar("ingest") as progress:
        _show(json_, ingest(settings, _log_folder(settings, out), progress=progress))


@ingest_app.command("parquet")
def ingest_parquet(
    config: Config, out: Path | None = None, set_: Set = None, json_: Json = False
) -> None:
    """Read anyone's own log with the column mapping of source.columns."""
    from driftline.pipelines.run import ingest

    settings = load_settings(config, overrides=set_ or [])
    if settings.source.kind != "parquet":
        raise SettingsError(f"source.kind must be 'parquet' for this, got {settings.source.kind!r}")
    with progress_bar("ingest") as progress:
        _show(json_, ingest(settings, _log_folder(settings, out), progress=progress))


@app.command()
def check(
    config: Config,
    data: Annotated[
        Path | None, typer.Argument(help="Folder in contract form; the workspace's log if absent.")
    ] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Check a log against the contract; bad rows go to quarantine, bad files are refused."""
    from driftline.features.quality import check_log

    settings = load_settings(config, overrides=set_ or [])
    workspace = Workspace.of(settings)
    with progress_bar("check") as progress:
        verdict = check_log(
            data or workspace.log,
            workspace.clean,
            settings=settings,
            now=datetime.now(UTC),
            progress=progress,
        )
    _show(json_, verdict)


@app.command()
def scales(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Measure every feature's drift time scale and print the factorisation plan."""
    from driftline.features.log import ImpressionLog
    from driftline.features.scales import estimate_scales, write_scales

    settings = load_settings(config, overrides=set_ or [])
    log = ImpressionLog.open(Workspace.of(settings).clean, settings)
    report = estimate_scales(log, settings)
    write_scales(report, Workspace.of(settings).scales)
    _show(json_, report)


@features_app.command("prepare")
def features_prepare(
    config: Config, as_of: AsOf = None, set_: Set = None, json_: Json = False
) -> None:
    """Compute texts, counters and frames up to a moment."""
    from driftline.pipelines.prepare import prepare_features

    settings = market_settings(config, set_)
    with progress_bar("features") as progress:
        asked = event_time(as_of) if as_of else None
        window = prepare_features(settings, as_of=asked, progress=progress)
    text = f"frames {window} in {Workspace.of(settings).frames}"
    Output(json_).show(text, {"start": window.start, "end": window.end})


@features_app.command("apply")
def features_apply(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Register the Feast objects that follow from the contract."""
    from driftline.features.log import ImpressionLog
    from driftline.features.store import apply
    from driftline.features.views import feature_view_versions

    settings = market_settings(config, set_)
    log = ImpressionLog.open(Workspace.of(settings).clean, settings)
    apply(settings, key_type=log.key_type)
    versions = feature_view_versions(settings)
    text = "\n".join(f"{name:<28} {version}" for name, version in versions.items())
    Output(json_).show(text, versions)


@features_app.command("materialize")
def features_materialize(
    config: Config, as_of: AsOf = None, set_: Set = None, json_: Json = False
) -> None:
    """Put the newest values known at a moment into the online store."""
    from driftline.pipelines.prepare import materialize_features

    settings = market_settings(config, set_)
    _show(json_, materialize_features(settings, as_of=moment(settings, as_of)))


@features_app.command("get")
def features_get(
    config: Config,
    page: Annotated[str, typer.Option(help="Page product.")],
    ad: Annotated[list[str], typer.Option(help="Ad product; may be given often.")],
    as_of: AsOf = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Read what the server would read for one request."""
    from driftline.pipelines.prepare import read_online

    settings = market_settings(config, set_)
    found = read_online(settings, page=page, ads=ad, now=moment(settings, as_of))
    width = max(len(name) for name in found)
    Output(json_).show("\n".join(f"{name:<{width}}  {v}" for name, v in found.items()), found)


@app.command()
def teacher(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Train the teachers on the stale part of the log, once, and freeze them."""
    from driftline.pipelines.teachers import train_teachers

    settings = checked_settings(config, set_)
    with _ray(settings), progress_bar("teacher") as progress:
        first, *others = train_teachers(settings, progress=progress)
    lines = [f"teacher {frozen.hash[:12]}, frozen in {frozen.path}" for frozen in (first, *others)]
    found = {"hash": first.hash, **first.manifest}
    ensemble = {frozen.path.name: {"hash": frozen.hash, **frozen.manifest} for frozen in others}
    Output(json_).show("\n".join(lines), found | ({"ensemble": ensemble} if others else {}))


@app.command()
def labels(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Write the teacher's soft labels for all training rows of the log; paid once."""
    from driftline.pipelines.labels import label_log

    settings = market_settings(config, set_)
    with progress_bar("labels") as progress:
        found = label_log(settings, progress=progress)
    text = f"{found['num_rows']:,} rows labelled, {found['num_passes']:,} through the teacher now"
    Output(json_).show(text, found)


@app.command()
def tasks(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Distil the teachers of several outcomes (click, purchase) into one student."""
    from driftline.pipelines.tasks import train_tasks

    settings = checked_settings(config, set_)
    with _ray(settings), progress_bar("tasks") as progress:
        report = train_tasks(settings, progress=progress)
    lines = [
        f"{name}: {report.num_rows[name]:,} rows, AUC {report.measures[f'{name}.auc']:.4f}, {path}"
        for name, path in report.weights.items()
    ]
    Output(json_).show("\n".join(lines), report.to_json())


@refresh_app.command("arms")
def refresh_arms(config: Config, as_of: AsOf = None, set_: Set = None, json_: Json = False) -> None:
    """Re-train arms and head, re-encode the catalogue, judge, publish (the monthly job)."""
    from driftline.pipelines.refresh_arms import refresh_arms as refresh

    _refresh(refresh, config, as_of, set_, json_)


@refresh_app.command("head")
def refresh_head(config: Config, as_of: AsOf = None, set_: Set = None, json_: Json = False) -> None:
    """Re-train the head on cached vectors, judge, publish (the hourly job)."""
    from driftline.pipelines.refresh_head import refresh_head as refresh

    _refresh(refresh, config, as_of, set_, json_)


@app.command()
def gate(
    config: Config,
    bundle: Annotated[
        str | None, typer.Option(help="Fingerprint; the newest bundle if absent.")
    ] = None,
    as_of: AsOf = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Judge a bundle beside the champion and say why; promotes nothing."""
    from driftline.pipelines.publish import judge_again
    from driftline.pipelines.verdict import verdict_json

    settings = market_settings(config, set_)
    verdict = judge_again(settings, bundle, as_of=moment(settings, as_of))
    head = "would promote" if verdict.promote else "would refuse"
    Output(json_).show("\n".join([head, *verdict.reasons]), verdict_json(verdict))


@app.command()
def replay(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Play the recent part of the log hour by hour under every policy; write the report."""
    from driftline.pipelines.run import replay_and_report

    settings = checked_settings(config, set_)
    with _ray(settings), progress_bar("replay") as progress:
        result = replay_and_report(settings, progress=progress)
    Output(json_).show(result.text, result.figures)


@app.command()
def study(
    file: Annotated[
        Path | None, typer.Argument(help="Study file, or the name of one of configs/studies/.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name all studies, run none.")] = False,
    seeds: Annotated[str | None, typer.Option(help="Instead of the file's: 1,2,3.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this variant; repeatable.")] = None,
    folder: Annotated[Path, typer.Option(help="Of markets, trials, results.")] = Path(
        "runs/studies"
    ),
    results: Annotated[Path | None, typer.Option(help="Also write table and plot here.")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Trials at the same time.")] = 1,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Repeat one of the papers' studies: a table, a plot, and which of their claims held."""
    from driftline.pipelines.study import StudyRequest, list_studies, run_study

    if list_:
        found = list_studies()
        Output(json_).show(aligned(list(found)), dict(found))
        return
    if file is None:
        raise SettingsError("study needs a file or a name; `driftline study --list` gives them")
    request = StudyRequest(
        path=file,
        folder=folder,
        results=results,
        overrides=tuple(set_ or ()),
        seeds=_seeds(seeds),
        only=tuple(only or ()),
        at_once=at_once,
    )
    report = run_study(request, progress_bar=progress_bar)
    text = f"{report.markdown.read_text()}\n{report.markdown}"
    Output(json_).show(text, read_json(report.json))


@app.command()
def serve(config: Config, set_: Set = None) -> None:
    """Serve the champion in the foreground, until Ctrl-C."""
    from driftline.serving.server import serve_forever

    settings = market_settings(config, set_)
    serve_forever(
        settings,
        on_ready=lambda url, _: Output(False).show(f"serving {settings.name} at {url}", {}),
    )


@app.command()
def score(
    config: Config,
    page: Annotated[str, typer.Option(help="Page product.")],
    ad: Annotated[list[str], typer.Option(help="Ad product; may be given often.")],
    context: Annotated[list[str] | None, typer.Option(help="Feature: name=value.")] = None,
    as_of: AsOf = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Score one page and some ads in this process: what the server would answer."""
    from driftline.serving.once import parse_context, score_once

    answer = score_once(
        market_settings(config, set_),
        page=page,
        ads=ad,
        context=parse_context(context or []),
        as_of=event_time(as_of) if as_of else None,
    )
    pairs = zip(ad, answer["probabilities"], strict=True)
    text = "\n".join(f"{product:<20} {probability:.5f}" for product, probability in pairs)
    Output(json_).show(f"bundle {answer['bundle']}\n{text}", answer)


@app.command()
def up(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Start Ray, the server and the cadence service, and leave them running."""
    from driftline.pipelines.operation import up as start

    report = start(market_settings(config, set_))
    text = f"{'already up' if report.already else 'up'} at {report.url}, logs in {report.logs}"
    Output(json_).show(text, {"url": report.url, "already": report.already, "logs": report.logs})


@app.command()
def status(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Tiers with both ages, last and next runs, champion, serving health."""
    from driftline.pipelines.status import status as look
    from driftline.pipelines.status import status_text

    found = look(market_settings(config, set_), now=datetime.now(UTC))
    Output(json_).show(status_text(found), found)


@app.command()
def down(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Stop what `up` started, and nothing else."""
    from driftline.pipelines.operation import down as stop

    stopped = stop(market_settings(config, set_))
    Output(json_).show(f"stopped {stopped} processes", {"stopped": stopped})


for command in (search, deploy, traffic, rollback, skew):
    app.command()(command)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: what a user can act on is one line on stderr, all else a traceback."""
    given = sys.argv[1:] if arguments is None else arguments
    quiet_libraries()
    set_up_logging(verbose="--verbose" in given)
    try:
        app([argument for argument in given if argument != "--verbose"])
    except DriftlineError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(1) from None


def _refresh(
    refresh: Callable[..., Any],
    config: Path,
    as_of: str | None,
    overrides: list[str] | None,
    as_json: bool,
) -> None:
    asked = event_time(as_of) if as_of else None
    settings = checked_settings(config, overrides)
    with _ray(settings), progress_bar("refresh") as progress:
        record = refresh(settings, as_of=asked or moment(settings, None), progress=progress)
    _show(as_json, record)


def _ray(settings: DriftlineSettings) -> Any:
    from driftline.platform.ray_runtime import ray_session

    return ray_session(settings.ray)


def _seeds(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise SettingsError(f"--seeds must be numbers such as 1,2,3, got {text!r}") from error


def _log_folder(settings: DriftlineSettings, out: Path | None) -> Path:
    return out or Workspace.of(settings).log


def _show(as_json: bool, report: Any) -> None:
    value = report.to_json() if hasattr(report, "to_json") else asdict(report)
    pairs = report.rows() if hasattr(report, "rows") else list(value.items())
    Output(as_json).show(aligned(pairs), value)


if __name__ == "__main__":
    main()
