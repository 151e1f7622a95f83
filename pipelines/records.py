"""One readable JSON record for each refresh: what was done, what it cost, how it was judged."""

from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from driftline.platform.artefacts import read_json, write_json
from driftline.platform.errors import SettingsError
from driftline.platform.windows import format_time
from driftline.platform.workspace import Workspace

Kind = Literal["arms", "head"]


@dataclass(frozen=True)
class RefreshRecord:
    """The outcome of one refresh."""

    kind: Kind
    as_of: str
    bundle: str
    parent: str | None
    """Fingerprint of the champion it was judged against."""
    decision: Literal["promoted", "canary", "refused"]
    """``canary``: it passed the gate and was put up beside the champion; the registry knows what
    became of it."""
    reasons: tuple[str, ...]
    settings: str
    """Hash of the settings it was made with."""
    num_rows: int
    seconds: float
    core_seconds: float
    auc_champion: float | None
    auc_challenger: float | None
    champion: str
    """Fingerprint that is champion after the decision."""

    def to_json(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        return asdict(self)


def record_path(workspace: Workspace, kind: Kind, as_of: datetime) -> Path:
    """Where the record of a refresh lies; sorts by time."""
    stamp = format_time(as_of).replace(":", "")
    return workspace.reports / "refreshes" / f"{stamp}-{kind}.json"


def read_record(
    workspace: Workspace, kind: Kind, as_of: datetime, *, settings_hash: str
) -> RefreshRecord | None:
    """The record of that refresh, if it was done.

    Raises:
        SettingsError: it was done with other settings.
    """
    path = record_path(workspace, kind, as_of)
    if not path.exists():
        return None
    raw = read_json(path)
    if raw["settings"] != settings_hash:
        raise SettingsError(
            f"the {kind} refresh of {raw['as_of']} was made with other settings "
            f"({raw['settings']}, now {settings_hash}); use another workspace"
        )
    return RefreshRecord(**{**raw, "reasons": tuple(raw["reasons"])})


def write_record(workspace: Workspace, record: RefreshRecord, *, as_of: datetime) -> None:
    """Keep the record; the last act of a refresh."""
    write_json(record_path(workspace, record.kind, as_of), record.to_json())


def read_records(workspace: Workspace) -> list[RefreshRecord]:
    """All records in order of event time."""
    paths = sorted((workspace.reports / "refreshes").glob("*.json"))
    raws = [read_json(path) for path in paths]
    return [RefreshRecord(**{**raw, "reasons": tuple(raw["reasons"])}) for raw in raws]
