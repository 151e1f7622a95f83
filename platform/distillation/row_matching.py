"""Matches of a click model, row by row, with what its teacher showed for the same row.

Shape suffixes: B rows, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from driftline.platform.batching import Rows
from driftline.platform.distillation.capture import Capture
from driftline.platform.distillation.matching import Features, Matching
from driftline.platform.inputs import ClickInputs
from driftline.platform.teacher_features import TeacherFeatures


@dataclass(frozen=True)
class RowOutputs:
    """What came of some rows."""

    logits: Tensor
    """The student's. ``[B, 2]``."""
    teacher_logits: Tensor | None
    """Of a live teacher. ``[B, 2]``."""
    matches: Mapping[str, Tensor]
    """Loss of each match, a mean over the rows that have the teacher's tensors."""


class RowMatching:
    """Runs a click model and compares what is inside with a teacher, stored or live.

    A row without stored tensors counts in no match. Workers share a step: ``shares`` tells how
    much of a match's mean over the whole step this worker's mean is.

    Args:
        student: The model that is trained, as it is inside any wrapping.
        matching: The matches; empty for a live teacher that gives its logits alone.
        store: The teacher's tensors.
        teacher: The frozen teacher itself, over the student's own tokens; instead of ``store``.
    """

    def __init__(
        self,
        student: nn.Module,
        matching: Matching,
        *,
        store: TeacherFeatures | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.matching = matching
        self.store = store
        self.teacher = teacher
        self._seen = Capture(student, matching.student_keys)
        if teacher is not None:
            self._teacher_seen = Capture(teacher, matching.teacher_keys)

    def run(
        self, model: nn.Module, inputs: ClickInputs, rows: Rows, *, device: torch.device
    ) -> RowOutputs:
        """The student's logits for some rows, and its matches with the teacher.

        Args:
            model: The student, perhaps inside ``DistributedDataParallel``.
            inputs: Where the rows are.
            rows: Which of them.
            device: Where the model is.
        """
        arguments = inputs.arguments(rows, device=device)
        with self._seen as seen:
            logits = model(*arguments)
            features = seen.features
        seen.clear()
        teacher_logits, teacher = self._ask_live(arguments)
        known_B = self.known(inputs, rows)
        if not len(self.matching):
            return RowOutputs(logits, teacher_logits, {})
        if not known_B.any():
            return RowOutputs(logits, teacher_logits, self.matching.nothing(features))
        mask_BT = inputs.mask(arguments)
        if self.store is not None:
            num_tokens = None if mask_BT is None else mask_BT.shape[1]
            teacher = self._read(inputs, rows[known_B], num_tokens=num_tokens, device=device)
        if not known_B.all():
            kept = torch.from_numpy(np.flatnonzero(known_B)).to(device)
            features = {key: tensor[kept] for key, tensor in features.items()}
            mask_BT = None if mask_BT is None else mask_BT[kept]
        return RowOutputs(logits, teacher_logits, self.matching.losses(features, teacher, mask_BT))

    def known(self, inputs: ClickInputs, rows: Rows) -> NDArray[np.bool_]:
        """Rows that have the teacher's tensors. ``[B]``."""
        if self.store is None:
            return np.full(len(rows), self.teacher is not None)
        if inputs.teacher_rows is None:
            return np.zeros(len(rows), np.bool_)
        return inputs.teacher_rows[rows] >= 0

    def amounts(self, inputs: ClickInputs, rows: Rows) -> dict[str, float]:
        """How much is compared in some rows, for each match: what its mean is over."""
        kept = rows[self.known(inputs, rows)]
        lengths = inputs.num_tokens(kept)
        lengths_B = torch.from_numpy(np.ones(len(kept)) if lengths is None else lengths).double()
        weights = self.matching.row_weights(lengths_B)
        return {name: float(weight_B.sum()) for name, weight_B in weights.items()}

    def shares(self, inputs: ClickInputs, own: Rows, rows: Rows) -> dict[str, float]:
        """This worker's part of each match's mean over all rows of a step."""
        mine, all_ = self.amounts(inputs, own), self.amounts(inputs, rows)
        return {name: mine[name] / max(all_[name], 1e-9) for name in mine}

    def _ask_live(self, arguments: Sequence[Any]) -> tuple[Tensor | None, Features]:
        if self.teacher is None:
            return None, {}
        with torch.no_grad(), self._teacher_seen as seen:
            logits: Tensor = self.teacher(*arguments)
            features = seen.features
        seen.clear()
        return logits, features

    def _read(
        self, inputs: ClickInputs, rows: Rows, *, num_tokens: int | None, device: torch.device
    ) -> Features:
        assert self.store is not None
        assert inputs.teacher_rows is not None
        places = inputs.teacher_rows[rows]
        return {
            key: self.store.read(key, places, num_tokens=num_tokens).to(device, non_blocking=True)
            for key in self.matching.teacher_keys
        }
