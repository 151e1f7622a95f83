"""Writing online rows: one writer at a time, new files, then one atomic rename.

A crash at any moment leaves the old version; the next writer removes what the dead one left. A
small write adds a delta file and never touches the base; when the deltas outgrow a share of the
base they are merged into a new one. Files of the version before the current one stay, and whoever
has mapped an older file keeps it: its name is gone but the system keeps its pages.
"""

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.ipc as ipc
from filelock import FileLock, Timeout

from driftline.features.feast_plugins.arranged import write_arranged
from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.features.feast_plugins.merging import newest_by_key
from driftline.features.feast_plugins.pointer import (
    POINTER,
    Pointer,
    arranged_folder,
    read_part,
    read_pointer,
)
from driftline.features.feast_plugins.scan import KEY

_MIN_DELTA_ROWS = 1_000
_MAX_DELTAS = 32


class SnapshotWriter:
    """Writes one view's folder; any number of threads and processes may each have one."""

    def __init__(
        self,
        view_dir: Path,
        *,
        compact_share: float = 0.002,
        lock_timeout_s: float = 60,
        durable: bool = True,
        categories: Sequence[str] = (),
    ) -> None:
        """Touch nothing yet.

        Args:
            view_dir: Folder of the view; made by the first write.
            compact_share: Rows in deltas, as a share of the base, above which they are merged.
            lock_timeout_s: Longest wait for another writer.
            durable: Survive a power cut as well, not only a killed process.
            categories: String features that readers want as codes, because there are few of them.
        """
        self.view_dir = view_dir
        self._compact_share = compact_share
        self._lock_timeout_s = lock_timeout_s
        self._durable = durable
        self._categories = tuple(categories)

    def write(self, rows: pa.Table) -> str:
        """Merge online rows (``merging.online_rows``) into the view; late ones never overwrite.

        Returns:
            The version that holds them.

        Raises:
            FeatureStoreError: the rows do not fit those written before, or the lock is taken.
        """
        rows = newest_by_key([rows])
        with self._locked():
            self.view_dir.mkdir(parents=True, exist_ok=True)
            old = read_pointer(self.view_dir)
            if old is not None and not len(rows):
                return old.version
            new = self._add(old, rows)
            self._publish(new)
            self._prune(keep=[new, *([old] if old else [])])
        return new.version

    def remove(self) -> None:
        """Remove the view's folder; nothing happens if there is none."""
        if not self.view_dir.exists():
            return
        with self._locked():
            # First the pointer: a reader then finds no snapshot rather than half of one.
            (self.view_dir / POINTER).unlink(missing_ok=True)
            shutil.rmtree(self.view_dir)

    def _add(self, old: Pointer | None, rows: pa.Table) -> Pointer:
        number = 1 if old is None else int(old.version.split("-")[0]) + 1
        version = f"{number:012d}-{uuid.uuid4().hex[:8]}"
        if old is None:
            return Pointer(version, self._base(version, rows), len(rows))
        self._check_key(old, rows)
        delta_rows = old.delta_rows + len(rows)
        if delta_rows > max(self._compact_share * old.base_rows, _MIN_DELTA_ROWS):
            merged = newest_by_key([*self._parts([old.base, *old.deltas]), rows])
            return Pointer(version, self._base(version, merged), len(merged))
        if len(old.deltas) >= _MAX_DELTAS:
            merged = newest_by_key([*self._parts(old.deltas), rows])
            deltas: tuple[str, ...] = (self._file(version, "delta", merged),)
            delta_rows = len(merged)
        else:
            deltas = (*old.deltas, self._file(version, "delta", rows))
        return Pointer(version, old.base, old.base_rows, deltas, delta_rows)

    def _check_key(self, old: Pointer, rows: pa.Table) -> None:
        with pa.memory_map(str(self.view_dir / old.base)) as mapped:
            before = ipc.open_file(mapped).schema.field(KEY).type
        if before != rows.schema.field(KEY).type:
            raise FeatureStoreError(
                f"keys in {self.view_dir} are {before}, got {rows.schema.field(KEY).type}; "
                "remove the folder if the entity has really changed"
            )

    def _parts(self, names: Sequence[str]) -> list[pa.Table]:
        return [read_part(self.view_dir, name) for name in names]

    def _base(self, version: str, rows: pa.Table) -> str:
        """Write a base, and its columns as look-ups want them: once here, not in every reader."""
        name = self._file(version, "base", rows)
        write_arranged(
            rows,
            self.view_dir / f"{version}-base",
            categories=self._categories,
            durable=self._durable,
        )
        return name

    def _file(self, version: str, kind: str, rows: pa.Table) -> str:
        name = f"{version}-{kind}.arrow"
        with (self.view_dir / name).open("wb") as file:
            with ipc.new_file(file, rows.schema) as writer:
                writer.write_table(rows.combine_chunks())
            self._sync(file)
        return name

    def _publish(self, pointer: Pointer) -> None:
        partial = self.view_dir / f".{pointer.version}.partial"
        with partial.open("wb") as file:
            file.write(pointer.to_json())
            self._sync(file)
        partial.replace(self.view_dir / POINTER)

    def _sync(self, file: IO[bytes]) -> None:
        file.flush()
        if self._durable:
            os.fsync(file.fileno())

    def _prune(self, keep: Sequence[Pointer]) -> None:
        names = {name for pointer in keep for name in (pointer.base, *pointer.deltas)}
        names |= {arranged_folder(self.view_dir, pointer).name for pointer in keep}
        for file in self.view_dir.iterdir():
            if file.name in names:
                continue
            if file.suffix in (".arrow", ".partial"):
                file.unlink()
            elif file.name.endswith("-base"):
                shutil.rmtree(file)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # Beside the folder, not in it: removing the folder must not remove the lock.
        path = self.view_dir.with_name(f".{self.view_dir.name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path, timeout=self._lock_timeout_s):
                yield
        except Timeout as error:
            raise FeatureStoreError(
                f"another writer has held {path} for more than {self._lock_timeout_s:g} s; "
                "look for a stuck materialisation of this view"
            ) from error
