"""Rows and texts of a laboratory, known by what decides them and read when first asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from driftline.platform.teacher_memory import Labelled

Logits = NDArray[np.float32]
Source = Literal["ood", "id"]


@dataclass
class TextSet:
    """Texts that rows point to; read when first asked for."""

    key: str
    """Decides the content."""
    read: Callable[[], pa.Table]

    @cached_property
    def table(self) -> pa.Table:
        """``text_id`` (ascending) and a column for each text feature."""
        return self.read()


@dataclass
class Rows:
    """Rows of one example file; made when first asked for, since most files are there already."""

    key: str
    """Decides the content, labels included."""
    texts: TextSet
    read: Callable[[], pa.Table]
    """The frame, whose ``clicked`` may be a share, or NaN where nobody knows."""
    label: Callable[[], Labelled | None] | None = None
    """Soft labels on the student's prior, NaN in rows without, and where inner features are."""

    @cached_property
    def frame(self) -> pa.Table:
        """The rows, without soft labels: reading them asks no teacher."""
        return self.read()

    @cached_property
    def labels(self) -> Labelled | None:
        """The soft labels; None for rows that have none."""
        return None if self.label is None else self.label()

    @property
    def teacher_logits(self) -> Logits | None:
        """Of the soft labels. ``[N, 2]``."""
        return None if self.labels is None else self.labels.logits

    @property
    def teacher_rows(self) -> NDArray[np.int64] | None:
        """Rows of the teacher's stored features. ``[N]``."""
        return None if self.labels is None else self.labels.teacher_rows


def with_clicks(frame: pa.Table, clicked: NDArray[np.float32]) -> pa.Table:
    """The same rows with other labels: shares, or NaN for not known."""
    at = frame.column_names.index("clicked")
    return frame.set_column(at, "clicked", pa.array(clicked, pa.float32()))


def merged_texts(first: pa.Table, second: pa.Table) -> pa.Table:
    """Texts of both, by ascending id; what stands in both is the same text."""
    known = first["text_id"].to_numpy()
    new = second.filter(pa.array(~np.isin(second["text_id"].to_numpy(), known)))
    both = pa.concat_tables([first, new.select(first.column_names).cast(first.schema)])
    return both.take(pa.array(np.argsort(both["text_id"].to_numpy(), kind="stable")))
