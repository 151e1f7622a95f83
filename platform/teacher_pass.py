"""One forward pass of the teacher: its logits and, where a match asks for them, inner tensors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from driftline.platform.batching import Rows
from driftline.platform.distillation.capture import Capture
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.examples import Ragged, TokenRows
from driftline.platform.inputs import TowerInputs
from driftline.platform.models.spec import TowerSpec
from driftline.platform.tasks import inference_batches
from driftline.platform.teacher_features import TOKENS, FeatureShape

SPECIALS = 2  # [CLS] and [SEP]
PROBE_LENGTHS = (5, 4)


@dataclass(frozen=True)
class PassBatch:
    """What the teacher gave for some of the inputs of a pass."""

    places: Rows
    """Which of the inputs. ``[B]``."""
    logits: NDArray[np.float32]
    """``[B, 2]``"""
    features: Mapping[FeatureKey, NDArray[np.float32]]
    """Padded to the longest of the batch. ``[B, *dims]``."""


@dataclass(frozen=True)
class TeacherPass:
    """Runs the teacher over token sequences.

    A batch is made of the sequences of one call alone, in an order that their lengths decide: the
    same sequences in the same order give the same bits, whatever was asked before.
    """

    model: nn.Module
    """From ``load_model``."""
    spec: TowerSpec
    keys: tuple[FeatureKey, ...] = ()
    """Inner tensors to take out of the same pass."""

    def lengths(self, tokens: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
        """Positions that each sequence takes, [CLS] and [SEP] included. ``[N]``."""
        own = np.fromiter(map(len, tokens), np.int64, len(tokens))
        return np.minimum(own + SPECIALS, self.spec.encoder.max_tokens)

    def run(self, tokens: Sequence[NDArray[np.int32]]) -> Iterator[PassBatch]:
        """Each sequence once, batched by length."""
        unknown = np.full(len(tokens), np.nan, np.float32)
        inputs = TowerInputs(self.spec, TokenRows(Ragged.of(tokens), unknown))
        device = next(self.model.parameters()).device
        for places in inference_batches(inputs, np.arange(len(tokens))):
            with torch.inference_mode(), Capture(self.model, self.keys) as seen:
                logits_B2 = inputs.logits(self.model, places, device=device)
                found = {key: _plain(tensor) for key, tensor in seen.features.items()}
            yield PassBatch(places, _plain(logits_B2), found)

    @cached_property
    def shapes(self) -> dict[FeatureKey, FeatureShape]:
        """Shape of each inner tensor, found with two short made-up inputs.

        Raises:
            ValueError: the teacher has no such tensor, or its size follows from the number of
                tokens in another way than being equal to it.
        """
        if self.spec.encoder.max_tokens < max(PROBE_LENGTHS):
            raise ValueError(
                f"the teacher's max_tokens must be at least {max(PROBE_LENGTHS)} to match its "
                f"tensors, got {self.spec.encoder.max_tokens}"
            )
        long, short = (
            next(self.run([np.full(length - SPECIALS, self.spec.encoder.specials.sep, np.int32)]))
            for length in PROBE_LENGTHS
        )
        return {
            key: _shape(key, long.features[key].shape[1:], short.features[key].shape[1:])
            for key in self.keys
        }


def _shape(key: FeatureKey, long: tuple[int, ...], short: tuple[int, ...]) -> FeatureShape:
    dims: list[int | str] = []
    for sizes in zip(long, short, strict=True):
        if sizes[0] != sizes[1] and sizes != PROBE_LENGTHS:
            raise ValueError(
                f"{key} has size {sizes} for {PROBE_LENGTHS} tokens; only tensors with one value "
                "a token, or with a fixed size, can be stored"
            )
        dims.append(sizes[0] if sizes[0] == sizes[1] else TOKENS)
    return FeatureShape(tuple(dims))


def _plain(tensor: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = tensor.float().cpu().numpy()
    return values
