"""Who is trained on what: stable hashes decide, so a row never changes sides.

A request (all ads shown together) belongs to one of three parts for good: *train*, *validation*
(early stopping and calibration) or *gate* (judging a challenger against the champion). Because no
student ever trains on the gate part, champion and challenger are judged on rows that neither has
seen, and the newest hour can still be learned from.
"""

from typing import Final, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from driftline.platform.settings import SplitSettings

Part = Literal["train", "validation", "gate"]

_HASH_SPAN: Final = float(2**64)


def unit_hash(values: pa.ChunkedArray | pa.Array, *, salt: str) -> NDArray[np.float64]:
    """A stable pseudo-random number in [0, 1) for each value; equal values get equal numbers.

    SipHash keyed by ``salt`` (16 characters are used), the same on every machine.
    """
    key = salt.ljust(16, "_")[:16]
    strings = values.cast(pa.string()).to_pandas().to_numpy(dtype=object, na_value="")
    codes, distinct = pd.factorize(strings)
    hashed = pd.util.hash_array(np.asarray(distinct, dtype=object), hash_key=key, categorize=False)
    return (hashed.astype(np.float64) / _HASH_SPAN)[codes] if len(codes) else np.empty(0)


def part_mask(frame: pa.Table, part: Part, *, split: SplitSettings) -> NDArray[np.bool_]:
    """Which rows of a frame belong to ``part``. ``[N]``, by request."""
    position = unit_hash(request_keys(frame), salt="driftline-part")
    gate = position < split.gate_share
    validation = ~gate & (position < split.gate_share + split.validation_share)
    return {"gate": gate, "validation": validation, "train": ~gate & ~validation}[part]


def request_keys(frame: pa.Table) -> pa.ChunkedArray:
    """The request of each row; the row itself where the log does not name one."""
    return pc.coalesce(frame["request_id"], frame["impression_id"])


def thinned(frame: pa.Table, *, keep_rate: float, seed: int) -> NDArray[np.bool_]:
    """Rows that stay in training: all clicks, ``keep_rate`` of the others (papers.md S0.25)."""
    clicked = frame["clicked"].to_numpy().astype(bool)
    kept = unit_hash(frame["impression_id"], salt=f"thin-{seed}") < keep_rate
    return clicked | kept


def soft_labelled(frame: pa.Table, *, share: float, seed: int) -> NDArray[np.bool_]:
    """Rows that the teacher is asked about, clicked or not."""
    return unit_hash(frame["impression_id"], salt=f"soft-{seed}") < share
