"""Deploy, share, stop, roll back: nothing moves before it was tried, and all is written down."""

import asyncio
import io
import json
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.tiny_market import TinyMarket

from driftline.platform.bundle import Bundle
from driftline.platform.errors import BundleError, DeliveryError, MissingArtefactError
from driftline.platform.registry import Registry, read_champion
from driftline.platform.settings import DriftlineSettings
from driftline.platform.traffic import read_traffic
from driftline.platform.workspace import Workspace
from driftline.serving.rollout import delivery_child
from driftline.serving.rollout.admin import AdminFace, with_administration
from driftline.serving.rollout.admin_token import make_token
from driftline.serving.rollout.audit import audit_path
from driftline.serving.rollout.delivery import Delivery
from driftline.serving.service import BundleService

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def versions(market: TinyMarket, first: Bundle, second: Bundle) -> list[Bundle]:
    """Three registered bundles: versions 1, 2 and 3."""
    bundles = [first, second, market.bundle(seed=4)]
    registry = Registry(market.settings, Workspace.of(market.settings))
    for bundle in bundles:
        registry.register(bundle.path, fingerprint=bundle.fingerprint, lineage={}, metrics={})
    return bundles


class Wall:
    """A clock that a minute passes on whenever someone looks."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        self.now += timedelta(minutes=1)
        return self.now


@pytest.fixture
def delivery(market: TinyMarket, versions: list[Bundle]) -> Iterator[Delivery]:
    """Nothing is live before, nor after."""
    workspace = Workspace.of(market.settings)
    files = [workspace.bundles / "CHAMPION", workspace.bundles / "TRAFFIC", audit_path(workspace)]
    for path in files:
        path.unlink(missing_ok=True)
    yield Delivery(market.settings, by="ann", via="test", clock=Wall())
    for path in files:
        path.unlink(missing_ok=True)


@pytest.fixture
def bundles(market: TinyMarket) -> Path:
    return Workspace.of(market.settings).bundles


def champion_version(bundles: Path) -> int | None:
    found = read_champion(bundles)
    return None if found is None else found.version


def audit(settings: DriftlineSettings) -> list[dict[str, Any]]:
    lines = audit_path(Workspace.of(settings)).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_canary_keeps_its_keys_when_its_share_grows(
    delivery: Delivery, versions: list[Bundle], bundles: Path
) -> None:
    delivery.deploy_champion("1")
    delivery.deploy_canary(versions[1].fingerprint, share=0.1)
    small = read_traffic(bundles).canary
    delivery.set_share(0.4)
    large = read_traffic(bundles).canary
    delivery.set_share(0.4)
    assert small is not None
    assert large is not None
    assert (small.share, small.step, large.share, large.step) == (0.1, 1, 0.4, 2)
    assert small.salt == large.salt
    assert small.experiment != large.experiment
    assert large.step_at is not None
    assert large.started_at == small.started_at < large.step_at
    assert read_traffic(bundles).canary == large

    delivery.stop()
    delivery.deploy_canary("2", share=0.1)
    again = read_traffic(bundles).canary
    assert again is not None
    assert again.salt != small.salt


def test_what_makes_no_sense_is_refused_and_changes_nothing(
    delivery: Delivery, bundles: Path
) -> None:
    with pytest.raises(DeliveryError, match="needs a champion beside it"):
        delivery.deploy_canary("2", share=0.5)
    delivery.deploy_champion("1")
    with pytest.raises(DeliveryError, match="version 1 is the champion already"):
        delivery.deploy_canary("1", share=0.5)
    with pytest.raises(DeliveryError, match="there is no canary"):
        delivery.set_share(0.5)
    for share in (0.0, 1.0, 1.5, -1.0):
        with pytest.raises(DeliveryError, match="between 0 and 1"):
            delivery.deploy_canary("2", share=share)
    with pytest.raises(MissingArtefactError, match=r"no version 9; the newest are 3 \("):
        delivery.deploy_champion("9")
    delivery.deploy_canary("2", share=0.5)
    with pytest.raises(DeliveryError, match="version 2 is the canary already"):
        delivery.deploy_canary("3", share=0.5)
    with pytest.raises(DeliveryError, match="version 2 is the canary already"):
        delivery.deploy_shadow("2")
    delivery.deploy_shadow("3")
    traffic = read_traffic(bundles)
    assert traffic.canary is not None
    assert (champion_version(bundles), traffic.canary.bundle.version) == (1, 2)
    assert [ref.version for ref in traffic.shadows] == [3]
    assert (traffic.by, traffic.changed_at is not None) == ("ann", True)


def test_a_promoted_canary_leaves_the_traffic_and_others_stay(
    delivery: Delivery, versions: list[Bundle], bundles: Path
) -> None:
    delivery.deploy_champion("1")
    delivery.deploy_canary("2", share=0.5)
    delivery.deploy_shadow("3")
    delivery.deploy_champion(versions[1].fingerprint[:8])
    traffic = read_traffic(bundles)
    assert champion_version(bundles) == 2
    assert traffic.canary is None
    assert [ref.version for ref in traffic.shadows] == [3]


def test_a_bundle_is_found_by_a_fingerprint_that_begins_with_digits_alone(
    market: TinyMarket, delivery: Delivery, first: Bundle
) -> None:
    """One in 43 does; what a version is called comes first."""
    registry = Registry(market.settings, Workspace.of(market.settings))
    name = "3165378054fb8b44"
    number = registry.register(first.path, fingerprint=name, lineage={}, metrics={})
    for called in (name, name[:8], name[:4], str(number)):
        assert (delivery.find(called).version, delivery.find(called).fingerprint) == (number, name)
    with pytest.raises(MissingArtefactError, match="no version 316"):
        delivery.find(name[:3])


def test_rolling_back_goes_from_champion_to_champion_and_withdraws_the_canary(
    delivery: Delivery, bundles: Path
) -> None:
    for version in ("1", "2", "3"):
        delivery.deploy_champion(version)
    delivery.deploy_canary("1", share=0.5)
    delivery.roll_back()
    assert champion_version(bundles) == 2
    assert read_traffic(bundles).canary is None
    delivery.roll_back()
    assert champion_version(bundles) == 1
    with pytest.raises(MissingArtefactError, match="no champion before this one"):
        delivery.roll_back()
    delivery.roll_back("3")
    assert champion_version(bundles) == 3


def test_a_bundle_that_does_not_load_never_goes_live(
    market: TinyMarket, delivery: Delivery, altered: Bundle, bundles: Path
) -> None:
    registry = Registry(market.settings, Workspace.of(market.settings))
    number = registry.register(
        altered.path, fingerprint=altered.fingerprint, lineage={}, metrics={}
    )
    delivery.deploy_champion("1")
    for change in (
        lambda: delivery.deploy_champion(str(number)),
        lambda: delivery.deploy_canary(str(number), share=0.5),
        lambda: delivery.deploy_shadow(str(number)),
        lambda: delivery.roll_back(str(number)),
    ):
        with pytest.raises(BundleError, match=r"cannot be served: .*calibration\.json was altered"):
            change()
    assert champion_version(bundles) == 1
    assert read_traffic(bundles).is_empty


def test_damaged_pointers_can_be_replaced(delivery: Delivery, bundles: Path) -> None:
    delivery.deploy_champion("1")
    (bundles / "TRAFFIC").write_text("{")
    (bundles / "CHAMPION").write_text("{")
    delivery.roll_back("2")
    assert champion_version(bundles) == 2
    assert read_traffic(bundles).is_empty


def test_a_damaged_pointer_is_named_over_http_too(http: "Http", bundles: Path) -> None:
    (bundles / "TRAFFIC").write_text('{"canary": null}')
    try:
        status, _, body = http("GET", "/v1/admin/routes")
    finally:
        (bundles / "TRAFFIC").unlink()
    assert (status, body["error"]["code"]) == (503, "damaged_pointer")
    assert "TRAFFIC lacks 'changed_at'" in body["error"]["message"]


def test_the_audit_log_says_who_asked_for_what_and_what_came_of_it(
    market: TinyMarket, delivery: Delivery
) -> None:
    delivery.deploy_champion("1")
    with pytest.raises(DeliveryError):
        delivery.set_share(0.5)
    lines = audit(market.settings)
    assert [(line["action"], line["state"]) for line in lines] == [
        ("deploy", "asked"),
        ("deploy", "done"),
        ("traffic", "asked"),
        ("traffic", "refused"),
    ]
    assert {(line["by"], line["via"]) for line in lines} == {("ann", "test")}
    assert lines[0]["arguments"] == {"role": "champion", "bundle": "1", "reasons": []}
    assert lines[0]["id"] == lines[1]["id"] != lines[2]["id"]
    assert "there is no canary" in lines[3]["message"]
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)


def test_rolling_back_does_not_wait_for_the_audit_log(
    market: TinyMarket, delivery: Delivery, bundles: Path
) -> None:
    delivery.deploy_champion("1")
    delivery.deploy_champion("2")
    path = audit_path(Workspace.of(market.settings))
    path.unlink()
    path.mkdir()
    try:
        with pytest.raises(IsADirectoryError):
            delivery.deploy_champion("3")
        delivery.roll_back()
    finally:
        path.rmdir()
    assert champion_version(bundles) == 1


# --- over HTTP ----------------------------------------------------------------------------


Reply = tuple[int, dict[bytes, bytes], dict[str, Any]]


class Http:
    """The administration of a service, driven without a server."""

    def __init__(self, settings: DriftlineSettings, service: BundleService) -> None:
        async def nothing(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 299, "headers": []})
            await send({"type": "http.response.body", "body": b'{"passed": "on"}'})

        self.face = with_administration(nothing, settings, status=service.status)
        path = settings.serving.admin_token_file
        self.path = Workspace.of(settings).root / path if path else None
        self.runner = asyncio.Runner()

    def __call__(
        self, method: str, path: str, body: bytes = b"", *, token: bytes | None = b"right"
    ) -> Reply:
        if token == b"right":
            token = self.path.read_bytes().strip() if self.path else b"x"
        headers = [] if token is None else [(b"authorization", b"Bearer " + token)]
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": path, "method": method, "headers": headers}

        async def exchange() -> None:
            await self.face(scope, receive, send)

        self.runner.run(exchange())
        return sent[0]["status"], dict(sent[0]["headers"]), orjson.loads(sent[1]["body"])


@pytest.fixture
def service(market: TinyMarket, delivery: Delivery) -> BundleService:
    delivery.deploy_champion("1")
    delivery.deploy_champion("2")
    service = BundleService(market.settings)
    service.look()
    return service


@pytest.fixture
def http(market: TinyMarket, service: BundleService) -> Iterator[Http]:
    serving = market.settings.serving.model_copy(update={"admin_token_file": Path("admin.token")})
    http = Http(market.settings.model_copy(update={"serving": serving}), service)
    with http.runner:
        yield http


def test_without_a_token_file_there_is_no_administration(
    market: TinyMarket, service: BundleService
) -> None:
    http = Http(market.settings, service)
    with http.runner:
        status, _, body = http("GET", "/v1/admin/routes")
    assert (status, body) == (299, {"passed": "on"})  # the scoring face says 404


def test_the_token_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "token"
    make_token(path)
    kept = path.read_text()
    make_token(path)
    assert path.read_text() == kept
    assert len(kept.strip()) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["token"]


@pytest.mark.parametrize("token", [None, b"", b"wrong", b"wrong \xff", b"x" * 10_000])
def test_who_brings_no_right_token_changes_nothing(
    http: Http, bundles: Path, token: bytes | None
) -> None:
    for method, path in (("POST", "rollback"), ("GET", "routes"), ("POST", "nothing")):
        status, headers, body = http(method, f"/v1/admin/{path}", b"{}", token=token)
        assert status == 401
        assert headers[b"www-authenticate"].startswith(b"Bearer")
        assert body["error"]["code"] in ("no_token", "wrong_token")
    assert champion_version(bundles) == 2


def test_a_token_that_others_can_read_turns_administration_off(http: Http) -> None:
    assert http.path is not None
    http.path.chmod(0o644)
    try:
        status, _, body = http("GET", "/v1/admin/routes")
    finally:
        http.path.chmod(0o600)
    assert (status, body["error"]["code"]) == (403, "admin_off")


def test_the_token_can_be_changed_while_the_server_runs(http: Http) -> None:
    assert http.path is not None
    old = http.path.read_bytes().strip()
    http.path.write_text("another-token-of-some-length\n")
    assert http("GET", "/v1/admin/routes")[0] == 200
    assert http("GET", "/v1/admin/routes", token=old)[0] == 401


BAD: dict[str, tuple[str, str, bytes, int]] = {
    "unknown path": ("GET", "nothing", b"", 404),
    "wrong method": ("GET", "deploy", b"", 405),
    "no JSON": ("POST", "deploy", b"{", 400),
    "no bundle": ("POST", "deploy", b"{}", 422),
    "unknown key": ("POST", "rollback", b'{"version": 1}', 422),
    "share of a champion": (
        "POST", "deploy", b'{"bundle": 1, "role": "champion", "share": 0.5}', 422,
    ),
    "canary without share": ("POST", "deploy", b'{"bundle": 1, "role": "canary"}', 422),
    "all to the canary": ("POST", "traffic", b'{"share": 1.0}', 422),
    "share and stop": ("POST", "traffic", b'{"share": 0.5, "stop": true}', 422),
    "neither": ("POST", "traffic", b"{}", 422),
    "a number as name": ("POST", "rollback", b'{"by": 3}', 422),
    "too large": ("POST", "rollback", b" " * 20_000, 413),
    "NaN": ("POST", "traffic", b'{"share": NaN}', 422),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_change_is_refused_with_a_reason(http: Http, bundles: Path, name: str) -> None:
    method, path, sent, expected = BAD[name]
    status, _, body = http(method, f"/v1/admin/{path}", sent)
    assert status == expected
    assert body["error"]["message"]
    assert champion_version(bundles) == 2


def test_a_change_over_http_is_followed_and_written_down(
    market: TinyMarket, http: Http, service: BundleService, bundles: Path
) -> None:
    sent = b'{"bundle": 3, "role": "canary", "share": 0.25, "by": "bob"}'
    status, _, body = http("POST", "/v1/admin/deploy", sent)
    assert status in (200, 202)
    see = f"/v1/admin/changes/{body['id']}"
    for _ in range(600):
        if (state := http("GET", see)[2]["state"]) != "running":
            break
        time.sleep(0.2)
    assert state == "done"
    service.look()
    _, _, found = http("GET", "/v1/admin/routes")
    assert found["live"]["canary"]["version"] == 3
    roles = {route["role"]: route["share"] for route in found["here"]["routes"]}
    assert roles == {"champion": 0.75, "canary": 0.25}
    assert champion_version(bundles) == 2
    lines = [line for line in audit(market.settings) if line["id"] == body["id"]]
    assert [line["state"] for line in lines] == ["received", "asked", "done"]
    assert {line["by"] for line in lines} == {"bob"}


def test_a_change_whose_process_dies_is_written_down_as_failed(
    market: TinyMarket, http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("driftline.serving.rollout.admin.sys.executable", "/nowhere/python")
    monkeypatch.setattr("driftline.serving.rollout.admin.WAIT_SECONDS", 60.0)  # else 202, if slow
    status, _, body = http("POST", "/v1/admin/rollback", b"{}")
    assert status == 503
    assert "the change failed" in body["error"]["message"]
    last = audit(market.settings)[-1]
    assert (last["state"], last["action"]) == ("failed", "rollback")
    _, _, seen = http("GET", f"/v1/admin/changes/{last['id']}")
    assert (seen["state"], seen["id"]) == ("failed", last["id"])
    assert http("GET", "/v1/admin/changes/unknown")[0] == 404


def test_what_a_child_refuses_comes_back_as_an_error(
    market: TinyMarket,
    delivery: Delivery,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = {
        "settings": market.settings.model_dump(mode="json"),
        "id": "abc",
        "by": "bob",
        "via": "test",
        "action": "rollback",
        "arguments": {"to": "77"},
    }
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asked)))
    monkeypatch.setattr("os.nice", lambda by: by)
    delivery_child.main()
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["error"]["type"] == "MissingArtefactError"
    assert "no version 77" in answer["error"]["message"]
    assert audit(market.settings)[-1]["state"] == "refused"


def test_one_change_at_a_time(http: Http) -> None:
    assert isinstance(http.face, AdminFace)
    http.face._busy = True
    status, headers, _ = http("POST", "/v1/admin/rollback", b"{}")
    assert status == 503
    assert b"retry-after" in headers
