"""Bring features up to a moment: texts, counters, Feast objects, frames, online store."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from driftline.features.counters import compute_counters
from driftline.features.log import ImpressionLog
from driftline.features.online import OnlineFeatures
from driftline.features.texts import write_product_sources
from driftline.features.views import feature_view_versions
from driftline.platform.artefacts import hash_file, hash_value, read_json, write_json
from driftline.platform.columns import head_columns
from driftline.platform.errors import SettingsError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window, ceil_time, floor_time, format_time, parse_time
from driftline.platform.workspace import Workspace, require

if TYPE_CHECKING:
    from driftline.features.store import MaterializeReport

logger = logging.getLogger(__name__)


def prepare_features(
    settings: DriftlineSettings,
    *,
    as_of: datetime | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Window:
    """Compute what is missing up to ``as_of`` (the whole log when not given); gives the window.

    Free when everything is there: every refresh calls it first.
    """
    workspace = Workspace.of(settings)
    log = ImpressionLog.open(workspace.clean, settings)
    end = log.span.end if as_of is None else min(log.span.end, ceil_time(as_of, HOUR))
    window = Window(log.span.start, max(log.span.start, end))
    with _turn(workspace):
        _prepare(settings, log, window, progress=progress)
    return window


def read_catalogue(settings: DriftlineSettings) -> None:
    """Take in what the catalogue holds now, without waiting for the hour to end."""
    with _turn(Workspace.of(settings)):
        write_product_sources(settings)


@contextmanager
def _turn(workspace: Workspace) -> Iterator[None]:
    """Two jobs may want to write features at once."""
    workspace.features.mkdir(parents=True, exist_ok=True)
    with FileLock(workspace.features / ".prepare.lock"):
        yield


def _prepare(
    settings: DriftlineSettings,
    log: ImpressionLog,
    window: Window,
    *,
    progress: Callable[[int, int], None] | None,
) -> None:
    stamp = Workspace.of(settings).features / "prepared.json"
    key = _preparation_key(settings)
    done = read_json(stamp) if stamp.exists() else {}
    prepared_until = parse_time(done["end"]) if done.get("key") == key else log.span.start
    if prepared_until >= window.end:
        return
    from driftline.features.frames import build_frames  # Feast: seconds to import
    from driftline.features.store import apply

    missing = Window(prepared_until, window.end)
    write_product_sources(settings)
    compute_counters(settings, window=missing)
    apply(settings, key_type=log.key_type)
    build_frames(settings, window=missing, progress=progress)
    write_json(stamp, {"key": key, "end": format_time(window.end)})


def materialize_features(settings: DriftlineSettings, *, as_of: datetime) -> "MaterializeReport":
    """Put the newest values known at ``as_of`` into the online store."""
    from driftline.features.store import materialize

    prepare_features(settings, as_of=floor_time(as_of, HOUR))
    return materialize(settings, as_of=as_of)


def read_online(
    settings: DriftlineSettings, *, page: str, ads: list[str], now: datetime
) -> dict[str, Any]:
    """What the online store gives for one page and some ads, by column.

    Raises:
        SettingsError: products of this log have integer keys and these are none.
    """
    log = ImpressionLog.open(Workspace.of(settings).clean, settings)
    keys: list[Any] = [page, *ads]
    if str(log.key_type) == "int64":
        try:
            keys = [int(key) for key in keys]
        except ValueError as error:
            raise SettingsError(f"products of this log are integers, got {keys}") from error
    online = OnlineFeatures.open(settings)
    read = online.read(keys[0], keys[1:], context={}, now=now)
    return {name: list(_values(values)) for name, values in read.columns.items()}


def _values(values: Any) -> list[Any]:
    found = values.to_pylist() if hasattr(values, "to_pylist") else values.tolist()
    assert isinstance(found, list)
    return found


def _preparation_key(settings: DriftlineSettings) -> str:
    """Changes when the clean log does, whose content the verdict tells, or a feature's meaning."""
    verdict = require(Workspace.of(settings).clean / "verdict.json", made_by="check CONFIG")
    columns = [(column.name, column.kind) for column in head_columns(settings)]
    return hash_value([hash_file(verdict), feature_view_versions(settings), columns])
