"""The table of capabilities names what exists, and every preset of a study can be run."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from driftline.pipelines.study import PRESETS, StudyRequest, list_studies, plan_trials
from driftline.platform.study_settings import load_study

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
