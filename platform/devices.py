"""Where tensors live and at which precision products are computed."""

from typing import Literal

import torch
from torch import Tensor

Precision = Literal["off", "bfloat16"]


def choose_device() -> torch.device:
    """The accelerator this process was given, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def to_device(value: object, device: torch.device) -> object:
    """Move the tensors of a nested structure; tuples become lists."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list | tuple):
        return [to_device(part, device) for part in value]
    return value


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Matrix products in bfloat16, where asked for."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
