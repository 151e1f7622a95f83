"""Draws of whole requests, without and with replacement."""

import hashlib

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from driftline.platform.errors import EmptyWindowError, SettingsError
from driftline.platform.sampling import request_keys, unit_hash

Key = tuple[str | int | None, ...]
"""What makes a draw different from all others: its purpose, the seed, perhaps a size."""


def wanted_rows(frame: pa.Table, *, share: float, num_rows: int | None) -> int:
    """The size asked for, as a number of rows; at least 1.

    Raises:
        SettingsError: there are fewer rows than asked for.
        EmptyWindowError: there are none.
    """
    if frame.num_rows == 0:
        raise EmptyWindowError(
            "a transfer set needs rows to be made from, and there are none; "
            "take a longer window, or another domain or period"
        )
    if num_rows is None:
        return max(1, round(share * frame.num_rows))
    if num_rows > frame.num_rows:
        raise SettingsError(
            f"num_rows of a transfer set must be at most the {frame.num_rows} rows there are, "
            f"got {num_rows}; kind bootstrap draws a larger set from a small one"
        )
    return num_rows


def without_replacement(frame: pa.Table, wanted: int, *, key: Key) -> NDArray[np.bool_]:
    """Rows of a random choice of requests, as near to ``wanted`` rows as whole requests allow.

    With equal keys, the rows for a smaller ``wanted`` are among those for a larger one: requests
    are taken in the order of their hash. ``[N]``.
    """
    place_N = unit_hash(request_keys(frame), salt=_digest(key, size=16))
    places, sizes = np.unique(place_N, return_counts=True)
    last = _nearest(np.cumsum(sizes), wanted)
    chosen: NDArray[np.bool_] = place_N <= places[last]
    return chosen


def with_replacement(frame: pa.Table, wanted: int, *, key: Key) -> NDArray[np.int64]:
    """Row numbers of requests drawn again and again, ascending; about ``wanted`` of them."""
    place_N = unit_hash(request_keys(frame), salt="driftline-boot")
    _, request_N = np.unique(place_N, return_inverse=True)
    order_N = np.argsort(request_N, kind="stable")
    sizes = np.bincount(request_N)
    starts = np.cumsum(sizes) - sizes
    generator = random_of(key)
    drawn = generator.integers(0, len(sizes), size=wanted)  # each request has a row or more
    drawn = drawn[: _nearest(np.cumsum(sizes[drawn]), wanted) + 1]
    rows = [order_N[starts[request] : starts[request] + sizes[request]] for request in drawn]
    return np.sort(np.concatenate(rows))


def random_of(key: Key) -> np.random.Generator:
    """A stream of random numbers that no other key has."""
    return np.random.default_rng(int(_digest(key, size=16), 16))


def _digest(key: Key, *, size: int) -> str:
    return hashlib.blake2b(repr(key).encode(), digest_size=size // 2).hexdigest()


def _nearest(totals: NDArray[np.int64], wanted: int) -> int:
    """Index of the ascending total nearest to ``wanted``."""
    return int(np.abs(totals - wanted).argmin())
