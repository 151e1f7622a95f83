"""How large a model is, part by part, and how fast: for any module, ours or not."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from driftline.platform.models.grid import MEBIBYTE


@dataclass(frozen=True)
class PartSize:
    """A module and everything below it."""

    name: str
    """Path of the module; empty for the whole model."""
    num_parameters: int
    num_bytes: int
    share: float
    """Of the whole model's parameters."""
    shared_with: str | None = None
    """Path of the tensor that this one is tied to; counted there, and 0 here."""


def part_sizes(model: nn.Module, *, max_depth: int = 2) -> list[PartSize]:
    """Parameters of a model by part, in its own order; a tied tensor counts once (S2.7).

    The children of every part add up to it: parameters that a module holds itself stand in a line
    of their own. Works on the ``meta`` device, so that any size can be asked for.

    Args:
        model: Any module.
        max_depth: Levels of modules below the whole model.
    """
    owners: dict[int, str] = {}
    counts: dict[str, tuple[int, int]] = {}
    ties: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        size = parameter.numel() if first == name else 0
        if first != name:
            ties[name] = first
        parts = name.split(".")
        for depth in range(min(len(parts), max_depth + 1)):
            _add(counts, ".".join(parts[:depth]), size, size * parameter.element_size())
        if len(parts) <= max_depth or first != name:
            _add(counts, name, size, size * parameter.element_size())
    total = max(1, counts.get("", (0, 0))[0])
    return [
        PartSize(
            name=name,
            num_parameters=size,
            num_bytes=num_bytes,
            share=size / total,
            shared_with=ties.get(name),
        )
        for name, (size, num_bytes) in counts.items()
    ]


def _add(counts: dict[str, tuple[int, int]], name: str, size: int, num_bytes: int) -> None:
    before = counts.get(name, (0, 0))
    counts[name] = (before[0] + size, before[1] + num_bytes)


def size_table(model: nn.Module, *, max_depth: int = 2) -> str:
    """``part_sizes`` as aligned text, for people."""
    lines = [f"{'part':<48}{'parameters':>14}{'share':>9}{'MiB':>11}"]
    for part in part_sizes(model, max_depth=max_depth):
        depth = part.name.count(".") + 1 if part.name else 0
        label = "  " * depth + (part.name.rpartition(".")[2] or "(whole model)")
        tied = f"  shared with {part.shared_with}" if part.shared_with else ""
        lines.append(
            f"{label:<48}{part.num_parameters:>14,}{part.share:>9.1%}"
            f"{part.num_bytes / MEBIBYTE:>11.2f}{tied}"
        )
    return "\n".join(lines)


def median_seconds(run: Callable[[], object], *, num_repeats: int = 10) -> float:
    """Median wall time of a call without gradients, after one to warm up (T4.1 of S3.22)."""
    seconds = []
    with torch.inference_mode():
        run()
        for _ in range(num_repeats):
            _wait()
            started = time.perf_counter()
            run()
            _wait()
            seconds.append(time.perf_counter() - started)
    return median(seconds)


def _wait() -> None:
    """An accelerator works while Python goes on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
