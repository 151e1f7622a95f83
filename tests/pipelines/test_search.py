"""A search trains no beginning twice, survives a kill, and its winner is ready to be used."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from driftline.pipelines.cli import main
from driftline.pipelines.market_moment import default_moment
from driftline.pipelines.refresh_arms import refresh_arms
from driftline.pipelines.replay import log_split
from driftline.pipelines.search import WINNER, run_search
from driftline.pipelines.search_place import SETTINGS, Place, Trial, forget
from driftline.platform.errors import ResourceError, SettingsError
from driftline.platform.registry import read_champion
from driftline.platform.settings import DriftlineSettings, load_settings, parse_settings
from driftline.platform.windows import HOUR, format_time
from driftline.platform.workspace import Workspace

STAGE = {"num_epochs": 1, "batch_size": 128, "learning_rate": 0.003, "max_rows": 200}
SMALL_AXES: dict[str, Any] = {
    "init": {"random": {"init": "random"}, "mlm": {"init": "mlm"}},
    "distil": {"none": {"distil": None}, "ood": {"distil": {"on": "ood"}}},
    "finetune": {"vanilla": {"self_training": {"enabled": False}}},
}
SEARCH = {
    "seeds": [0],
    "slice_hours": 3,
    "num_bootstrap": 20,
    "axes": SMALL_AXES,
    "max_concurrent": 1,  # the imports of a second process cost more than it saves
}


def searching(market: DriftlineSettings, **search: Any) -> DriftlineSettings:
    """The market with small stages and a small search."""
    raw = market.model_dump(mode="json")
    stages = ("mlm", "supervised", "distil", "finetune", "self_training")
    raw["student"]["arms_refresh"] |= dict.fromkeys(stages, STAGE) | {"head": None}
    return parse_settings(raw | {"search": SEARCH | search}, origin="test")


def count_passes(settings: DriftlineSettings) -> int:
    """Rows that went through the teacher for the files of the laboratory."""
    records = (Workspace.of(settings).laboratory / "files").glob("*.json")
    return sum(json.loads(path.read_text())["teacher_passes"] for path in records)


def count_labels(settings: DriftlineSettings) -> int:
    """Inputs that the teacher was ever asked about."""
    hours = Workspace.of(settings).labels.glob("*/*.parquet")
    return sum(pq.read_metadata(path).num_rows for path in hours)


@pytest.mark.ray
def test_a_grid_shares_beginnings_and_its_winner_is_refreshed_with(
    market: DriftlineSettings, local_ray: None
) -> None:
    matches = {"objective": {"matches": [{"kind": "pkd", "projection": "linear"}]}}
    distil = SMALL_AXES["distil"] | {"matched": {"distil": {"on": "ood"}, **matches}}
    axes = SMALL_AXES | {"init": {"mlm": {"init": "mlm"}}, "distil": distil}
    settings = searching(market, axes=axes, seeds=[0, 1], max_concurrent=2)
    shutil.rmtree(Workspace.of(settings).labels)
    found = run_search(settings)
    figures = found.figures
    assert len(figures["rows"]) == 3
    aucs = [row["auc"]["value"] for row in figures["rows"]]
    assert aucs == sorted(aucs, reverse=True)
    assert figures["rows"][0]["behind"]["value"] == 0
    # for each seed: mlm 1, distil 2, fine-tune 3; alone: mlm 3, distil 2, fine-tune 3
    assert figures["num_stages"] == {"shared": 12, "alone": 16}
    assert count_passes(settings) == count_labels(settings) > figures["teacher_passes"] > 0
    assert figures["core_seconds"]["shared"] < figures["core_seconds"]["alone"]
    assert set(figures["later_slice"]) == {row["name"] for row in figures["rows"][:2]}
    assert "| mlm/none/vanilla |" in found.text
    again = run_search(settings)  # everything is there
    assert again.figures["rows"] == figures["rows"]

    winner = load_settings(found.folder / WINNER)
    assert winner.student.arms_refresh == found.winner
    record = refresh_arms(winner, as_of=log_split(winner).id.start + 6 * HOUR)
    pointer = read_champion(Workspace.of(winner).bundles)
    assert record.decision == "refused" or (pointer and pointer.fingerprint == record.bundle)


@pytest.mark.ray
def test_a_greedy_search_tries_axis_by_axis(market: DriftlineSettings, local_ray: None) -> None:
    found = run_search(searching(market, method="greedy"))
    names = {row["name"] for row in found.figures["rows"]}
    first = {"random/none/vanilla", "mlm/none/vanilla"}
    assert first <= names
    assert len(names) == 3  # the better of the two, distilled
    auc = {row["name"]: row["auc"]["value"] for row in found.figures["rows"]}
    better = max(first, key=auc.__getitem__)
    assert names - first == {better.replace("none", "ood")}


@pytest.mark.ray
def test_a_stage_is_tuned_and_compared_with_the_settings_own(
    market: DriftlineSettings, local_ray: None
) -> None:
    tuning = {
        "stage": "distil",
        "num_trials": 2,
        "space": {
            "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "temperature": {"choices": [1.0, 4.0]},
        },
    }
    settings = searching(market, method="optuna", tuning=tuning)
    found = run_search(settings)
    names = {row["name"] for row in found.figures["rows"]}
    assert "settings" in names
    assert len(names) == 2
    tuned = next(name for name in names if name != "settings")
    assert "temperature" in tuned
    assert "learning_rate" in tuned
    records = [json.loads(path.read_text()) for path in (found.folder / "tuned").glob("*.json")]
    assert len(records) == 2
    best = max(records, key=lambda record: record["score"])  # of validation rows
    assert tuned == f"tuned {best['values']}"
    assert len(list((found.folder / "results").glob("*.json"))) == 3  # own, tuned, baseline


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_search_is_resumed_without_training_anything_twice(
    market: DriftlineSettings, capfd: pytest.CaptureFixture[str], local_ray: None
) -> None:
    settings = searching(market, axes=SMALL_AXES | {"init": {"random": {"init": "random"}}})
    config = Path(settings.workspace) / "search.yaml"
    raw = settings.model_dump(mode="json") | {"ray": {"num_cpus": 1}}  # of the killed process
    config.write_text(yaml.safe_dump(raw))
    results = Workspace.of(settings).searches / "strategies" / "results"
    code = "import sys; from driftline.pipelines.cli import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "search", str(config)], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list(results.glob("*.json")):
        assert process.poll() is None, "the search ended before it could be killed"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    assert before
    with pytest.raises(SystemExit) as ended:
        main(["search", str(config), "--resume", "--json"])
    assert ended.value.code == 0
    figures = json.loads(capfd.readouterr().out)
    assert len(figures["rows"]) == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = yaml.safe_load(config.read_text()) | {"search": SEARCH}
    config.write_text(yaml.safe_dump(other))
    with pytest.raises(SystemExit) as ended:
        main(["search", str(config), "--resume"])
    assert ended.value.code == 1
    assert "begun with other settings" in capfd.readouterr().err


# --- what a result is of ------------------------------------------------------------------


DECIDING: list[dict[str, Any]] = [
    {"search": {"slice_hours": 2}},
    {"labels": {"negative_keep_rate": 0.25}},
    {"student": {"encoder": {"num_layers": 2}}},
    {"student": {"head_refresh": {"objective": {"alpha": 0}}}},
    {"student": {"arms_refresh": {"window_hours": 5}}},
]


def identity(settings: DriftlineSettings, folder: Path) -> str:
    """Of the settings' own strategy in a search of the market."""
    folder.mkdir(exist_ok=True)
    (folder / SETTINGS).write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    moment = default_moment(settings, slice_hours=3, num_slices=2)
    place = Place(folder, Workspace.of(settings).laboratory, format_time(moment))
    strategy = searching(settings).student.arms_refresh
    return place.identity(Trial("own", strategy, 0))


@pytest.mark.parametrize("changes", DECIDING)
def test_a_result_is_found_only_by_a_search_that_would_measure_the_same(
    market: DriftlineSettings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = searching(market)
    before = identity(settings, tmp_path / "search")
    raw = merged(settings.model_dump(mode="json"), changes)
    assert identity(parse_settings(raw, origin="test"), tmp_path / "search") != before
    other = {"search": {"num_bootstrap": 9, "max_concurrent": 2}, "serving": {"num_replicas": 2}}
    raw = merged(settings.model_dump(mode="json"), other)
    assert identity(parse_settings(raw, origin="test"), tmp_path / "search") == before


def test_a_result_knows_its_teacher(market: DriftlineSettings, tmp_path: Path) -> None:
    before = identity(searching(market), tmp_path / "search")
    forget()
    shutil.rmtree(Workspace.of(market).teacher)
    assert identity(searching(market), tmp_path / "search") != before


def merged(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings with a few of their leaves replaced."""
    for name, value in changes.items():
        if isinstance(value, dict) and name != "objective":
            merged(raw[name], value)
        else:
            raw[name] = value
    return raw


# --- bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"axes": {"init": {}}}, "search.axes.init"),
        ({"axes": {"init": {"a": {"init": "magic"}}}}, r"axes\.init\.a\.init: .*kind must be"),
        ({"axes": {"distil": {"a": {"distil": {"rate": 1}}}}}, r"axes\.distil\.a\.distil\.rate"),
        ({"axes": {"init": {"a": {"window_hours": 1}}}}, "cannot be searched"),
        ({"seeds": []}, "search.seeds"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"method": "optuna", "tuning": {"space": {"lr": {"choices": [1]}}}}, r"distil\.lr"),
        ({"method": "optuna", "tuning": {"stage": "supervised"}}, "has no stage 'supervised'"),
        ({"method": "optuna", "tuning": {"space": {"alpha": {"low": 2, "high": 3}}}}, "alpha"),
        ({"tuning": {"space": {"alpha": {"low": 3, "high": 2}}}}, "low must be below"),
    ],
)
def test_a_search_that_cannot_work_is_refused_on_reading(
    market: DriftlineSettings, search: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        searching(market, **search)


@pytest.mark.ray
def test_an_impossible_match_is_refused_before_the_teacher_is_asked(
    market: DriftlineSettings, local_ray: None
) -> None:
    matches = {"objective": {"matches": ["hidden_mse"]}}
    distil = SMALL_AXES["distil"] | {"matched": {"distil": {"on": "ood"}, **matches}}
    settings = searching(market, axes=SMALL_AXES | {"distil": distil})
    labels = count_labels(settings)
    with pytest.raises(SettingsError, match=r"strategy random/matched/vanilla: objective.matches"):
        run_search(settings)
    assert count_labels(settings) == labels
    assert not (Workspace.of(settings).laboratory / "files").exists()


@pytest.mark.ray
def test_a_slice_outside_the_log_is_refused_before_training(
    market: DriftlineSettings, local_ray: None
) -> None:
    settings = searching(market, slice_hours=48)
    with pytest.raises(SettingsError, match="set slice_hours to at most 4, or"):
        run_search(settings)
    assert not Workspace.of(settings).laboratory.exists()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"slice_hours": 0.01}, r"needs a click and a non-click, but test slice 1.* 0 clicks"),
        ({"as_of": "2026-01-02T12:00:00Z"}, r"leaves 0 h .* must leave 3 h; .*2026-01-02T15:00"),
        ({"as_of": "2026-01-02T14:00:00Z"}, "leaves 2 h of recent rows"),
    ],
)
def test_slices_that_judge_nobody_are_refused_before_training(
    market: DriftlineSettings, local_ray: None, search: dict[str, Any], message: str
) -> None:
    settings = searching(market, **search)
    with pytest.raises(SettingsError, match=message):
        run_search(settings)
    assert not Workspace.of(settings).laboratory.exists()


@pytest.mark.ray
def test_trials_that_never_fit_are_refused(market: DriftlineSettings, local_ray: None) -> None:
    with pytest.raises(ResourceError, match="a trial needs 64 processors"):
        run_search(searching(market, cpus_per_trial=64))
