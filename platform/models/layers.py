"""Layers that several models share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LogitLayer(nn.Linear):
    """Two logits, in float32 even under autocast: bfloat16 would tie scores that differ by 1 %."""

    def __init__(self, num_inputs: int) -> None:
        super().__init__(num_inputs, 2)

    def forward(self, inputs_BH: Tensor) -> Tensor:
        """Logits of (no click, click). ``[B, 2]``."""
        with torch.autocast(inputs_BH.device.type, enabled=False):
            return super().forward(inputs_BH.float())


def mlp(num_inputs: int, hidden_sizes: Sequence[int], *, dropout: float) -> nn.Sequential:
    """Linear, ReLU and dropout for each hidden size, then two logits."""
    layers: list[nn.Module] = []
    for width in hidden_sizes:
        layers += [nn.Linear(num_inputs, width), nn.ReLU(), nn.Dropout(dropout)]
        num_inputs = width
    return nn.Sequential(*layers, LogitLayer(num_inputs))
