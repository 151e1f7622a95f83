"""What a kind of the user's own decides is not found again once its code has changed."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.market_moment import default_moment
from driftline.pipelines.search_place import SETTINGS, Place, Trial
from driftline.pipelines.strategy_nursery import StudentNursery
from driftline.pipelines.strategy_stages import Stages
from driftline.pipelines.student_forms import student_form
from driftline.pipelines.study_trial import TrialJob
from driftline.platform.settings import ArmsRefreshSettings, DriftlineSettings
from driftline.platform.windows import format_time
from driftline.platform.workspace import Workspace

SOURCE = """
from pathlib import Path
from typing import Any, Literal

from driftline.platform.initialisers import Initialiser
from driftline.platform.transfer.sets import Natural, TransferSet


class Oddities(TransferSet):
    kind: Literal["oddities_of_a_test"] = "oddities_of_a_test"

    def make(self, source: Any, *, seed: int) -> Any:
        return Natural().make(source, seed=seed)


class Nest(Initialiser):
    kind: Literal["nest_of_a_test"] = "nest_of_a_test"

    def weights(self, nursery: Any) -> tuple[Path, ...]:
        return (nursery.make("nest", lambda path: path.touch(), key="same"),)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """A module of the user's own, read once."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "kinds_of_a_test.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("kinds_of_a_test")
    finally:
        sys.path.remove(str(folder))


def edit(module: ModuleType) -> None:
    assert module.__file__ is not None
    with Path(module.__file__).open("a") as stream:
        stream.write("# edited\n")


def names(settings: DriftlineSettings, folder: Path) -> dict[str, str]:
    """Names under which the parts of a strategy, and its results, are kept."""
    moment = default_moment(settings, slice_hours=3, num_slices=2)
    lab = Laboratory.open(settings, as_of=moment, folder=folder, seed=0, slice_hours=3)
    strategy = settings.student.arms_refresh
    assert strategy.distil is not None
    folder.mkdir(exist_ok=True)
    (folder / SETTINGS).write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    place = Place(folder, folder, format_time(moment))
    nursery = StudentNursery(Stages(lab, student_form("mlp", lab)), strategy)
    (start,) = strategy.init.weights(nursery)
    job = TrialJob(
        cell="a",
        seed=0,
        form="twin",
        teacher=None,
        settings=settings,
        test_hours=3,
        num_bootstrap=2,
    )
    return {
        "rows": lab.distil_rows(strategy.distil)[0].key,
        "start": start.name,
        "result": place.result_path(Trial("a", strategy, 0)).name,
        "trial": job.key,
    }


def test_edited_code_gives_other_names(
    market: DriftlineSettings, own: ModuleType, tmp_path: Path
) -> None:
    raw: dict[str, Any] = market.student.arms_refresh.model_dump(mode="json")
    raw |= {
        "init": "nest_of_a_test",
        "distil": raw["distil"] | {"transfer": {"kind": "oddities_of_a_test"}},
    }
    arms = ArmsRefreshSettings.model_validate(raw)
    student = market.student.model_copy(update={"arms_refresh": arms})
    settings = market.model_copy(update={"student": student})
    assert Workspace.of(settings).teacher.exists()
    before = names(settings, tmp_path / "lab")
    assert names(settings, tmp_path / "lab") == before
    edit(own)
    after = names(settings, tmp_path / "lab")
    assert [name for name in before if before[name] == after[name]] == []
