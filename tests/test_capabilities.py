"""The table of capabilities names what exists, and what the pages show can be run."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from driftline.pipelines.study import PRESETS, StudyRequest, list_studies, plan_trials
from driftline.platform.settings import ArmsRefreshSettings, load_settings
from driftline.platform.study_settings import StudySettings, load_study
from driftline.platform.yaml_text import read_yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "configs" / "studies" / "README.md"
EXPECTED = ("C3", *(f"C{number}" for number in range(5, 29)), "C33")
STUDIES = sorted(PRESETS.glob("*.yaml"))


def tables() -> dict[str, list[str]]:
    """Cells of every table row of the page, by its first cell."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in rows}


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@cache
def functions_of(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_capability_of_the_workbench_has_a_row() -> None:
    numbered = [name for name in tables() if re.fullmatch(r"C\d+", name)]
    assert tuple(numbered) == EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_a_capability_names_modules_and_tests_that_exist(name: str) -> None:
    _, modules, tests = tables()[name]
    assert quoted(modules)
    missing = [module for module in quoted(modules) if not (ROOT / module).is_file()]
    assert not missing, f"{name} names modules that are not there: {missing}"
    assert quoted(tests)
    for test in quoted(tests):
        file, _, function = test.partition("::")
        assert function.startswith("test_"), f"{name}: {test!r} names no test"
        assert (ROOT / file).is_file(), f"{name}: there is no {file}"
        assert function in functions_of(ROOT / file), f"{name}: {file} has no {function}"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_preset_can_be_run_and_has_a_row(path: Path) -> None:
    """Reading checks variants, measures and claims; planning the settings of every model."""
    study = load_study(path)
    trials = list(plan_trials(study, StudyRequest(path=path)))
    assert study.name == path.stem
    assert study.orderings, "a study repeats what a paper claims"
    assert len(study.seeds) >= 3
    assert len(trials) == len(study.cells) * len(study.seeds)
    row = tables()[path.stem]
    assert row[-1] == str(len(study.cells))
    assert row[2].startswith(str(len(study.variants)))


def test_the_page_lists_all_studies_and_no_other() -> None:
    listed = {name for name, _ in list_studies()}
    shown = set(re.findall(r"^\| `([a-z0-9_]+)` \|", PAGE.read_text(), flags=re.MULTILINE))
    assert shown == listed


# --- examples -----------------------------------------------------------------------------


def block(page: Path) -> str:
    """The first YAML block of a page."""
    return page.read_text().split("```yaml\n")[1].split("```")[0]


def test_the_example_of_a_study_is_one() -> None:
    study = StudySettings.model_validate(read_yaml(block(PAGE)))
    assert list(study.cells) == ["pf@l1", "pf@l2", "pd@l1", "pd@l2"]
    trials = list(plan_trials(study, StudyRequest(path=PAGE.with_name("example.yaml"))))
    epochs = {t.cell: t.settings.student.arms_refresh.distil for t in trials}
    assert epochs["pf@l1"] is None
    assert epochs["pd@l1"] is not None
    assert epochs["pd@l1"].num_epochs == 4


def test_the_objectives_of_the_distillation_page_are_read_as_written() -> None:
    page = ROOT / "platform" / "distillation" / "README.md"
    short, long = block(page).split("\n\n")
    first, second = (
        ArmsRefreshSettings.model_validate(read_yaml(text)).objective for text in (short, long)
    )
    assert first.weights_at(0.5) == pytest.approx((0.9, 0.1))
    assert [match.kind for match in second.matches] == [
        *("hidden_mse", "pkd", "attention_kl", "module")
    ]
    assert (second.temperature, second.tau_squared) == (4, False)


def test_the_sets_of_the_transfer_page_are_read_as_written() -> None:
    strategy = ArmsRefreshSettings.model_validate(
        read_yaml(block(ROOT / "platform" / "transfer" / "README.md"))
    )
    assert strategy.distil is not None
    assert strategy.distil.transfer.kind == "hybrid"


def test_the_search_finds_the_demo_as_it_was_left() -> None:
    """One workspace, so all that decides log, features and teacher must be the same."""
    demo, search = (load_settings(ROOT / "configs" / f"{name}.yaml") for name in ("demo", "search"))
    assert search.search is not None
    assert len(list(search.search.combinations())) == 18
    changed = {n for n in type(demo).model_fields if getattr(demo, n) != getattr(search, n)}
    assert changed == {"search", "student"}
    student = demo.student.model_copy(update={"arms_refresh": search.student.arms_refresh})
    assert search.student == student
