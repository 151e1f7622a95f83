"""The only code that turns features into probabilities, offline and online alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors.torch import load_file

from driftline.platform.bundle import HEAD, Bundle, Calibration, VectorCache
from driftline.platform.columns import TEXT_ID_COLUMNS
from driftline.platform.fused_head import FusedHead, Projected
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import EncoderSpec, HeadOnlySpec, TwinSpec
from driftline.platform.models.student import HeadOnly
from driftline.platform.tabular import Columns, TabularEncoder

ROWS_PER_PASS = 16_384


@dataclass(frozen=True)
class Scorer:
    """A head over its own cached vectors, scales and calibration. Thread-safe: nothing changes."""

    head: HeadOnly
    vectors: VectorCache
    tabular: TabularEncoder
    calibration: Calibration
    published: Projected | None = None
    """The vectors as a bundle holds them for answering; computed when first needed if absent."""

    @classmethod
    def of(cls, bundle: Bundle) -> "Scorer":
        """The scorer of a published bundle."""
        head = load_head(HeadOnlySpec.model_validate(bundle.student["head"]), bundle.path / HEAD)
        return cls(head, bundle.vectors, bundle.tabular, bundle.calibration, bundle.projected)

    @cached_property
    def fused(self) -> FusedHead:
        """The head, folded."""
        return FusedHead.of(self.head)

    @cached_property
    def projected(self) -> Projected:
        """The vectors after the head's first layer."""
        return self.published or Projected.of(self.head, self.vectors.page, self.vectors.ad)

    def score(self, columns: Columns) -> NDArray[np.float64]:
        """Click probability of each row, on the natural click rate. ``[B]``.

        Args:
            columns: Frame columns by name, text ids included; a table or arrays. Each row is
                scored by itself: neither order nor company of rows changes its score beyond
                floating-point noise.
        """
        return self.calibration.probabilities(self.logits(columns))

    def logits(self, columns: Columns) -> NDArray[np.float64]:
        """Click logit of each row on the thinned prior, not calibrated. ``[B]``."""
        both = self.logit_pairs(columns)
        return both[:, 1] - both[:, 0]

    def logit_pairs(self, columns: Columns) -> NDArray[np.float64]:
        """Logits of (no click, click). ``[B, 2]``."""
        categories, numbers = self.tabular.encode(columns)
        rows = self.text_rows(columns)
        parts = [
            self.fused.logits(
                self.projected,
                rows[i : i + ROWS_PER_PASS],
                categories[i : i + ROWS_PER_PASS],
                numbers[i : i + ROWS_PER_PASS],
            )
            for i in range(0, len(rows), ROWS_PER_PASS)
        ]
        return np.concatenate(parts).astype(np.float64) if parts else np.empty((0, 2))

    def text_rows(self, columns: Columns) -> NDArray[np.int32]:
        """Row of the page's and the ad's vector in the cache, -1 when neutral. ``[B, 2]``."""
        return np.column_stack(
            [self.vectors.rows(_text_ids(columns[name])) for name in TEXT_ID_COLUMNS]
        )


def load_head(spec: HeadOnlySpec, weights: Path) -> HeadOnly:
    """A head ready to score; only ``head.*`` weights are taken from the file."""
    head = build_model(spec)
    assert isinstance(head, HeadOnly)
    state = {name: value for name, value in load_file(weights).items() if name.startswith("head.")}
    head.load_state_dict(state)
    return head.eval()


def _text_ids(values: "pa.Array | pa.ChunkedArray | NDArray[np.generic]") -> NDArray[np.int64]:
    if isinstance(values, np.ndarray):
        return values.astype(np.int64)
    filled = values.fill_null(0)
    ids: NDArray[np.int64] = np.asarray(filled, np.int64)
    return ids


def twin_spec(student: Mapping[str, Any]) -> TwinSpec | None:
    """Arms and head of a bundle's ``student.json``; ``None`` for a student without text."""
    if student["encoder"] is None:
        return None
    return TwinSpec(
        encoder=EncoderSpec.model_validate(student["encoder"]),
        tie_arms=student["tie_arms"],
        head=HeadOnlySpec.model_validate(student["head"]).head,
    )


def student_json(
    head: HeadOnlySpec, encoder: Mapping[str, Any] | None, *, tie_arms: bool
) -> dict[str, Any]:
    """What a bundle's ``student.json`` holds: the head, and the arms if there are any."""
    return {
        "head": head.model_dump(mode="json"),
        "encoder": None if encoder is None else dict(encoder),
        "tie_arms": tie_arms,
    }
