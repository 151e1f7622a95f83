"""Changes what is live: deploy, share, stop, roll back. One door for the command and for HTTP.

Every bundle is opened, verified and scored with before any pointer moves; every change is written
to an audit log, before and after. The servers follow the pointers by themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from filelock import FileLock

from driftline.platform.errors import DeliveryError, MissingArtefactError
from driftline.platform.registry import RegisteredBundle, Registry, read_champion
from driftline.platform.settings import DriftlineSettings
from driftline.platform.traffic import MAX_SHADOWS, BundleRef, Canary, Traffic, read_traffic
from driftline.platform.windows import format_time
from driftline.platform.workspace import Workspace
from driftline.serving.rollout.audit import AuditLog, audit_path
from driftline.serving.service import BundleService

SHORTEST_PREFIX: Final = 4
LONGEST_VERSION: Final = 9
"""Digits; what is longer is a fingerprint that happens to have no letters."""


def utc_now() -> datetime:
    """Wall time."""
    return datetime.now(UTC)


class Delivery:
    """What is live in one market, and who may change it.

    Args:
        settings: Of the market.
        by: Who asks; for the audit log.
        via: Which way the change came, e.g. ``command``.
        clock: Wall time.
        change: Id of the one change that will be asked for, in the audit log.
    """

    def __init__(
        self,
        settings: DriftlineSettings,
        *,
        by: str,
        via: str,
        clock: Callable[[], datetime] = utc_now,
        change: str | None = None,
    ) -> None:
        self._settings = settings
        self._workspace = Workspace.of(settings)
        self._registry = Registry(settings, self._workspace)
        self._clock = clock
        self._by = by
        path = audit_path(self._workspace)
        self._audit = AuditLog(path, by=by, via=via, clock=clock, change=change)

    # --- changes --------------------------------------------------------------------------

    def deploy_champion(self, bundle: str, *, reasons: Sequence[str] = ()) -> BundleRef:
        """Let a bundle answer all requests that no canary gets.

        Raises:
            MissingArtefactError: no such version or fingerprint.
            BundleError: it cannot be served; nothing has changed.
        """
        with self._audit.entry("deploy", role="champion", bundle=bundle, reasons=list(reasons)):
            ref = self._tried(self.find(bundle))
            self._promote(ref, reasons=reasons or (f"deployed by {self._by}",))
            with self._registry.traffic(by=self._by, now=self._clock()) as change:
                change.after = change.after.without(ref.fingerprint)
        return ref

    def deploy_canary(self, bundle: str, *, share: float) -> Canary:
        """Let a bundle answer a share of the requests, beside the champion.

        Raises:
            MissingArtefactError: no such version or fingerprint.
            BundleError: it cannot be served; nothing has changed.
            DeliveryError: it is the champion, another canary is live, or there is no champion.
        """
        check_share(share)
        with self._audit.entry("deploy", role="canary", bundle=bundle, share=share):
            ref = self._tried(self.find(bundle))
            self._check_beside_champion(ref, role="canary")
            now = self._clock()
            with self._registry.traffic(by=self._by, now=now) as change:
                old = change.after.canary
                if old is not None and old.bundle.fingerprint != ref.fingerprint:
                    raise DeliveryError(
                        f"version {old.bundle.version} is the canary already; "
                        "`driftline traffic CONFIG --stop` withdraws it"
                    )
                salt = f"{ref.fingerprint}@{format_time(now)}"
                canary = Canary(ref, share=share, salt=salt, started_at=now, step_at=now)
                if old is not None:
                    canary = next_step(old, share=share, now=now)
                others = change.after.without(ref.fingerprint)
                change.after = replace(others, canary=canary)
        return canary

    def deploy_shadow(self, bundle: str) -> BundleRef:
        """Let a bundle score the requests beside the champion without answering.

        Raises:
            MissingArtefactError: no such version or fingerprint.
            BundleError: it cannot be served; nothing has changed.
            DeliveryError: it is live already, or there are enough shadows.
        """
        with self._audit.entry("deploy", role="shadow", bundle=bundle):
            ref = self._tried(self.find(bundle))
            self._check_beside_champion(ref, role="shadow")
            with self._registry.traffic(by=self._by, now=self._clock()) as change:
                shadows = change.after.without(ref.fingerprint).shadows
                if change.after.canary is not None and change.after.canary.bundle == ref:
                    raise DeliveryError(f"version {ref.version} is the canary already")
                if len(shadows) >= MAX_SHADOWS:
                    raise DeliveryError(
                        f"at most {MAX_SHADOWS} shadows; `driftline traffic CONFIG --stop` "
                        "leaves the champion alone"
                    )
                change.after = replace(change.after, shadows=(*shadows, ref))
        return ref

    def set_share(self, share: float) -> Canary:
        """Give the canary another share; a larger one only adds request keys.

        Raises:
            DeliveryError: there is no canary.
        """
        check_share(share)
        with self._audit.entry("traffic", share=share):
            _the_canary(read_traffic(self._workspace.bundles))
            with self._registry.traffic(by=self._by, now=self._clock()) as change:
                old = _the_canary(change.after)
                canary = next_step(old, share=share, now=self._clock())
                change.after = replace(change.after, canary=canary)
        return canary

    def stop(self, *, reasons: Sequence[str] = (), shadows: bool = True) -> None:
        """Withdraw the canary and, by default, the shadows. Harmless when there are none."""
        with (
            self._audit.entry("stop", must_be_written=False, reasons=list(reasons)),
            self._registry.traffic(by=self._by, now=self._clock()) as change,
        ):
            left = () if shadows else change.after.shadows
            change.after = replace(change.after, canary=None, shadows=left)

    def roll_back(self, to: str | None = None) -> BundleRef:
        """Make an earlier champion the champion again, and withdraw the canary.

        Args:
            to: Version or fingerprint; the champion before this one when not given.

        Raises:
            MissingArtefactError: no such version, or there was no champion before this one.
            BundleError: it cannot be served; nothing has changed.
        """
        with self._audit.entry("rollback", must_be_written=False, to=to):
            ref = self._tried(self.find(to if to is not None else str(self._version_before())))
            with self._registry.traffic(by=self._by, now=self._clock()) as change:
                change.after = replace(change.after, canary=None)
            self._promote(ref, reasons=(f"rolled back by {self._by}",))
        return ref

    # --- how ------------------------------------------------------------------------------

    def find(self, bundle: str) -> BundleRef:
        """A registered bundle by version, or by fingerprint or its beginning.

        Raises:
            MissingArtefactError: none, or several, are called so.
        """
        versions = self._registry.versions()
        found = _called(versions, bundle)
        if len(found) == 1:
            return BundleRef(found[0].version, found[0].fingerprint, found[0].path)
        newest = [f"{known.version} ({known.fingerprint})" for known in versions[:5]]
        what = f"{len(found)} bundles begin with {bundle!r}" if found else f"no version {bundle}"
        raise MissingArtefactError(
            f"{self._settings.name}: {what}; the newest are {', '.join(newest) or 'none yet'}; "
            "give a version or a fingerprint"
        )

    def _tried(self, ref: BundleRef) -> BundleRef:
        """The bundle, once it has answered a request."""
        BundleService(self._settings).try_out(ref)
        return ref

    def _promote(self, ref: BundleRef, *, reasons: Sequence[str]) -> None:
        # Not between a refresh's look at the champion and its promotion.
        with FileLock(self._workspace.root / "publish.lock"):
            self._registry.promote(ref.version, promoted_at=self._clock(), reasons=reasons)

    def _check_beside_champion(self, ref: BundleRef, *, role: str) -> None:
        champion = read_champion(self._workspace.bundles)
        if champion is None:
            raise DeliveryError(f"a {role} needs a champion beside it; there is none yet")
        if champion.fingerprint == ref.fingerprint:
            raise DeliveryError(f"version {ref.version} is the champion already")

    def _version_before(self) -> int:
        champion = read_champion(self._workspace.bundles)
        if champion is None or not champion.before:
            raise MissingArtefactError(
                f"{self._settings.name}: no champion before this one is known; name a version "
                "with --to"
            )
        return champion.before[0]


def _the_canary(traffic: Traffic) -> Canary:
    if traffic.canary is None:
        raise DeliveryError(
            "there is no canary; `driftline deploy CONFIG --bundle B --canary SHARE` starts one"
        )
    return traffic.canary


def check_share(share: float) -> None:
    """Refuse a share that leaves one arm empty.

    Raises:
        DeliveryError: not between 0 and 1.
    """
    if not 0 < share < 1:
        raise DeliveryError(
            f"a canary's share must lie between 0 and 1, got {share:g}; "
            "`driftline deploy CONFIG --bundle B --champion` gives it everything"
        )


def next_step(old: Canary, *, share: float, now: datetime) -> Canary:
    """The same canary with another share; itself when the share is the same."""
    if share == old.share:
        return old
    return replace(old, share=share, step=old.step + 1, step_at=now)


def live_facts(workspace: Workspace) -> dict[str, Any]:
    """What the pointers say: champion, canary with its share, shadows. JSON-able.

    Raises:
        ArtefactError: one of the two files is damaged.
    """
    champion = read_champion(workspace.bundles)
    traffic = read_traffic(workspace.bundles)
    share = traffic.canary.share if traffic.canary else 0.0
    facts = traffic.to_json()
    return {
        "champion": None
        if champion is None
        else {
            "bundle": champion.fingerprint,
            "version": champion.version,
            "share": round(1 - share, 6),
            "before": list(champion.before),
        },
        "canary": facts["canary"],
        "shadow": facts["shadow"],
        "changed_at": facts["changed_at"],
        "by": facts["by"],
    }


def _called(versions: Sequence[RegisteredBundle], name: str) -> list[RegisteredBundle]:
    """The bundle of this version, or those whose fingerprint begins so: it may be all digits."""
    if name.isdecimal() and len(name) <= LONGEST_VERSION:
        found = [known for known in versions if known.version == int(name)]
        if found:
            return found
    if len(name) < SHORTEST_PREFIX:
        return []
    return [known for known in versions if known.fingerprint.startswith(name)]
