"""A market that keeps itself fresh: the cadence service, and up, status, down on real processes."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.listening import listeners
from tests.tiny_market import AS_OF, TinyMarket, tiny_settings

from driftline.features.texts import known_texts, read_texts
from driftline.pipelines.cadence import CadenceService
from driftline.pipelines.operation import UpReport, down, up
from driftline.pipelines.provenance import settings_hash
from driftline.pipelines.records import RefreshRecord, write_record
from driftline.pipelines.run_log import Run, RunLog
from driftline.pipelines.schedules import Clock
from driftline.pipelines.status import status, status_text
from driftline.platform.errors import MissingArtefactError, ResourceError
from driftline.platform.processes import family_members, free_port
from driftline.platform.settings import DriftlineSettings
from driftline.platform.vector_deltas import DeltaReader
from driftline.platform.windows import HOUR, format_time
from driftline.platform.workspace import Workspace
from driftline.serving.client import ScoringClient

WALL = datetime(2026, 11, 1, 10, tzinfo=UTC)
CLOCK = Clock(anchor=WALL, start=AS_OF + timedelta(minutes=20), end=AS_OF + 24 * HOUR)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> TinyMarket:
    """A market with a champion; its event clock stands at ``AS_OF`` when it comes up."""
    settings = tiny_settings(
        tmp_path_factory.mktemp("cadence"),
        serving={"clock": "snapshot", "poll_seconds": 0.1, "port": free_port()},
        cadence={
            "clock": "event",
            "start": format_time(AS_OF),
            "seconds_per_hour": 3600,
            "restart_seconds": 0.1,
        },
        ray={"num_cpus": 2},
    )
    market = TinyMarket.make(settings)
    bundle = market.bundle(seed=1)
    market.promote(bundle)
    for kind in ("arms", "head"):  # so that neither is due at once
        record = RefreshRecord(
            kind="arms" if kind == "arms" else "head",
            as_of=format_time(AS_OF),
            bundle=bundle.fingerprint,
            parent=None,
            decision="promoted",
            reasons=(),
            settings=settings_hash(settings),
            num_rows=1,
            seconds=1,
            core_seconds=1,
            auc_champion=None,
            auc_challenger=None,
            champion=bundle.fingerprint,
        )
        write_record(Workspace.of(settings), record, as_of=AS_OF)
    return market


def runs_of(settings: DriftlineSettings) -> RunLog:
    return RunLog(Workspace.of(settings).state / "runs.db")


def last(settings: DriftlineSettings, kind: str) -> Run:
    found = runs_of(settings).last(kind)
    assert found is not None
    return found


# --- the service --------------------------------------------------------------------------


@pytest.mark.ray
def test_a_run_is_recorded_with_its_moment_outcome_and_log(
    market: TinyMarket, local_ray: None
) -> None:
    service = CadenceService(market.settings, clock=CLOCK)

    service.run("materialize", now=WALL)

    run = last(market.settings, "materialize")
    assert (run.outcome, run.as_of) == ("done", "2026-01-02T12:00:00Z")
    assert Path(run.log).exists()


@pytest.mark.ray
def test_new_texts_are_encoded_with_the_values_that_come_online(
    tmp_path: Path, local_ray: None
) -> None:
    market = TinyMarket.make(tiny_settings(tmp_path, name="texts"))
    service = CadenceService(market.settings, clock=CLOCK)
    service.run("materialize", now=WALL)
    assert last(market.settings, "materialize").message == "online"  # nobody to encode for
    published = known_texts(market.settings, as_of=AS_OF)["text_id"].to_pylist()
    later = set(read_texts(market.settings)["text_id"].to_pylist()) - set(published)
    assert later
    bundle = market.bundle(seed=2, num_uncached=len(published) // 2)
    missing = set(published) - set(bundle.vectors.text_id.tolist())
    assert missing
    market.promote(bundle)

    for num_new in (len(missing), 0):
        service.run("materialize", now=WALL)
        run = last(market.settings, "materialize")
        assert (run.outcome, run.message) == ("done", f"online; {num_new} new texts encoded")
        reader = DeltaReader(bundle)
        reader.look()
        assert [set(delta.vectors.text_id.tolist()) for delta in reader.deltas] == [missing]


@pytest.mark.ray
def test_a_run_that_fails_says_why_and_the_service_goes_on(
    market: TinyMarket, local_ray: None
) -> None:
    service = CadenceService(market.settings, clock=CLOCK)
    champion = Workspace.of(market.settings).bundles / "CHAMPION"

    service.run("head", now=WALL + HOUR)  # the registry knows no champion, only the pointer does

    run = last(market.settings, "head")
    assert champion.exists()
    assert (run.outcome, run.as_of) == ("failed", "2026-01-02T13:00:00Z")
    assert run.message.startswith("MissingArtefactError: no champion before 2026-01-02T13:00:00Z")
    assert "Traceback" in Path(run.log).read_text()


def due_of(settings: DriftlineSettings) -> dict[str, str]:
    jobs = status(settings, now=datetime.now(UTC))["jobs"]
    return {kind: job["next"] for kind, job in jobs.items()}


def scheduled(settings: DriftlineSettings, clock: Clock, *, at: datetime) -> dict[str, str]:
    """Due times after a service has started and stopped."""
    service = CadenceService(settings, clock=clock)
    service.start(now=at)
    service.stop()
    return due_of(settings)


FUTURE = datetime(2126, 1, 1, 10, 20, tzinfo=UTC)  # nothing falls due while the test runs


def test_due_times_stand_on_whole_intervals(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)  # a head is due each hour, values each hour, arms in 720 h

    found = scheduled(settings, Clock(anchor=FUTURE, start=FUTURE), at=FUTURE)

    assert found["materialize"] == "2126-01-01T11:00:00Z"
    assert found["head"] == "2126-01-01T12:00:00Z"  # an hour from now, and then the next whole one
    assert found["arms"] > found["head"]


def test_due_times_outlive_the_service_but_not_its_clock(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    later = FUTURE + HOUR

    first = scheduled(settings, Clock(anchor=FUTURE, start=FUTURE), at=FUTURE)
    again = scheduled(settings, Clock(anchor=later, start=later), at=later)
    replayed = scheduled(settings, Clock(anchor=later, start=AS_OF, speed=360), at=later)

    assert again == first
    assert replayed["materialize"] == format_time(later)
    assert replayed["head"] == format_time(later + timedelta(seconds=10))


# --- up, status, down ---------------------------------------------------------------------


@dataclass(frozen=True)
class Raised:
    """A market that is up."""

    market: TinyMarket
    report: UpReport
    family: str

    def status(self) -> dict[str, Any]:
        return status(self.market.settings, now=datetime.now(UTC))

    def wait(self, condition: str, seconds: float = 120) -> dict[str, Any]:
        """The status once an expression about it (``s``) holds."""
        deadline = time.monotonic() + seconds
        while not eval(condition, {"s": (found := self.status())}):
            assert time.monotonic() < deadline, (condition, found)
            time.sleep(0.1)
        return found


@pytest.fixture(scope="module")
def raised(market: TinyMarket) -> Iterator[Raised]:
    report = up(market.settings)
    state = json.loads((Workspace.of(market.settings).state / "up.json").read_text())
    yield Raised(market, report, state["family"])
    down(market.settings)


@pytest.mark.ray
def test_up_serves_the_champion_and_refreshes_on_schedule(raised: Raised) -> None:
    found = raised.wait("s['jobs']['materialize']['last']['outcome'] == 'done' and s['serving']")

    assert found["up"]
    assert {name: entry["alive"] for name, entry in found["services"].items()} == {
        "ray": True,
        "serving": True,
        "cadence": True,
    }
    assert found["serving"]["bundle"] == found["champion"]["bundle"]
    for tier in found["tiers"].values():
        assert 0 <= tier["value_age_hours"] < 0.5
        assert 0 <= tier["parameter_age_hours"] < 0.5
    assert found["jobs"]["head"]["next"] > found["jobs"]["materialize"]["last"]["started"]
    assert found["jobs"]["arms"]["next"] > found["jobs"]["head"]["next"]
    with ScoringClient(raised.report.url) as client:
        answer = client.score(100_001, [100_002])
        assert answer["bundle"] == found["champion"]["bundle"]
    text = status_text(found)
    assert "tiny   up" in text
    assert "materialize done as of" in text


@pytest.mark.ray
def test_all_that_up_starts_listens_on_loopback_only(raised: Raised) -> None:
    heard = {(one.ip.removeprefix("::ffff:"), one.process) for one in listeners(raised.family)}
    assert len(heard) > 3
    assert {ip for ip, _ in heard} == {"127.0.0.1"}, heard


@pytest.mark.ray
def test_up_again_finds_it_up(raised: Raised) -> None:
    assert up(raised.market.settings).already


@pytest.mark.ray
def test_a_killed_service_is_started_again_and_serving_never_stops(raised: Raised) -> None:
    before = raised.status()["services"]
    failures = 0
    os.kill(before["cadence"]["pid"], signal.SIGKILL)
    os.kill(before["serving"]["pid"], signal.SIGKILL)
    with ScoringClient(raised.report.url) as client:
        deadline = time.monotonic() + 120
        ready = False
        while not ready:
            assert time.monotonic() < deadline, raised.status()
            status, _ = client.request(
                "POST", "/v1/score", b'{"page_product_id": 100001, "ad_product_ids": [100002]}'
            )
            failures += status != 200
            state = json.loads((Workspace.of(raised.market.settings).state / "up.json").read_text())
            ready = state["ready"] and all(
                state["services"][name]["restarts"] for name in ("cadence", "serving")
            )

    after = raised.status()["services"]
    assert failures == 0
    for name in ("cadence", "serving"):
        assert after[name]["alive"]
        assert after[name]["pid"] != before[name]["pid"]
        assert "with code -9" in after[name]["last_exit"]
    assert after["ray"] == before["ray"]


@pytest.mark.ray
def test_down_stops_what_up_started_and_nothing_else(raised: Raised) -> None:
    strangers = {process.pid for process in psutil.process_iter()} - {
        process.pid for process in family_members(raised.family)
    }
    ours = family_members(raised.family)
    assert len(ours) > 5

    stopped = down(raised.market.settings)

    assert stopped == len(ours)
    assert family_members(raised.family) == []
    assert os.getpid() in strangers
    assert psutil.pid_exists(os.getppid())
    assert down(raised.market.settings) == 0
    found = raised.status()
    assert not found["up"]
    assert found["serving"] is None
    assert found["champion"] is not None
    assert "not up" in status_text(found)


def test_status_works_where_nothing_ever_ran(tmp_path: Path) -> None:
    found = status(tiny_settings(tmp_path), now=WALL)

    assert (found["up"], found["champion"], found["services"]) == (False, None, {})
    assert found["jobs"]["head"] == {"last": None, "next": None}
    assert "champion    none yet" in status_text(found)
    assert not Workspace.of(tiny_settings(tmp_path)).state.exists()


def test_up_needs_a_log_for_the_event_clock(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, cadence={"clock": "event"}, serving={"port": free_port()})

    with pytest.raises(MissingArtefactError, match="driftline check"):
        up(settings)

    assert down(settings) == 0


def test_up_refuses_a_port_that_is_taken(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = tiny_settings(tmp_path, serving={"port": taken.getsockname()[1]})
        with pytest.raises(ResourceError, match=r"serving\.port: cannot listen"):
            up(settings)
    assert not status(settings, now=WALL)["up"]
