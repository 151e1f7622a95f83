"""The token that administration over HTTP asks for: made, read, compared."""

import hmac
import logging
import os
import secrets
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from driftline.platform.settings import DriftlineSettings
from driftline.platform.workspace import Workspace
from driftline.serving.transport.requests import refuse

logger = logging.getLogger(__name__)

SHORTEST_TOKEN: Final = 16
"""Characters."""


def token_path(settings: DriftlineSettings) -> Path | None:
    """The file of the token; ``None`` when there is no administration over HTTP."""
    given = settings.serving.admin_token_file
    return None if given is None else Workspace.of(settings).root / given


def make_token(path: Path) -> None:
    """Write a random token that only the owner can read, unless there is a file already."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        try:
            os.link(scratch, path)  # another replica may have been faster; then its token counts
            logger.info("made a token for administration: %s", path)
        except FileExistsError:
            pass
    finally:
        scratch.unlink(missing_ok=True)


def read_token(path: Path) -> bytes:
    """The token.

    Raises:
        RefusedRequestError: 403, when there is none, or others can read it.
    """
    try:
        mode, token = path.stat().st_mode, path.read_bytes().strip()
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    else:
        if len(token) >= SHORTEST_TOKEN and not mode & 0o077:
            return token
        reason = "can be read by others; chmod 600 it"
        if len(token) < SHORTEST_TOKEN:
            reason = f"holds less than {SHORTEST_TOKEN} characters"
    logger.warning("administration is refused: %s %s", path, reason)
    raise refuse(f"administration is off: the token's file {reason}", status=403, code="admin_off")


def check_token(scope: Mapping[str, Any], path: Path) -> None:
    """Compare the token that came with the file's, in a time that tells nothing.

    Raises:
        RefusedRequestError: 401 without the right one; 403 when the file cannot be used.
    """
    token = read_token(path)
    given = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, brought = given.partition(b" ")
    right = hmac.compare_digest(brought.strip(), token)
    if scheme.lower() != b"bearer" or not right:
        raise refuse(
            "administration needs the header `Authorization: Bearer TOKEN`",
            status=401,
            code="wrong_token" if given else "no_token",
            hint="the token is in serving.admin_token_file",
        )
