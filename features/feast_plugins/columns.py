"""Arrow columns as numpy arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Column = NDArray[Any]
Matrix = NDArray[np.floating[Any]]


def is_number(kind: pa.DataType) -> bool:
    """Whether values of this type are plain numbers (or yes and no)."""
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def plain_numbers(values: pa.Array | pa.ChunkedArray, *, null: float | None = None) -> Column:
    """Integers or floats as numpy, a view of Arrow's own memory where nothing is null.

    Arrow's own ``to_numpy`` imports pandas, which costs a server seconds at its start and memory.

    Args:
        values: One type of number, no booleans.
        null: Stands for what is null; there must be nothing null without it.
    """
    if null is not None and values.null_count:
        values = values.fill_null(null)
    assert not values.null_count, "nulls need a number that stands for them"
    if isinstance(values, pa.ChunkedArray):
        values = values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
    kind = np.dtype({"float": "f4", "double": "f8"}.get(str(values.type), str(values.type)))
    if not len(values):
        return np.empty(0, kind)
    return np.frombuffer(values.buffers()[1], kind)[values.offset :][: len(values)]


def arrow_rows(rows: NDArray[np.int64]) -> pa.Array:
    """Row numbers for Arrow's ``take``; ``pa.array`` would import pandas, too."""
    whole = np.ascontiguousarray(rows, np.int64)
    return pa.Array.from_buffers(pa.int64(), len(whole), [None, pa.py_buffer(whole)])


def as_numpy(values: pa.ChunkedArray) -> Column:
    """A column as numpy, without a copy where it is one chunk of numbers without nulls.

    Numbers keep their type and have NaN for null (integers with nulls become ``float64``); lists
    of one length become ``[N, D]``; everything else becomes Python objects.
    """
    kind = values.type
    if is_number(kind):
        if pa.types.is_boolean(kind):
            values = values.cast(pa.int8())
        return values.to_numpy()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _list_column(values)
    return np.array(values.to_pylist(), object)


def matrix_type(kinds: Sequence[pa.DataType]) -> np.dtype[Any]:
    """``float32``, or ``float64`` where one of the columns needs it."""
    return np.result_type(np.float32, *(np.dtype(kind.to_pandas_dtype()) for kind in kinds))


def side_by_side(table: pa.Table, names: Sequence[str], dtype: np.dtype[Any]) -> Matrix:
    """Number columns as one matrix; NaN for null and for a column that is not there. ``[N, F]``."""
    matrix = np.full((len(table), len(names)), np.nan, dtype)
    for place, name in enumerate(names):
        if name in table.column_names:
            matrix[:, place] = as_numpy(table.column(name))
    return matrix


def _list_column(values: pa.ChunkedArray) -> Column:
    """Lists as ``[N, D]`` if all have one length, else one array (or ``None``) per row."""
    column = values.combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    if len(column) and not column.null_count and len(flat) % len(column) == 0:
        lengths = np.asarray(column.value_lengths())
        if (lengths == lengths[0]).all():
            return flat.reshape(len(column), -1)
    found = np.empty(len(column), object)
    for row, value in enumerate(column):
        found[row] = value.values.to_numpy(zero_copy_only=False) if value.is_valid else None
    return found
