"""A study from its file to its page: shared stages once, every claim answered, nothing twice."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from driftline.pipelines.student_forms import student_form
from driftline.pipelines.study import StudyReport, StudyRequest, plan_trials, run_study
from driftline.pipelines.study_market import market_name
from driftline.pipelines.study_trial import laboratory_of
from driftline.platform.errors import SettingsError
from driftline.platform.examples import open_tokens
from driftline.platform.settings import DriftlineSettings
from driftline.platform.study_settings import load_study

STAGE = {"num_epochs": 1, "batch_size": 128, "learning_rate": 0.003, "max_rows": 200}
WHOLE = {name: value for name, value in STAGE.items() if name != "max_rows"}
RECIPES = dict.fromkeys(("mlm", "supervised", "distil"), STAGE) | {"finetune": WHOLE}
STUDY: dict[str, Any] = {
    "name": "tiny",
    "title": "A study in seconds",
    "market": "market.yaml",
    "set": {f"student.arms_refresh.{name}": recipe for name, recipe in RECIPES.items()}
    | {"student.arms_refresh.head": None},
    "seeds": [1, 2],
    "test_hours": 3,
    "num_bootstrap": 20,
    "baseline": "pf",
    "columns": ["id_auc", "distilled_ood_auc", "transfer_rows", "num_parameters"],
    "variants": {
        "pf": {"strategy": "PF"},
        "supervised": {"strategy": 3},
        "pd": {"strategy": "PD"},
        "pd_f": {"strategy": "PD-F"},
        "teacher": {"form": "teacher"},
    },
    "orderings": [
        {"claim": "distillation helps", "source": "S1.15", "order": ["pf", "pd_f"]},
        {"claim": "one size", "source": "S1.9", "measure": "num_parameters", "order": ["1", "pf"]},
        {"claim": "the impossible", "source": "S0.0", "order": ["2", "pd"]},  # an AUC above 2
    ],
}
STAGES = {
    "pf": ["mlm", "finetune"],
    "supervised": ["supervised", "finetune"],
    "pd": ["mlm", "distil"],
    "pd_f": ["mlm", "distil", "finetune"],
}


def quiet(_: str) -> AbstractContextManager[Callable[[int, int], None]]:
    return nullcontext(lambda done, of: None)


@pytest.fixture
def place(market: DriftlineSettings, tmp_path: Path) -> Path:
    """A folder with a study's files, its market prepared where the study looks for it."""
    folder = tmp_path / "studies"
    folder.mkdir()
    raw = market.model_dump(mode="json")
    (folder / "market.yaml").write_text(yaml.safe_dump(raw))
    shutil.move(str(market.workspace), folder / "markets" / market_name(market))
    return folder


def write(place: Path, **changes: Any) -> StudyRequest:
    path = place / "tiny.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes))
    return StudyRequest(path=path, folder=place)


def figures(report: StudyReport) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(report.json.read_text())
    return found


def test_a_study_trains_what_its_variants_share_once_and_answers_every_claim(place: Path) -> None:
    request = write(place)
    report = run_study(request, progress_bar=quiet)
    trials = sorted((place / "tiny" / "trials").glob("*.json"))
    assert len(trials) == 5 * 2
    identities: Counter[str] = Counter()
    for path in trials:
        trial = json.loads(path.read_text())
        stages = [node for node in trial["notes"].get("nodes", []) if node["num_steps"] is not None]
        assert [node["name"] for node in stages] == STAGES.get(trial["cell"], [])
        identities.update(node["identity"] for node in stages)

    found = figures(report)
    assert found["num_stages"] == identities.total() == 9 * 2
    assert found["num_stages_trained"] == len(identities) == 6 * 2  # mlm, distil are shared
    outcomes = {verdict["claim"]: verdict["outcome"] for verdict in found["orderings"]}
    assert outcomes["one size"] == "held"
    assert outcomes["the impossible"] == "reversed"
    assert outcomes["distillation helps"] in {"held", "not shown", "reversed"}
    rows = {row["name"]: row["measures"] for row in found["rows"]}
    assert rows["pd"]["transfer_rows"]["value"]["mean"] == STAGE["max_rows"]
    assert rows["pf"]["transfer_rows"]["value"] is None
    page = report.markdown.read_text()
    assert all(claim["claim"] in page for claim in STUDY["orderings"])
    assert report.picture is not None
    assert report.picture.stat().st_size > 0

    before = {path: path.stat().st_mtime_ns for path in trials}
    again = figures(run_study(request, progress_bar=quiet))
    assert again["rows"] == found["rows"]
    assert {path: path.stat().st_mtime_ns for path in trials} == before


def test_a_tower_pre_trains_on_the_very_rows_it_is_distilled_on(place: Path) -> None:
    """The compound experiment of papers.md S1.19: D_LM = D_T, by content."""
    request = write(place, variants={"pf": {"form": "single", "strategy": "PD"}}, orderings=[])
    (job, *_) = plan_trials(load_study(request.path), request)
    laboratory = laboratory_of(job)
    strategy = job.settings.student.arms_refresh
    assert strategy.distil is not None
    form = student_form("single", laboratory)
    language = open_tokens(form.language()[0]).tokens
    distilled = open_tokens(form.examples(laboratory.distil_rows(strategy.distil)[0])).tokens
    assert strategy.mlm.max_rows == len(distilled) == STAGE["max_rows"]
    first = len(language) - len(distilled)  # a stage learns from the newest rows
    for row in range(len(distilled)):
        theirs, ours = (
            source.values[source.offsets[at] : source.offsets[at + 1]]
            for source, at in ((language, first + row), (distilled, row))
        )
        np.testing.assert_array_equal(theirs, ours)


def test_inner_matches_of_a_variant_reach_its_student(place: Path) -> None:
    """A tower that also matches the teacher's hidden states ends elsewhere, for the same pass."""
    changes = {
        "plain": {"preset": "turc"},
        "matched": {"preset": "turc", "matches": [{"kind": "hidden_mse", "weight": 10}]},
    }
    variants = {
        name: {
            "form": "single",
            "strategy": ["random", "ood", "none"],
            "set": {"student.arms_refresh.objective": objective},
        }
        for name, objective in changes.items()
    }
    request = write(place, variants=variants, baseline="plain", seeds=[1], orderings=[])
    (market,) = (place / "markets").iterdir()
    shutil.rmtree(market / "labels")
    report = run_study(request, progress_bar=quiet)
    records = (market / "laboratory" / "files").glob("*.json")
    passes = sum(json.loads(path.read_text())["teacher_passes"] for path in records)
    assert passes == sum(pq.read_metadata(p).num_rows for p in market.glob("labels/*/*.parquet"))
    auc, stages = {}, {}
    for path in (place / "tiny" / "trials").glob("*.json"):
        trial = json.loads(path.read_text())
        (stage,) = [node for node in trial["notes"]["nodes"] if node["name"] == "distil"]
        stages[trial["cell"]] = stage
        auc[trial["cell"]] = trial["measures"]["distilled_ood_auc"]
    assert auc["plain"] != auc["matched"]
    assert stages["plain"]["best"] != stages["matched"]["best"]
    assert stages["plain"]["num_steps"] == stages["matched"]["num_steps"]
    assert figures(report)["num_stages_trained"] == 2


def test_sizes_are_measured_without_a_market(place: Path) -> None:
    shutil.rmtree(place / "markets")
    sizes = {"small": 16, "large": 64}
    variants = {
        name: {"form": "encoder", "set": {"student.encoder.hidden_size": size}}
        for name, size in sizes.items()
    }
    claim = {"claim": "wider is larger", "source": "S1.9", "measure": "num_parameters"}
    request = write(
        place,
        variants=variants,
        baseline="small",
        columns=["num_parameters", "encode_seconds"],
        orderings=[claim | {"order": ["small", "large"]}],
        plot={"measure": "num_parameters"},
    )
    found = figures(run_study(request, progress_bar=quiet))
    assert found["orderings"][0]["outcome"] == "held"
    assert all(row["measures"]["encode_seconds"]["value"]["mean"] > 0 for row in found["rows"])
    assert found["num_stages"] == 0
    assert not (place / "markets").exists()


PICKED = {"kind": "layers", "layers": [9], "source": "teacher"}
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"variants": {"pf": {"strategy": "PX"}}}, "variant 'pf': strategy must be one of basic, KD"),
    ({"variants": {"pf": {"strategy": 11}}}, "variant 'pf': approach must be one of"),
    (
        {"variants": {"pf": {"set": {"student.arms_refresh.objective.temperature": -1}}}},
        r"variant 'pf'.*student.arms_refresh.objective.temperature.*got -1",
    ),
    ({"variants": {"pf": {"set": {"student.heads": 3}}}}, "student.heads: Extra inputs"),
    ({"market": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
    (
        {
            "variants": {
                "pf": {
                    "strategy": "PD",
                    "set": {"student.arms_refresh.objective": {"preset": "textbrewer"}},
                }
            }
        },
        "variant 'pf': objective.matches: .*compares token by token.*two product texts",
    ),
    (
        {
            "variants": {
                "pf": {
                    "strategy": ["own", "ood", "none"],
                    "set": {"student.arms_refresh.init": PICKED},
                }
            }
        },
        "variant 'pf': .*layers of the teacher.*got 9",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_variant_that_cannot_be_is_refused_before_anything_is_trained(
    place: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=f"(?s){message}"):
        run_study(write(place, orderings=[], **changes), progress_bar=quiet)
    assert not (place / "tiny" / "trials").exists()


def test_test_rows_that_rank_nobody_are_refused_before_anything_is_trained(place: Path) -> None:
    request = write(place, test_hours=0.01, variants={"pf": {"strategy": "PF"}}, orderings=[])
    with pytest.raises(SettingsError, match=r"variant 'pf': .*test slice 1, .* 0 clicks; raise"):
        run_study(request, progress_bar=quiet)
    (market,) = (place / "markets").iterdir()
    assert not (market / "laboratory").exists()


def test_a_variant_that_is_not_there_cannot_be_chosen(place: Path) -> None:
    request = write(place)
    with pytest.raises(SettingsError, match="--only pdf: no such variant, there are"):
        run_study(StudyRequest(request.path, folder=place, only=("pdf",)), progress_bar=quiet)
