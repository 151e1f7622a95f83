"""The Feast materialisation engine: offline rows to an online snapshot as Arrow, all the way.

``{"type": "driftline.features.feast_plugins.engine.SnapshotComputeEngine"}`` as ``batch_engine``.
Feast's own engines turn every cell into a protobuf, and one of them reports success when a write
fails; here an error is raised, so Feast does not move the watermark.
"""

import logging
import time
from typing import Any

from feast.infra.common.materialization_job import MaterializationJobStatus, MaterializationTask
from feast.infra.compute_engines.local.compute import LocalComputeEngine, LocalComputeEngineConfig
from feast.infra.compute_engines.local.job import LocalMaterializationJob
from feast.infra.registry.base_registry import BaseRegistry
from feast.utils import _get_column_names
from pydantic import StrictStr

from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.features.feast_plugins.online import SnapshotOnlineStore

logger = logging.getLogger(__name__)


class SnapshotComputeEngineConfig(LocalComputeEngineConfig):
    """Settings of the engine in the Feast configuration; it has none of its own."""

    type: StrictStr = "driftline.features.feast_plugins.engine.SnapshotComputeEngine"


class SnapshotComputeEngine(LocalComputeEngine):
    """Materialises plain feature views into ``SnapshotOnlineStore``; any offline store will do."""

    def __init__(self, **settings: Any) -> None:
        """Take Feast's settings.

        Raises:
            FeatureStoreError: the online store is another one.
        """
        settings.pop("type", None)
        super().__init__(**settings)
        if self.online_store is not None and not isinstance(self.online_store, SnapshotOnlineStore):
            raise FeatureStoreError(
                "SnapshotComputeEngine writes to SnapshotOnlineStore only, got "
                f"{type(self.online_store).__name__}; set batch_engine to local"
            )

    def _materialize_one(
        self, registry: BaseRegistry, task: MaterializationTask, **kwargs: Any
    ) -> LocalMaterializationJob:
        """Write the newest row of each product in the task's time range.

        Raises:
            FeatureStoreError: the view needs what only Feast's own engines do.
        """
        view, started = task.feature_view, time.monotonic()
        _check_plain(task)
        entities = [registry.get_entity(name, task.project) for name in view.entities]
        keys, features, event_column, created_column = _get_column_names(view, entities)
        job = self.offline_store.pull_latest_from_table_or_query(
            config=self.repo_config,
            data_source=view.batch_source,
            join_key_columns=keys,
            feature_name_columns=features,
            timestamp_field=event_column,
            created_timestamp_column=created_column,
            start_date=task.start_time,
            end_date=task.end_time,
        )
        mapping = view.batch_source.field_mapping or {}
        rows = job.to_arrow()
        num_rows = self.online_store.write_arrow(
            self.repo_config,
            view,
            rows.rename_columns([mapping.get(name, name) for name in rows.column_names]),
            event_column=mapping.get(event_column, event_column),
            created_column=created_column and mapping.get(created_column, created_column),
        )
        logger.info(
            "materialised %s up to %s: %d products in %.2f s",
            *(view.name, task.end_time.isoformat(), num_rows, time.monotonic() - started),
        )
        return LocalMaterializationJob(
            job_id=f"{view.name}-{task.start_time}-{task.end_time}",
            status=MaterializationJobStatus.SUCCEEDED,
        )


def _check_plain(task: MaterializationTask) -> None:
    view = task.feature_view
    unsupported = {
        "aggregations": getattr(view, "aggregations", None),
        "a feature transformation": getattr(view, "feature_transformation", None),
        "disable_event_timestamp": task.disable_event_timestamp,
        "rows that are not the latest (only_latest=False)": not task.only_latest,
    }
    for what, present in unsupported.items():
        if present:
            raise FeatureStoreError(
                f"feature view {view.name} asks for {what}, which SnapshotComputeEngine does not "
                "do; write the finished features to Parquet, or set batch_engine to local"
            )
