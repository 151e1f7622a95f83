"""A teacher on disk: frozen for good, and nobody has touched it."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from driftline.platform.artefacts import hash_file, hash_value, read_json
from driftline.platform.errors import FrozenTeacherError
from driftline.platform.workspace import Workspace, require

WEIGHTS: Final = "model.safetensors"
MASKED: Final = "masked.safetensors"
"""Before it saw a click, with its prediction head; if there was masked-language training."""
MANIFEST: Final = "manifest.json"


@dataclass(frozen=True)
class Teacher:
    """The frozen teacher on disk."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, workspace: Workspace, name: str | None = None) -> "Teacher":
        """Open it and check that nobody touched the weights.

        Args:
            workspace: Where it lies.
            name: Of a member of the ensemble; the market's first teacher when not given.

        Raises:
            MissingArtefactError: there is none yet.
            FrozenTeacherError: the weights do not have the hash they were frozen with.
        """
        path = require(teacher_folder(workspace, name), made_by="teacher CONFIG")
        manifest = read_json(path / MANIFEST)
        if (found := _hash_once(path / WEIGHTS)) != manifest["weights"]:
            raise FrozenTeacherError(
                f"teacher {path}: weights have hash {found[:12]}, frozen as "
                f"{manifest['weights'][:12]}; restore the file or start a new workspace"
            )
        return cls(path, manifest)

    @property
    def hash(self) -> str:
        """Hash of weights, input columns and tokeniser: the key of its soft labels."""
        parts = (self.manifest["weights"], self.manifest["columns"], self.manifest["tokenizer"])
        return hash_value(parts)

    @property
    def weights(self) -> Path:
        """The frozen weights."""
        return self.path / WEIGHTS

    @property
    def masked(self) -> Path | None:
        """Its weights from before the clicks, with their prediction head; None without MLM.

        Raises:
            FrozenTeacherError: they are not those that were written down with it. Teachers of
                before this was written down are believed.
        """
        path, known = self.path / MASKED, self.manifest.get("masked")
        found = _hash_once(path) if path.exists() else None
        if known is not None and found != known:
            state = "is gone" if found is None else f"has hash {found[:12]}"
            raise FrozenTeacherError(
                f"teacher {self.path}: {MASKED} {state}, frozen as {known[:12]}; restore the file "
                "or start a new workspace"
            )
        return path if found else None

    @property
    def keep_rate(self) -> float:
        """Share of non-clicks it was trained on; its logits stand on that prior."""
        return float(self.manifest["keep_rate"])


def check_frozen(teacher: Teacher, key: str) -> None:
    """Refuse settings that would give another teacher.

    Raises:
        FrozenTeacherError: this one was trained with others.
    """
    if teacher.manifest["key"] != key:
        raise FrozenTeacherError(
            f"teacher {teacher.path} is frozen and was trained with other settings "
            f"(key {teacher.manifest['key']}, these give {key}); undo the change of "
            "teacher/tokenizer/features/labels/split settings, or use a new workspace"
        )


def teacher_folder(workspace: Workspace, name: str | None) -> Path:
    """Where a teacher lies: the market's first, or that member of the ensemble."""
    return workspace.teacher if name is None else workspace.teachers / name


def _hash_once(path: Path) -> str:
    """Hash a file again only when it changed: hourly steps open the teacher often."""
    status = path.stat()
    return _hash_of(path, status.st_mtime_ns, status.st_size)


@cache
def _hash_of(path: Path, mtime_ns: int, size: int) -> str:
    return hash_file(path)
