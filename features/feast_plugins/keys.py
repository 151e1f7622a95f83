"""Product keys: the two kinds there are (integers and strings), and finding their rows fast."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from driftline.features.feast_plugins.columns import plain_numbers
from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.platform.key_directory import WORTH_IT, KeyDirectory, hash_bytes
from driftline.platform.mapped_tables import map_table

Keys: TypeAlias = Iterable[int | str | None] | NDArray[Any]
"""Keys to look up: a list, a numpy array or an Arrow column, all of one kind."""
Rows = NDArray[np.int64]

_MAX_KEY_BYTES = 512
_MAX_SPARSENESS = 8
_DENSE, _TEXTS = "dense_rows.npy", "key_bytes.npy"
_DIRECTORY: Final = ("hashes", "rows", "starts", "width")


def key_type(found: pa.DataType, what: str) -> pa.DataType:
    """The kind of key a column holds: ``int64`` or ``string``.

    Raises:
        FeatureStoreError: it is neither; ``what`` names the column.
    """
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_integer(found):
        return pa.int64()
    if pa.types.is_string(found) or pa.types.is_large_string(found):
        return pa.string()
    if hasattr(pa.types, "is_string_view") and pa.types.is_string_view(found):
        return pa.string()
    raise FeatureStoreError(f"{what} must hold integers or strings, got {found}")


def as_key_type(
    keys: pa.Array | pa.ChunkedArray, wanted: pa.DataType, what: str
) -> pa.Array | pa.ChunkedArray:
    """Keys as ``wanted``; whole floats, pandas' way of writing integers with gaps, are integers.

    Raises:
        FeatureStoreError: the keys are of the other kind; ``what`` names the column.
    """
    if keys.type == wanted:
        return keys
    whole = pa.types.is_floating(keys.type) and wanted == pa.int64()
    if not (pa.types.is_null(keys.type) or whole) and key_type(keys.type, what) != wanted:
        raise FeatureStoreError(
            f"{what} holds {keys.type} but the feature view's key is {wanted}; "
            "convert one of the two"
        )
    try:
        return pc.cast(keys, wanted)
    except pa.ArrowInvalid as error:
        raise FeatureStoreError(f"{what} cannot be read as {wanted}: {error}") from error


class KeyIndex(Protocol):
    """Finds rows by key."""

    def rows(self, keys: Keys) -> Rows:
        """Row of each key, -1 where there is none."""


def build_key_index(keys: pa.Array) -> KeyIndex:
    """Index distinct, non-null keys without a Python object per row."""
    if keys.type == pa.int64():
        numbers = plain_numbers(keys)
        return _DenseIndex(_dense(numbers)) if _is_dense(numbers) else _SortedIntegers(numbers)
    return _SortedStrings(*_sorted(fixed_bytes(keys)))


def save_key_index(keys: pa.Array, folder: Path) -> None:
    """Write the index of ascending, distinct keys as files for :func:`open_key_index`."""
    if keys.type == pa.int64():
        numbers = plain_numbers(keys)
        if _is_dense(numbers):
            np.save(folder / _DENSE, _dense(numbers))
        else:
            _save_directory(KeyDirectory.of(numbers), folder)
        return
    texts = fixed_bytes(keys)
    np.save(folder / _TEXTS, texts)
    if len(texts) >= WORTH_IT:
        hashes = hash_bytes(texts, num_bytes=texts.itemsize)
        _save_directory(KeyDirectory.of_hashes(hashes), folder)


def open_key_index(keys: pa.Array, folder: Path) -> KeyIndex:
    """Map what :func:`save_key_index` wrote: at once, whatever the number of ``keys``."""
    if (folder / _DENSE).exists():
        return _DenseIndex(map_table(folder / _DENSE))
    directory = _open_directory(folder)
    if keys.type == pa.int64():
        if directory is not None:
            return _HashedIntegers(directory)
        return _SortedIntegers(plain_numbers(keys), is_sorted=True)
    texts = map_table(folder / _TEXTS)
    return _SortedStrings(texts) if directory is None else _HashedStrings(texts, directory)


def _is_dense(keys: NDArray[np.int64]) -> bool:
    if not len(keys) or keys.min() < 0:
        return False
    return bool(keys.max() < max(_MAX_SPARSENESS * len(keys), 1 << 20))


def _dense(keys: NDArray[np.int64]) -> NDArray[np.int32]:
    """Row by key, with an entry before the first key and one after the last, to clip to."""
    rows = np.full(int(keys.max()) + 3, -1, np.int32)
    rows[keys + 1] = np.arange(len(keys), dtype=np.int32)
    return rows


def _save_directory(directory: KeyDirectory | None, folder: Path) -> None:
    if directory is not None:
        for name, values in directory.to_arrays().items():
            np.save(folder / f"key_{name}.npy", values)


def _open_directory(folder: Path) -> KeyDirectory | None:
    paths = {name: folder / f"key_{name}.npy" for name in _DIRECTORY}
    if not paths["hashes"].exists():
        return None
    return KeyDirectory.from_arrays({name: map_table(path) for name, path in paths.items()})


class _DenseIndex:
    """Integers close to 0..N: a table from key to row, 4 bytes per possible key."""

    def __init__(self, rows: NDArray[np.int32]) -> None:
        self._row = rows

    def rows(self, keys: Keys) -> Rows:
        numbers, missing = _integers(keys)
        found = self._row.take(numbers + 1, mode="clip").astype(np.int64)
        if missing is not None:
            found[missing] = -1
        return found


class _SortedIntegers:
    """Sparse integers (hashes, for example): binary search."""

    def __init__(self, keys: NDArray[np.int64], *, is_sorted: bool = False) -> None:
        self._sorted = keys
        self._order: Rows | None = None
        if not is_sorted:
            self._sorted, self._order = _sorted(keys)

    def rows(self, keys: Keys) -> Rows:
        numbers, missing = _integers(keys)
        found = _search(self._sorted, self._order, numbers)
        if missing is not None:
            found[missing] = -1
        return found


class _HashedIntegers:
    """Very many sparse integers: a directory of their hashes."""

    def __init__(self, directory: KeyDirectory) -> None:
        self._directory = directory

    def rows(self, keys: Keys) -> Rows:
        numbers, missing = _integers(keys)
        found = self._directory.find(numbers)
        if missing is not None:
            found[missing] = -1
        return found


class _SortedStrings:
    """Strings as fixed-width bytes: binary search by ``memcmp``."""

    def __init__(self, texts: NDArray[np.bytes_], order: Rows | None = None) -> None:
        self._sorted, self._order = texts, order

    def rows(self, keys: Keys) -> Rows:
        texts, missing = _texts_of_width(keys, self._sorted.itemsize)
        found = _search(self._sorted, self._order, texts)
        if missing is not None:
            found[missing] = -1
        return found


class _HashedStrings:
    """Very many strings: a directory of their hashes, and the strings to compare with."""

    def __init__(self, texts: NDArray[np.bytes_], directory: KeyDirectory) -> None:
        self._texts, self._directory = texts, directory

    def rows(self, keys: Keys) -> Rows:
        width = self._texts.itemsize
        texts, missing = _texts_of_width(keys, width)
        if not len(texts):
            return np.empty(0, np.int64)
        found = self._directory.find_hashes(hash_bytes(texts, num_bytes=width))
        found[self._texts.take(found, mode="clip") != texts] = -1
        if missing is not None:
            found[missing] = -1
        return found


def _sorted(keys: NDArray[Any]) -> tuple[NDArray[Any], Rows | None]:
    if len(keys) < 2 or bool(np.all(keys[:-1] < keys[1:])):
        return keys, None
    order = np.argsort(keys, kind="stable")
    return keys[order], order


def _search(haystack: NDArray[Any], order: Rows | None, keys: NDArray[Any]) -> Rows:
    if len(haystack) == 0:
        return np.full(len(keys), -1, np.int64)
    place = np.searchsorted(haystack, keys)
    found: Rows = np.where(haystack.take(place, mode="clip") == keys, place, -1)
    if order is not None:
        found = np.where(found >= 0, order[found], -1)
    return found


def _integers(keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """Keys as integers, and which of them are missing (none: ``None``)."""
    if isinstance(keys, np.ndarray) and keys.dtype == np.int64:
        return keys, None
    if isinstance(keys, (pa.Array, pa.ChunkedArray)):
        column = as_key_type(keys, pa.int64(), "the column of requested keys")
        if not column.null_count:
            return plain_numbers(column), None
        return plain_numbers(column, null=0), np.asarray(column.is_null())
    numbers: NDArray[Any] = np.asarray(keys)
    if numbers.dtype.kind in "iu":
        return numbers.astype(np.int64, copy=False), None
    if len(numbers) == 0:
        return np.empty(0, np.int64), None
    if numbers.dtype.kind == "O":
        missing = np.array([key is None for key in numbers])
        if all(isinstance(key, int | np.integer) for key in numbers[~missing]):
            return np.where(missing, 0, numbers).astype(np.int64), missing
    raise FeatureStoreError(
        f"keys of this view are integers, got {numbers.dtype} such as {numbers.flat[0]!r}"
    )


def _texts(keys: Keys) -> tuple[NDArray[np.bytes_], NDArray[np.bool_] | None]:
    """Keys as bytes, and which of them are missing (none: ``None``)."""
    if isinstance(keys, (pa.Array, pa.ChunkedArray)):
        listed = as_key_type(keys, pa.string(), "the column of requested keys").to_pylist()
    else:
        listed = keys.tolist() if isinstance(keys, np.ndarray) else list(keys)
    try:
        return np.array([key.encode() for key in listed], np.bytes_), None
    except AttributeError:
        for key in listed:
            if key is not None and not isinstance(key, str):
                raise FeatureStoreError(
                    f"keys of this view are strings, got {type(key).__name__} such as {key!r}"
                ) from None
    missing = np.array([key is None for key in listed])
    return np.array([(key or "").encode() for key in listed], np.bytes_), missing


def _texts_of_width(keys: Keys, width: int) -> tuple[NDArray[np.bytes_], NDArray[np.bool_] | None]:
    """Keys as bytes of an index's width; one longer than all of its own counts as missing."""
    texts, missing = _texts(keys)
    if texts.itemsize > width:
        # It must not match by its first bytes.
        too_long = np.char.str_len(texts) > width
        missing = too_long if missing is None else missing | too_long
        texts = texts.astype(f"S{width}")
    return texts, missing


def fixed_bytes(keys: pa.Array) -> NDArray[np.bytes_]:
    """Strings as one array of zero-padded bytes, without a Python object per key."""
    lengths = plain_numbers(pc.binary_length(keys))
    width = max(int(lengths.max(initial=0)), 1)
    if width > _MAX_KEY_BYTES:
        raise FeatureStoreError(
            f"a product key may have at most {_MAX_KEY_BYTES} bytes, got one of {width}; "
            "use a shorter identifier"
        )
    offsets = np.frombuffer(keys.buffers()[1], np.int32)[keys.offset :][: len(keys) + 1]
    padded = np.zeros((len(keys), width), np.uint8)
    if len(keys) and offsets[-1] > offsets[0]:
        data = np.frombuffer(keys.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
        if not data.all():
            raise FeatureStoreError("a product key may not contain the character NUL")
        padded[np.arange(width) < lengths[:, None]] = data
    return padded.view(f"S{width}").ravel()
