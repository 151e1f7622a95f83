"""Feast as the catalogue of features, and the step from its sources to the online store.

Feast keeps definitions, tags, services and watermarks in a SQL registry; joins, online rows and
materialisation run through the plug-ins in ``feast_plugins``. Feast accepts a view whose source is
missing or of another type without a word, so :func:`apply` checks that first.
"""

import io
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from feast import FeatureStore, FeatureView
from feast.repo_config import RepoConfig
from filelock import FileLock

from driftline.features.definitions import VERSION_TAG, feast_objects, feast_project
from driftline.features.online_plan import ViewPlan, plan_view
from driftline.features.paths import (
    materialized_path,
    online_folder,
    project_name,
    unfinished_path,
)
from driftline.features.views import View, feature_view_versions, feature_views
from driftline.platform.artefacts import read_json, write_json
from driftline.platform.errors import ContractError, MissingArtefactError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import format_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

PLUGINS: Final = "driftline.features.feast_plugins"
REGISTRY_CACHE_SECONDS: Final = 60
WRITE_BATCH_ROWS: Final = 10_000
MAX_INTERVALS: Final = 24
"""Materialisation intervals kept of each view in the registry."""


@dataclass(frozen=True)
class MaterializeReport:
    """What :func:`materialize` did."""

    as_of: datetime
    seconds: float
    views: Mapping[str, str]
    """By view: ``unchanged``, ``added`` (only what was new) or ``rebuilt``."""


def open_store(settings: DriftlineSettings) -> FeatureStore:
    """Feast on the market's registry and stores. The first import of Feast takes seconds."""
    workspace = Workspace.of(settings)
    workspace.features.mkdir(parents=True, exist_ok=True)
    online: dict[str, Any] = {"type": f"{PLUGINS}.online.SnapshotOnlineStore"}
    engine: dict[str, Any] = {"type": f"{PLUGINS}.engine.SnapshotComputeEngine"}
    if settings.store.online == "redis":
        online = {
            "type": "redis",
            "connection_string": settings.store.redis_address,
            # A correction has the event time of what it corrects, and Redis would refuse it. Every
            # write here holds the newest row of its key, so none can overwrite a newer one.
            "skip_dedup": True,
        }
        engine = {"type": "local"}
    else:
        online["path"] = str(online_folder(settings).parent)
    config = RepoConfig(
        project=project_name(settings),
        provider="local",
        registry={
            "registry_type": "sql",
            "path": settings.store.registry or f"sqlite:///{workspace.features / 'registry.db'}",
            "cache_ttl_seconds": REGISTRY_CACHE_SECONDS,
            "serve_features_while_materializing": True,
        },
        offline_store={
            "type": f"{PLUGINS}.offline.AsofOfflineStore",
            "threads": settings.store.threads,
            "memory_limit": settings.store.memory_limit,
            "ray": settings.ray.address is not None,
            "materialize_as_known": True,
        },
        online_store=online,
        batch_engine=engine,
        materialization={
            "pull_latest_features": True,
            "online_write_batch_size": WRITE_BATCH_ROWS,
        },
        entity_key_serialization_version=3,
        repo_path=workspace.features,
    )
    return FeatureStore(config=config)


def apply(settings: DriftlineSettings, *, key_type: pa.DataType) -> FeatureStore:
    """Check the sources, then register all objects and drop those that no longer exist.

    Raises:
        ContractError: a source's column is missing or has another type.
        MissingArtefactError: a view has no source files.
    """
    for view in feature_views(settings):
        check_source(view, settings, key_type=key_type)
    store = open_store(settings)
    objects = feast_objects(settings, key_type=key_type)
    names = {item.name for item in objects}
    old = [
        item
        for item in (
            *store.list_feature_services(),
            *store.list_feature_views(),
            *store.list_entities(),
        )
        if item.name not in names and item.name != "__dummy"
    ]
    store.apply([feast_project(settings), *objects], objects_to_delete=old, partial=not old)
    store.refresh_registry()
    return store


def check_source(view: View, settings: DriftlineSettings, *, key_type: pa.DataType) -> None:
    """Compare every file of a view's source with the view's columns.

    Raises:
        ContractError: a column is missing or has another type; names file, column and remedy.
        MissingArtefactError: there is no file.
    """
    folder = view.folder(settings)
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise MissingArtefactError(
            f"feature view {view.name} has no source files in {folder}; "
            "run `driftline features prepare` first"
        )
    for path in files:
        found = pq.read_schema(path)
        for field in view.schema(key=key_type):
            index = found.get_field_index(field.name)
            if index < 0:
                raise ContractError(
                    f"{path}: column {field.name!r} of feature view {view.name} is missing among "
                    f"{found.names}; run `driftline features prepare` to write the source anew"
                )
            if found.field(index).type != field.type:
                raise ContractError(
                    f"{path}: column {field.name!r} of feature view {view.name} must be "
                    f"{field.type}, got {found.field(index).type}; "
                    "run `driftline features prepare` to write the source anew"
                )


def materialize(settings: DriftlineSettings, *, as_of: datetime) -> MaterializeReport:
    """Bring the online store to what was known at ``as_of``: no row from after it.

    A view whose rows only grew since the last call takes the new rows; one whose past changed, or
    that already knows a later time, is rebuilt.

    Raises:
        MissingArtefactError: the views have not been applied.
    """
    started = time.monotonic()
    lock = Workspace.of(settings).features / ".materialize.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):  # two at once would each undo half of the other's
        store = open_store(settings)
        state_path = materialized_path(settings)
        state = read_json(state_path) if state_path.exists() else {}
        tables = _registered(store, settings)
        plans = [
            plan_view(view, settings, state.get(view.name), as_of=as_of)
            for view in feature_views(settings)
        ]
        unfinished = unfinished_path(settings)
        unfinished.touch()  # servers keep what they have until all views are there
        for start in sorted({plan.start for plan in plans}):
            together = [plan for plan in plans if plan.start == start]
            if gone := {plan.view.name for plan in together if plan.kind == "rebuilt"}:
                state = {name: value for name, value in state.items() if name not in gone}
                write_json(state_path, state)  # killed in between, it is rebuilt next time
            _run(store, together, tables, as_of=as_of)
            state |= {plan.view.name: plan.state for plan in together}
            write_json(state_path, state)
        unfinished.unlink()
    seconds = time.monotonic() - started
    done = {plan.view.name: plan.kind for plan in plans}
    logger.info("materialised as of %s in %.2f s: %s", format_time(as_of), seconds, done)
    return MaterializeReport(as_of, seconds, done)


def _registered(store: FeatureStore, settings: DriftlineSettings) -> dict[str, FeatureView]:
    """Feast's views by name, all of them as the settings define them."""
    tables = {table.name: table for table in store.list_feature_views()}
    for name, version in feature_view_versions(settings).items():
        if name not in tables or tables[name].tags.get(VERSION_TAG) != version:
            raise MissingArtefactError(
                f"feature view {name} is not registered as the settings define it; "
                "run `driftline features apply` first"
            )
    return tables


def _run(
    store: FeatureStore,
    plans: Sequence[ViewPlan],
    tables: Mapping[str, FeatureView],
    *,
    as_of: datetime,
) -> None:
    """Materialise views that start at the same event time; Feast's cost is by call."""
    names = [plan.view.name for plan in plans if plan.kind != "unchanged"]
    for plan in plans:
        if plan.kind == "rebuilt":
            _forget(store, tables[plan.view.name])
    if names:
        with redirect_stdout(io.StringIO()):  # Feast prints its progress
            store.materialize(plans[0].start, as_of, feature_views=names)
    for name in names:
        if len(tables[name].materialization_intervals) >= MAX_INTERVALS:
            _trim_intervals(store, name)


def _forget(store: FeatureStore, table: FeatureView) -> None:
    """Remove a view's online rows; Feast has no call of its own for that."""
    store._get_provider().online_store.update(
        config=store.config,
        tables_to_delete=[table],
        tables_to_keep=[],
        entities_to_delete=[],
        entities_to_keep=[],
        partial=True,
    )


def _trim_intervals(store: FeatureStore, name: str) -> None:
    """Keep the newest materialisation interval; Feast lets the list grow for ever (feast#4440)."""
    table = store.registry.get_feature_view(name, store.project)
    table.materialization_intervals = table.materialization_intervals[-1:]
    store.registry.apply_feature_view(table, store.project)
