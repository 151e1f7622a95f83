"""Feast as the catalogue of features, and the step from its sources to the online store.

Feast keeps definitions, tags, services and watermarks in a SQL registry; joins, online rows and
materialisation run through the plug-ins in ``feast_plugins``. Feast accepts a view whose source is
missing or of another type without a word, so :func:`apply` checks that first.
"""

import io
import logging
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from feast import FeatureStore
from feast.repo_config import RepoConfig

from driftline.features.definitions import VERSION_TAG, feast_objects, feast_project
from driftline.features.paths import materialized_path, online_folder, project_name
from driftline.features.sources import hour_fingerprints
from driftline.features.views import View, feature_views
from driftline.platform.artefacts import read_json, write_json
from driftline.platform.errors import ContractError, MissingArtefactError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, format_time, parse_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

PLUGINS: Final = "driftline.features.feast_plugins"
REGISTRY_CACHE_SECONDS: Final = 60
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class MaterializeReport:
    """What :func:`materialize` did."""

    as_of: datetime
    seconds: float
    views: Mapping[str, str]
    """By view: ``unchanged``, ``added`` (only what was new) or ``rebuilt``."""


def feature_view_versions(settings: DriftlineSettings) -> dict[str, str]:
    """Hash of each view's definition, by name; part of a bundle's identity."""
    return {view.name: view.version for view in feature_views(settings)}


def open_store(settings: DriftlineSettings) -> FeatureStore:
    """Feast on the market's registry and stores. The first import of Feast takes seconds."""
    workspace = Workspace.of(settings)
    workspace.features.mkdir(parents=True, exist_ok=True)
    online: dict[str, Any] = {"type": f"{PLUGINS}.online.SnapshotOnlineStore"}
    engine: dict[str, Any] = {"type": f"{PLUGINS}.engine.SnapshotComputeEngine"}
    if settings.store.online == "redis":
        online = {"type": "redis", "connection_string": settings.store.redis_address}
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
    store = open_store(settings)
    state_path = materialized_path(settings)
    state = read_json(state_path) if state_path.exists() else {}
    applied = {view.name: view for view in store.list_feature_views()}
    done: dict[str, str] = {}
    for view in feature_views(settings):
        known = applied.get(view.name)
        if known is None or known.tags.get(VERSION_TAG) != view.version:
            raise MissingArtefactError(
                f"feature view {view.name} is not registered as the settings define it; "
                "run `driftline features apply` first"
            )
        hours = _known_hours(view, settings, as_of=as_of)
        start, kind = _plan(view, settings, state.get(view.name), hours=hours, as_of=as_of)
        if kind == "rebuilt":
            _forget(store, view)
        if kind != "unchanged":
            with redirect_stdout(io.StringIO()):  # Feast prints its progress
                store.materialize(start, as_of, feature_views=[view.name])
            _trim_intervals(store, view)
        done[view.name] = kind
        state[view.name] = {
            "version": view.version,
            "as_of": format_time(as_of),
            "hours": {str(hour): value for hour, value in hours.items()},
        }
        write_json(state_path, state)
    seconds = time.monotonic() - started
    logger.info("materialised as of %s in %.2f s: %s", format_time(as_of), seconds, done)
    return MaterializeReport(as_of, seconds, done)


def _known_hours(view: View, settings: DriftlineSettings, *, as_of: datetime) -> dict[int, str]:
    """Fingerprints of the hours that hold rows known at ``as_of`` which can still count."""
    first, last = _oldest_hour(view, as_of), (as_of - EPOCH) // HOUR
    found = hour_fingerprints(view, settings)
    return {hour: value for hour, value in found.items() if first <= hour <= last}


def _oldest_hour(view: View, as_of: datetime) -> int:
    return 0 if view.ttl is None else (as_of - view.ttl - EPOCH) // HOUR


def _plan(
    view: View,
    settings: DriftlineSettings,
    state: Mapping[str, Any] | None,
    *,
    hours: Mapping[int, str],
    as_of: datetime,
) -> tuple[datetime, str]:
    """From which event time to read, and whether the view starts anew."""
    everything = EPOCH if view.ttl is None else as_of - view.ttl
    if state is None or state["version"] != view.version or not _is_online(view, settings):
        return everything, "rebuilt"
    before = parse_time(state["as_of"])
    old = {int(hour): value for hour, value in state["hours"].items()}
    last_whole = (before - EPOCH) // HOUR  # this hour may have grown since
    oldest = _oldest_hour(view, as_of)
    kept = {hour: value for hour, value in old.items() if oldest <= hour < last_whole}
    grown = {hour: value for hour, value in hours.items() if hour >= last_whole}
    if as_of < before or kept != {h: v for h, v in hours.items() if h < last_whole}:
        return everything, "rebuilt"
    if not grown or (grown == {last_whole: old.get(last_whole)} and as_of == before):
        return everything, "unchanged"
    start = _first_event(view, settings, since=EPOCH + min(grown) * HOUR)
    return max(everything, min(start, as_of)), "added"


def _first_event(view: View, settings: DriftlineSettings, *, since: datetime) -> datetime:
    """Oldest event time of the rows that became known at or after ``since``."""
    micros = (since - EPOCH) // timedelta(microseconds=1)
    files = f"{view.folder(settings)}/*.parquet".replace("'", "''")
    with duckdb.connect(config={"threads": settings.store.threads}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        moment = f"make_timestamptz({micros})"
        found = connection.execute(
            f"SELECT epoch_us(min(event_time)) FROM read_parquet('{files}') "
            f"WHERE event_time >= {moment} OR created_time >= {moment}"
        ).fetchone()
    assert found is not None
    return since if found[0] is None else EPOCH + timedelta(microseconds=found[0])


def _is_online(view: View, settings: DriftlineSettings) -> bool:
    if settings.store.online == "redis":
        return True
    return (online_folder(settings) / view.name / "CURRENT").exists()


def _forget(store: FeatureStore, view: View) -> None:
    """Remove a view's online rows; Feast has no call of its own for that."""
    online = store._get_provider().online_store
    table = store.get_feature_view(view.name)
    online.update(
        config=store.config,
        tables_to_delete=[table],
        tables_to_keep=[],
        entities_to_delete=[],
        entities_to_keep=[],
        partial=True,
    )


def _trim_intervals(store: FeatureStore, view: View) -> None:
    """Keep the newest materialisation interval; Feast lets the list grow for ever (feast#4440)."""
    table = store.registry.get_feature_view(view.name, store.project)
    if len(table.materialization_intervals) > 1:
        table.materialization_intervals = table.materialization_intervals[-1:]
        store.registry.apply_feature_view(table, store.project)
