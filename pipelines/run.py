"""``driftline run``: the whole loop, each step by its own function, in the order of the README."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from driftline.features.log import ImpressionLog, IngestReport
from driftline.features.mind import ingest_mind
from driftline.features.parquet_log import ingest_parquet
from driftline.features.quality import check_log
from driftline.features.scales import estimate_scales, resolve_tiers, write_scales
from driftline.features.simulate import SimulationReport, simulate
from driftline.pipelines.plan import make_plan, plan_text
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.replay import replay
from driftline.pipelines.report import build_report
from driftline.pipelines.smoke import serve_some_requests
from driftline.pipelines.teachers import train_teachers
from driftline.platform.artefacts import read_json, write_json
from driftline.platform.errors import SettingsError
from driftline.platform.ray_runtime import ray_session
from driftline.platform.settings import DriftlineSettings, MindSource, ParquetSource
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
ProgressBar = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class RunResult:
    """What a person reads at the end, and the same for a machine."""

    text: str
    figures: dict[str, Any]


def run_all(settings: DriftlineSettings, *, progress_bar: ProgressBar) -> RunResult:
    """Data, check, features, teacher, student, replay, serving, report.

    Every step keeps what it finished, so a killed run is continued by the same command.
    """
    timer = _Timer()
    workspace = Workspace.of(settings)
    for _ in timer.step("ingest"):
        with progress_bar("ingest") as progress:
            if not workspace.log.exists():
                ingest(settings, workspace.log, progress=progress)
    for _ in timer.step("check"):
        if not (workspace.clean / "verdict.json").exists():
            verdict = check_log(
                workspace.log, workspace.clean, settings=settings, now=datetime.now(UTC)
            )
            logger.info("\n".join(f"{name}: {text}" for name, text in verdict.rows()))
    for _ in timer.step("scales"):
        log = ImpressionLog.open(workspace.clean, settings)
        if not workspace.scales.exists():
            write_scales(estimate_scales(log, settings), workspace.scales)
        settings = resolve_tiers(settings, workspace.scales)
        logger.info("the plan:\n%s", plan_text(make_plan(settings)))
    for _ in timer.step("features"):
        with progress_bar("features") as progress:
            prepare_features(settings, progress=progress)
    with ray_session(settings.ray):
        for _ in timer.step("teacher"):
            with progress_bar("teacher") as progress:
                train_teachers(settings, progress=progress)
        for _ in timer.step("student and replay"):
            with progress_bar("replay") as progress:
                result = replay_and_report(settings, progress=progress)
    for _ in timer.step("serving"):
        served = serve_some_requests(settings)
    figures = result.figures | {"served": served, "seconds": timer.seconds}
    write_json(workspace.reports / "run.json", figures)
    lines = [f"  {name:<20} {seconds:8.1f} s" for name, seconds in timer.seconds.items()]
    text = "\n".join(
        [result.text, "", f"served {served['num_requests']} requests: {served['summary']}", *lines]
    )
    return RunResult(text, figures)


def ingest(
    settings: DriftlineSettings, destination: Path, *, progress: Progress | None = None
) -> IngestReport | SimulationReport:
    """Bring the source that the settings name into the form of the contract.

    Raises:
        SettingsError: a MIND source without a folder.
    """
    source = settings.source
    if isinstance(source, MindSource):
        if source.path is None:
            raise SettingsError(
                "source.path is not set; give the folder with behaviors.tsv and news.tsv: "
                "--set source.path=DIR, or make mind DATA=DIR"
            )
        return ingest_mind(source.path, destination, settings=settings, progress=progress)
    if isinstance(source, ParquetSource):
        return ingest_parquet(source, destination, settings=settings, progress=progress)
    return simulate(settings, destination, progress=progress)


def replay_and_report(
    settings: DriftlineSettings, *, progress: Progress | None = None
) -> RunResult:
    """Replay the recent part of the log and write the report."""
    workspace = Workspace.of(settings)
    played = replay(settings, progress=progress)
    paths = build_report(
        played.summary, played.scores, workspace.reports / "replay", made_at=datetime.now(UTC)
    )
    return RunResult(f"{paths.markdown.read_text()}\nreport: {paths.html}", read_json(paths.json))


class _Timer:
    """Seconds of each step, also when it is repeated."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def step(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        logger.info("— %s", name)
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
