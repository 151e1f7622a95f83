"""Optimisers and learning rates: AdamW, LAMB, parts of a model with a rate of their own."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from driftline.platform.settings import StageSettings

BASE_RATE: Final = "initial_lr"  # the name that torch's own schedulers use


class Lamb(torch.optim.Optimizer):
    """Adam's step, rescaled tensor by tensor to the norm of the weights; for large batches.

    Source: papers.md S4.10 (You et al. 2019). With bias-corrected moments m and v:
    ``r = m / (sqrt(v) + epsilon) + weight_decay * w`` and ``w -= lr * (|w| / |r|) * r``, where the
    trust ratio ``|w| / |r|`` is 1 if either norm is 0. Not in torch.

    A group with ``trust=False`` takes plain Adam steps; ``make_optimizer`` puts biases and norms
    there. All state is tensors: ``step``, ``exp_avg``, ``exp_avg_sq``.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        trust: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "trust": trust,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if trained:
                self._update(trained, group)
        return value

    def _update(self, weights: list[Tensor], group: Mapping[str, Any]) -> None:
        states = [self._state_of(weight) for weight in weights]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        numbers = []
        for state in states:
            state["step"] += 1
            numbers.append(float(state["step"]))  # kept on the CPU: reading it waits for nothing
        roots = torch._foreach_div(squares, [1 - beta2**number for number in numbers])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        steps = torch._foreach_div(means, [1 - beta1**number for number in numbers])
        torch._foreach_div_(steps, roots)
        if group["weight_decay"]:
            torch._foreach_add_(steps, weights, alpha=group["weight_decay"])
        if group["trust"]:
            ratios: Any = _trust_ratios(weights, list(steps))
            torch._foreach_mul_(steps, ratios)
        torch._foreach_add_(weights, steps, alpha=-group["lr"])

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state


def _trust_ratios(weights: list[Tensor], steps: list[Tensor]) -> list[Tensor]:
    """``|w| / |r|`` of each tensor, 1 where a norm is 0. No value leaves the device."""
    ratios = []
    for weight, step in zip(torch._foreach_norm(weights), torch._foreach_norm(steps), strict=True):
        usable = (weight > 0) & (step > 0)
        ratios.append(torch.where(usable, weight / step, torch.ones_like(weight)))
    return ratios


def make_optimizer(
    model: nn.Module, stage: StageSettings, *, rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The stage's optimiser over everything in the model that needs a gradient.

    Biases, norms and other vectors do not decay, and LAMB does not rescale them (papers.md S0.9,
    S4.10).

    Args:
        model: What is trained.
        stage: Optimiser, rate, moments and decay.
        rates: Learning rates of parts of the model, by the prefix of their parameters' names
            (``projections.``); the longest prefix that fits counts. The schedule scales each.

    Raises:
        ValueError: a prefix fits no parameter that needs a gradient, or a rate is not positive.
    """
    rates = dict(rates or {})
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    _check_rates(rates, [name for name, _ in named])
    groups = []
    for prefix in ("", *sorted(rates)):
        own = [p for name, p in named if _prefix_of(name, rates) == prefix]
        rate = rates[prefix] if prefix else stage.learning_rate
        matrices, vectors = _split(own)
        groups.append(_group(matrices, stage, rate, decay=stage.weight_decay, trust=True))
        groups.append(_group(vectors, stage, rate, decay=0.0, trust=False))
    groups = [group for group in groups if group["params"]]
    if stage.optimizer == "lamb":
        return Lamb(groups, lr=stage.learning_rate, betas=stage.betas, eps=stage.epsilon)
    for group in groups:
        del group["trust"]
    return torch.optim.AdamW(
        groups, lr=stage.learning_rate, betas=stage.betas, eps=stage.epsilon, fused=True
    )


def _split(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    every = list(parameters)
    return [p for p in every if p.ndim > 1], [p for p in every if p.ndim <= 1]


def _group(
    parameters: list[nn.Parameter],
    stage: StageSettings,
    rate: float,
    *,
    decay: float,
    trust: bool,
) -> dict[str, Any]:
    return {
        "params": parameters,
        "weight_decay": decay,
        "trust": trust,
        "lr": rate,
        BASE_RATE: rate,
    }


def _prefix_of(name: str, rates: Mapping[str, float]) -> str:
    return max((prefix for prefix in rates if name.startswith(prefix)), key=len, default="")


def _check_rates(rates: Mapping[str, float], names: list[str]) -> None:
    for prefix, rate in rates.items():
        if not rate > 0:
            raise ValueError(f"the learning rate of {prefix!r} must be positive, got {rate}")
        if not prefix or not any(name.startswith(prefix) for name in names):
            raise ValueError(
                f"a learning rate is given for {prefix!r}, but no trained parameter's name starts "
                f"so; there are {sorted({name.split('.', 1)[0] for name in names})}"
            )


# --- schedules ----------------------------------------------------------------------------


def rate_factor(stage: StageSettings, step: int, num_steps: int) -> float:
    """Share of the learning rate at an update; updates count from 1. In ``(0, 1]``.

    ``one_cycle`` is the paper's continuous cycle from 0 to the rate and back to 0, read at
    ``step / (num_steps + 1)``, so that no update is wasted on a rate of 0 (papers.md A3.10; no
    cycling of the momentum).
    """
    if stage.schedule in ("one_cycle", "one_cycle_cosine"):
        place, peak = step / (num_steps + 1), stage.warmup_share
        share = place / peak if place < peak else (1 - place) / (1 - peak)
        return share if stage.schedule == "one_cycle" else (1 - math.cos(math.pi * share)) / 2
    warmup = max(1, round(stage.warmup_share * num_steps))
    rising = step / warmup
    if stage.schedule == "constant":
        return min(rising, 1.0)
    falling = (num_steps + 1 - step) / (num_steps + 1 - warmup)
    return min(rising, falling)


def learning_rate(stage: StageSettings, step: int, num_steps: int) -> float:
    """The stage's own rate at an update; updates count from 1."""
    return stage.learning_rate * rate_factor(stage, step, num_steps)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, stage: StageSettings, step: int, num_steps: int
) -> None:
    """Put the rates of an update into the optimiser, each group's own."""
    factor = rate_factor(stage, step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = group[BASE_RATE] * factor
