"""Which bundles exist, where each came from, and which one is live (MLflow's model registry).

A bundle is a folder of files; a *version* of the registered model ``settings.name`` points to it
and carries its lineage, figures and the gate's decision. The alias ``champion`` is the pointer to
the live version, ``challenger`` to the newest one that is not yet judged; rolling back is
promoting an older version.

The registry is the truth. Beside it, ``bundles/CHAMPION`` repeats the alias as a small JSON file,
so that a server can look every second without MLflow (two seconds of import, milliseconds a
query). It is replaced in one step after each promotion; a promotion killed between the two is
made good by running it again, or by ``publish_pointer``.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from filelock import FileLock, Timeout

from driftline.platform.artefacts import interpreting, read_json, write_json
from driftline.platform.errors import (
    ArtefactError,
    BundleError,
    MissingArtefactError,
    ResourceError,
    SettingsError,
)
from driftline.platform.settings import DriftlineSettings
from driftline.platform.traffic import TRAFFIC, Traffic, read_traffic, write_traffic
from driftline.platform.windows import format_time, parse_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

Decision = Literal["pending", "promoted", "refused"]

CHAMPION: Final = "champion"
CHALLENGER: Final = "challenger"
POINTER: Final = "CHAMPION"
LINEAGE: Final = "lineage."
LOCK_SECONDS: Final = 120
DAMAGED: Final = (
    "`driftline deploy CONFIG --bundle VERSION --champion` writes it anew; until then servers keep "
    "the champion that they have"
)
MAX_BEFORE: Final = 20
"""Earlier champions that the pointer remembers."""


@dataclass(frozen=True)
class RegisteredBundle:
    """One version in the registry."""

    version: int
    fingerprint: str
    path: Path
    lineage: Mapping[str, str]
    """Windows, teacher, arms, feature views, code version, cost: whatever was registered."""
    decision: Decision
    reasons: tuple[str, ...]
    """The gate's, one sentence each."""
    decided_at: datetime | None


@dataclass(frozen=True)
class ChampionPointer:
    """What ``bundles/CHAMPION`` says."""

    version: int
    fingerprint: str
    path: Path
    promoted_at: datetime | None
    before: tuple[int, ...] = ()
    """Versions that were champion before, the newest first; what rolling back goes through."""


def read_champion(bundles: Path) -> ChampionPointer | None:
    """The live bundle according to the pointer file; ``None`` before the first promotion.

    Args:
        bundles: The folder of bundles, ``Workspace.bundles``.

    Raises:
        ArtefactError: the file is damaged.
    """
    source = bundles / POINTER
    try:
        pointer = read_json(source, remedy=DAMAGED)
    except FileNotFoundError:
        return None
    with interpreting(source, remedy=DAMAGED):
        moment = pointer["promoted_at"]
        return ChampionPointer(
            version=pointer["version"],
            fingerprint=pointer["fingerprint"],
            path=(bundles / pointer["bundle"]).resolve(),
            promoted_at=parse_time(moment) if moment else None,
            before=tuple(pointer.get("before", ())),
        )


@dataclass
class TrafficChange:
    """What is live beside the champion, to be changed: assign to ``after``."""

    after: Traffic


class Registry:
    """The registered model of one market.

    Args:
        settings: ``name`` names the model, ``registry.tracking_uri`` the MLflow to use.
        workspace: Holds the SQLite file when no address is given, the bundles and the lock.

    Writers on one machine take turns by a file lock; across machines MLflow's own transactions
    keep each step whole.
    """

    def __init__(self, settings: DriftlineSettings, workspace: Workspace) -> None:
        self.name = settings.name
        self.workspace = workspace
        self.uri = settings.registry.tracking_uri or f"sqlite:///{workspace.registry}"
        self._is_local = settings.registry.tracking_uri is None
        self._turn = FileLock(workspace.root / "mlflow.lock")

    # --- writing --------------------------------------------------------------------------

    def register(
        self,
        bundle_dir: Path,
        *,
        fingerprint: str,
        lineage: Mapping[str, str],
        metrics: Mapping[str, float],
    ) -> int:
        """Record a bundle as a new version under the alias ``challenger``.

        A fingerprint that is already there keeps its version, its decision and its record.

        Args:
            bundle_dir: Where the files are; becomes the version's source.
            fingerprint: Hash of the bundle's content; the identity of the version.
            lineage: Where it came from, as text; kept as tags ``lineage.KEY``.
            metrics: Figures, including the cost in core-seconds; kept in an MLflow run.
        """
        with self._lock():
            known = self._find(fingerprint)
            if known is not None:
                return known.version
            run_id = self._record_run(fingerprint, lineage=lineage, metrics=metrics)
            tags = {
                "fingerprint": fingerprint,
                "bundle_path": str(bundle_dir.absolute()),
                "decision": "pending",
            } | {LINEAGE + key: str(value) for key, value in lineage.items()}
            created = self._client.create_model_version(
                self.name, source=self._source(bundle_dir), run_id=run_id, tags=tags
            )
            version = int(created.version)
            self._client.set_registered_model_alias(self.name, CHALLENGER, str(version))
            logger.info("registered %s version %d (%s)", self.name, version, fingerprint)
            return version

    def promote(
        self, version: int, *, promoted_at: datetime | None = None, reasons: Sequence[str] = ()
    ) -> None:
        """Make a version the champion. An older version rolls back; the same again is harmless.

        Args:
            version: Any registered version, whatever was decided before.
            promoted_at: Event time or wall time of the decision; recorded as given.
            reasons: The gate's, or the operator's.

        Raises:
            MissingArtefactError: no such version.
            BundleError: its files are gone.
        """
        with self._lock():
            bundle = self._get(version)
            if not bundle.path.is_dir():
                raise BundleError(
                    f"{self.name} version {version} cannot be promoted: its bundle "
                    f"{bundle.path} is gone; promote a version whose files are there"
                )
            self._decide(version, "promoted", decided_at=promoted_at, reasons=reasons)
            self._client.set_registered_model_alias(self.name, CHAMPION, str(version))
            self._write_pointer(self._get(version))
        logger.info("promoted %s version %d (%s)", self.name, version, bundle.fingerprint)

    def log_refusal(
        self, version: int, *, reasons: Sequence[str], decided_at: datetime | None = None
    ) -> None:
        """Record that the gate refused a version, and why; the champion stays.

        Raises:
            MissingArtefactError: no such version.
        """
        with self._lock():
            self._get(version)
            self._decide(version, "refused", decided_at=decided_at, reasons=reasons)

    @contextmanager
    def traffic(self, *, by: str, now: datetime) -> Iterator["TrafficChange"]:
        """Change what is live beside the champion; written when the block ends well.

        Args:
            by: Who changes it.
            now: Wall time.
        """
        with self._lock():
            before = None
            try:
                before = read_traffic(self.workspace.bundles)
            except ArtefactError as error:
                logger.warning("%s is damaged and will be replaced: %s", TRAFFIC, error)
            change = TrafficChange(before or Traffic())
            yield change
            if change.after != before:
                after = replace(change.after, changed_at=now, by=by)
                write_traffic(self.workspace.bundles, after)

    def publish_pointer(self) -> None:
        """Make ``bundles/CHAMPION`` agree with the registry."""
        with self._lock():
            champion = self.champion()
            if champion is not None:
                self._write_pointer(champion)

    # --- reading --------------------------------------------------------------------------

    def champion(self) -> RegisteredBundle | None:
        """The live version; ``None`` before the first promotion."""
        return self._aliased(CHAMPION)

    def challenger(self) -> RegisteredBundle | None:
        """The newest version that waits for the gate; ``None`` if none does."""
        return self._aliased(CHALLENGER)

    def versions(self) -> tuple[RegisteredBundle, ...]:
        """All versions, newest first, refused ones included."""
        if self._is_empty:
            return ()
        found = self._search(f"name = '{self.name}'")
        return tuple(sorted(found, key=lambda bundle: -bundle.version))

    # --- MLflow ---------------------------------------------------------------------------

    @property
    def _is_empty(self) -> bool:
        """Reading must not create a database; only the default address tells for free."""
        return self._is_local and not self.workspace.registry.exists()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.workspace.root.mkdir(parents=True, exist_ok=True)
        try:
            self._turn.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise ResourceError(
                f"registry: {self._turn.lock_file} has been held by another process for "
                f"{LOCK_SECONDS} s; see which driftline process hangs"
            ) from error
        try:
            yield
        finally:
            self._turn.release()

    @cached_property
    def _client(self) -> Any:
        """An ``MlflowClient`` with the registered model in place.

        MLflow is imported here and not at the top because that takes two seconds. A new SQLite
        file takes a few more, once.
        """
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves the machine
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        try:
            with self._lock():  # two processes must not create the tables at once
                client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
                if not client.search_registered_models(f"name = '{self.name}'"):
                    client.create_registered_model(self.name)
        except MlflowException as error:
            raise SettingsError(
                f"registry.tracking_uri: MLflow cannot use {self.uri!r} ({error.message:.200}); "
                "give sqlite:///FILE, postgresql://... or the http(s) address of a server"
            ) from error
        return client

    @cached_property
    def _experiment_id(self) -> str:
        experiment = self._client.get_experiment_by_name(self.name)
        if experiment is not None:
            return str(experiment.experiment_id)
        root = None if self._is_server else (self.workspace.root / "mlflow").as_uri()
        return str(self._client.create_experiment(self.name, artifact_location=root))

    @property
    def _is_server(self) -> bool:
        return self.uri.startswith(("http://", "https://"))

    def _source(self, bundle_dir: Path) -> str:
        """The bundle's folder; an MLflow *server* refuses local paths, so it gets a name."""
        return f"bundle://{bundle_dir.name}" if self._is_server else str(bundle_dir.absolute())

    def _record_run(
        self, fingerprint: str, *, lineage: Mapping[str, str], metrics: Mapping[str, float]
    ) -> str:
        """The finished run of a fingerprint; taken up again if a kill left one behind."""
        from mlflow.entities import Metric

        experiments = [self._experiment_id]
        runs = self._client.search_runs(experiments, f"tags.fingerprint = '{fingerprint}'")
        if runs:
            run = runs[0]
        else:
            tags = {"fingerprint": fingerprint} | {k: str(v) for k, v in lineage.items()}
            run = self._client.create_run(self._experiment_id, run_name=fingerprint, tags=tags)
        run_id = str(run.info.run_id)
        started = run.info.start_time
        figures = [Metric(key, float(value), started, 0) for key, value in metrics.items()]
        self._client.log_batch(run_id, metrics=figures)
        self._client.set_terminated(run_id)
        return run_id

    def _decide(
        self,
        version: int,
        decision: Decision,
        *,
        decided_at: datetime | None,
        reasons: Sequence[str],
    ) -> None:
        tags = {
            "decision": decision,
            "decided_at": format_time(decided_at) if decided_at else "",
            "reasons": "\n".join(reasons),
        }
        for key, value in tags.items():
            self._client.set_model_version_tag(self.name, str(version), key, value)
        if self._aliases().get(CHALLENGER) == version:
            self._client.delete_registered_model_alias(self.name, CHALLENGER)

    def _aliases(self) -> dict[str, int]:
        aliases = self._client.get_registered_model(self.name).aliases
        return {alias: int(version) for alias, version in aliases.items()}

    def _aliased(self, alias: str) -> RegisteredBundle | None:
        version = None if self._is_empty else self._aliases().get(alias)
        return None if version is None else self._get(version)

    def _get(self, version: int) -> RegisteredBundle:
        found = self._search(f"name = '{self.name}' and version_number = '{version}'")
        if not found:
            known = [bundle.version for bundle in self.versions()][:10]
            raise MissingArtefactError(
                f"{self.name} has no version {version}; the newest are {known or 'none yet'}; "
                "`driftline status` lists them"
            )
        return found[0]

    def _find(self, fingerprint: str) -> RegisteredBundle | None:
        found = self._search(f"name = '{self.name}' and tag.fingerprint = '{fingerprint}'")
        return found[0] if found else None

    def _search(self, query: str) -> list[RegisteredBundle]:
        found, token = [], None
        while True:
            page = self._client.search_model_versions(query, page_token=token)
            found += [self._read(version) for version in page]
            token = page.token
            if not token:
                return found

    def _read(self, version: Any) -> RegisteredBundle:
        tags = dict(version.tags)
        recorded = Path(tags["bundle_path"])
        here = self.workspace.bundles / recorded.name  # the workspace may have moved since
        return RegisteredBundle(
            version=int(version.version),
            fingerprint=tags["fingerprint"],
            path=here if here.is_dir() else recorded,
            lineage={
                key.removeprefix(LINEAGE): value
                for key, value in tags.items()
                if key.startswith(LINEAGE)
            },
            decision=tags["decision"],
            reasons=tuple(tags.get("reasons", "").splitlines()),
            decided_at=parse_time(tags["decided_at"]) if tags.get("decided_at") else None,
        )

    def _write_pointer(self, bundle: RegisteredBundle) -> None:
        bundles = self.workspace.bundles.resolve()
        path = bundle.path.resolve()
        inside = path.is_relative_to(bundles)
        moment = bundle.decided_at
        write_json(
            self.workspace.bundles / POINTER,
            {
                "version": bundle.version,
                "fingerprint": bundle.fingerprint,
                "bundle": str(path.relative_to(bundles) if inside else path),
                "promoted_at": format_time(moment) if moment else None,
                "before": list(self._before(bundle.version)),
            },
        )

    def _before(self, version: int) -> tuple[int, ...]:
        """Champions before this one; rolling back forgets those that it passes over."""
        try:
            now = read_champion(self.workspace.bundles)
        except ArtefactError as error:
            logger.warning("%s is damaged and will be replaced: %s", POINTER, error)
            now = None
        if now is None:
            return ()
        if now.version == version:
            return now.before
        if version in now.before:
            return now.before[now.before.index(version) + 1 :]
        return (now.version, *now.before)[:MAX_BEFORE]
