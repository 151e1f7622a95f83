"""Checkpoints of a training stage: safetensors and JSON, written whole, never a pickle."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

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
        """Put weights and optimiser back, bit for bit; a sharded model takes its own part."""
        fill_model(model, self.path / WEIGHTS)
        with safe_open(self.path / OPTIMIZER, framework="pt") as opened:
            load_optimizer(optimizer, ((n, opened.get_tensor(n)) for n in opened.keys()))  # noqa: SIM118


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
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        state: Mapping[str, Any],
        is_best: bool,
    ) -> None:
        """Write a checkpoint, then forget the older ones.

        Args:
            step: Updates done.
            weights: The whole model; see ``whole_state``.
            moments: State of the optimiser; see ``optimizer_tensors``.
            state: Plain values.
            is_best: Mark the weights as the best so far; else the last best is carried over.
        """
        before = self.latest()
        destination = self.root / f"step-{step:09d}"
        with whole_directory(destination) as scratch:
            save_file(_contiguous(weights), scratch / WEIGHTS)
            save_file(dict(moments), scratch / OPTIMIZER)
            best = scratch / WEIGHTS if is_best else before and before.path / BEST
            if best and best.exists():
                link_or_copy(best, scratch / BEST)
            write_json(scratch / STATE, {**state, "step": step, "job": self.job})
        for path in self.root.glob("step-*"):
            if path != destination:
                shutil.rmtree(path)

    def take_best(self, model: nn.Module) -> None:
        """Put the weights of the best evaluation so far into the model, if there was one."""
        latest = self.latest()
        if latest is not None and (latest.path / BEST).exists():
            fill_model(model, latest.path / BEST)

    def clear(self) -> None:
        """Remove everything; the job is done."""
        shutil.rmtree(self.root, ignore_errors=True)


def whole_state(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """All weights by name. Those of a sharded model are put together, so all workers must call.

    Args:
        model: Sharded or not.
        keep: False gives nothing, for workers that only help.
    """
    return _whole(model.state_dict(), keep=keep)


def optimizer_tensors(optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Tensor]:
    """State of the optimiser as named tensors, ``PARAMETER.KEY``; see ``whole_state``."""
    state = optimizer.state_dict()["state"]
    named = {
        f"{number}.{key}": value
        for number, entries in state.items()
        for key, value in entries.items()
    }
    return {name: value.contiguous() for name, value in _whole(named, keep=keep).items()}


def _whole(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if isinstance(value, DTensor):
            whole = value.full_tensor()
            value = whole.cpu() if keep else whole  # one tensor at a time on the device
        if keep:
            found[name] = value
    return found


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Put back the items of what ``optimizer_tensors`` gave."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    whole = optimizer.state_dict()
    whole["state"] = {}
    for name, value in tensors:
        number, key = name.split(".", 1)
        like = parameters[int(number)]
        if value.shape == like.shape and value.ndim:
            value = _placed(value, like)
        whole["state"].setdefault(int(number), {})[key] = value
    optimizer.load_state_dict(whole)


@torch.no_grad()
def fill_model(model: nn.Module, source: Path) -> None:
    """Read all weights of a model from a file, one tensor in memory at a time.

    Raises:
        BundleError: the file holds other tensors than the model, or of other shapes.
    """
    own = model.state_dict()
    with safe_open(source, framework="pt") as opened:
        if set(opened.keys()) != set(own):
            differing = sorted(set(opened.keys()) ^ set(own))
            raise BundleError(
                f"{source} holds the weights of another model; differing: {differing[:3]}"
            )
        for name, target in own.items():
            target.copy_(_placed(opened.get_tensor(name), target))


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """This worker's part of a whole tensor, where ``like`` is sharded."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


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
        with safe_open(source, framework="pt") as opened:
            names = list(opened.keys())
            fitting = [name for name in names if name.split(".", 1)[0] in parts]
            if not fitting:
                raise BundleError(
                    f"{source} holds no weights of {sorted(parts)}, got {sorted(names)[:3]}"
                )
            for name in fitting:
                shape = tuple(opened.get_slice(name).get_shape())
                if name not in own or tuple(own[name].shape) != shape:
                    expected = tuple(own[name].shape) if name in own else "no such tensor"
                    raise BundleError(
                        f"{source}: {name} has shape {shape}, the model has {expected}; "
                        "these weights belong to a model of another shape"
                    )
            with torch.no_grad():
                for name in fitting:  # one tensor in memory at a time: models may be large
                    own[name].copy_(opened.get_tensor(name))


def extract_weights(source: Path, destination: Path, *, prefix: str) -> None:
    """Copy the tensors below a prefix (``head.``, ``arms.``) into a file of their own."""
    found = {name: value for name, value in load_file(source).items() if name.startswith(prefix)}
    if not found:
        raise BundleError(f"{source} holds no weights below {prefix!r}")
    save_weights(destination, found)


def _contiguous(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}
