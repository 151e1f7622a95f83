import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from driftline.platform.errors import BundleError, MissingArtefactError, SettingsError
from driftline.platform.registry import Registry, read_champion
from driftline.platform.settings import DriftlineSettings, RegistrySettings, SimulateSource
from driftline.platform.workspace import Workspace

NOON = datetime(2026, 1, 5, 12, tzinfo=UTC)
ONE = datetime(2026, 1, 5, 13, tzinfo=UTC)


def settings_in(root: Path, *, tracking_uri: str | None = None) -> DriftlineSettings:
    return DriftlineSettings(
        name="market",
        workspace=root,
        source=SimulateSource(kind="simulate", start=NOON),
        features=(),
        registry=RegistrySettings(tracking_uri=tracking_uri),
    )


def registry_in(root: Path) -> Registry:
    settings = settings_in(root)
    return Registry(settings, Workspace.of(settings))


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables take seconds to create; each test starts from a copy of one file."""
    root = tmp_path_factory.mktemp("template")
    assert registry_in(root)._client is not None
    return root / "mlflow.db"


@pytest.fixture
def registry(tmp_path: Path, empty_database: Path) -> Registry:
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    return registry_in(tmp_path)


def add(registry: Registry, name: str, *, auc: float = 0.7) -> int:
    bundle_dir = registry.workspace.bundles / name
    bundle_dir.mkdir(parents=True, exist_ok=True)
    lineage = {"teacher": "t1", "window": "2026-01-04T12:00:00Z..2026-01-05T12:00:00Z"}
    return registry.register(
        bundle_dir, fingerprint=name, lineage=lineage, metrics={"auc": auc, "core_seconds": 7.5}
    )


def test_a_registered_bundle_waits_as_challenger_with_its_lineage(registry: Registry) -> None:
    version = add(registry, "aa11")
    challenger = registry.challenger()
    assert challenger is not None
    assert (challenger.version, challenger.fingerprint) == (version, "aa11")
    assert challenger.path == registry.workspace.bundles / "aa11"
    assert challenger.lineage["teacher"] == "t1"
    assert challenger.decision == "pending"
    assert registry.champion() is None
    assert read_champion(registry.workspace.bundles) is None


def test_mlflow_users_find_source_figures_and_alias_where_they_look(registry: Registry) -> None:
    version = add(registry, "aa11", auc=0.71)
    registry.promote(version)
    client = MlflowClient(tracking_uri=registry.uri, registry_uri=registry.uri)
    entry = client.get_model_version_by_alias("market", "champion")
    assert entry.source == str(registry.workspace.bundles / "aa11")
    assert entry.tags["lineage.teacher"] == "t1"
    run = client.get_run(entry.run_id)
    assert run.data.metrics == {"auc": 0.71, "core_seconds": 7.5}
    assert run.info.status == "FINISHED"


def test_the_same_fingerprint_keeps_its_version_and_its_decision(registry: Registry) -> None:
    version = add(registry, "aa11")
    registry.promote(version, promoted_at=NOON)
    assert add(registry, "aa11") == version
    assert len(registry.versions()) == 1
    assert registry.versions()[0].decision == "promoted"
    assert registry.challenger() is None


def test_the_pointer_file_follows_promotions_and_roll_backs(registry: Registry) -> None:
    old, new = add(registry, "aa11"), add(registry, "bb22")
    for version, moment in ((old, NOON), (new, ONE), (old, ONE)):
        registry.promote(version, promoted_at=moment, reasons=["AUC rose.", "It is fast."])
        champion, pointer = registry.champion(), read_champion(registry.workspace.bundles)
        assert champion is not None
        assert pointer is not None
        assert champion.version == pointer.version == version
        assert champion.fingerprint == pointer.fingerprint
        assert champion.path == pointer.path
        assert champion.decided_at == pointer.promoted_at == moment
        assert champion.reasons == ("AUC rose.", "It is fast.")


def test_a_refusal_is_remembered_and_leaves_the_champion_alone(registry: Registry) -> None:
    live, worse = add(registry, "aa11"), add(registry, "bb22")
    registry.promote(live)
    registry.log_refusal(worse, reasons=["AUC fell by 0.03."], decided_at=NOON)
    newest, older = registry.versions()
    assert (newest.version, newest.decision) == (worse, "refused")
    assert newest.reasons == ("AUC fell by 0.03.",)
    assert newest.decided_at == NOON
    assert registry.champion() == older
    assert registry.challenger() is None


def test_a_kill_between_alias_and_pointer_is_made_good(registry: Registry) -> None:
    old, new = add(registry, "aa11"), add(registry, "bb22")
    registry.promote(old, promoted_at=NOON)
    registry._client.set_registered_model_alias("market", "champion", str(new))
    registry.publish_pointer()
    pointer = read_champion(registry.workspace.bundles)
    assert pointer is not None
    assert pointer.version == new


def test_a_kill_before_the_version_leaves_no_second_run(registry: Registry) -> None:
    fingerprint = {"fingerprint": "aa11"}
    registry._client.create_run(registry._experiment_id, run_name="aa11", tags=fingerprint)
    add(registry, "aa11", auc=0.6)
    runs = registry._client.search_runs([registry._experiment_id])
    assert [run.data.metrics["auc"] for run in runs] == [0.6]


def test_reading_an_unused_registry_creates_nothing(tmp_path: Path) -> None:
    registry = registry_in(tmp_path / "new")
    assert registry.champion() is None
    assert registry.challenger() is None
    assert registry.versions() == ()
    registry.publish_pointer()
    assert not (tmp_path / "new" / "mlflow.db").exists()


def test_a_moved_workspace_finds_its_bundles(registry: Registry, tmp_path: Path) -> None:
    registry.promote(add(registry, "aa11"))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("bundles", "mlflow.db"):
        (tmp_path / name).rename(moved / name)
    champion, pointer = registry_in(moved).champion(), read_champion(moved / "bundles")
    assert champion is not None
    assert pointer is not None
    assert champion.path == pointer.path == moved / "bundles" / "aa11"


def test_the_pointer_is_read_without_mlflow(registry: Registry) -> None:
    registry.promote(add(registry, "aa11"))
    code = (
        "import sys; from pathlib import Path; from driftline.platform.registry import *;"
        f"assert read_champion(Path({str(registry.workspace.bundles)!r})).version == 1;"
        "assert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_registry import add, registry_in
registry = registry_in(Path({root!r}))
for number in range(3):
    registry.promote(add(registry, f"{writer}{{number}}"))
    add(registry, f"shared{{number}}")
"""


@pytest.mark.slow
def test_processes_that_promote_at_once_take_turns(tmp_path: Path) -> None:
    tests = str(Path(__file__).parent)
    sources = [WRITER.format(tests=tests, root=str(tmp_path), writer=name) for name in "xy"]
    writers = [subprocess.Popen([sys.executable, "-c", source]) for source in sources]
    assert [writer.wait(timeout=600) for writer in writers] == [0, 0]
    registry = registry_in(tmp_path)
    versions = registry.versions()
    assert [bundle.version for bundle in versions] == list(range(9, 0, -1))
    assert len({bundle.fingerprint for bundle in versions}) == 9
    champion, pointer = registry.champion(), read_champion(registry.workspace.bundles)
    assert champion is not None
    assert pointer is not None
    assert champion.version == pointer.version


def test_an_unknown_version_is_refused_by_name(registry: Registry) -> None:
    add(registry, "aa11")
    with pytest.raises(MissingArtefactError, match=r"market has no version 9; .* \[1\]"):
        registry.promote(9)
    with pytest.raises(MissingArtefactError, match="market has no version 7"):
        registry.log_refusal(7, reasons=["slow"])


def test_a_bundle_whose_files_are_gone_cannot_be_promoted(registry: Registry) -> None:
    version = add(registry, "aa11")
    (registry.workspace.bundles / "aa11").rmdir()
    with pytest.raises(BundleError, match=r"version 1 cannot be promoted.* is gone"):
        registry.promote(version)
    assert registry.champion() is None


def test_an_address_that_mlflow_cannot_use_is_named(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, tracking_uri="carrier-pigeon://loft")
    with pytest.raises(SettingsError, match=r"registry.tracking_uri.*carrier-pigeon://loft"):
        Registry(settings, Workspace.of(settings)).versions()
