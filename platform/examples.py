"""Training examples: uncompressed Arrow IPC files, mapped into memory and read without copies.

Rows stand in order of event time, oldest first. Shape suffixes: N rows, C categorical columns,
F numeric inputs, P tokens of all rows, H vector width.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors.numpy import load_file

from driftline.platform.artefacts import whole_file
from driftline.platform.errors import ContractError

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
TOKENS = pa.large_list(pa.int32())
TEACHER_ROWS = "teacher_rows"


@dataclass(frozen=True)
class Ragged:
    """Token lists of different lengths, side by side."""

    values: Int32
    offsets: NDArray[np.int64]
    """``[N + 1]``; row n is ``values[offsets[n]:offsets[n + 1]]``."""

    @classmethod
    def of(cls, rows: Sequence[NDArray[np.int32]]) -> "Ragged":
        """From separate arrays."""
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        values = np.concatenate(rows) if rows else np.empty(0, np.int32)
        return cls(values.astype(np.int32, copy=False), np.concatenate([[0], np.cumsum(lengths)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row. ``[N]``."""
        return np.diff(self.offsets)

    def to_arrow(self) -> pa.LargeListArray:
        """The same as an Arrow column."""
        return pa.LargeListArray.from_arrays(pa.array(self.offsets, pa.int64()), self.values)


@dataclass(frozen=True)
class PairRows:
    """(page, ad) pairs for the twin student, its head and the baseline."""

    page_text: Int32
    """Row of the page's text in the texts or vectors file, -1 for none. ``[N]``."""
    ad_text: Int32
    categories: Int32
    numbers: Float32
    clicked: Float32
    """1 click, 0 none, between for a soft label, NaN for not known. ``[N]``."""
    teacher_logits: Float32 | None = None
    """Teacher's logits; NaN in rows without."""
    page_id_hash: Int32 | None = None
    """Bucket of the page product for the baseline, -1 for unknown."""
    ad_id_hash: Int32 | None = None
    teacher_rows: Int64 | None = None
    """Row of the teacher's features, -1 for none; see ``TeacherFeatures``. ``[N]``."""

    def __len__(self) -> int:
        return len(self.clicked)


@dataclass(frozen=True)
class TokenRows:
    """Serialised rows for a tower, or texts for masked-language training (without clicks)."""

    tokens: Ragged
    clicked: Float32 | None = None
    teacher_logits: Float32 | None = None
    teacher_rows: Int64 | None = None
    """Row of the teacher's features, -1 for none. ``[N]``."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Texts:
    """Distinct product texts by id."""

    text_id: NDArray[np.int64]
    tokens: Ragged


@dataclass(frozen=True)
class Vectors:
    """Cached [CLS] vectors in each role. ``[N, H]`` each."""

    page: Float32
    """``[N, H]``"""
    ad: Float32

    @classmethod
    def open(cls, path: Path) -> "Vectors":
        """Read tensors ``page`` and ``ad`` of a safetensors file."""
        tensors = load_file(path)
        return cls(tensors["page"], tensors["ad"])


# --- writing ------------------------------------------------------------------------------


def write_pairs(destination: Path, rows: PairRows) -> None:
    """Write pairs, whole or not at all."""
    columns: dict[str, pa.Array] = {
        "page_text": pa.array(rows.page_text, pa.int32()),
        "ad_text": pa.array(rows.ad_text, pa.int32()),
        "categories": _fixed(rows.categories, pa.int32()),
        "numbers": _fixed(rows.numbers, pa.float32()),
        "clicked": pa.array(rows.clicked, pa.float32()),
    }
    if rows.teacher_logits is not None:
        columns["teacher_logits"] = _fixed(rows.teacher_logits, pa.float32())
    for name, values in (("page_id_hash", rows.page_id_hash), ("ad_id_hash", rows.ad_id_hash)):
        if values is not None:
            columns[name] = pa.array(values, pa.int32())
    if rows.teacher_rows is not None:
        columns["teacher_rows"] = pa.array(rows.teacher_rows, pa.int64())
    _write(destination, columns)


def write_tokens(destination: Path, rows: TokenRows) -> None:
    """Write serialised rows, whole or not at all."""
    columns: dict[str, pa.Array] = {"tokens": rows.tokens.to_arrow()}
    if rows.clicked is not None:
        columns["clicked"] = pa.array(rows.clicked, pa.float32())
    if rows.teacher_logits is not None:
        columns["teacher_logits"] = _fixed(rows.teacher_logits, pa.float32())
    if rows.teacher_rows is not None:
        columns["teacher_rows"] = pa.array(rows.teacher_rows, pa.int64())
    _write(destination, columns)


def write_texts(destination: Path, texts: Texts) -> None:
    """Write product texts, whole or not at all."""
    ids = pa.array(texts.text_id, pa.int64())
    _write(destination, {"text_id": ids, "tokens": texts.tokens.to_arrow()})


def _fixed(values_ND: NDArray[Any], kind: pa.DataType) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(values_ND).reshape(-1), kind)
    if values_ND.shape[1] == 0:
        return pa.array([[]] * len(values_ND), pa.list_(kind, 0))
    return pa.FixedSizeListArray.from_arrays(flat, values_ND.shape[1])


def _write(destination: Path, columns: dict[str, pa.Array]) -> None:
    batch = pa.record_batch(columns)
    with (
        whole_file(destination) as scratch,
        pa.OSFile(str(scratch), "wb") as sink,
        pa.ipc.new_file(sink, batch.schema) as writer,
    ):
        writer.write_batch(batch)


# --- reading ------------------------------------------------------------------------------


def open_pairs(path: Path) -> PairRows:
    """Map a file of pairs.

    Raises:
        ContractError: not such a file, or a column is missing or of another type.
    """
    file = _MappedFile(path)
    return PairRows(
        page_text=file.flat("page_text", pa.int32()),
        ad_text=file.flat("ad_text", pa.int32()),
        categories=file.fixed("categories", pa.int32()),
        numbers=file.fixed("numbers", pa.float32()),
        clicked=file.flat("clicked", pa.float32()),
        teacher_logits=file.fixed("teacher_logits", pa.float32())
        if "teacher_logits" in file
        else None,
        page_id_hash=file.flat("page_id_hash", pa.int32()) if "page_id_hash" in file else None,
        ad_id_hash=file.flat("ad_id_hash", pa.int32()) if "ad_id_hash" in file else None,
        teacher_rows=file.flat("teacher_rows", pa.int64()) if "teacher_rows" in file else None,
    )


def open_tokens(path: Path) -> TokenRows:
    """Map a file of serialised rows or texts.

    Raises:
        ContractError: not such a file, or a column is missing or of another type.
    """
    file = _MappedFile(path)
    return TokenRows(
        tokens=file.ragged("tokens"),
        clicked=file.flat("clicked", pa.float32()) if "clicked" in file else None,
        teacher_logits=file.fixed("teacher_logits", pa.float32())
        if "teacher_logits" in file
        else None,
        teacher_rows=file.flat("teacher_rows", pa.int64()) if "teacher_rows" in file else None,
    )


def open_texts(path: Path) -> Texts:
    """Map a file of product texts.

    Raises:
        ContractError: not such a file, or a column is missing or of another type.
    """
    file = _MappedFile(path)
    return Texts(text_id=file.flat("text_id", pa.int64()), tokens=file.ragged("tokens"))


def hash_examples(path: Path) -> str:
    """Hash of the content of an example file, but for its rows of the teacher's features.

    The same tensors have other rows in another store; see ``TeacherFeatures.fingerprint``.

    Raises:
        ContractError: not such a file.
    """
    table = _MappedFile(path).table
    if TEACHER_ROWS in table.column_names:
        table = table.drop_columns([TEACHER_ROWS])
    digest = _Digest()
    with pa.PythonFile(digest, "w") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return digest.hash.hexdigest()


class _Digest(io.RawIOBase):
    """Hashes what is written to it."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Count in some bytes."""
        self.hash.update(data)
        return len(data)


class _MappedFile:
    """Columns of a mapped Arrow file as NumPy views; several record batches are joined (copied)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            raise ContractError(f"examples {path} cannot be read as Arrow IPC: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self.table.column_names

    def flat(self, name: str, kind: pa.DataType) -> NDArray[Any]:
        column = self._column(name, (kind,))
        return column.to_numpy(zero_copy_only=column.null_count == 0)

    def fixed(self, name: str, kind: pa.DataType) -> NDArray[Any]:
        width = getattr(self.table.schema.field(name).type, "list_size", 0) if name in self else 0
        column = self._column(name, (pa.list_(kind, width),))
        return column.flatten().to_numpy().reshape(len(column), width)

    def ragged(self, name: str) -> Ragged:
        column = self._column(name, (TOKENS, pa.list_(pa.int32())))
        offsets = column.offsets.to_numpy().astype(np.int64, copy=False)
        return Ragged(column.values.to_numpy(), offsets)

    def _column(self, name: str, kinds: Sequence[pa.DataType]) -> pa.Array:
        if name not in self:
            raise ContractError(
                f"examples {self.path}: column {name!r} is missing, got {self.table.column_names}"
            )
        found = self.table.schema.field(name).type
        if found not in kinds:
            raise ContractError(
                f"examples {self.path}: column {name!r} must be {kinds[0]}, got {found}"
            )
        chunks = self.table[name].chunks
        column = (
            chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks or [pa.array([], found)])
        )
        if column.null_count:
            raise ContractError(
                f"examples {self.path}: column {name!r} holds {column.null_count} nulls; "
                "write NaN or -1 for a missing value"
            )
        return column
