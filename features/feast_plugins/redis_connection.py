"""One connection to Redis that never waits longer than it was told, and a breaker for a dead one.

Commands travel together and their replies come back together: one round trip. A time-out holds for
the whole of it, connecting included, which the time-out of a socket (for each wait) does not.
"""

import json
import logging
import socket
import ssl
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final, Self

import hiredis

from driftline.features.feast_plugins.redis_wire import command
from driftline.platform.errors import SettingsError

logger = logging.getLogger(__name__)

_PARAMETERS: Final = ("db", "username", "password", "ssl")
_CHUNK: Final = 1 << 16

FAILURES_TO_OPEN: Final = 3
"""So many in a row, and requests no longer wait for Redis."""
PAUSE_SECONDS: Final = 10.0
"""After this long a request tries again, should nobody have looked in between."""


class RedisUnavailableError(Exception):
    """Redis is down, too slow, or answers with an error. Never leaves ``features``."""


@dataclass(frozen=True)
class RedisAddress:
    """Where Redis is, in Feast's way of writing: ``host:port,db=0,password=...``."""

    host: str
    port: int
    db: int = 0
    username: str | None = None
    password: str | None = None
    ssl: bool = False

    @classmethod
    def parse(cls, address: str) -> Self:
        """Read ``store.redis_address``.

        Raises:
            SettingsError: several hosts, or a parameter that is not known here.
        """
        hosts = [part for part in address.split(",") if "=" not in part]
        pairs = dict(part.split("=", 1) for part in address.split(",") if "=" in part)
        host, colon, port = hosts[0].rpartition(":") if len(hosts) == 1 else ("", "", "")
        unknown = [name for name in pairs if name not in _PARAMETERS]
        if not colon or not port.isdigit() or unknown:
            raise SettingsError(
                "store.redis_address must be HOST:PORT and any of "
                f"{', '.join(_PARAMETERS)}, such as localhost:6379,db=1; got {hosts} and {unknown}"
            )
        values = {name: _value(text) for name, text in pairs.items()}
        words = {name: str(values[name]) for name in ("username", "password") if name in values}
        return cls(
            host, int(port), db=int(values.get("db", 0)), ssl=bool(values.get("ssl")), **words
        )


class RedisConnection:
    """A connection that is made when first needed and again after an error. Thread-safe."""

    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self._reader = hiredis.Reader()
        self._lock = Lock()

    def ask(self, commands: bytes, *, num: int, timeout_seconds: float) -> list[Any]:
        """Send so many commands and return their replies, in one round trip.

        Raises:
            RedisUnavailableError: no reply in time, or an error for one.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._lock:
            try:
                fresh = self._socket is None
                try:
                    return self._ask(commands, num, deadline)
                except (ConnectionError, BrokenPipeError):
                    if fresh:
                        raise
                    self.close()  # Redis was restarted since the last time: try once more
                    return self._ask(commands, num, deadline)
            except (OSError, hiredis.HiredisError) as error:
                self.close()
                raise RedisUnavailableError(f"{type(error).__name__}: {error}") from error
            except RedisUnavailableError:
                self.close()
                raise

    def close(self) -> None:
        """Give the connection up; the next question makes a new one."""
        if self._socket is not None:
            self._socket.close()
        self._socket, self._reader = None, hiredis.Reader()

    def _ask(self, commands: bytes, num: int, deadline: float) -> list[Any]:
        if self._socket is None:
            self._socket = self._connect(deadline)
            weakref.finalize(self, self._socket.close)
            greeting = self._greeting()
            self._exchange(self._socket, b"".join(greeting), len(greeting), deadline)
        return self._exchange(self._socket, commands, num, deadline)

    def _connect(self, deadline: float) -> socket.socket:
        address = self._address
        connection = socket.create_connection((address.host, address.port), _left(deadline))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.ssl:
            context = ssl.create_default_context()
            return context.wrap_socket(connection, server_hostname=address.host)
        return connection

    def _greeting(self) -> list[bytes]:
        address = self._address
        commands = []
        if address.password is not None:
            names = [address.username.encode()] if address.username is not None else []
            commands.append(command(b"AUTH", *names, address.password.encode()))
        if address.db:
            commands.append(command(b"SELECT", str(address.db).encode()))
        return commands

    def _exchange(
        self, connection: socket.socket, commands: bytes, num: int, deadline: float
    ) -> list[Any]:
        connection.settimeout(_left(deadline))
        connection.sendall(commands)
        replies: list[Any] = []
        while len(replies) < num:
            reply = self._reader.gets()
            if reply is False:  # not whole yet
                connection.settimeout(_left(deadline))
                data = connection.recv(_CHUNK)
                if not data:
                    raise ConnectionResetError("Redis closed the connection")
                self._reader.feed(data)
            elif isinstance(reply, Exception):
                raise RedisUnavailableError(str(reply))
            else:
                replies.append(reply)
        return replies


class Breaker:
    """Whether it is worth while to ask a store that has failed.

    Closed: asked. After some failures in a row it opens, and nobody asks until a background look
    found the store alive, or a pause is over. So a dead store costs some requests its time-out, and
    the others nothing.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._retry_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the store counts as dead."""
        return self._failures >= FAILURES_TO_OPEN

    def allows(self) -> bool:
        """Whether to ask now; where the pause is over, this caller alone is let through."""
        if not self.is_open:
            return True
        if self._clock() < self._retry_at:
            return False
        self._retry_at = self._clock() + PAUSE_SECONDS
        return True

    def failed(self, reason: str) -> None:
        """The store did not answer."""
        self._failures += 1
        self._retry_at = self._clock() + PAUSE_SECONDS
        if self._failures == FAILURES_TO_OPEN:
            logger.warning("the online store does not answer, features are missing: %s", reason)

    def succeeded(self) -> None:
        """The store answered."""
        if self.is_open:
            logger.warning("the online store answers again")
        self._failures = 0


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("Redis did not answer in time")
    return left


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
