"""Checkpoints of a training stage: safetensors and JSON, written whole, never a pickle."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from driftline.platform.artefacts import (
    link_or_copy,
    read_json,
    whole_directory,
    whole_file,
    write_json,
)
from driftline.platform.errors import BundleError

WEIGHTS: Final = "weights.safetensors"
OPTIMIZER: Final = "optimizer.safetensors"
BEST: Final = "best.safetensors"
STATE: Final = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A place to continue from."""

    step: int
    path: Path
    state: dict[str, Any]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put weights and optimiser back, bit for bit."""
        model.load_state_dict(load_file(self.path / WEIGHTS))
        load_optimizer(optimizer, load_file(self.path / OPTIMIZER))


@dataclass(frozen=True)
class CheckpointFolder:
    """Checkpoints of one job; those of another job at the same place are ignored and removed."""

    root: Path
    job: str
    """Hash of everything that decides the result of the job."""

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint of this job."""
        found = None
        for path in sorted(self.root.glob("step-*")):
            state = read_json(path / STATE)
            if state["job"] == self.job:
                found = Checkpoint(state["step"], path, state)
        return found

    def save(
        self,
        *,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        is_best: bool,
    ) -> None:
        """Write a checkpoint, then forget the older ones.

        ``is_best`` marks the weights as the best so far; else the last best is carried over.
        """
        before = self.latest()
        destination = self.root / f"step-{step:09d}"
        with whole_directory(destination) as scratch:
            save_file(_contiguous(model.state_dict()), scratch / WEIGHTS)
            save_file(optimizer_tensors(optimizer), scratch / OPTIMIZER)
            best = scratch / WEIGHTS if is_best else before and before.path / BEST
            if best and best.exists():
                link_or_copy(best, scratch / BEST)
            write_json(scratch / STATE, {**state, "step": step, "job": self.job})
        for path in self.root.glob("step-*"):
            if path != destination:
                shutil.rmtree(path)

    def best_weights(self) -> dict[str, Tensor] | None:
        """Weights of the best evaluation so far."""
        latest = self.latest()
        if latest is None or not (latest.path / BEST).exists():
            return None
        return load_file(latest.path / BEST)

    def clear(self) -> None:
        """Remove everything; the job is done."""
        shutil.rmtree(self.root, ignore_errors=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of the optimiser as named tensors, ``PARAMETER.KEY``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{key}": value.contiguous()
        for number, entries in state.items()
        for key, value in entries.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave."""
    whole = optimizer.state_dict()
    whole["state"] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        whole["state"].setdefault(int(number), {})[key] = value
    optimizer.load_state_dict(whole)


def save_weights(destination: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights, whole or not at all."""
    with whole_file(destination) as scratch:
        save_file(_contiguous(weights), scratch)


def load_weights(model: nn.Module, *sources: Path) -> None:
    """Load safetensors files in order; each may hold a part of the model, or of a larger one.

    Files of a whole twin student can initialise its head alone: tensors of top-level parts that
    the model does not have (``arms.*``) are left out.

    Raises:
        BundleError: a tensor of one of the model's parts is unknown or has another shape.
    """
    own = model.state_dict()
    parts = {name.split(".", 1)[0] for name in own}
    for source in sources:
        loaded = load_file(source)
        fitting = {n: v for n, v in loaded.items() if n.split(".", 1)[0] in parts}
        if not fitting:
            raise BundleError(
                f"{source} holds no weights of {sorted(parts)}, got {sorted(loaded)[:3]}"
            )
        for name, value in fitting.items():
            if name not in own or own[name].shape != value.shape:
                expected = tuple(own[name].shape) if name in own else "no such tensor"
                raise BundleError(
                    f"{source}: {name} has shape {tuple(value.shape)}, the model has {expected}; "
                    "these weights belong to a model of another shape"
                )
        model.load_state_dict(fitting, strict=False)


def extract_weights(source: Path, destination: Path, *, prefix: str) -> None:
    """Copy the tensors below a prefix (``head.``, ``arms.``) into a file of their own."""
    found = {name: value for name, value in load_file(source).items() if name.startswith(prefix)}
    if not found:
        raise BundleError(f"{source} holds no weights below {prefix!r}")
    save_weights(destination, found)


def _contiguous(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}
