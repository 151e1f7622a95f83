import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from driftline.platform.checkpoints import load_optimizer, optimizer_tensors
from driftline.platform.optimizers import (
    Lamb,
    learning_rate,
    make_optimizer,
    rate_factor,
    set_learning_rate,
)
from driftline.platform.settings import StageSettings

# --- LAMB ---------------------------------------------------------------------------------


class SlowLamb:
    """LAMB as papers.md S4.10 writes it, one number at a time."""

    def __init__(
        self,
        weights: list[list[float]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decay: float,
        trust: bool,
    ) -> None:
        self.weights = weights
        self.lr, self.betas, self.eps, self.decay, self.trust = lr, betas, eps, decay, trust
        self.first = [[0.0] * len(w) for w in weights]
        self.second = [[0.0] * len(w) for w in weights]
        self.steps = 0

    def step(self, gradients: list[list[float]]) -> None:
        self.steps += 1
        beta1, beta2 = self.betas
        for w, g, m, v in zip(self.weights, gradients, self.first, self.second, strict=True):
            r = []
            for i in range(len(w)):
                m[i] = beta1 * m[i] + (1 - beta1) * g[i]
                v[i] = beta2 * v[i] + (1 - beta2) * g[i] ** 2
                mean = m[i] / (1 - beta1**self.steps)
                root = math.sqrt(v[i] / (1 - beta2**self.steps))
                r.append(mean / (root + self.eps) + self.decay * w[i])
            norm_w, norm_r = (math.sqrt(sum(x * x for x in values)) for values in (w, r))
            ratio = norm_w / norm_r if self.trust and norm_w > 0 and norm_r > 0 else 1.0
            for i in range(len(w)):
                w[i] -= self.lr * ratio * r[i]


@given(
    trust=st.booleans(),
    decay=st.sampled_from([0.0, 0.01, 0.3]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.9, 0.98)]),
    zero=st.booleans(),
    seed=st.integers(0, 99),
)
def test_lamb_equals_the_formula_number_by_number(
    trust: bool, decay: float, betas: tuple[float, float], zero: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    start = [random.normal(size=6) * (0.0 if zero else 1.0), random.normal(size=4)]
    weights = [nn.Parameter(torch.tensor(values)) for values in start]
    fast = Lamb(weights, lr=0.05, betas=betas, eps=1e-6, weight_decay=decay, trust=trust)
    slow = SlowLamb(
        [list(map(float, values)) for values in start],
        lr=0.05,
        betas=betas,
        eps=1e-6,
        decay=decay,
        trust=trust,
    )
    for _ in range(4):
        gradients = [random.normal(size=6), random.normal(size=4)]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = torch.tensor(gradient)
        fast.step()
        slow.step([list(map(float, gradient)) for gradient in gradients])
    for weight, expected in zip(weights, slow.weights, strict=True):
        assert weight.tolist() == pytest.approx(expected, abs=1e-12)


def test_the_first_lamb_step_is_the_one_worked_out_by_hand() -> None:
    # m / sqrt(v) is the gradient's sign after one step: r = (1, -1), |w| = 5, |r| = sqrt(2).
    weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    weight.grad = torch.tensor([0.2, -7.0], dtype=torch.float64)
    Lamb([weight], lr=0.1, eps=0.0, weight_decay=0.0).step()
    change = 0.1 * 5 / math.sqrt(2)
    assert weight.tolist() == pytest.approx([3 - change, 4 + change])


def test_lamb_moves_weights_of_zero_and_rests_without_a_gradient() -> None:
    still = nn.Parameter(torch.ones(2))
    zero = nn.Parameter(torch.zeros(2, 2))
    zero.grad = torch.ones(2, 2)
    Lamb([still, zero], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(still, torch.ones(2))
    assert torch.allclose(zero, torch.full((2, 2), -0.1), atol=1e-6)  # eps of 1e-6


def test_the_trust_ratio_makes_lamb_blind_to_the_scale_of_a_loss_and_of_its_weights() -> None:
    def relative_change(scale: float, gradient: float) -> Tensor:
        start = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
        weight = nn.Parameter(scale * start)
        weight.grad = gradient * torch.tensor([[1.0, 2.0], [-3.0, 0.1]])
        Lamb([weight], lr=0.1, eps=1e-12, weight_decay=0.0).step()
        return (weight.detach() - scale * start) / scale

    expected = relative_change(1.0, 1.0)
    assert torch.allclose(relative_change(50.0, 1.0), expected, atol=1e-6)
    assert torch.allclose(relative_change(1.0, 1000.0), expected, atol=1e-6)


# --- which parameters, which rate ---------------------------------------------------------


def small_model() -> nn.Module:
    linear = nn.Linear(3, 3)
    linear.bias.requires_grad_(False)
    return nn.ModuleDict(
        {
            "arms": nn.Sequential(linear, nn.LayerNorm(3)),
            "head": nn.Linear(3, 2),
            "projections": nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)}),
        }
    )


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_every_trained_parameter_has_the_rate_of_its_longest_prefix_and_vectors_do_not_decay(
    name: Any,
) -> None:
    model = small_model()
    rates = {"projections.": 0.5, "projections.b": 0.25}
    stage = StageSettings(optimizer=name, learning_rate=0.1, weight_decay=0.3)
    optimizer = make_optimizer(model, stage, rates=rates)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups)
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in groups
            continue
        group = groups[id(parameter)]
        expected = {"projections.a": 0.5, "projections.b": 0.25}.get(path[:13], 0.1)
        assert group["lr"] == expected, path
        assert group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0.0), path
        if name == "lamb":
            assert group["trust"] == (parameter.ndim > 1), path


def test_the_schedule_scales_each_groups_own_rate() -> None:
    stage = StageSettings(learning_rate=0.1, warmup_share=0.4)
    optimizer = make_optimizer(small_model(), stage, rates={"projections.": 0.5})
    set_learning_rate(optimizer, stage, 2, 10)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1 * 0.5, 0.5 * 0.5}
    set_learning_rate(optimizer, stage, 4, 10)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1, 0.5}


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"projection_": 0.1}, r"'projection_', but no trained parameter's name starts so"),
        ({"arms.0.bias": 0.1}, "no trained parameter's name starts so"),
        ({"": 0.1}, "there are .'arms', 'head', 'projections'."),
        ({"head.": 0.0}, "the learning rate of 'head.' must be positive, got 0.0"),
    ],
)
def test_a_rate_that_fits_nothing_is_refused(rates: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_optimizer(small_model(), StageSettings(), rates=rates)


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_an_optimiser_continues_from_its_named_tensors(name: Any) -> None:
    stage = StageSettings(optimizer=name, learning_rate=0.1)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            for number, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    torch.manual_seed(0)
    whole, cut = small_model(), small_model()
    cut.load_state_dict(whole.state_dict())
    train(whole, make_optimizer(whole, stage), 0, 5)
    before = make_optimizer(cut, stage)
    train(cut, before, 0, 2)
    after = make_optimizer(cut, stage)
    load_optimizer(after, [(k, v.clone()) for k, v in optimizer_tensors(before).items()])
    train(cut, after, 2, 5)
    for (path, expected), found in zip(whole.named_parameters(), cut.parameters(), strict=True):
        assert torch.equal(found, expected), path


# --- schedules ----------------------------------------------------------------------------


@given(
    num_steps=st.integers(1, 60),
    warmup=st.sampled_from([0.0, 0.05, 0.1, 0.5]),
    cosine=st.booleans(),
)
def test_one_cycle_is_a_line_up_and_a_line_down(
    num_steps: int, warmup: float, cosine: bool
) -> None:
    schedule: Any = "one_cycle_cosine" if cosine else "one_cycle"
    stage = StageSettings(schedule=schedule, learning_rate=2.0, warmup_share=warmup)
    places = np.arange(1, num_steps + 1) / (num_steps + 1)
    corners = ([0.0, warmup, 1.0], [0.0, 1.0, 0.0]) if warmup else ([0.0, 1.0], [1.0, 0.0])
    expected = np.interp(places, *corners)
    if cosine:
        expected = 0.5 - 0.5 * np.cos(np.pi * expected)
    found = [learning_rate(stage, step, num_steps) for step in range(1, num_steps + 1)]
    assert found == pytest.approx(list(2 * expected))
    assert min(found) > 0


def test_the_paper_s_cycle_peaks_at_its_warm_up() -> None:
    stage = StageSettings(schedule="one_cycle", warmup_share=0.05)  # papers.md S3.6
    rates = [rate_factor(stage, step, 399) for step in range(1, 400)]
    assert int(np.argmax(rates)) == 19
    assert rates[19] == pytest.approx(1.0)
    assert np.allclose(np.diff(rates[:20]), 0.05)
    assert np.allclose(np.diff(rates[19:]), -1 / 380)


def test_a_constant_rate_warms_up_and_stays() -> None:
    stage = StageSettings(schedule="constant", warmup_share=0.2)
    rates = [rate_factor(stage, step, 10) for step in range(1, 11)]
    assert rates == [0.5] + 9 * [1.0]


@pytest.mark.parametrize("schedule", ["linear", "one_cycle", "one_cycle_cosine", "constant"])
def test_no_schedule_leaves_a_single_update_without_a_rate(schedule: Any) -> None:
    assert rate_factor(StageSettings(schedule=schedule), 1, 1) > 0.1


# --- settings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "'adamw' or 'lamb'"),
        ({"schedule": "cosine"}, "'linear', 'one_cycle', 'one_cycle_cosine' or 'constant'"),
        ({"betas": (0.9, 1.0)}, "less than 1"),
        ({"num_steps": 0}, "greater than 0"),
        ({"accumulation": 0}, "greater than 0"),
        ({"sharding": "zero"}, "'off' or 'fsdp'"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageSettings(**changes)


def test_a_recipe_comes_back_from_json(tmp_path: Path) -> None:
    stage = StageSettings(optimizer="lamb", betas=(0.9, 0.98), num_steps=7, schedule="one_cycle")
    (tmp_path / "stage.json").write_text(stage.model_dump_json())
    assert StageSettings.model_validate_json((tmp_path / "stage.json").read_text()) == stage
