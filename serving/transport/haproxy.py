"""HAProxy as Ray Serve starts it, with what Ray Serve has no setting for.

Ray Serve renders a configuration at each change of replicas and starts the program named by
``RAY_SERVE_HAPROXY_BINARY_PATH`` on it. We name a small script that edits the configuration and
becomes HAProxy. So:

- statistics and metrics of HAProxy are reached from this machine only (Ray: from everywhere);
- a client that is slow with its headers, or with a body of up to 16 KB, is given up (Ray: never);
- what HAProxy itself answers to a request has our JSON body, and is 503 with ``Retry-After`` while
  there is no replica (Ray: a bare 500). What is no HTTP gets HAProxy's own page, still 400 or 408.
"""

import json
from math import ceil
from pathlib import Path
from typing import Final

from driftline.platform.loopback import LOOPBACK
from driftline.platform.settings import ServingSettings
from driftline.serving.transport.limits import RETRY_SECONDS
from driftline.serving.transport.requests import refuse

PLAIN: Final = {
    400: ("Bad Request", "malformed_http", "the request is not HTTP, or its headers are too many"),
    408: ("Request Timeout", "request_too_slow", "the request did not arrive in time"),
}
METHODS: Final = "GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT"
"""Others are refused here: the server behind would not say so in our form."""
UNREACHABLE: Final = (500, 502, 503, 504)


def haproxy_launcher(folder: Path, settings: ServingSettings, *, binary: str) -> Path:
    """Write the script into ``folder``, with the files that it needs; its path.

    Args:
        folder: A folder of this instance's own.
        settings: ``read_timeout_seconds``.
        binary: The real HAProxy.
    """
    bodies = folder / "answers"
    bodies.mkdir(parents=True, exist_ok=True)
    lines = [f"timeout http-request {ceil(settings.read_timeout_seconds * 1000)}ms"]
    for status, (phrase, code, message) in PLAIN.items():
        (bodies / f"{status}.http").write_bytes(_answer(status, phrase, code, message))
        lines.append(f"errorfile {status} {bodies / f'{status}.http'}")
    away = _answer(503, "Service Unavailable", "no_replica", "no replica answers at the moment")
    (bodies / "503.http").write_bytes(away)
    lines += [f"errorfile {status} {bodies / '503.http'}" for status in UNREACHABLE]
    missing, unknown = bodies / "404.json", bodies / "405.json"
    missing.write_bytes(_body(404, "unknown_path", "there is nothing at this path"))
    unknown.write_bytes(_body(405, "wrong_method", "no path takes this method"))
    strange = f"http-request return status 405 content-type application/json file {unknown}"
    not_found = "    http-request return status 404 content-type"
    edits = folder / "haproxy.sed"
    edits.write_text(
        "\n".join(
            [
                rf"s/^    bind :\([0-9]*\)$/    bind {LOOPBACK}:\1/",
                rf"s/^  bind \*:\([0-9]*\)$/  bind {LOOPBACK}:\1/",
                r"/^    errorfile /d",
                r"/^    timeout http-request /d",
                r"/^    option http-buffer-request$/d",
                r"/^    http-request return status 405 /d",
                rf"s|^{not_found} text/plain .*|{not_found} application/json file {missing}|",
                *(rf"/^defaults$/a\    {line}" for line in lines),
                r"/^frontend http_frontend$/a\    option http-buffer-request",
                rf"/^frontend http_frontend$/a\    {strange} unless {{ method {METHODS} }}",
                "",
            ]
        )
    )
    script = folder / "haproxy"
    script.write_text(
        "#!/bin/sh\n"
        'for argument; do [ "$before" = -f ] && config=$argument; before=$argument; done\n'
        f'sed -i -f {edits} "$config" && exec {binary} "$@"\n'
    )
    script.chmod(0o755)
    return script


def _body(status: int, code: str, message: str) -> bytes:
    return json.dumps(refuse(message, status=status, code=code).body).encode()


def _answer(status: int, phrase: str, code: str, message: str) -> bytes:
    """A whole HTTP answer, as HAProxy sends it."""
    body = _body(status, code, message)
    head = [
        f"HTTP/1.1 {status} {phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-cache",
        *([f"Retry-After: {RETRY_SECONDS}"] if status == 503 else []),
        "Connection: close",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body
