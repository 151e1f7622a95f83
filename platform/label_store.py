"""Soft labels on disk: the teacher's logits by the hash of its input, one Parquet file an hour.

``FOLDER/HOUR.parquet`` has one row for each input that was first met in that hour of event time.
An input is looked for in all hours, so it is paid once however often it comes back.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray

from driftline.platform.artefacts import whole_file
from driftline.platform.errors import ArtefactError
from driftline.platform.windows import format_time

LABELS_SCHEMA: Final = pa.schema(
    [
        pa.field("input_hash", pa.int64(), nullable=False),
        pa.field("no_click", pa.float32(), nullable=False),
        pa.field("click", pa.float32(), nullable=False),
    ]
)

Hashes = NDArray[np.int64]
Logits = NDArray[np.float32]
Stamp = tuple[int, int, int]


class HashIndex:
    """Logits by input hash in memory: sorted runs, merged when two are of like size.

    Adding M entries one by one so costs M log M, and a look-up goes through log M runs. What was
    added first under a hash stays.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[Hashes, Logits]] = []

    def add(self, hashes: Hashes, logits: Logits) -> None:
        """Remember logits. ``[N]``, ``[N, 2]``."""
        run = _sorted_run(hashes, logits)
        while self._runs and len(self._runs[-1][0]) <= 2 * len(run[0]):
            hashes, logits = self._runs.pop()
            run = _sorted_run(np.concatenate([hashes, run[0]]), np.concatenate([logits, run[1]]))
        self._runs.append(run)

    def find(self, hashes: Hashes) -> Logits:
        """Logits of each input, NaN where unknown. ``[B, 2]``."""
        found = np.full((len(hashes), 2), np.nan, np.float32)
        open_places = np.arange(len(hashes))
        for own, logits in self._runs:
            wanted = hashes[open_places]
            at = np.minimum(np.searchsorted(own, wanted), len(own) - 1)
            hit = own[at] == wanted if len(own) else np.zeros(len(wanted), bool)
            found[open_places[hit]] = logits[at[hit]]
            open_places = open_places[~hit]
        return found


class LabelStore:
    """Reads and extends the labels of one teacher. The files appear whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index = HashIndex()
        self._seen: dict[str, Stamp] = {}

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Only one process at a time is inside; it sees what the others wrote."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            self.refresh()
            yield

    def refresh(self) -> None:
        """Read the hours that are new or were changed by another process.

        Raises:
            ArtefactError: a file is damaged.
        """
        stamps = {}
        if self.folder.exists():
            with os.scandir(self.folder) as entries:
                stamps = {e.name: _stamp(e.stat()) for e in entries if _is_hour(e.name)}
        changed = sorted(name for name, stamp in stamps.items() if self._seen.get(name) != stamp)
        if changed:
            paths = [str(self.folder / name) for name in changed]
            try:
                table = ds.dataset(paths, schema=LABELS_SCHEMA).to_table()
            except (pa.ArrowInvalid, OSError) as error:
                raise ArtefactError(
                    f"soft labels {self.folder} cannot be read ({error}); remove the damaged file, "
                    "and the teacher is asked again about its rows"
                ) from error
            self._index.add(table["input_hash"].to_numpy(), _logits_of(table))
            self._seen |= {name: stamps[name] for name in changed}

    def find(self, hashes: Hashes) -> Logits:
        """Logits of each input, NaN where the teacher was never asked. ``[B, 2]``."""
        return self._index.find(hashes)

    def add(self, hour: int, hashes: Hashes, logits: Logits) -> None:
        """Write the labels of inputs first met in an hour; call inside ``exclusive``.

        Args:
            hour: Hours since 1970.
            hashes: New inputs. ``[N]``.
            logits: Their labels. ``[N, 2]``.
        """
        path = self._path(hour)
        columns = [pa.array(hashes), pa.array(logits[:, 0]), pa.array(logits[:, 1])]
        table = pa.Table.from_arrays(columns, schema=LABELS_SCHEMA)
        if path.exists():
            table = pa.concat_tables([pq.read_table(path, schema=LABELS_SCHEMA), table])
        with whole_file(path) as scratch:
            pq.write_table(table, scratch)
        self._seen[path.name] = _stamp(path.stat())
        self._index.add(hashes, logits)

    def _path(self, hour: int) -> Path:
        moment = datetime.fromtimestamp(int(hour) * 3600, UTC)
        return self.folder / f"{format_time(moment)[:13]}.parquet"


def _sorted_run(hashes: Hashes, logits: Logits) -> tuple[Hashes, Logits]:
    distinct, first = np.unique(hashes, return_index=True)
    return distinct, logits[first]


def _logits_of(table: pa.Table) -> Logits:
    return np.column_stack([table["no_click"].to_numpy(), table["click"].to_numpy()])


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _is_hour(name: str) -> bool:
    return name.endswith(".parquet") and not name.startswith(".")
