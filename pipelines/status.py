"""``driftline status``: services, runs, champion, and both ages of every tier."""

import sqlite3
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from driftline.features.paths import materialized_path
from driftline.features.views import TIERS, feature_views
from driftline.pipelines.cadence import CadencePaths
from driftline.pipelines.records import read_records
from driftline.pipelines.run_log import RunLog
from driftline.pipelines.schedules import JOB_KINDS, Clock
from driftline.pipelines.supervisor import living_supervisor, read_report
from driftline.platform.artefacts import read_json
from driftline.platform.processes import ProcessIdentity
from driftline.platform.registry import read_champion
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, format_time, parse_time
from driftline.platform.workspace import Workspace
from driftline.serving.client import ScoringClient
from driftline.serving.server import serving_url


def status(settings: DriftlineSettings, *, now: datetime) -> dict[str, Any]:
    """Services, runs, champion, both ages of every tier. Works while nothing runs."""
    workspace = Workspace.of(settings)
    report = read_report(settings)
    alive = living_supervisor(report) is not None
    services = {} if report is None else report["services"]
    serving = _serving_status(settings)
    clock_file = workspace.state / "clock.json"
    clock = Clock.from_json(read_json(clock_file)) if alive and clock_file.exists() else None
    event_now = now if clock is None else clock.event_time(now)
    return {
        "name": settings.name,
        "up": alive,
        "services": {
            name: {
                "alive": _is_alive(entry["process"]),
                "pid": entry["process"]["pid"] if entry["process"] else None,
                "restarts": entry["restarts"],
                "last_exit": entry["last_exit"],
            }
            for name, entry in services.items()
        },
        "url": serving_url(settings) if serving is not None else None,
        "now": format_time(event_now),
        "champion": champion_facts(workspace),
        "serving": serving,
        "tiers": _tiers(settings, now=event_now),
        "jobs": _jobs(workspace.state),
    }


def status_text(value: Mapping[str, Any]) -> str:
    """The status for a person."""
    champion, serving = value["champion"], value["serving"]
    lines = [f"{value['name']}   {'up' if value['up'] else 'not up'}   event time {value['now']}"]
    for name, service in value["services"].items():
        state = f"process {service['pid']}" if service["alive"] else "NOT RUNNING"
        again = f", started again {service['restarts']} times" if service["restarts"] else ""
        lines.append(f"  {name:<10} {state}{again}")
    if champion is None:
        lines.append("champion    none yet")
    else:
        lines.append(
            f"champion    version {champion['version']} ({champion['bundle']}), "
            f"{champion['kind']} refresh as of {champion['as_of']}"
        )
    if serving is not None:
        lines.append(
            f"serving     {value['url']}, bundle {serving['bundle']}, "
            f"{serving['answers']} answers, {serving['refusals']} bundles refused"
        )
    lines.append("tiers       value age (fresh for)    parameter age (fresh for)")
    for name, tier in value["tiers"].items():
        values = _hours(tier["value_age_hours"], tier["value_freshness_hours"])
        parameters = _hours(tier["parameter_age_hours"], tier["parameter_freshness_hours"])
        lines.append(f"  {name:<9} {values:<24} {parameters}")
    lines.append("jobs        last run")
    for kind, job in value["jobs"].items():
        last = job["last"]
        done = "never" if last is None else f"{last['outcome']} as of {last['as_of']}"
        message = f" ({last['message']})" if last and last["message"] else ""
        due = f"next {job['next']}" if job["next"] and value["up"] else "not scheduled"
        lines.append(f"  {kind:<11} {done}{message}; {due}")
    return "\n".join(lines)


def _serving_status(settings: DriftlineSettings) -> dict[str, Any] | None:
    """What the application says about itself, if this market's application answers."""
    with ScoringClient(serving_url(settings), timeout_seconds=3) as client:
        try:
            answer = client.status()
        except (OSError, ValueError):
            return None
    return answer if answer.get("name") == settings.name else None


def champion_facts(workspace: Workspace) -> dict[str, Any] | None:
    """Version, bundle and lineage of the champion, if there is one."""
    pointer = read_champion(workspace.bundles)
    if pointer is None:
        return None
    lineage = read_json(pointer.path / "manifest.json")["lineage"]
    return {
        "version": pointer.version,
        "bundle": pointer.fingerprint,
        "kind": lineage["kind"],
        "as_of": lineage["as_of"],
        "arms": lineage["arms"],
    }


def _tiers(settings: DriftlineSettings, *, now: datetime) -> dict[str, Any]:
    """Both ages of every tier: of what is online, and of the weights that read it.

    Long text is read by the arms, everything else by the head, which an arms refresh renews too.
    """
    workspace = Workspace.of(settings)
    path = materialized_path(settings)
    online = read_json(path) if path.exists() else {}
    champion = champion_facts(workspace)
    tiers: dict[str, Any] = {}
    for name in TIERS:
        tier = settings.tiers[name]
        views = [view.name for view in feature_views(settings) if view.tier == name]
        times = [online[view]["as_of"] for view in views if view in online]
        trained = None
        if champion is not None:
            trained = _arms_as_of(workspace, champion) if name == "long" else champion["as_of"]
        tiers[name] = {
            "value_age_hours": _age_hours(min(times, default=None), now=now),
            "value_freshness_hours": tier.value_freshness_hours,
            "parameter_age_hours": _age_hours(trained, now=now),
            "parameter_freshness_hours": tier.parameter_freshness_hours,
        }
    return tiers


def _arms_as_of(workspace: Workspace, champion: Mapping[str, Any]) -> str | None:
    """What the champion's arms know up to: the moment of the arms refresh that they come from."""
    for record in reversed(read_records(workspace)):
        manifest = workspace.bundles / record.bundle / "manifest.json"
        is_there = record.kind == "arms" and manifest.exists()
        if is_there and read_json(manifest)["lineage"]["arms"] == champion["arms"]:
            return record.as_of
    return None


def _age_hours(moment: str | None, *, now: datetime) -> float | None:
    return None if moment is None else round((now - parse_time(moment)) / HOUR, 2)


def _jobs(state: Path) -> dict[str, Any]:
    paths = CadencePaths(state)
    runs, due = RunLog(paths.runs), _due(paths.scheduler)
    jobs: dict[str, Any] = {}
    for kind in JOB_KINDS:
        last = runs.last(kind)
        jobs[kind] = {
            "last": None if last is None else last.__dict__,
            "next": format_time(datetime.fromtimestamp(due[kind], UTC)) if kind in due else None,
        }
    return jobs


def _due(scheduler: Path) -> dict[str, float]:
    """When each job runs next, read from the scheduler's table."""
    if not scheduler.exists():
        return {}
    connection = sqlite3.connect(f"file:{scheduler}?mode=ro", uri=True, timeout=5)
    try:
        rows = connection.execute("SELECT id, next_run_time FROM apscheduler_jobs").fetchall()
    finally:
        connection.close()
    return {str(kind): float(moment) for kind, moment in rows if moment is not None}


def _hours(age: float | None, limit: float) -> str:
    return f"{'unknown' if age is None else f'{age:g} h'} ({limit:g} h)"


def _is_alive(raw: Mapping[str, Any] | None) -> bool:
    return raw is not None and ProcessIdentity.from_json(raw).is_alive
