"""Where the online store lies; shared by those who write it and those who only read."""

from pathlib import Path

from driftline.platform.settings import DriftlineSettings
from driftline.platform.workspace import Workspace


def project_name(settings: DriftlineSettings) -> str:
    """The market's name as Feast allows it."""
    return settings.name.replace("-", "_")


def online_folder(settings: DriftlineSettings) -> Path:
    """Folder of the embedded online store; one folder a view below it."""
    return Workspace.of(settings).features / "online" / project_name(settings)


def materialized_path(settings: DriftlineSettings) -> Path:
    """What was materialised last, by view."""
    return Workspace.of(settings).features / "materialized.json"


def unfinished_path(settings: DriftlineSettings) -> Path:
    """There while views are being written, and after a writer that was killed.

    Some views of the online store may then be newer than others.
    """
    return Workspace.of(settings).features / ".materializing"
