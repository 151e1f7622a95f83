"""Feast's Redis layout by its bytes: one hash a key, one field a feature, protobuf values.

A hash is named by the serialised join key (version 3) and the project; it holds, for every view of
that key, ``_ts:VIEW`` and a field for each feature, named by a hash of view and feature. Feast
reads it a view at a time through protobuf objects; here one HMGET a key asks for all views, and the
values are decoded from the bytes, numbers all at once. ``tests/features/test_redis_wire.py`` holds
both against each other.
"""

import struct
from collections.abc import Sequence
from typing import Final

import mmh3
import numpy as np
from numpy.typing import NDArray

from driftline.features.feast_plugins.errors import FeatureStoreError

Cell = bytes | None
"""A field of a hash: a serialised ``feast.types.Value``, empty for null, none where not written."""

_STRING_TYPE, _INT64_TYPE = 2, 4
"""``feast.types.ValueType``."""
_STRING_TAG, _INT64_TAG, _FLOAT_TAG = 0x12, 0x20, 0x35
"""Field number and wire type of ``string_val``, ``int64_val``, ``float_val`` in ``Value``."""
_FLOAT: Final = np.dtype([("tag", "u1"), ("value", "<f4")])
_NAN: Final = bytes([_FLOAT_TAG]) + struct.pack("<f", float("nan"))
_MAX_VARINT: Final = 10


class HashKeys:
    """Names of the hashes of one join key, for integers and strings.

    Args:
        join_key: Name of the key column.
        project: Feast's project.
    """

    def __init__(self, join_key: str, project: str) -> None:
        name = join_key.encode()
        self._head = struct.pack("<III", 1, _STRING_TYPE, len(name)) + name
        self._tail = project.encode()

    def name(self, key: int | str) -> bytes:
        """Name of the hash of a key, as ``serialize_entity_key`` and Feast's store make it."""
        if isinstance(key, str):
            text = key.encode()
            return self._head + struct.pack("<II", _STRING_TYPE, len(text)) + text + self._tail
        return self._head + struct.pack("<IIq", _INT64_TYPE, 8, key) + self._tail


def field_name(view: str, feature: str) -> bytes:
    """Field of a feature: the murmur hash of its full name, 4 bytes little-endian."""
    return struct.pack("<I", mmh3.hash(f"{view}:{feature}", signed=False))


def time_field(view: str) -> bytes:
    """Field of the event time of a view's values."""
    return b"_ts:" + view.encode()


def command(*parts: bytes) -> bytes:
    """A Redis command as it travels."""
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in parts)


def floats(cells: Sequence[Cell]) -> NDArray[np.float32]:
    """Numbers of cells; NaN for null and for what is not there. ``[K]``.

    Raises:
        FeatureStoreError: a cell holds something else.
    """
    joined = b"".join([cell or _NAN for cell in cells])
    if len(joined) != len(cells) * len(_NAN):
        raise FeatureStoreError(_complaint("a number", cells, len(_NAN)))
    read = np.frombuffer(joined, _FLOAT)
    if (read["tag"] != _FLOAT_TAG).any():
        raise FeatureStoreError("a feature in Redis is no number; materialise the views again")
    return np.asarray(read["value"])


def integers(cells: Sequence[Cell], *, missing: int) -> NDArray[np.int64]:
    """Integers of cells; ``missing`` for null and for what is not there. ``[K]``.

    Raises:
        FeatureStoreError: a cell holds something else.
    """
    width = 1 + _MAX_VARINT
    if any(cell and (cell[0] != _INT64_TAG or len(cell) > width) for cell in cells):
        raise FeatureStoreError("a feature in Redis is no integer; materialise the views again")
    joined = b"".join([(cell or b"").ljust(width, b"\0") for cell in cells])
    digits = np.frombuffer(joined, np.uint8).reshape(len(cells), width)[:, 1:].astype(np.uint64)
    shifts = np.arange(0, 7 * _MAX_VARINT, 7, dtype=np.uint64)
    values = ((digits & np.uint64(0x7F)) << shifts).sum(axis=1, dtype=np.uint64).view(np.int64)
    return np.where([bool(cell) for cell in cells], values, missing)


def text(cell: Cell) -> str | None:
    """The string of a cell; none for null and for what is not there.

    Raises:
        FeatureStoreError: the cell holds something else.
    """
    if not cell:
        return None
    if cell[0] != _STRING_TAG:
        raise FeatureStoreError("a feature in Redis is no string; materialise the views again")
    _, start = _varint(cell, 1)
    return cell[start:].decode()


def event_us(cell: bytes) -> int:
    """Microseconds after 1970 of a serialised ``google.protobuf.Timestamp``."""
    seconds = nanoseconds = place = 0
    while place < len(cell):
        tag = cell[place]
        value, place = _varint(cell, place + 1)
        if tag == 0x08:
            seconds = value - (1 << 64) if value >> 63 else value
        elif tag == 0x10:
            nanoseconds = value
    return seconds * 1_000_000 + nanoseconds // 1_000


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A variable-length integer, and where it ends."""
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7


def _complaint(what: str, cells: Sequence[Cell], size: int) -> str:
    wrong = next(cell for cell in cells if cell and len(cell) != size)
    return (
        f"a feature in Redis should be {what}, got the {len(wrong)} bytes {wrong[:12].hex()}; "
        "materialise the views again"
    )
