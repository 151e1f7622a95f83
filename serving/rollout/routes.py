"""Which of the live bundles answers a request.

The choice is sticky: it depends on the request's key alone, not on the process, the replica or the
moment. A larger share only moves keys from the champion to the canary.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final, Literal

from driftline.platform.traffic import Canary
from driftline.platform.windows import format_time
from driftline.serving.prepared import PreparedBundle
from driftline.serving.transport.requests import RequestParser, ScoreRequest

Arm = Literal["champion", "canary"]

HASH_BYTES: Final = 8


@dataclass(frozen=True)
class LiveBundle:
    """A prepared bundle with its place in the registry and its part in the traffic."""

    version: int
    prepared: PreparedBundle = field(compare=False)
    promoted_at: datetime | None
    loaded_at: datetime
    load_seconds: float
    arm: Arm = "champion"
    """Which arm of a canary test its answers belong to; ``champion`` without a test."""
    experiment: str | None = None
    """``Canary.experiment`` while one runs; the champion's answers carry it, too."""

    @property
    def fingerprint(self) -> str:
        """Names the bundle in every answer."""
        return self.prepared.bundle.fingerprint


@dataclass(frozen=True)
class Routes:
    """All bundles that are live now; replaced as a whole, never changed."""

    champion: LiveBundle | None = None
    canary: LiveBundle | None = None
    share: float = 0.0
    """Of the request keys, that the canary answers."""
    salt: str = ""
    stand_in: LiveBundle | None = None
    """The champion in the canary's arm: answers where the canary failed, so that the arms stay
    as the keys divided them."""
    shadows: tuple[LiveBundle, ...] = ()

    @classmethod
    def of(
        cls,
        champion: LiveBundle | None,
        *,
        canary: tuple[Canary, LiveBundle] | None = None,
        shadows: tuple[LiveBundle, ...] = (),
    ) -> "Routes":
        """Routes over loaded bundles; a canary or shadow that is the champion is left out."""
        if champion is None:
            return cls()
        others = tuple(live for live in shadows if live.fingerprint != champion.fingerprint)
        if canary is None or canary[1].fingerprint == champion.fingerprint:
            return cls(champion=champion, shadows=others)
        plan, live = canary
        tested = replace(champion, experiment=plan.experiment)
        return cls(
            champion=tested,
            canary=replace(live, arm="canary", experiment=plan.experiment),
            share=plan.share,
            salt=plan.salt,
            stand_in=replace(tested, arm="canary"),
            shadows=others,
        )

    @property
    def parser(self) -> RequestParser:
        """Reads requests, for champion and canary alike; there must be a champion."""
        assert self.champion is not None
        return self.champion.prepared.parser

    def choose(self, request: ScoreRequest) -> LiveBundle:
        """The bundle that answers a request; there must be a champion.

        Sticky by ``request_key``, else by ``request_id``; a request with neither is drawn by lot.
        """
        assert self.champion is not None
        if self.canary is None:
            return self.champion
        key = request.request_key or request.request_id
        place = random.random() if key is None else key_place(self.salt, key)
        return self.canary if place < self.share else self.champion

    def all(self) -> Iterator[LiveBundle]:
        """Every live bundle: champion, canary, shadows."""
        if self.champion is not None:
            yield self.champion
        if self.canary is not None:
            yield self.canary
        yield from self.shadows

    def to_json(self) -> list[dict[str, Any]]:
        """Each live bundle with its role and its share of the answers, JSON-able."""
        entries = []
        for live in self.all():
            role, share = "shadow", 0.0
            if live is self.champion:
                role, share = "champion", 1.0 - self.share
            elif live is self.canary:
                role, share = "canary", self.share
            entries.append(
                {
                    "role": role,
                    "bundle": live.fingerprint,
                    "version": live.version,
                    "share": round(share, 6),
                    "loaded_at": format_time(live.loaded_at),
                    "load_seconds": live.load_seconds,
                }
            )
        return entries


def key_place(salt: str, key: str) -> float:
    """Where a key lies between 0 and 1, the same in every process and on every machine.

    The first 8 bytes of BLAKE2b over salt, a zero byte and key, in UTF-8, as an unsigned
    big-endian number divided by 2^64.
    """
    text = f"{salt}\0{key}".encode("utf-8", "surrogatepass")
    digest = blake2b(text, digest_size=HASH_BYTES).digest()
    return int.from_bytes(digest, "big") / 2 ** (8 * HASH_BYTES)
