"""Who changed what is live, when, which way, and what came of it: one JSON object a line."""

import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from driftline.platform.windows import format_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)


def audit_path(workspace: Workspace) -> Path:
    """The file; it is only ever appended to."""
    return workspace.state / "delivery.jsonl"


def new_change() -> str:
    """An id for a change."""
    return uuid.uuid4().hex[:12]


def read_change(path: Path, change: str) -> Mapping[str, Any] | None:
    """The newest line about a change; ``None`` when nothing is known of it."""
    found = None
    if path.exists():
        with path.open() as file:
            for line in file:
                if change in line and (entry := json.loads(line)).get("id") == change:
                    found = entry
    return found


@dataclass(frozen=True)
class AuditLog:
    """Appends to a file and never changes what stands in it.

    A market without a workspace has nothing to change, so nothing is written there.
    """

    path: Path
    by: str
    via: str
    clock: Callable[[], datetime]
    change: str | None = None
    """Id of the change; a new one for each entry when not given."""

    @contextmanager
    def entry(
        self, action: str, *, must_be_written: bool = True, **arguments: Any
    ) -> Iterator[None]:
        """Write down what is asked for before the block runs, and its outcome after it.

        Args:
            action: What is asked for.
            must_be_written: Whether the action waits for a disk that is full; rolling back must
                not.
            arguments: Of the action.

        Raises:
            OSError: the file cannot be written, and it must.
        """
        name = self.change or new_change()
        asked = {"id": name, "action": action, "arguments": arguments}
        self.append(asked | {"state": "asked"}, must_be_written=must_be_written)
        try:
            yield
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            failed = asked | {"state": "refused", "message": message}
            self.append(failed, must_be_written=False)
            raise
        self.append(asked | {"state": "done"}, must_be_written=False)

    def append(self, facts: Mapping[str, Any], *, must_be_written: bool) -> None:
        """Write one line, and make sure that it is on disk."""
        if not self.path.parent.parent.exists():
            return
        line = {"at": format_time(self.clock()), "by": self.by, "via": self.via, **facts}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                file.write(json.dumps(line, default=str).encode() + b"\n")
                os.fsync(file.fileno())
        except OSError as error:
            if must_be_written:
                raise
            logger.warning("audit log not written: %s", error)
