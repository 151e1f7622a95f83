"""``CURRENT``: the small file that says which files of a view count.

A view's folder holds Arrow files: a *base*, sorted by product, and *deltas* with rows that came
later; beside the base a folder of the same name with its columns arranged for look-ups. Files never
change once they are named; a new version is new files and a new ``CURRENT``, put in place by one
atomic rename. So a reader sees a version whole or not at all.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc as ipc

POINTER = "CURRENT"


@dataclass(frozen=True)
class Pointer:
    """What ``CURRENT`` says."""

    version: str
    """Grows with every write; no two writes share one."""
    base: str
    base_rows: int
    deltas: tuple[str, ...] = ()
    delta_rows: int = 0

    def to_json(self) -> bytes:
        """The content of the file."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Pointer":
        """Read the content of the file."""
        values = json.loads(content)
        return cls(**{**values, "deltas": tuple(values["deltas"])})


def read_content(view_dir: str | Path) -> bytes | None:
    """The content of ``CURRENT``, in microseconds; none before the first write."""
    try:
        file = os.open(f"{view_dir}/{POINTER}", os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return os.read(file, 1 << 20)
    finally:
        os.close(file)


def read_pointer(view_dir: Path) -> Pointer | None:
    """What counts now; none before the first write."""
    content = read_content(view_dir)
    return None if content is None else Pointer.from_json(content)


def current_version(view_dir: Path) -> str | None:
    """Version that a reader would open now; none before the first write."""
    pointer = read_pointer(view_dir)
    return None if pointer is None else pointer.version


def arranged_folder(view_dir: Path, pointer: Pointer) -> Path:
    """Where the columns of the base lie as look-ups want them (``arranged``); it may be absent."""
    return view_dir / pointer.base.removesuffix(".arrow")


def read_part(view_dir: Path, name: str) -> pa.Table:
    """Map one file of a view."""
    with pa.memory_map(str(view_dir / name)) as mapped:
        return ipc.open_file(mapped).read_all()
