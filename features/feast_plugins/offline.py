"""The Feast offline store: every training row with the feature values of its own moment.

``{"type": "driftline.features.feast_plugins.offline.AsofOfflineStore"}`` in the Feast
configuration. Feast's own stores either lose or misplace rows (dask, Ray) or join every row inside
the time to live before they choose one, through one connection for the whole process (DuckDB).
"""

from collections.abc import Sequence
from datetime import datetime

import pandas as pd
import pyarrow as pa
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.feature_view import FeatureView
from feast.infra.offline_stores.duckdb import DuckDBOfflineStore, DuckDBOfflineStoreConfig
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from pydantic import PositiveInt, StrictStr

from driftline.features.feast_plugins.asof import Int64s
from driftline.features.feast_plugins.entities import (
    event_microseconds,
    moment,
    time_column,
    to_arrow,
)
from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.features.feast_plugins.history import newest_rows
from driftline.features.feast_plugins.joins import JoinPlan, ViewJoin, join_features
from driftline.features.feast_plugins.retrieval import AsofRetrievalJob
from driftline.features.feast_plugins.scan import (
    UNKNOWN_US,
    DuckDbSettings,
    FeatureSource,
    SourceScan,
    TimeRange,
    connect,
    locate,
    to_us,
)


class AsofOfflineStoreConfig(DuckDBOfflineStoreConfig):
    """Settings of the offline store in the Feast configuration."""

    type: StrictStr = "driftline.features.feast_plugins.offline.AsofOfflineStore"
    threads: PositiveInt | None = None
    """Threads of one retrieval; all cores by default."""
    memory_limit: str = "4GB"
    """What DuckDB may hold while it reads, per retrieval; above it, it spills to disk."""
    temp_directory: str | None = None
    """Where it spills; the system's temporary directory by default."""
    slice_rows: PositiveInt = 500_000
    """Entity rows joined at a time. Smaller slices take less memory and a little longer."""
    ray: bool = False
    """Join slices as Ray tasks if this process is connected to Ray; otherwise here, same rows."""
    materialize_as_known: bool = False
    """Materialise only rows that were written by the end of the window, as a replay of the past
    needs; otherwise, as in Feast's own stores, a later correction of an older row counts too."""


class AsofOfflineStore(DuckDBOfflineStore):
    """Exact point-in-time joins over Parquet: one row out per entity row in, in its place.

    A value counts from its event time until its view's time to live is over, both ends included; of
    equal event times the one created last counts. With ``filter_by_created_timestamp`` a value
    counts only from its created time on, as a replay of the past needs. Times are compared in whole
    microseconds. Views have exactly one join key, integers or strings. Entity columns come back
    untouched, and from a ``pyarrow.Table`` they are not even copied.
    """

    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | pa.Table | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """Plan a join; it runs when the job is read.

        Raises:
            FeatureStoreError: the request cannot be answered (on-demand views, several join keys,
                no entity table, two columns of one name).
        """
        if not isinstance(entity_df, pd.DataFrame | pa.Table):
            raise FeatureStoreError(
                "entity_df must be a pandas DataFrame or a pyarrow Table with one row per "
                f"impression, got {type(entity_df).__name__}; to read a range of dates without "
                "entities use pull_all_from_table_or_query"
            )
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        if on_demand:
            raise FeatureStoreError(
                f"on-demand feature views {', '.join(sorted(view.name for view in on_demand))} are "
                "not supported; compute crossed features in the model's own preprocessing"
            )
        views = tuple(
            _view_join(config, view, feature_refs, full=full_feature_names)
            for view in feature_views
        )
        entities = to_arrow(entity_df)
        _check_names(entities, views)
        times = time_column(entities.schema)
        at_us = event_microseconds(entities.column(times), times)
        settings = config.offline_store
        plan = JoinPlan(
            views=views,
            as_known=filter_by_created_timestamp,
            duckdb=_duckdb_settings(config),
            slice_rows=settings.slice_rows,
        )

        def run() -> pa.Table:
            features = (_spread if settings.ray else join_features)(entities, at_us, plan)
            joined = entities
            for name in features.column_names:
                joined = joined.append_column(name, features.column(name))
            return joined

        known = at_us[at_us != UNKNOWN_US]
        return AsofRetrievalJob(
            run,
            config=config,
            full_feature_names=full_feature_names,
            metadata=RetrievalMetadata(
                features=feature_refs,
                keys=[name for name in entities.column_names if name != times],
                min_event_timestamp=moment(int(known.min())) if len(known) else None,
                max_event_timestamp=moment(int(known.max())) if len(known) else None,
            ),
        )

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """Plan the newest row of each product in a closed range of event time."""
        created = created_timestamp_column or None
        source = FeatureSource(
            location=_location(config, data_source),
            key_column=_only_key(join_key_columns, data_source.name),
            event_column=timestamp_field,
            created_column=created,
        )
        columns = [*feature_name_columns, timestamp_field, *([created] if created else [])]
        within = (to_us(start_date), to_us(end_date))

        def run() -> pa.Table:
            newest = newest_rows(
                source,
                columns,
                within,
                _duckdb_settings(config),
                as_known=config.offline_store.materialize_as_known,
            )
            return newest.select([*join_key_columns, *columns])

        return AsofRetrievalJob(run, config=config)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """Plan all rows in a closed range of event time; an end that is not given is open."""
        created = created_timestamp_column or None
        location = _location(config, data_source)
        columns = list(
            dict.fromkeys(
                [
                    *join_key_columns,
                    *feature_name_columns,
                    timestamp_field,
                    *([created] if created else []),
                ]
            )
        )
        within = TimeRange(
            None if start_date is None else to_us(start_date),
            None if end_date is None else to_us(end_date),
        )

        def run() -> pa.Table:
            with connect(_duckdb_settings(config)) as connection:
                scan = SourceScan(connection, location, event_column=timestamp_field)
                return scan.read(columns, times=[], within=within).read_all()

        return AsofRetrievalJob(run, config=config)


def _spread(entities: pa.Table, at_us: Int64s, plan: JoinPlan) -> pa.Table:
    # Ray takes seconds to import, and a store without it should not pay for that.
    import ray

    from driftline.features.feast_plugins.slices import historical_slices

    if not ray.is_initialized() or len(at_us) <= plan.slice_rows:
        return join_features(entities, at_us, plan)
    return historical_slices(entities, at_us, plan, num_cpus=plan.duckdb.threads or 1)


def _duckdb_settings(config: RepoConfig) -> DuckDbSettings:
    settings = config.offline_store
    return DuckDbSettings(
        threads=settings.threads,
        memory_limit=settings.memory_limit,
        temp_directory=settings.temp_directory,
    )


def _view_join(
    config: RepoConfig, view: FeatureView, feature_refs: Sequence[str], *, full: bool
) -> ViewJoin:
    source = view.batch_source
    label = view.projection.name_to_use()
    in_file = {new: old for old, new in (source.field_mapping or {}).items()}
    key = _only_key([column.name for column in view.entity_columns], label)
    wanted = [ref.split(":", 1)[1] for ref in feature_refs if ref.split(":", 1)[0] == label]
    prefix = f"{view.projection.name_alias or view.name}__" if full else ""
    created = source.created_timestamp_column or None
    return ViewJoin(
        label=label,
        source=FeatureSource(
            location=_location(config, source),
            key_column=in_file.get(key, key),
            event_column=in_file.get(source.timestamp_field, source.timestamp_field),
            created_column=None if created is None else in_file.get(created, created),
        ),
        entity_key=view.projection.join_key_map.get(key, key),
        columns=tuple((in_file.get(name, name), prefix + name) for name in wanted),
        ttl_us=0 if view.ttl is None else int(view.ttl.total_seconds() * 1_000_000),
    )


def _location(config: RepoConfig, source: DataSource) -> str:
    if not isinstance(source, FileSource) or not (
        source.file_format is None or isinstance(source.file_format, ParquetFormat)
    ):
        raise FeatureStoreError(
            f"source {source.name} must be a FileSource of Parquet files, "
            f"got {type(source).__name__}"
        )
    return locate(source.path, repo_path=config.repo_path)


def _only_key(keys: Sequence[str], what: str) -> str:
    if len(keys) != 1 or keys[0] == "__dummy_id":
        raise FeatureStoreError(
            f"{what} must have exactly one join key, got {', '.join(keys) or 'none'}; "
            "write a column that combines them and use it as the entity's key"
        )
    return keys[0]


def _check_names(entities: pa.Table, views: Sequence[ViewJoin]) -> None:
    taken = set(entities.column_names)
    for view in views:
        for _, name in view.columns:
            if name in taken:
                raise FeatureStoreError(
                    f"column {name} of {view.label} is already in the result; "
                    "ask for full_feature_names=True or rename the entity column"
                )
            taken.add(name)
