"""From a spec to a model, and how large it is."""

from typing import assert_never

import torch
from torch import nn

from driftline.platform.models.baseline import MlpBaseline
from driftline.platform.models.spec import (
    HeadOnlySpec,
    MlpSpec,
    ModelSpec,
    SingleSpec,
    TeacherSpec,
    TwinSpec,
)
from driftline.platform.models.student import HeadOnly, TwinStudent
from driftline.platform.models.teacher import ClickTower


def build_model(spec: ModelSpec, *, pretrained: bool = True) -> nn.Module:
    """A new model, initialised from torch's current random state.

    Args:
        spec: What to build.
        pretrained: Start a checkpoint encoder from its checkpoint; without, from noise (for a
            model whose weights are loaded next).
    """
    match spec:
        case TeacherSpec() | SingleSpec():
            return ClickTower(spec, pretrained=pretrained)
        case TwinSpec():
            return TwinStudent(spec, pretrained=pretrained)
        case HeadOnlySpec():
            return HeadOnly(spec)
        case MlpSpec():
            return MlpBaseline(spec)
        case _:
            assert_never(spec)


def count_parameters(spec: ModelSpec) -> int:
    """Number of parameters, counted on the ``meta`` device: no memory, any size."""
    with torch.device("meta"):
        model = build_model(spec, pretrained=False)
    return sum(parameter.numel() for parameter in model.parameters())
