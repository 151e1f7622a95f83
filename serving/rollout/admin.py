"""Administration over HTTP: deploy, traffic, rollback, for who brings the token.

``POST /v1/admin/deploy``, ``/traffic`` and ``/rollback`` do what the commands of these names do;
``GET /v1/admin/routes`` says what is live. Off unless ``serving.admin_token_file`` is set. Changes
run in a process of their own, so that scoring goes on undisturbed, one at a time. One that takes
more than a moment is answered 202 with an id; ``GET /v1/admin/changes/ID`` says what became of it,
from the audit log, whichever replica is asked.
"""

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError
from pydantic import model_validator as check

from driftline.platform.data_settings import Settings
from driftline.platform.errors import ArtefactError
from driftline.platform.priority import roam
from driftline.platform.settings import DriftlineSettings
from driftline.platform.workspace import Workspace
from driftline.serving.rollout.admin_token import check_token, make_token, token_path
from driftline.serving.rollout.audit import AuditLog, audit_path, new_change, read_change
from driftline.serving.rollout.delivery import live_facts, utc_now
from driftline.serving.transport.pages import Message, Page, Receive, Send, send_page
from driftline.serving.transport.requests import RefusedRequestError, refuse, show

logger = logging.getLogger(__name__)

Application = Callable[[Message, Receive, Send], Awaitable[None]]

PREFIX: Final = "/v1/admin/"
ROUTES: Final = "routes"
CHANGE: Final = "changes/"
CHANGES_PATH: Final = PREFIX + CHANGE
WAIT_SECONDS: Final = 3.0
"""A change that takes longer is answered 202; what stands before a replica has no more patience."""
STATES: Final[Mapping[str, str]] = {"received": "running", "asked": "running"}
MAX_BODY: Final = 10_000
CHANGE_SECONDS: Final = 180.0
REALM: Final = 'Bearer realm="driftline"'
CHILD: Final = "driftline.serving.rollout.delivery_child"

STATUS_OF: Final = {"MissingArtefactError": 404, "DeliveryError": 409, "BundleError": 409}
"""HTTP status by the class of error that a change ends with; 503 for any other."""

Name = Annotated[StrictStr, Field(min_length=1, max_length=100)]
BundleName = Name | StrictInt
ShareOfKeys = Annotated[StrictFloat, Field(gt=0, lt=1)]


class Change(Settings):
    """What every change says."""

    by: Name = "admin"
    """Who asks, for the audit log; the token does not tell."""

    def arguments(self) -> dict[str, Any]:
        """As ``delivery_child.carry_out`` takes them."""
        return self.model_dump(exclude={"by"})


class DeployChange(Change):
    """Body of ``POST /v1/admin/deploy``."""

    bundle: BundleName
    role: Literal["champion", "canary", "shadow"]
    share: ShareOfKeys | None = None
    """Of the request keys; for a canary, and only for one."""

    @check(mode="after")
    def _a_canary_has_a_share(self) -> Self:
        if (self.role == "canary") != (self.share is not None):
            raise ValueError(f"a canary needs a share, and only a canary; got {self.share}")
        return self

    def arguments(self) -> dict[str, Any]:
        """The bundle as text."""
        return super().arguments() | {"bundle": str(self.bundle)}


class TrafficChange(Change):
    """Body of ``POST /v1/admin/traffic``."""

    share: ShareOfKeys | None = None
    stop: StrictBool = False

    @check(mode="after")
    def _one_of_both(self) -> Self:
        if self.stop == (self.share is not None):
            raise ValueError("give either a share or stop: true")
        return self


class RollbackChange(Change):
    """Body of ``POST /v1/admin/rollback``."""

    to: BundleName | None = None

    def arguments(self) -> dict[str, Any]:
        """The bundle as text."""
        return {"to": None if self.to is None else str(self.to)}


CHANGES: Final[dict[str, type[Change]]] = {
    "deploy": DeployChange,
    "traffic": TrafficChange,
    "rollback": RollbackChange,
}


def with_administration(
    face: Application, settings: DriftlineSettings, *, status: Callable[[], dict[str, Any]]
) -> Application:
    """The HTTP face, with ``/v1/admin/`` if the settings turn it on; else the face itself."""
    token = token_path(settings)
    if token is None:
        return face
    make_token(token)
    return AdminFace(face, settings, token=token, status=status)


class AdminFace:
    """An ASGI application before another one: takes ``/v1/admin/``, passes on the rest.

    Args:
        face: Takes everything else.
        settings: Of the market.
        token: File that holds the token; read for each request, so that it can be changed.
        status: The replica's, for ``GET /v1/admin/routes``.
    """

    def __init__(
        self,
        face: Application,
        settings: DriftlineSettings,
        *,
        token: Path,
        status: Callable[[], dict[str, Any]],
    ) -> None:
        self._face = face
        self._settings = settings
        self._token = token
        self._status = status
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="admin", initializer=roam)
        self._busy = False

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._face(scope, receive, send)
            return
        try:
            status, value = await self._answer(scope, receive)
        except RefusedRequestError as error:
            headers = {
                401: (b"www-authenticate", REALM.encode()),
                405: (b"allow", b", ".join(verb.encode() for verb in error.allowed or ())),
                503: (b"retry-after", b"5"),
            }
            extra = (headers[error.status],) if error.status in headers else ()
            await send_page(send, _page(error.body, status=error.status, headers=extra))
        else:
            await send_page(send, _page(value, status=status))

    async def _answer(self, scope: Message, receive: Receive) -> tuple[int, dict[str, Any]]:
        check_token(scope, self._token)
        action, method = scope["path"].removeprefix(PREFIX), scope["method"]
        reads = action == ROUTES or action.startswith(CHANGE)
        if not reads and action not in CHANGES:
            allowed = [PREFIX + name for name in (ROUTES, *CHANGES)]
            raise refuse(
                f"there is nothing at {show(scope['path'])}",
                status=404,
                code="unknown_path",
                allowed=allowed,
            )
        wanted = "GET" if reads else "POST"
        if method != wanted:
            raise refuse(
                f"{PREFIX}{action} takes {wanted}, got {show(method)}",
                status=405,
                code="wrong_method",
                allowed=[wanted],
            )
        if action == ROUTES:
            return 200, self._routes()
        if reads:
            return 200, self._change(action.removeprefix(CHANGE))
        change = _read(CHANGES[action], await self._read_body(receive))
        client = (scope.get("client") or ("unknown",))[0]
        return await self._carry_out(action, change, via=f"http from {client}")

    def _routes(self) -> dict[str, Any]:
        status = self._status()
        here = {name: status[name] for name in ("replica", "routes", "shadows", "last_refusal")}
        try:
            live = live_facts(Workspace.of(self._settings))
        except ArtefactError as error:
            raise refuse(str(error), status=503, code="damaged_pointer") from None
        return {"live": live, "here": here}

    async def _carry_out(self, action: str, change: Change, *, via: str) -> tuple[int, Any]:
        if self._busy:
            raise refuse("another change is under way", status=503, code="busy")
        name = new_change()
        asked = {
            "id": name,
            "settings": self._settings.model_dump(mode="json"),
            "by": change.by,
            "via": via,
            "action": action,
            "arguments": change.arguments(),
        }
        path = audit_path(Workspace.of(self._settings))
        audit = AuditLog(path, by=change.by, via=via, clock=utc_now)
        self._busy = True
        running = asyncio.get_running_loop().run_in_executor(self._pool, run_change, asked, audit)
        running.add_done_callback(self._finish)
        done, _ = await asyncio.wait([running], timeout=WAIT_SECONDS)
        if not done:
            return 202, {"id": name, "state": "running", "see": CHANGES_PATH + name}
        answer = running.result()
        if "error" in answer:
            error = answer["error"]
            raise refuse(
                error["message"], status=STATUS_OF.get(error["type"], 503), code="not_changed"
            )
        return 200, {"id": name, "state": "done", **answer}

    def _finish(self, running: "asyncio.Future[dict[str, Any]]") -> None:
        self._busy = False

    def _change(self, name: str) -> dict[str, Any]:
        entry = read_change(audit_path(Workspace.of(self._settings)), name)
        if entry is None:
            raise refuse(f"no change {show(name)} is known", status=404, code="unknown_change")
        return {**entry, "state": STATES.get(entry["state"], entry["state"])}

    async def _read_body(self, receive: Receive) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.serving.read_timeout_seconds):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > MAX_BODY:
                        raise refuse(
                            f"the body may have {MAX_BODY:,} bytes", status=413, code="too_large"
                        )
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise refuse("the body did not arrive", status=408, code="body_too_slow") from None


def run_change(asked: Mapping[str, Any], audit: AuditLog) -> dict[str, Any]:
    """Carry a change out in a child process and wait for it; its answer, or what went wrong."""
    facts = {name: asked[name] for name in ("id", "action", "arguments")}
    audit.append(facts | {"state": "received"}, must_be_written=False)
    try:
        child = subprocess.run(
            [sys.executable, "-m", CHILD],
            input=json.dumps(asked).encode(),
            capture_output=True,
            timeout=CHANGE_SECONDS,
            check=True,
        )
        answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        output = (getattr(error, "stderr", None) or b"").decode(errors="replace")
        logger.error("%s failed: %s\n%s", asked["action"], error, output[-2_000:])
        message = "the change failed, see the server's log; GET /v1/admin/routes says what is live"
        failed = facts | {"state": "failed", "message": f"{type(error).__name__}: {error}"}
        audit.append(failed, must_be_written=False)
        return {"error": {"type": type(error).__name__, "message": message}}
    return answer


# --- how ----------------------------------------------------------------------------------


def _read(kind: type[Change], body: bytes) -> Change:
    try:
        return kind.model_validate_json(body or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        is_json = first["type"] != "json_invalid"
        raise refuse(
            f"{field or 'the body'}: {first['msg'].removeprefix('Value error, ')}",
            status=422 if is_json else 400,
            code="wrong_value" if is_json else "invalid_json",
            field=field or None,
            allowed=list(kind.model_fields),
        ) from None


def _page(
    value: dict[str, Any], *, status: int, headers: tuple[tuple[bytes, bytes], ...] = ()
) -> Page:
    body = json.dumps(value, default=str).encode()
    return Page(body, status, more_headers=((b"cache-control", b"no-store"), *headers))
