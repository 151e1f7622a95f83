"""What is live beside the champion: ``bundles/TRAFFIC``, a small JSON file.

``bundles/CHAMPION`` says who answers. ``bundles/TRAFFIC`` says who else is loaded: a *canary*
answers a share of the requests, a *shadow* scores them and answers none. Servers look at both
files every second; either is replaced in one step, under the registry's lock. No file means that
the champion is alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from driftline.platform.artefacts import interpreting, read_json, write_json
from driftline.platform.windows import format_time, parse_time

TRAFFIC: Final = "TRAFFIC"
DAMAGED: Final = (
    "`driftline traffic CONFIG --stop` writes it anew, for the champion alone; until then servers "
    "keep the routes that they have"
)
MAX_SHADOWS: Final = 3
"""Each shadow scores every request once more."""


@dataclass(frozen=True)
class BundleRef:
    """A registered bundle and where its files are."""

    version: int
    fingerprint: str
    path: Path


@dataclass(frozen=True)
class Canary:
    """A bundle that answers a share of the requests."""

    bundle: BundleRef
    share: float
    """Of all request keys, between 0 and 1."""
    salt: str
    """Mixed into the hash of a key: another salt, another choice of keys. A larger share with the
    same salt keeps all the keys that the smaller one had."""
    started_at: datetime
    step: int = 1
    """1 with the first share, and one more with every change of it."""
    step_at: datetime | None = None
    """When this step began; ``started_at`` when not given."""

    @property
    def experiment(self) -> str:
        """Names this canary at this share, in the decision log and in the servers' counts.

        Only answers of one share are compared: over several, the arms would differ in the hours
        that their requests come from.
        """
        return f"{self.salt}/{self.step}"


@dataclass(frozen=True)
class Traffic:
    """Who is loaded beside the champion."""

    canary: Canary | None = None
    shadows: tuple[BundleRef, ...] = ()
    changed_at: datetime | None = None
    by: str | None = None

    def without(self, fingerprint: str) -> "Traffic":
        """The same without a bundle, e.g. because it became the champion."""
        canary = self.canary
        if canary is not None and canary.bundle.fingerprint == fingerprint:
            canary = None
        shadows = tuple(ref for ref in self.shadows if ref.fingerprint != fingerprint)
        return replace(self, canary=canary, shadows=shadows)

    @property
    def is_empty(self) -> bool:
        """Whether the champion is alone."""
        return self.canary is None and not self.shadows

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "canary": None if self.canary is None else _canary_json(self.canary),
            "shadow": [_ref_json(ref) for ref in self.shadows],
            "changed_at": None if self.changed_at is None else format_time(self.changed_at),
            "by": self.by,
        }


def read_traffic(bundles: Path) -> Traffic:
    """What the file says; empty without one.

    Args:
        bundles: The folder of bundles, ``Workspace.bundles``.

    Raises:
        ArtefactError: not JSON, or something is missing in it or means nothing.
    """
    source = bundles / TRAFFIC
    try:
        raw = read_json(source, remedy=DAMAGED)
    except FileNotFoundError:
        return Traffic()
    with interpreting(source, remedy=DAMAGED):
        changed_at = raw["changed_at"]
        return Traffic(
            canary=None if raw["canary"] is None else _canary(raw["canary"], bundles),
            shadows=tuple(_ref(entry, bundles) for entry in raw["shadow"]),
            changed_at=None if changed_at is None else parse_time(changed_at),
            by=raw["by"],
        )


def write_traffic(bundles: Path, traffic: Traffic) -> None:
    """Replace the file in one step; hold the registry's turn while reading and writing."""
    value = traffic.to_json()
    refs = value["shadow"] + ([value["canary"]] if value["canary"] else [])
    root = bundles.resolve()
    for entry in refs:
        path = Path(entry["path"]).resolve()
        entry["path"] = str(path.relative_to(root) if path.is_relative_to(root) else path)
    write_json(bundles / TRAFFIC, value)


def _ref_json(ref: BundleRef) -> dict[str, Any]:
    return {"bundle": ref.fingerprint, "version": ref.version, "path": str(ref.path)}


def _canary_json(canary: Canary) -> dict[str, Any]:
    return _ref_json(canary.bundle) | {
        "share": canary.share,
        "salt": canary.salt,
        "started_at": format_time(canary.started_at),
        "step": canary.step,
        "step_at": format_time(canary.step_at or canary.started_at),
    }


def _ref(raw: Mapping[str, Any], bundles: Path) -> BundleRef:
    return BundleRef(int(raw["version"]), str(raw["bundle"]), (bundles / raw["path"]).resolve())


def _canary(raw: Mapping[str, Any], bundles: Path) -> Canary:
    share = float(raw["share"])
    if not 0 < share < 1:
        raise ValueError(f"the canary's share must lie between 0 and 1, got {share}")
    return Canary(
        bundle=_ref(raw, bundles),
        share=share,
        salt=str(raw["salt"]),
        started_at=parse_time(raw["started_at"]),
        step=int(raw["step"]),
        step_at=parse_time(raw["step_at"]),
    )
