"""What happens inside a trial of a search: train and measure one strategy with one seed.

A trial trains in its own process, unless the strategy asks for a worker group. What it found
stands in one JSON file, so a search that was killed reads what is there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from ray import tune

from driftline.pipelines.search_place import Place, Trial
from driftline.pipelines.strategy import TrainedStudent, train_strategy
from driftline.pipelines.strategy_measures import TestSets, measure_student
from driftline.platform.artefacts import whole_file, write_json
from driftline.platform.settings import SearchSettings, TuningSettings
from driftline.platform.workspace import Workspace

TUNED: Final = "tuned"
FINISHED: Final = "finished"
"""Beside the score of a tuning trial that was not ended early."""


def run_trial(config: dict[str, Any]) -> None:
    """What Tune calls: train, measure, write the result, report it.

    With ``values`` of hyper-parameters it trains only, and reports ``score`` after each evaluation
    of the tuned stage: the best AUC on its validation rows so far, or minus the loss of a
    masked-language stage. Never through ``ray.train``, which refuses inside Tune.
    """
    place = Place(Path(config["folder"]), Path(config["laboratory"]), config["as_of"])
    torch.set_num_threads(config["num_threads"])
    settings = place.settings
    search = settings.search or SearchSettings()
    values = config.get("values")
    if values is None:
        trial = Trial.from_json(config["trial"])
        tune.report(evaluate(place, trial)["measures"])
        return
    strategy = search.tuned(values, settings.student.arms_refresh)
    trial = Trial(f"tuned {values}", strategy, search.seeds[0])
    telling = _Telling(search.tuning)
    student = train_strategy(place.open(seed=trial.seed), trial.strategy, report=telling)
    history = telling.history(student)
    score = max((_score(row) for row in history), default=-np.inf)
    write_json(
        place.folder / TUNED / f"{place.identity(trial)}.json", {"values": values, "score": score}
    )
    tune.report({"score": score, "evaluation": len(history), FINISHED: True})


@dataclass
class _Telling:
    """Reports to Tune how the tuned stage stands."""

    tuning: TuningSettings
    num_evaluations: int = 0
    best: float = -np.inf

    def __call__(self, stage: str, measures: Mapping[str, float]) -> None:
        if stage == self.tuning.stage:
            self.num_evaluations += 1
            self.best = max(self.best, _score(measures))
            tune.report({"score": self.best, "evaluation": self.num_evaluations})

    def history(self, student: TrainedStudent) -> Sequence[Mapping[str, float]]:
        """Evaluations of the finished stage, also of one that an earlier run trained."""
        stages = [n.result for n in student.nodes if n.result and n.name == self.tuning.stage]
        return stages[0].history if stages else ()


def _score(measures: Mapping[str, float]) -> float:
    """Never NaN: where no AUC exists, nothing is known to be good."""
    score = measures["auc"] if "auc" in measures else -measures.get("loss", measures["train_loss"])
    return -np.inf if np.isnan(score) else score


def evaluate(place: Place, trial: Trial) -> dict[str, Any]:
    """The result of a trial: measures, nodes, scores on the next slice; found if it was done."""
    done = place.result(trial)
    if done is not None:
        return done
    laboratory = place.open(seed=trial.seed)
    student = train_strategy(laboratory, trial.strategy, form=trial.form)
    tests = TestSets(laboratory)
    measures, scores = measure_student(
        student, tests, soft=Workspace.of(place.settings).teacher.exists()
    )
    path = place.result_path(trial)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path.with_suffix(".npy")) as scratch, scratch.open("wb") as stream:
        np.save(stream, scores)
    result = {
        **trial.to_json(),
        "measures": measures,
        "nodes": [node.to_json() for node in student.nodes],
        "scores": path.with_suffix(".npy").name,
    }
    write_json(path, result)
    return result
