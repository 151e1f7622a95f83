"""Studies as settings: expressions, grids, and every mistake found before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from driftline.platform.errors import SettingsError
from driftline.platform.study_contrasts import parse_contrast
from driftline.platform.study_settings import StudySettings, load_study

BASE: dict[str, Any] = {
    "name": "made",
    "title": "Made",
    "market": "market.yaml",
    "set": {"seed": 1, "labels.negative_keep_rate": 0.5},
    "variants": {
        "kd": {"strategy": "KD", "set": {"seed": 2}},
        "pd": {"label": "PD", "strategy": "PD"},
        "teacher": {"form": "teacher", "each": False},
    },
    "each": {
        "tiny": {"label": "2/128", "x": 4.4, "set": {"student.encoder.num_layers": 2}},
        "mini": {"x": 11.3},
    },
    "baseline": "kd",
    "columns": ["id_auc", {"measure": "core_seconds", "show": "value"}],
    "orderings": [{"claim": "PD is better", "source": "S1.15", "order": ["kd", "pd"]}],
}


def write(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "made.yaml"
    path.write_text(yaml.safe_dump(BASE | changes, sort_keys=False))
    return path


NUMBER = st.integers(0, 9).map(str)
NAME = st.sampled_from(["a", "b", "c"])
EXPRESSION = st.recursive(
    st.one_of(NAME, NUMBER),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(NUMBER, inner).map(lambda t: f"{t[0]} * {t[1]}"),
        st.tuples(inner, NUMBER).map(lambda t: f"{t[0]}*{t[1]}"),
    ),
    max_leaves=8,
)


@given(text=EXPRESSION, values=st.tuples(*[st.integers(-5, 5)] * 3))
def test_an_expression_means_what_arithmetic_says(text: str, values: tuple[int, int, int]) -> None:
    named = dict(zip("abc", values, strict=True))
    found = parse_contrast(text)
    total = found.constant + sum(weight * named[name] for name, weight in found.weights.items())
    assert total == pytest.approx(eval(text, {}, named))


@pytest.mark.parametrize(
    "text", ["", "a -", "a b", "a * b", "(a", "a)", "A", "2 3", "a ** 2", "a@", "a:B", "a / 2"]
)
def test_what_is_no_linear_expression_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no expression over variants"):
        parse_contrast(text)


def test_cells_and_other_measures_are_names_in_expressions() -> None:
    assert parse_contrast("-kd@48 + pd@tiny:ood_auc").weights == {"kd@48": -1, "pd@tiny:ood_auc": 1}
    assert parse_contrast("kd - kd").weights == {}


def test_a_grid_multiplies_the_variants_and_leaves_reference_rows_alone(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    assert list(study.cells) == ["kd@tiny", "kd@mini", "pd@tiny", "pd@mini", "teacher"]
    cell = study.cells["kd@tiny"]
    assert (cell.label, cell.x, cell.strategy) == ("kd · 2/128", 4.4, "KD")
    assert list(cell.overrides) == [
        ("seed", 1),
        ("labels.negative_keep_rate", 0.5),
        ("seed", 2),
        ("student.encoder.num_layers", 2),
    ]


def test_a_bare_name_is_the_mean_over_the_grid_or_one_value_of_it(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    mean = study.resolve("pd - 0.5", measure="id_auc")
    assert mean.weights == {"pd@tiny:id_auc": 0.5, "pd@mini:id_auc": 0.5}
    assert mean.constant == -0.5
    assert study.resolve("pd:ood_auc", measure="id_auc", at="mini").weights == {
        "pd@mini:ood_auc": 1
    }
    assert study.resolve("teacher", measure="id_auc", at="mini").weights == {"teacher:id_auc": 1}


def test_a_baseline_is_taken_at_the_same_value_of_the_grid(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    column = study.columns[0]
    assert study.baseline_of(study.cells["pd@mini"], column) == "kd@mini"
    assert study.baseline_of(study.cells["teacher"], column) is None


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"varients": {}}, "varients: Extra inputs are not permitted"),
    ({"variants": {"kd": {"lable": "x"}}, "each": {}}, r"variants\.kd\.lable: Extra inputs"),
    ({"variants": {"KD": {}}}, r"variants\.KD.*should match pattern"),
    ({"variants": {"kd": {"form": "tree"}}}, r"variants\.kd\.form.*got 'tree'"),
    ({"variants": {"kd": {"form": "teacher", "strategy": "KD"}}}, r"'KD' would be ignored"),
    ({"test_hours": 1e9}, r"test_hours: .*less than or equal to 8784"),
    ({"baseline": "basic"}, r"baseline: no variant 'basic', there are \['kd'"),
    ({"columns": ["auc"]}, r"columns\.0\.measure: no measure 'auc', there are"),
    ({"columns": []}, r"columns: .*at least 1"),
    ({"columns": [{"measure": "id_auc", "baseline": "x"}]}, r"columns\.0\.baseline: no variant"),
    ({"seeds": []}, "seeds: .*at least 1"),
    ({"seeds": [1, 1]}, "seeds: each counts once"),
    ({"plot": {"measure": "speed"}}, r"plot\.measure: no measure 'speed'"),
    ({"plot": {"kind": "line"}, "each": {"tiny": {}}}, r"a line needs x, \['kd@tiny', 'pd@tiny'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[m[1][:30] for m in MISTAKES])
def test_a_mistake_in_a_study_is_named_with_its_path(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        load_study(write(tmp_path, **changes))


BAD_ORDERINGS: list[tuple[dict[str, Any], str]] = [
    ({"order": ["kd", "pf"]}, "no variant 'pf'"),
    ({"order": ["kd", "pd@huge"]}, "no variant 'pd@huge'"),
    ({"order": ["kd", "pd:speed"]}, "no measure 'speed'"),
    ({"order": ["kd", "pd"], "measure": "speed"}, r"orderings\.0\.measure: no measure 'speed'"),
    ({"order": ["kd", "pd *"]}, "is no expression"),
    ({"order": ["kd"]}, "need two entries or more"),
    ({}, "exactly one of"),
    ({"order": ["kd", "pd"], "better": "pd", "than": "kd"}, "exactly one of"),
    ({"better": "pd"}, "better and than need each other"),
    ({"among": ["kd@tiny", "pd@tiny"]}, "agrees_with and among need each other"),
    ({"agrees_with": "speed", "among": ["kd@tiny", "pd@tiny"]}, "no measure 'speed'"),
    ({"agrees_with": "ood_auc", "among": ["kd", "pd@tiny"]}, "no variant 'kd', there are"),
    ({"linear": ["kd@tiny", "pd@tiny", "teacher"]}, "linear needs x, 'teacher' has none"),
    ({"order": ["kd", "pd"], "by": 0.1}, "by belongs to better and than"),
    ({"order": ["kd", "pd"], "at": "tiny"}, "at: Input should be 'each'"),
]


@pytest.mark.parametrize(("ordering", "message"), BAD_ORDERINGS, ids=[m[1] for m in BAD_ORDERINGS])
def test_a_claim_that_cannot_be_judged_is_refused(
    tmp_path: Path, ordering: dict[str, Any], message: str
) -> None:
    wrong = {"claim": "c", "source": "S0.1", **ordering}
    with pytest.raises(SettingsError, match=message):
        load_study(write(tmp_path, orderings=[wrong]))


@pytest.mark.parametrize("content", ["- a\n", "text", "a: [", "\x00"])
def test_a_file_that_is_no_study_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"bad\.yaml"):
        load_study(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        load_study(tmp_path / "none.yaml")


def test_seeds_can_be_given_instead_of_the_files(tmp_path: Path) -> None:
    assert load_study(write(tmp_path), seeds=[7]).seeds == (7,)


def test_a_study_round_trips_through_json(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    raw = study.model_dump(mode="json", by_alias=True)
    assert StudySettings.model_validate(raw) == study
