"""Sets put together, cut to size, drawn again."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from driftline.platform.errors import EmptyWindowError, SettingsError
from driftline.platform.sampling import request_keys
from driftline.platform.transfer.samples import with_replacement, without_replacement
from driftline.platform.transfer.sets import MadeRows
from driftline.platform.transfer.texts import distinct_texts, with_column


def concatenated(parts: Sequence[MadeRows]) -> MadeRows:
    """The rows of all parts. The texts are one table when no part has another."""
    texts = parts[0].texts
    if any(part.texts is not texts for part in parts):
        texts = distinct_texts(pa.concat_tables([part.texts for part in parts]))
    frame = pa.concat_tables([part.frame for part in parts])
    return MadeRows(frame, texts, np.concatenate([part.made_up for part in parts]))


def cut_part(rows: MadeRows, wanted: int, *, name: str, seed: int) -> MadeRows:
    """As many rows of a part of a mixture as wanted, to the nearest request.

    Raises:
        SettingsError: there are fewer, or none is wanted.
    """
    found = rows.frame.num_rows
    if wanted < 1 or found < wanted:
        raise SettingsError(
            f"hybrid: {name} must give {wanted} rows, but {found} are left for it; give it another "
            "share, set hybrid.num_rows to fewer, or take bootstrap of it"
        )
    if found == wanted:
        return rows
    mask = without_replacement(rows.frame, wanted, key=("part", seed))
    return replace(rows, frame=rows.frame.filter(pa.array(mask)), made_up=rows.made_up[mask])


def without_requests(frame: pa.Table, taken: pa.Table) -> pa.Table:
    """Rows whose request is not among those of other rows."""
    known = pc.unique(request_keys(taken).cast(pa.string()))
    return frame.filter(pc.invert(pc.is_in(request_keys(frame), value_set=known)))


def drawn_again(rows: MadeRows, wanted: int, *, seed: int) -> MadeRows:
    """About ``wanted`` rows by drawing requests with replacement; copies get ids of their own.

    Raises:
        EmptyWindowError: there is no row to draw from.
    """
    if rows.frame.num_rows == 0:
        raise EmptyWindowError("bootstrap: there is no row to draw from; take a longer window")
    chosen = with_replacement(rows.frame, wanted, key=("bootstrap", seed))
    copy = pd.Series(chosen).groupby(chosen).cumcount()
    endings = [f"#{number}" if number else "" for number in copy]
    frame = rows.frame.take(pa.array(chosen))
    frame = with_column(frame, "request_id", request_keys(frame))
    ids = pc.binary_join_element_wise(frame["impression_id"], pa.array(endings), "")
    frame = with_column(frame, "impression_id", ids)
    return replace(rows, frame=frame, made_up=rows.made_up[chosen])
