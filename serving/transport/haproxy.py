"""HAProxy as Ray Serve starts it, with what Ray Serve has no setting for.

Ray Serve renders a configuration at each change of replicas and starts the program named by
``RAY_SERVE_HAPROXY_BINARY_PATH`` on it. We name a small script that edits the configuration and
becomes HAProxy. So:

- statistics and metrics of HAProxy are reached from this machine only (Ray: from everywhere);
- a client that is slow with its headers, or with a body of up to 16 KB, is given up (Ray: never);
- what HAProxy itself answers to a request has our JSON body, and is 503 with ``Retry-After`` while
  there is no replica (Ray: a bare 500). What is no HTTP gets HAProxy's own page, still 400 or 408;
- where more requests are under way than the lines of the replicas that answer may hold, the next is
  refused at once, before it costs Python anything. What is under way is counted, not connections,
  and only scoring is refused: health and status are answered under any load;
- a scoring request whose replica dies before it answers is sent to another one, because scoring
  changes nothing (Ray: lost). It must fit into HAProxy's buffer of 16 KB. No other POST is sent
  twice;
- where no replica answers, a request is refused at once. Ray Serve would hand it to a proxy of its
  own, which waits for a replica until the client is tired of it;
- no line of log is sent for a request (Ray: one to port 514, where mostly nobody listens, for a
  fifth of HAProxy's system calls). What becomes of replicas is logged as before.
"""

import json
from math import ceil
from pathlib import Path
from typing import Final

from driftline.platform.loopback import LOOPBACK
from driftline.platform.settings import ServingSettings
from driftline.serving.transport.limits import RETRY_SECONDS, too_busy
from driftline.serving.transport.paths import SCORE
from driftline.serving.transport.requests import RefusedRequestError, refuse

PLAIN: Final = {
    400: ("Bad Request", "malformed_http", "the request is not HTTP, or its headers are too many"),
    408: ("Request Timeout", "request_too_slow", "the request did not arrive in time"),
}
METHODS: Final = "GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT"
"""Others are refused here: the server behind would not say so in our form."""
READING: Final = "GET HEAD"
UNREACHABLE: Final = (500, 502, 503, 504)
CONNECT_MILLISECONDS: Final = 200
"""How long a replica may take to accept a connection, and the pause before the only one is tried
again; its kernel accepts, on this machine, however busy it is itself."""


def haproxy_launcher(folder: Path, settings: ServingSettings, *, binary: str) -> Path:
    """Write the script into ``folder``, with the files that it needs; its path.

    Args:
        folder: A folder of this instance's own.
        settings: ``read_timeout_seconds`` and ``max_waiting``.
        binary: The real HAProxy.
    """
    bodies = folder / "answers"
    bodies.mkdir(parents=True, exist_ok=True)
    edits = folder / "haproxy.sed"
    edits.write_text("\n".join([*_closed_doors(), *_answers(bodies, settings), ""]))
    script = folder / "haproxy"
    script.write_text(
        "#!/bin/sh\n"
        'for argument; do [ "$before" = -f ] && config=$argument; before=$argument; done\n'
        f'sed -i -f {edits} "$config" && exec {binary} "$@"\n'
    )
    script.chmod(0o755)
    return script


def _closed_doors() -> list[str]:
    """Edits for what listens, waits and writes more than it should."""
    return [
        rf"s/^    bind :\([0-9]*\)$/    bind {LOOPBACK}:\1/",
        rf"s/^  bind \*:\([0-9]*\)$/  bind {LOOPBACK}:\1/",
        rf"s/^    timeout connect .*/    timeout connect {CONNECT_MILLISECONDS}ms/",
        "s/ check backup$/ check backup disabled/",
        r"/^    option http-buffer-request$/d",
        r"/^frontend http_frontend$/a\    option http-buffer-request",
        r"/^    http-request set-log-level silent$/d",
        r"/^frontend http_frontend$/a\    http-request set-log-level silent",
    ]


def _answers(bodies: Path, settings: ServingSettings) -> list[str]:
    """Edits for what HAProxy answers by itself; their bodies are written into a folder."""
    defaults = [f"timeout http-request {ceil(settings.read_timeout_seconds * 1000)}ms"]
    for status, (phrase, code, message) in PLAIN.items():
        (bodies / f"{status}.http").write_bytes(
            _answer(phrase, refuse(message, status=status, code=code))
        )
        defaults.append(f"errorfile {status} {bodies / f'{status}.http'}")
    away = refuse("no replica answers at the moment", status=503, code="no_replica")
    (bodies / "503.http").write_bytes(_answer("Service Unavailable", away))
    defaults += [f"errorfile {status} {bodies / '503.http'}" for status in UNREACHABLE]

    missing = refuse("there is nothing at this path", status=404, code="unknown_path")
    strange = refuse("no path takes this method", status=405, code="wrong_method")
    limit = settings.max_waiting
    busy = too_busy(f"{limit} requests for each replica are under way already", allowed=limit)
    not_found = "    http-request return status 404 content-type"
    return [
        r"/^    errorfile /d",
        r"/^    timeout http-request /d",
        r"/^    http-request return status 405 /d",
        rf"s|^{not_found} text/plain .*|    {_rule(bodies, missing)}|",
        *(rf"/^defaults$/a\    {line}" for line in defaults),
        rf"/^frontend http_frontend$/a\    {_rule(bodies, strange)} unless {{ method {METHODS} }}",
        r"/^    http-request set-var(txn.may_hold) /d",
        r"/^    http-request disable-l7-retry /d",
        r"/^    http-request return status 503 content-type application\/json file /d",
        *(
            rf"/^backend http-/a\    {rule}"
            for rule in (
                f"{_rule(bodies, away)} if {{ nbsrv lt 1 }}",
                f"http-request disable-l7-retry if !{{ path {SCORE} }} !{{ method {READING} }}",
                f"http-request set-var(txn.may_hold) nbsrv,mul({limit})",
                f"{_rule(bodies, busy)} if {{ path {SCORE} }} {{ be_conn,sub(txn.may_hold) gt 0 }}",
            )
        ),
    ]


def _rule(bodies: Path, error: RefusedRequestError) -> str:
    """A rule that answers a request; its body is written into a folder."""
    body = bodies / f"{error.code}.json"
    body.write_text(json.dumps(error.body))
    rule = f"http-request return status {error.status} content-type application/json file {body}"
    return rule + (f" hdr Retry-After {RETRY_SECONDS}" if error.status == 503 else "")


def _answer(phrase: str, error: RefusedRequestError) -> bytes:
    """A whole HTTP answer, as HAProxy sends it."""
    body = json.dumps(error.body).encode()
    head = [
        f"HTTP/1.1 {error.status} {phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-cache",
        *([f"Retry-After: {RETRY_SECONDS}"] if error.status == 503 else []),
        "Connection: close",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body
