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
