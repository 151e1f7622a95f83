"""Artefacts on disk: written whole or not at all, known by the hash of their content."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from driftline.platform.errors import ArtefactError, BundleError

DTYPES: Final = {"I64": "<i8", "I32": "<i4", "F32": "<f4", "F16": "<f2"}
"""Types of tensors that we map; others are weights, which ``safetensors`` loads."""
REMOVE: Final = "it was cut short or altered: remove it, and the step that writes it writes it anew"


@contextmanager
def whole_directory(destination: Path) -> Iterator[Path]:
    """Give a scratch folder that becomes ``destination`` only if the block succeeds.

    An existing ``destination`` is replaced at the end. What a crash leaves behind is hidden, and
    the next call for the same destination clears it away.
    """
    parent, name = destination.parent, destination.name
    parent.mkdir(parents=True, exist_ok=True)
    for retired in parent.glob(f".{name}.*.retired"):
        if destination.exists():
            shutil.rmtree(retired)
        else:  # killed between the two renames below
            retired.rename(destination)
    for left_over in parent.glob(f".{name}.*.partial"):
        shutil.rmtree(left_over, ignore_errors=True)
    scratch = parent / f".{name}.{uuid.uuid4().hex[:8]}.partial"
    scratch.mkdir()
    try:
        yield scratch
        if destination.exists():
            retired = scratch.with_suffix(".retired")
            destination.rename(retired)
            scratch.rename(destination)
            shutil.rmtree(retired)
        else:
            scratch.rename(destination)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """Give a scratch folder below ``parent``; the block renames it to a name made from content.

    What is still there when the block ends is removed.
    """
    scratch = parent / f".{uuid.uuid4().hex[:8]}.partial"
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def whole_file(destination: Path) -> Iterator[Path]:
    """Give a scratch path that becomes ``destination`` only if the block succeeds."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    scratch = destination.parent / f".{destination.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        yield scratch
        os.replace(scratch, destination)  # noqa: PTH105 - atomic on POSIX
    finally:
        scratch.unlink(missing_ok=True)


def write_json(destination: Path, value: Mapping[str, Any]) -> None:
    """Write readable JSON, whole or not at all."""
    with whole_file(destination) as scratch:
        scratch.write_text(json.dumps(value, indent=2, default=str) + "\n")


def read_json(source: Path, *, remedy: str = REMOVE) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        source: The file.
        remedy: What to do about a damaged one; the end of the message.

    Raises:
        ArtefactError: the file is no JSON, or holds another value.
    """
    try:
        value = json.loads(source.read_text())
    except ValueError as error:
        raise ArtefactError(f"{source} is no JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{source} must hold a JSON object, got {value!r:.40}; {remedy}")
    return value


@contextmanager
def interpreting(source: Path, *, remedy: str) -> Iterator[None]:
    """Say which file is damaged, and what to do, where its JSON does not hold what it should."""
    try:
        yield
    except KeyError as error:
        raise ArtefactError(f"{source} lacks {error}; {remedy}") from error
    except (ValueError, TypeError) as error:
        raise ArtefactError(f"{source} holds a value that means nothing ({error}); {remedy}") from (
            error
        )


def hash_file(source: Path) -> str:
    """SHA-256 of the bytes, in hex."""
    with source.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(root: Path, *, exclude: tuple[str, ...] = ()) -> dict[str, str]:
    """Hash of each file below ``root`` by relative path, in order of path."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    names = [(path.relative_to(root).as_posix(), path) for path in files]
    return {name: hash_file(path) for name, path in names if name not in exclude}


def hash_value(value: Any) -> str:
    """SHA-256 of the canonical JSON form, in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def link_or_copy(source: Path, destination: Path) -> None:
    """Share an immutable file by hard link; copy where the file system cannot link."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)


def map_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Tensors of a safetensors file as read-only views of the mapped file, whatever its size.

    ``safetensors`` itself copies what it loads; processes that map share one copy in memory.

    Raises:
        BundleError: not such a file, or it ends too early.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise BundleError(f"{path} is no safetensors file: its header does not fit in it")
        header = json.loads(file.read(length))
    tensors: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        kind = np.dtype(DTYPES[entry["dtype"]])
        if 8 + length + end > size:
            raise BundleError(f"{path}: tensor {name} ends after the file does")
        if end == start:
            tensors[name] = np.empty(entry["shape"], kind)
            continue
        tensors[name] = np.memmap(
            path, kind, mode="r", offset=8 + length + start, shape=tuple(entry["shape"])
        )
    return tensors
