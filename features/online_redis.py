"""Features of a request from Redis in one round trip, and what happens while Redis is away.

Feast writes; here its layout is read by its bytes (``feast_plugins.redis_wire``). All views of
products come with one command a product, sent together. Views of categories, a few thousand rows,
are kept in memory and read again in the background after each materialisation, because their keys
are only known once the products are read.

While Redis is down or slow, features are missing and the request says so: its time-out ends the
wait, and after some of them a breaker ends the waiting, until Redis answers again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.features.feast_plugins.keys import Keys
from driftline.features.feast_plugins.redis_connection import (
    Breaker,
    RedisAddress,
    RedisConnection,
    RedisUnavailableError,
)
from driftline.features.feast_plugins.redis_wire import (
    Cell,
    HashKeys,
    command,
    event_us,
    field_name,
    floats,
    integers,
    text,
    time_field,
)
from driftline.features.online_views import Found, Key, ViewTable, Wanted, empty_table
from driftline.features.views import NO_TEXT, TEXT_ID, View

MAX_GROUPS: Final = 20_000
"""Categories and pairs that are kept in memory; beyond that they are forgotten and learned anew."""
CHUNK: Final = 1_000
"""Keys asked for at once in the background."""
BACKGROUND_SECONDS: Final = 2.0
"""Time-out of a background chunk."""


@dataclass(frozen=True)
class RedisViews:
    """Views that share a join key, hence a hash each key, and where their fields stand in it."""

    wanted: tuple[Wanted, ...]
    keys: HashKeys
    tail: bytes
    """The fields, packed: the same at the end of each command."""
    num_fields: int

    @classmethod
    def of(cls, wanted: Sequence[Wanted], *, project: str) -> "RedisViews":
        """The views of one entity."""
        fields = [name for one in wanted for name in _fields(one)]
        return cls(
            tuple(wanted),
            HashKeys(wanted[0].view.join_key, project),
            b"".join(b"$%d\r\n%b\r\n" % (len(name), name) for name in fields),
            len(fields),
        )

    def commands(self, keys: Sequence[Key] | NDArray[np.int64]) -> bytes:
        """Ask for all fields of some keys, one command each."""
        if not isinstance(keys, np.ndarray):
            return b"".join([self._command(key) for key in keys])
        template, key_places = self._template
        commands_KL = np.tile(template, (len(keys), 1))
        commands_KL[:, key_places] = keys.astype("<i8").view(np.uint8).reshape(len(keys), -1)
        return commands_KL.tobytes()

    @cached_property
    def _template(self) -> tuple[NDArray[np.uint8], NDArray[np.intp]]:
        """The command of an integer, and where in it the integer stands; all are of one length."""
        zero, ones = (np.frombuffer(self._command(key), np.uint8) for key in (0, -1))
        return zero, np.flatnonzero(zero != ones)

    def _command(self, key: Key) -> bytes:
        name = self.keys.name(key)
        head = b"*%d\r\n$5\r\nHMGET\r\n$%d\r\n" % (2 + self.num_fields, len(name))
        return head + name + b"\r\n" + self.tail

    def tables(self, replies: Sequence[Sequence[Cell]]) -> dict[str, Found]:
        """The values of each view, by its name, in the order of the replies."""
        columns = list(zip(*replies, strict=True)) or [()] * self.num_fields
        found = {}
        for wanted in self.wanted:
            num = len(_fields(wanted))
            found[wanted.view.name] = _table(wanted, columns[:num])
            columns = columns[num:]
        return found


@dataclass(frozen=True)
class Groups:
    """Rows of a view of categories in memory."""

    places: Mapping[str, int]
    """Slot of each key that was asked for; -1 for one that Redis does not have."""
    table: ViewTable


@dataclass(frozen=True)
class RedisVersion:
    """What requests see; groups never change, products are as new as Redis has them."""

    source: "RedisSource" = field(compare=False)
    as_of: datetime | None
    groups: Mapping[str, Groups]
    catalogue: None = None

    def products(self, keys: Keys) -> Mapping[str, Found] | None:
        """All views of products, in one round trip; ``None`` while Redis is away."""
        listed = keys if isinstance(keys, np.ndarray) else list(keys)
        return self.source.read(self.source.products, listed)

    def group(self, view: View, keys: Sequence[Key | None]) -> Found | None:
        """A view of categories: from memory, or from Redis for a category not seen before."""
        groups = self.groups[view.name]
        slots = [-1 if key is None else groups.places.get(str(key)) for key in keys]
        if None not in slots:
            return Found(groups.table, np.array(slots, np.int64))
        self.source.note(view.name, [str(key) for key in keys if key is not None])
        found = self.source.read(self.source.categories[view.name], keys)
        return None if found is None else found[view.name]

    def tables(self) -> Sequence[ViewTable]:
        """Of the views of categories; those of products are read anew for each request."""
        return [groups.table for groups in self.groups.values()]

    def view_version(self, name: str) -> str | None:
        """Unknown: Redis does not tell when it was written."""
        return None


class RedisSource:
    """Reads the views of a market from Redis.

    Args:
        wanted: What a head reads of each view.
        project: Feast's project.
        address: ``store.redis_address``.
        timeout_ms: Longest wait of a request for Redis.
    """

    def __init__(
        self, wanted: Sequence[Wanted], *, project: str, address: str, timeout_ms: float
    ) -> None:
        products = [one for one in wanted if one.view.entity == "product"]
        others = [one for one in wanted if one.view.entity != "product"]
        self.products = RedisViews.of(products, project=project)
        self.categories = {one.view.name: RedisViews.of([one], project=project) for one in others}
        self._timeout_seconds = timeout_ms / 1e3
        parsed = RedisAddress.parse(address)
        self._requests, self._background = RedisConnection(parsed), RedisConnection(parsed)
        self._breaker = Breaker()
        self._noted: dict[str, dict[str, None]] = {name: {} for name in self.categories}
        self._counts = {"reads": 0, "failures": 0, "skipped": 0}

    def counts(self) -> Mapping[str, int]:
        """Round trips for requests; those that failed; those not tried because Redis was away."""
        return dict(self._counts)

    @property
    def is_away(self) -> bool:
        """Whether Redis counts as dead, so that requests do not ask it."""
        return self._breaker.is_open

    def read(
        self, views: RedisViews, keys: Sequence[Key | None] | NDArray[np.int64]
    ) -> dict[str, Found] | None:
        """Values of some views for a request's keys; ``None`` while Redis is away."""
        if not self._breaker.allows():
            self._counts["skipped"] += 1
            return None
        self._counts["reads"] += 1
        asked = keys if isinstance(keys, np.ndarray) else [key for key in keys if key is not None]
        replies: list[Any] = []
        if len(asked):
            try:
                replies = self._requests.ask(
                    views.commands(asked), num=len(asked), timeout_seconds=self._timeout_seconds
                )
            except RedisUnavailableError as error:
                self._failed(error)
                return None
        if len(asked) < len(keys):
            there = iter(replies)
            nothing = (None,) * views.num_fields
            replies = [nothing if key is None else next(there) for key in keys]
        try:
            tables = views.tables(replies)
        except FeatureStoreError as error:  # written by other definitions of the views
            self._failed(error)
            return None
        if len(asked):
            self._breaker.succeeded()
        return tables

    def look(self, old: RedisVersion | None, *, as_of: datetime | None) -> RedisVersion:
        """A newer version, when there was a materialisation or a request met a new category.

        Also finds out whether a Redis that was away is back. While it is away, the groups stay.
        """
        if self._breaker.is_open:
            self._probe()
        noted = {name: list(keys) for name, keys in self._noted.items()}
        if old is not None and old.as_of == as_of and not any(noted.values()):
            return old
        groups = {}
        for name, views in self.categories.items():
            known = [] if old is None else list(old.groups[name].places)
            keys = list(dict.fromkeys([*known, *noted[name]]))
            try:
                groups[name] = self._groups(views, keys if len(keys) <= MAX_GROUPS else noted[name])
            except RedisUnavailableError as error:
                self._breaker.failed(str(error))
                if old is not None:
                    return old
                groups[name] = Groups({}, empty_table(views.wanted[0]))
                continue
            for key in noted[name]:
                self._noted[name].pop(key, None)
        return RedisVersion(self, as_of, groups)

    def note(self, name: str, keys: Sequence[str]) -> None:
        """Keys of a view of categories that were asked for and are not in memory."""
        noted = self._noted[name]
        if len(noted) < MAX_GROUPS:
            noted.update(dict.fromkeys(keys))

    def _failed(self, error: Exception) -> None:
        self._counts["failures"] += 1
        self._breaker.failed(str(error))

    def _probe(self) -> None:
        try:
            self._background.ask(command(b"PING"), num=1, timeout_seconds=BACKGROUND_SECONDS)
        except RedisUnavailableError as error:
            self._breaker.failed(str(error))
        else:
            self._breaker.succeeded()

    def _groups(self, views: RedisViews, keys: Sequence[str]) -> Groups:
        replies: list[Any] = []
        for start in range(0, len(keys), CHUNK):
            chunk = keys[start : start + CHUNK]
            replies += self._background.ask(
                views.commands(chunk), num=len(chunk), timeout_seconds=BACKGROUND_SECONDS
            )
        found = views.tables(replies)[views.wanted[0].view.name]
        return Groups(dict(zip(keys, found.slots.tolist(), strict=True)), found.table)


def _fields(wanted: Wanted) -> list[bytes]:
    """Fields of a view in the order in which they are asked for: its event time comes first."""
    name = wanted.view.name
    features = [*wanted.numbers, *wanted.categories, *([TEXT_ID] if wanted.text_id else [])]
    return [time_field(name), *(field_name(name, feature) for feature in features)]


def _table(wanted: Wanted, columns: Sequence[Sequence[Cell]]) -> Found:
    """A view's values, one slot a reply and a last one for a missing key.

    Args:
        wanted: The view.
        columns: The cells of each of its fields, in the order of :func:`_fields`.
    """
    written, *others = columns
    num, num_numbers = len(written), len(wanted.numbers)
    times = {cell: 0 if cell is None else event_us(cell) for cell in set(written)}
    event = np.array([*(times[cell] for cell in written), 0], np.int64)
    slots = np.arange(num)
    if None in times:
        slots[[cell is None for cell in written]] = -1
    numbers = np.full((num + 1, num_numbers), np.nan, np.float32)
    cells = list(chain.from_iterable(others[:num_numbers]))
    numbers[:-1] = floats(cells).reshape(num_numbers, num).T
    categories = {}
    for name, read in zip(wanted.categories, others[num_numbers:], strict=False):
        codes: dict[bytes, int] = {}
        found = [codes.setdefault(cell, len(codes)) if cell else -1 for cell in read]
        strings = np.empty(len(codes) + 1, np.object_)
        strings[:-1], strings[-1] = [text(cell) for cell in codes], None
        categories[name] = (np.array([*found, -1], np.int32), strings)
    text_id = None
    if wanted.text_id:
        text_id = np.append(integers(others[-1], missing=NO_TEXT), NO_TEXT)
    return Found(ViewTable(event, numbers, categories, text_id), slots)
