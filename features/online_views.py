"""Newest values of one view by key, as arrays: from the embedded snapshot, or through Feast.

Shape suffixes: K requested keys, N keys of a snapshot, F numeric features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from driftline.features.feast_plugins.arranged import code_strings, no_codes
from driftline.features.feast_plugins.keys import Keys
from driftline.features.feast_plugins.snapshot import Snapshot, current_version
from driftline.features.views import NO_TEXT, TEXT_ID, View

if TYPE_CHECKING:
    from feast import FeatureStore

Key = int | str


@dataclass(frozen=True, eq=False)
class ViewTable:
    """Newest values of a view by slot; the last slot, also at -1, is that of a missing key."""

    event_us: NDArray[np.int64]
    """Event time in microseconds; without meaning in the last slot. ``[N + 1]``."""
    numbers: NDArray[np.float32]
    """NaN where missing. ``[N + 1, F]``."""
    categories: Mapping[str, tuple[NDArray[np.int32], NDArray[np.object_]]]
    """For each category: codes ``[N + 1]``, -1 where missing, and the strings that they stand for,
    whose last entry is ``None``."""
    text_id: NDArray[np.int64] | None
    """``NO_TEXT`` where missing. ``[N + 1]``."""


@dataclass(frozen=True)
class Found:
    """Where the requested keys stand in a table: -1 where they do not. ``[K]``."""

    table: ViewTable
    slots: NDArray[np.int64]


@dataclass(frozen=True)
class Wanted:
    """The features that a head reads of one view; the texts themselves are never loaded."""

    view: View
    numbers: tuple[str, ...]
    categories: tuple[str, ...]
    text_id: bool


class OnlineVersion(Protocol):
    """What all views hold at one moment, for one request."""

    @property
    def as_of(self) -> datetime | None:
        """Moment up to which the store is known to be complete; ``None`` before the first time."""

    def products(self, keys: Keys) -> Mapping[str, Found] | None:
        """Every view of products by name, in the order of ``keys``; ``None`` with no store."""

    def group(self, view: View, keys: Sequence[Key | None]) -> Found | None:
        """One view of categories; the same."""

    def tables(self) -> Sequence[ViewTable]:
        """Those that many requests will look into."""

    def view_version(self, name: str) -> str | None:
        """Changes with every write; ``None`` before the first, or when it cannot be known."""


class SnapshotLookup:
    """One immutable version of a view, mapped."""

    def __init__(self, wanted: Wanted, snapshot: Snapshot | None) -> None:
        """Take the columns of the wanted features."""
        self.wanted = wanted
        self.snapshot = snapshot
        self.table = empty_table(wanted) if snapshot is None else _table(wanted, snapshot)

    @classmethod
    def open(
        cls, folder: Path, wanted: Wanted, *, since: "SnapshotLookup | None" = None
    ) -> "SnapshotLookup":
        """The current version of a view's folder, or ``since`` when it is still current."""
        old = None if since is None else since.snapshot
        if current_version(folder) is None:
            return since or cls(wanted, None)
        snapshot = Snapshot.open(folder, since=old)
        if since is not None and snapshot is old:
            return since
        return cls(wanted, snapshot)

    def version(self) -> str | None:
        """Version of the snapshot."""
        return None if self.snapshot is None else self.snapshot.version

    def find(self, keys: Keys) -> Found:
        """Slots in the order of ``keys``, in microseconds."""
        if self.snapshot is None:
            return Found(self.table, np.full(_length(keys), -1))
        return Found(self.table, self.snapshot.rows(keys))


@dataclass(frozen=True)
class SnapshotVersion:
    """What requests see of the embedded store; never changed, only replaced."""

    lookups: Mapping[str, SnapshotLookup]
    as_of: datetime | None

    def products(self, keys: Keys) -> Mapping[str, Found] | None:
        """All views of products."""
        return {
            name: lookup.find(keys)
            for name, lookup in self.lookups.items()
            if lookup.wanted.view.entity == "product"
        }

    def equals(self, other: "SnapshotVersion") -> bool:
        """Whether both hold the very same snapshots."""
        same = (other.lookups[name] is lookup for name, lookup in self.lookups.items())
        return self.as_of == other.as_of and all(same)

    def group(self, view: View, keys: Keys) -> Found | None:
        """A view of categories."""
        return self.lookups[view.name].find(keys)

    def tables(self) -> Sequence[ViewTable]:
        """Of all views."""
        return [lookup.table for lookup in self.lookups.values()]

    def view_version(self, name: str) -> str | None:
        """Version of a view's snapshot."""
        return self.lookups[name].version()


class FeastLookup:
    """A view read through Feast's own ``get_online_features``: any online store, slowly."""

    def __init__(self, wanted: Wanted, store: "FeatureStore") -> None:
        """Keep the store; nothing is read yet."""
        self._wanted = wanted
        self._store = store

    def version(self) -> str | None:
        """Unknown: Feast's stores do not tell when they were written."""
        return None

    def find(self, keys: Keys) -> Found:
        """A table of the requested keys alone; milliseconds a call."""
        wanted = self._wanted
        keys = keys.tolist() if isinstance(keys, np.ndarray) else list(keys)
        names = [*wanted.numbers, *wanted.categories, *_text(wanted)]
        present = np.array([key is not None for key in keys], bool)
        found: dict[str, list[Any]] = {name: [None] * len(keys) for name in names}
        event_us = np.zeros(len(keys), np.int64)
        known = np.zeros(len(keys), bool)
        rows = np.flatnonzero(present).tolist()
        if rows and names:
            response = self._store.get_online_features(
                features=[f"{wanted.view.name}:{name}" for name in names],
                entity_rows=[{wanted.view.join_key: keys[row]} for row in rows],
            ).proto
            # Stores disagree on what they report as present; a row of theirs has an event time.
            for name, result in zip(
                response.metadata.feature_names.val, response.results, strict=True
            ):
                if name not in found:
                    continue
                for row, value, moment in zip(
                    rows, result.values, result.event_timestamps, strict=True
                ):
                    micros = moment.ToMicroseconds()
                    if micros > 0:
                        known[row], event_us[row] = True, micros
                        kind = value.WhichOneof("val")
                        found[name][row] = None if kind is None else getattr(value, kind)
        numbers = np.full((len(keys) + 1, len(wanted.numbers)), np.nan, np.float32)
        for place, name in enumerate(wanted.numbers):
            numbers[:-1, place] = [np.nan if value is None else value for value in found[name]]
        ids = [NO_TEXT if value is None else value for value in found.get(TEXT_ID, [])]
        table = ViewTable(
            event_us=np.append(event_us, 0),
            numbers=numbers,
            categories={
                name: code_strings(pa.chunked_array([pa.array(found[name], pa.string())]))
                for name in wanted.categories
            },
            text_id=np.array([*ids, NO_TEXT], np.int64) if wanted.text_id else None,
        )
        return Found(table, np.where(known, np.arange(len(keys)), -1))


def _length(keys: Keys) -> int:
    assert isinstance(keys, Sequence | np.ndarray)
    return len(keys)


def _table(wanted: Wanted, snapshot: Snapshot) -> ViewTable:
    """A snapshot's columns: mapped, so that nothing of their size is read or copied."""
    arranged = snapshot.arranged([*wanted.numbers, *wanted.categories, *_text(wanted)])
    return ViewTable(
        event_us=arranged.event_us,
        numbers=arranged.side_by_side(wanted.numbers),
        categories={name: arranged.categories[name] for name in wanted.categories},
        text_id=arranged.integers[TEXT_ID] if wanted.text_id else None,
    )


def empty_table(wanted: Wanted) -> ViewTable:
    """A table without a key, for a view that was never materialised or cannot be read."""
    return ViewTable(
        event_us=np.zeros(1, np.int64),
        numbers=np.full((1, len(wanted.numbers)), np.nan, np.float32),
        categories={name: no_codes() for name in wanted.categories},
        text_id=np.full(1, NO_TEXT, np.int64) if wanted.text_id else None,
    )


def _text(wanted: Wanted) -> tuple[str, ...]:
    return (TEXT_ID,) if wanted.text_id else ()
