"""The page of a study: numbers where they belong, every claim answered, a picture that is one."""

import json
import re
from typing import Any

import numpy as np
import pytest

from driftline.pipelines.study_plot import draw_study
from driftline.pipelines.study_results import StudyResults, Trial
from driftline.pipelines.study_table import DASH, StudyTable, markdown
from driftline.platform.study_settings import StudySettings

STUDY: dict[str, Any] = {
    "name": "made",
    "title": "Which start is best",
    "source": ["S0.31"],
    "market": "market.yaml",
    "variants": {
        "mlp": {"label": "MLP, baseline", "form": "mlp", "each": False},
        "random": {"label": "random | KD", "x": 1},
        "mlm": {"label": "MLM, KD", "x": 2},
    },
    "baseline": "mlp",
    "columns": [
        "ood_auc",
        {"measure": "id_soft_auc", "baseline": "random"},
        "id_auc",
        "log_loss",
        "num_parameters",
    ],
    "orderings": [
        {"claim": "random < MLM", "source": "S0.32", "order": ["random", "mlm"]},
        {"claim": "less loss", "source": "S0.32", "measure": "log_loss",
         "better": "random", "than": "mlm"},
        {"claim": "the MLP ranks soft labels", "source": "S0.32", "measure": "id_soft_auc",
         "order": ["mlp", "mlm"]},
    ],
}  # fmt: skip
AUC = {"mlp": [0.60, 0.61, 0.62], "random": [0.63, 0.64, 0.65], "mlm": [0.66, 0.68, 0.70]}


def make(**changes: Any) -> tuple[StudySettings, StudyResults]:
    study = StudySettings.model_validate(STUDY | changes)
    trials = []
    for name in study.cells:
        for seed, auc in zip((1, 2, 3), AUC[name.partition("@")[0]], strict=True):
            measures = {"ood_auc": auc, "id_auc": auc, "log_loss": 1 - auc, "num_parameters": 1500}
            if name != "mlp":
                measures["id_soft_auc"] = auc + 0.01
            trials.append(Trial(name, seed, measures))
    return study, StudyResults(trials)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_deltas_are_percent_of_the_baseline_paired_by_seed() -> None:
    study, results = make()
    page = markdown(StudyTable.of(study, results)).splitlines()
    row = next(cells(line) for line in page if line.startswith("| MLM, KD"))
    deltas = [100 * (m / b - 1) for m, b in zip(AUC["mlm"], AUC["mlp"], strict=True)]
    assert row[1].startswith(f"+{np.mean(deltas):.2f} [")
    half = 4.30265 * np.std(deltas, ddof=1) / np.sqrt(3)
    assert f"+{np.mean(deltas) + half:.2f}]" in row[1]
    own = [100 * (m / r - 1) for m, r in zip([x + 0.01 for x in AUC["mlm"]],
           [x + 0.01 for x in AUC["random"]], strict=True)]  # fmt: skip
    assert row[2].startswith(f"+{np.mean(own):.2f} [")
    assert row[4].startswith("0.3200 [")
    assert row[5] == "1,500"


def test_the_baseline_is_shown_as_zero_with_its_own_value_and_gaps_as_dashes() -> None:
    study, results = make()
    page = markdown(StudyTable.of(study, results)).splitlines()
    row = next(cells(line) for line in page if line.startswith("| MLP, baseline"))
    assert row[1:4] == ["0 (0.6100)", DASH, "0 (0.6100)"]


def test_every_claim_is_answered_also_the_ones_that_failed() -> None:
    study, results = make()
    page = markdown(StudyTable.of(study, results))
    assert "## What the papers claim: 1 held, 1 reversed, 1 not measured" in page
    found = {cells(line)[0]: cells(line)[2] for line in page.splitlines() if "| S0.32 |" in line}
    assert found == {
        "random < MLM": "**held**",
        "less loss": "**reversed**",
        "the MLP ranks soft labels": "not measured",
    }
    assert "ID AUC points: random < mlm: +4.00 [" in page


def test_the_page_gives_mean_median_and_range_and_no_holes() -> None:
    study, results = make()
    page = markdown(StudyTable.of(study, results), origin=["made today"], picture="made.png")
    assert f"0.6800, 0.6800, 0.6600{DASH}0.7000" in page
    assert "made today" in page
    assert "![Which start is best](made.png)" in page
    assert "nan" not in page.lower()
    assert "None" not in page
    widths = {len(cells(line)) for line in page.splitlines() if line.startswith("| MLM")}
    assert widths == {6, 4}  # a bar in a label does not make a column


def test_the_json_holds_the_same_numbers_and_is_json() -> None:
    study, results = make()
    raw = json.loads(json.dumps(StudyTable.of(study, results).to_json(), allow_nan=False))
    row = raw["rows"][2]["measures"]["id_auc"]
    assert row["value"]["mean"] == pytest.approx(0.68)
    assert row["value"]["median"] == pytest.approx(0.68)
    assert row["delta_percent"]["num_seeds"] == 3
    assert raw["rows"][0]["measures"]["id_soft_auc"]["value"] is None
    assert raw["outcomes"] == {"held": 1, "not shown": 0, "reversed": 1, "not measured": 1}
    assert raw["orderings"][0]["steps"][0]["outcome"] == "held"


def test_a_study_that_has_hardly_begun_still_gives_a_page() -> None:
    study, _ = make()
    page = markdown(StudyTable.of(study, StudyResults([Trial("mlm", 1, {"id_auc": 0.7})])))
    assert "3 not measured" in page
    assert draw_study(study, StudyResults([])) is None


@pytest.mark.parametrize(
    "plot",
    [
        {"measure": "id_auc"},
        {"measure": "log_loss", "log_x": True},
        {"kind": "line", "log_x": True, "measure": "id_auc", "x_measure": "num_parameters"},
    ],
)
def test_the_picture_names_its_variants_its_axis_and_its_intervals(plot: dict[str, Any]) -> None:
    study, results = make(plot=plot)
    picture = draw_study(study, results)
    assert picture is not None
    assert picture.png.startswith(b"\x89PNG")
    assert "Which start is best" in picture.svg
    assert "95 % intervals over 3 seeds" in picture.svg
    if plot.get("kind") != "line":
        assert "MLM, KD" in picture.svg


def test_a_grid_draws_a_line_for_each_variant_and_references_across() -> None:
    grid = {"small": {"label": "S", "x": 4.4}, "large": {"label": "L", "x": 110}}
    orderings = [{"claim": "c", "source": "s", "order": ["random", "mlm"], "at": "each"}]
    plot = {"kind": "line", "log_x": True, "x_label": "millions of parameters"}
    columns = ["id_auc"]
    study, results = make(each=grid, orderings=orderings, plot=plot, columns=columns)
    picture = draw_study(study, results)
    assert picture is not None
    for text in ("random | KD", "MLM, KD", "MLP, baseline", "4.4", "110", "millions of parameters"):
        assert text in picture.svg
    page = markdown(StudyTable.of(study, results))
    assert "| MLM, KD · L |" in page
    assert "2 held" in page
