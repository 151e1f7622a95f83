"""Which rows of a frame belong to a domain: by category, by time."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from driftline.platform.errors import EmptyWindowError, SettingsError
from driftline.platform.transfer.similarity import corpus_similarity, frame_words

MAX_SHOWN: Final = 20


def domain_mask(
    frame: pa.Table,
    *,
    columns: Sequence[str],
    values: Sequence[str],
    inside: bool,
    period: tuple[float, float],
) -> NDArray[np.bool_]:
    """Rows of the domain; see ``OtherDomain``. ``[N]``.

    Raises:
        SettingsError: a column that the frame does not have or that holds no categories; a value
            that no row has.
        EmptyWindowError: the domain holds no row.
    """
    _check(frame, columns=columns, values=values)
    mask = _inside_period(frame, period)
    listed = pa.array(values, pa.string())
    for column in columns:
        is_listed = pc.is_in(frame[column], value_set=listed).to_numpy().astype(bool)
        known = pc.is_valid(frame[column]).to_numpy().astype(bool)
        mask &= known & (is_listed == inside)
    if not mask.any():
        where = "in" if inside else "outside"
        raise EmptyWindowError(
            f"other_domain: none of {frame.num_rows} rows lies {where} {list(values)} of "
            f"{list(columns)} within the period {list(period)}; choose other values or a longer "
            "period"
        )
    return mask


def split_similarity(frame: pa.Table, texts: pa.Table, mask: NDArray[np.bool_]) -> float | None:
    """Word similarity of the rows in the mask to the others; None where one side has no words."""
    own, rest = (frame_words(frame.filter(pa.array(side)), texts) for side in (mask, ~mask))
    return corpus_similarity(own, rest) if own and rest and len(own | rest) > 1 else None


def _inside_period(frame: pa.Table, period: tuple[float, float]) -> NDArray[np.bool_]:
    times = frame["event_time"].cast(pa.int64()).to_numpy()
    if not len(times):
        return np.zeros(0, np.bool_)
    first, span = int(times.min()), int(times.max()) - int(times.min())
    start, end = (first + share * span for share in period)
    return (times >= start) & ((times < end) | (period[1] == 1))


def _check(frame: pa.Table, *, columns: Sequence[str], values: Sequence[str]) -> None:
    categorical = [field.name for field in frame.schema if _is_category(field)]
    if wrong := [column for column in columns if column not in categorical]:
        raise SettingsError(
            f"other_domain.columns: {wrong} are no categorical columns of a frame; "
            f"choose from {categorical}"
        )
    found = {value for column in columns for value in pc.unique(frame[column]).to_pylist()}
    if wrong := [value for value in values if value not in found]:
        known = sorted(value for value in found if value is not None)
        more = f" and {len(known) - MAX_SHOWN} more" if len(known) > MAX_SHOWN else ""
        raise SettingsError(
            f"other_domain.values: {wrong} do not occur in {list(columns)}; "
            f"there are {known[:MAX_SHOWN]}{more}"
        )


def _is_category(field: pa.Field) -> bool:
    is_key = field.name in ("impression_id", "request_id") or field.name.endswith("_product_id")
    return pa.types.is_string(field.type) and not is_key
