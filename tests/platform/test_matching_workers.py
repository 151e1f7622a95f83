"""Matches and masked-language distillation on two workers of a real Ray (papers.md C33)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from driftline.platform.models.spec import SingleSpec
from driftline.platform.ray_runtime import fit
from driftline.platform.settings import ObjectiveSettings, RaySettings, StageSettings
from driftline.platform.stage_teacher import FrozenTeacher
from driftline.platform.stages import StageJob, run_stage

ONE_CPU = RaySettings(num_cpus_per_worker=1)
STAGE = StageSettings(batch_size=15, num_epochs=2, learning_rate=1e-3)


def quiet(spec: Any, **changes: Any) -> Any:
    """The same model without chance in a step: workers draw different random numbers."""
    encoder = spec.encoder.model_copy(update={"dropout": 0.0, **changes})
    return spec.model_copy(update={"encoder": encoder})


def trained(tiny_market: Any, folder: Path, kind: str, **changes: Any) -> FrozenTeacher:
    job = tiny_market.job(kind, folder, stage=STAGE, **changes)
    run_stage(job)
    return FrozenTeacher(job.model, (job.output,))


def on_clicks(tiny_market: Any, folder: Path) -> StageJob:
    """A narrow tower beside a live one: rows of different lengths, projections, schedules."""
    matches = [
        {"kind": "hidden_mse", "projection": {"kind": "linear", "learning_rate": 0.01}},
        {"kind": "nst", "weight": {"base": 0.5, "schedule": "linear_decay"}},
        {"kind": "attention_kl", "layers": {"kind": "explicit", "pairs": [[1, 2]]}},
    ]
    job: StageJob = tiny_market.job(
        "teacher",
        folder,
        model=SingleSpec(encoder=quiet(tiny_market.teacher, hidden_size=8, num_layers=1).encoder),
        objective=ObjectiveSettings.model_validate({"alpha": 0.5, "matches": matches}),
        teacher=trained(tiny_market, folder / "t", "teacher", model=quiet(tiny_market.teacher)),
        stage=STAGE,
    )
    return job


def on_tokens(tiny_market: Any, folder: Path) -> StageJob:
    """A twin student of a tower's language model."""
    language = quiet(tiny_market.teacher)
    job: StageJob = tiny_market.job(
        "mlm",
        folder,
        model=quiet(tiny_market.twin, num_layers=1),
        task="mlm_distil",
        objective=ObjectiveSettings.model_validate({"preset": "thesis"}),
        teacher=trained(tiny_market, folder / "t", "mlm", model=language, keep_head=True),
        stage=STAGE,
    )
    return job


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("make", [on_clicks, on_tokens])
def test_two_workers_learn_what_one_does(tiny_market: Any, tmp_path: Path, make: Any) -> None:
    job = make(tiny_market, tmp_path)
    alone = replace(job, output=tmp_path / "alone.safetensors")
    expected = run_stage(alone)
    found = fit(job, num_workers=2, ray=ONE_CPU)
    assert found.num_rows == expected.num_rows
    for mine, other in zip(found.history, expected.history, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            assert mine[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
    weights, reference = load_file(job.output), load_file(alone.output)
    for name, value in reference.items():
        # float32 sums in another order; AdamW magnifies where gradients are tiny
        assert torch.allclose(weights[name], value, atol=2e-3), name
