"""Finds the rows of keys among tens of millions, from mapped arrays, in microseconds for a hundred.

Binary search over ten million keys is a chain of two dozen cache misses, one after the other. Here
keys are hashed by a bijection and sorted by hash, and the first bits of a hash say where its few
neighbours lie: three gathers, in which the misses of all keys overlap. 14 to 18 bytes a key, in
files that all processes of a node share.

Shape suffixes: K requested keys, N keys, P buckets, W the fullest bucket.
"""

from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

WORTH_IT: Final = 250_000
"""Keys from which on a directory is faster than binary search."""
MAX_BUCKET: Final = 64
_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True, eq=False)
class KeyDirectory:
    """Rows by 64-bit key; thread-safe, nothing changes."""

    hashes: Hashes
    """Ascending. ``[N]``."""
    rows: NDArray[np.int32]
    """Row of the key with that hash. ``[N]``."""
    starts: NDArray[np.int32]
    """Where the hashes that begin with certain bits begin. ``[P + 1]``."""
    width: int
    """Hashes in the fullest bucket."""

    @classmethod
    def of(cls, keys: NDArray[np.int64]) -> Self | None:
        """A directory of distinct keys; ``None`` where it would not be worth it."""
        return cls.of_hashes(hash_integers(keys)) if len(keys) >= WORTH_IT else None

    @classmethod
    def of_hashes(cls, hashes_N: Hashes) -> Self | None:
        """The same for hashes; ``None`` if two are equal or one bucket is far too full."""
        order_N = np.argsort(hashes_N)
        sorted_N = hashes_N[order_N]
        bits = max(int(np.ceil(np.log2(max(len(hashes_N), 2) / 2))), 1)
        firsts_P = np.arange(1, 1 << bits, dtype=np.uint64) << np.uint64(64 - bits)
        starts = np.concatenate([[0], np.searchsorted(sorted_N, firsts_P), [len(sorted_N)]])
        width = int(np.diff(starts).max())
        if width > MAX_BUCKET or bool((sorted_N[1:] == sorted_N[:-1]).any()):
            return None
        return cls(sorted_N, order_N.astype(np.int32), starts.astype(np.int32), max(width, 1))

    def find(self, keys_K: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row of each key, -1 where there is none. ``[K]``."""
        return self.find_hashes(hash_integers(keys_K))

    def find_hashes(self, hashes_K: Hashes) -> NDArray[np.int64]:
        """The same by hash."""
        if not len(self.hashes):
            return np.full(len(hashes_K), -1, np.int64)
        bits = (len(self.starts) - 1).bit_length() - 1
        starts_K = self.starts.take(hashes_K >> np.uint64(64 - bits))
        near_KW = starts_K[:, None] + np.arange(self.width)
        hit_KW = self.hashes.take(near_KW, mode="clip") == hashes_K[:, None]
        place_K = hit_KW.argmax(axis=1)
        rows_K = self.rows.take(starts_K + place_K, mode="clip").astype(np.int64)
        rows_K[~hit_KW.any(axis=1)] = -1
        return rows_K

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """What a file holds; signed, because other tools know no unsigned 64-bit tensors."""
        width = np.array([self.width], np.int32)
        hashes = self.hashes.view(np.int64)
        return {"hashes": hashes, "rows": self.rows, "starts": self.starts, "width": width}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Self:
        """From what :meth:`to_arrays` gave, mapped."""
        hashes = np.asarray(arrays["hashes"]).view(np.uint64)
        rows, starts = np.asarray(arrays["rows"]), np.asarray(arrays["starts"])
        return cls(hashes, rows, starts, int(arrays["width"][0]))


def hash_integers(keys: NDArray[np.int64]) -> Hashes:
    """Well-mixed bits of each key; different keys have different hashes. ``[K]``."""
    return _mix(keys.astype(np.int64, copy=False).view(np.uint64).copy())


def hash_bytes(keys: NDArray[np.bytes_], *, num_bytes: int) -> Hashes:
    """Hash of byte strings of at most ``num_bytes``, shorter ones filled with zeros. ``[K]``.

    Two strings may share one: whoever finds a row by it compares the strings.
    """
    words = -(-num_bytes // 8)
    padded = keys.astype(f"S{8 * words}").view(np.uint64).reshape(len(keys), words)
    hashes = np.zeros(len(keys), np.uint64)
    for word in range(words):
        hashes = _mix(hashes ^ padded[:, word])
    return hashes


def _mix(bits: Hashes) -> Hashes:
    """Two rounds of xor-shift and multiplication, in place; each step can be undone."""
    bits ^= bits >> np.uint64(32)
    bits *= _FIRST
    bits ^= bits >> np.uint64(29)
    bits *= _SECOND
    return bits
