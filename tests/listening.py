"""Who listens: what the tests of several servers ask of all their processes."""

from contextlib import suppress
from typing import NamedTuple

import psutil

from driftline.platform.processes import family_members


class Listener(NamedTuple):
    """A socket that waits for connections."""

    ip: str
    port: int
    process: str


def listeners(family: str) -> set[Listener]:
    """All of a family of processes; one that is gone by now does not listen."""
    found = set()
    for process in family_members(family):
        with suppress(psutil.NoSuchProcess):  # Ray's workers come and go
            found |= {
                Listener(connection.laddr.ip, connection.laddr.port, process.name())
                for connection in process.net_connections(kind="inet")
                if connection.status == psutil.CONN_LISTEN
            }
    return found
