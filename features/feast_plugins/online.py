"""The Feast online store: versioned Arrow files that every server on the machine maps.

``{"type": "driftline.features.feast_plugins.online.SnapshotOnlineStore"}`` in the Feast
configuration. All of Feast's calls work (``materialize``, ``push``, ``write_to_online_store``,
``get_online_features``, aliases); a server uses ``read_arrays`` or ``snapshot.Snapshot`` instead,
which answer in a hundredth of the time because they build no protobuf.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from feast import Entity
from feast.feature_view import FeatureView
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.supported_async_methods import SupportedAsyncMethods
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.type_map import feast_value_type_to_python_type, python_values_to_proto_values
from feast.types import from_feast_to_pyarrow_type
from pydantic import Field, PositiveFloat, StrictStr

from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.features.feast_plugins.keys import Keys
from driftline.features.feast_plugins.merging import RESERVED, online_rows
from driftline.features.feast_plugins.scan import CREATED_US, EVENT_US, KEY, UNKNOWN_US, to_us
from driftline.features.feast_plugins.snapshot import SnapshotReader, SnapshotRows
from driftline.features.feast_plugins.snapshot_writer import SnapshotWriter

OnlineRow = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ARRANGED_TAG = "arranged"
"""Tag of a string feature with few values: ``codes``, for it is arranged as such for look-ups."""
_KEY_KINDS = ("int64_val", "int32_val", "string_val")


class SnapshotOnlineStoreConfig(FeastConfigBaseModel):
    """Settings of the online store in the Feast configuration."""

    type: StrictStr = "driftline.features.feast_plugins.online.SnapshotOnlineStore"
    path: str = "online"
    """Folder of the snapshots, relative to the Feast repository."""
    compact_share: PositiveFloat = 0.002
    """Rows in deltas, as a share of the base, above which they are merged into it: each row of a
    delta is a page of memory of a reader's own. Below 1,000 rows they never are."""
    lock_timeout_s: PositiveFloat = 60.0
    """Longest wait for another writer of the same view."""
    durable: bool = Field(default=True)
    """Survive a power cut as well, not only a killed process; costs a millisecond per write."""


class SnapshotOnlineStore(OnlineStore):
    """Newest (event, created) wins, whatever the order of arrival; readers never wait.

    Values past their time to live are returned with their times, as in Feast's other stores: the
    reader decides. Views have exactly one join key, integers or strings.
    """

    @property
    def async_supported(self) -> SupportedAsyncMethods:
        """Reading is in memory; writing moves to a thread."""
        return SupportedAsyncMethods(read=True, write=True)

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[OnlineRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Write rows that Feast has already turned into protobufs (push, ingestion)."""
        if data:
            _writer(config, table).write(_rows_from_protos(table, data))
        if progress is not None:
            progress(len(data))

    async def online_write_batch_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[OnlineRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Write without holding up the event loop."""
        await asyncio.to_thread(self.online_write_batch, config, table, data, progress)

    def write_arrow(
        self,
        config: RepoConfig,
        table: FeatureView,
        rows: pa.Table,
        *,
        event_column: str,
        created_column: str | None = None,
    ) -> int:
        """Write a table of feature rows without a protobuf per cell; its number of rows.

        Raises:
            FeatureStoreError: a column is missing or does not fit the view's schema.
        """
        features = [
            pa.field(feature.name, from_feast_to_pyarrow_type(feature.dtype))
            for feature in table.features
        ]
        taken = [feature.name for feature in features if feature.name in RESERVED]
        if taken:
            raise FeatureStoreError(f"feature view {table.name} may not have a feature {taken[0]}")
        online = online_rows(
            rows,
            key=join_key(table),
            event_column=event_column,
            created_column=created_column or None,
            features=features,
        )
        _writer(config, table).write(online)
        return len(online)

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """Feature values as Feast wants them; ``(None, None)`` for an unknown product."""
        snapshot = _reader_of(config, table.name).current()
        if snapshot is None:
            return [(None, None)] * len(entity_keys)
        types = {feature.name: feature.dtype.to_value_type() for feature in table.features}
        rows = snapshot.rows([_key_of(key, table.name) for key in entity_keys])
        values = []
        for name in requested_features or list(types):
            # A feature that the view got after the last write is null until the next one.
            known = name in snapshot.names
            column = snapshot.arrow(name, rows).to_pylist() if known else [None] * len(rows)
            values.append((name, python_values_to_proto_values(column, types[name])))
        times = snapshot.event_time_us
        return [
            (None, None)
            if row < 0
            else (
                _EPOCH + timedelta(microseconds=int(times[row])),
                {name: protos[place] for name, protos in values},
            )
            for place, row in enumerate(rows)
        ]

    async def online_read_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """Read from memory, so without giving up the event loop."""
        return self.online_read(config, table, entity_keys, requested_features)

    def read_arrays(
        self,
        config: RepoConfig,
        table: FeatureView | str,
        keys: Keys,
        features: Sequence[str] | None = None,
    ) -> SnapshotRows:
        """The fast path beside Feast's contract; see ``read_arrays``."""
        return read_arrays(config, table, keys, features)

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Remove the folders of deleted views; a kept view's folder comes with its first write."""
        for table in tables_to_delete:
            _writer(config, table).remove()

    def teardown(
        self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]
    ) -> None:
        """Remove the folders of all views."""
        for table in tables:
            _writer(config, table).remove()


def read_arrays(
    source: RepoConfig | Path,
    feature_view: FeatureView | str,
    keys: Keys,
    features: Sequence[str] | None = None,
) -> SnapshotRows:
    """Features of some products as numpy arrays, with their event times.

    Every call looks for a newer version first, which costs microseconds while there is none.

    Args:
        source: The Feast configuration, or the folder of one project's snapshots.
        feature_view: The view or its name.
        keys: Products; unknown ones are reported, not refused.
        features: Names; all of the view by default.

    Raises:
        FeatureStoreError: the view was never written, or lacks a feature.
    """
    name = feature_view if isinstance(feature_view, str) else feature_view.name
    reader = _reader_in(source, name) if isinstance(source, Path) else _reader_of(source, name)
    snapshot = reader.current()
    if snapshot is None:
        raise FeatureStoreError(
            f"feature view {name} has no online rows in {reader.view_dir}; "
            "materialise it or push to it"
        )
    return snapshot.read(keys, features)


def view_dir(config: RepoConfig, feature_view: str) -> Path:
    """Folder of one view's snapshots."""
    return _reader_of(config, feature_view).view_dir


def join_key(table: FeatureView) -> str:
    """The one join key of a view.

    Raises:
        FeatureStoreError: it has none or several.
    """
    names = [column.name for column in table.entity_columns]
    if len(names) != 1 or names[0] == "__dummy_id":
        raise FeatureStoreError(
            f"feature view {table.name} must have exactly one join key, "
            f"got {', '.join(names) or 'none'}; combine them into one column"
        )
    return str(names[0])


@lru_cache(maxsize=256)
def _reader(folder: str) -> SnapshotReader:
    """One reader per folder and process, so that all stores share the mapped files."""
    return SnapshotReader(Path(folder))


def _reader_in(project_dir: Path, feature_view: str) -> SnapshotReader:
    return _reader(f"{project_dir}/{feature_view}")


def _reader_of(config: RepoConfig, feature_view: str) -> SnapshotReader:
    # Text is put together in a tenth of the time of paths, and this is on the way of every read.
    root = config.online_store.path
    if not os.path.isabs(root) and config.repo_path is not None:  # noqa: PTH117
        root = f"{config.repo_path}/{root}"
    return _reader(f"{root}/{config.project}/{feature_view}")


def _writer(config: RepoConfig, table: FeatureView) -> SnapshotWriter:
    settings = config.online_store
    return SnapshotWriter(
        view_dir(config, table.name),
        compact_share=settings.compact_share,
        lock_timeout_s=settings.lock_timeout_s,
        durable=settings.durable,
        categories=[f.name for f in table.features if f.tags.get(ARRANGED_TAG) == "codes"],
    )


def _rows_from_protos(table: FeatureView, data: list[OnlineRow]) -> pa.Table:
    keys = [_key_of(row[0], table.name) for row in data]
    if None in keys:
        raise FeatureStoreError(
            f"row {keys.index(None)} written to feature view {table.name} has no {join_key(table)}"
        )
    columns: dict[str, pa.Array] = {
        KEY: pa.array(keys, pa.string() if isinstance(keys[0], str) else pa.int64()),
        EVENT_US: pa.array([to_us(row[2]) for row in data], pa.int64()),
        CREATED_US: pa.array([_created_us(row[3]) for row in data], pa.int64()),
    }
    for feature in table.features:
        values = [_plain(row[1].get(feature.name)) for row in data]
        columns[feature.name] = pa.array(values, from_feast_to_pyarrow_type(feature.dtype))
    return pa.table(columns)


def _created_us(created: datetime | None) -> int:
    # pandas' "not a time" differs from itself.
    return UNKNOWN_US if created is None or created != created else to_us(created)


def _plain(value: Value | None) -> object:
    return None if value is None else feast_value_type_to_python_type(value)


def _key_of(key: EntityKey, view: str) -> int | str | None:
    """The product of an entity key; ``None`` where the caller gave none."""
    if len(key.entity_values) != 1:
        raise FeatureStoreError(
            f"feature view {view} must be read by exactly one join key, "
            f"got {', '.join(key.join_keys)}"
        )
    kind = key.entity_values[0].WhichOneof("val")
    if kind is None:
        return None
    if kind not in _KEY_KINDS:
        raise FeatureStoreError(
            f"join key {key.join_keys[0]} of feature view {view} must be an integer or a string, "
            f"got {kind}"
        )
    found: int | str = getattr(key.entity_values[0], kind)
    return found
