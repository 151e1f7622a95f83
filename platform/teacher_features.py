"""The teacher's inner tensors of each input, written once and read row by row (papers.md C9, B18).

A store holds chosen tensors of one frozen teacher (hidden states, [CLS] vectors, attention) for
inputs known by the hash of their tokens::

    FOLDER/manifest.json        teacher, dtype, tensors and their shapes
    FOLDER/000000/index.parquet input_hash, length, no_click, click: one line an input
    FOLDER/000000/hidden.1.npy  values of all inputs of the segment, one after the other

A segment is written whole or not at all and never changed, so a killed pass loses at most the
segment under way. The row of an input is its place in all segments in order; it never changes
either, so example files may point to it. Where an input's values begin follows from the lengths.
Padding is not stored. The logits of the same forward pass stand in the index, so that no input
needs a second one.

Shape suffixes: B rows asked for, N rows of a segment, T tokens.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from driftline.platform.artefacts import hash_value, read_json, whole_directory, write_json
from driftline.platform.distillation.keys import FeatureKey, FeatureKind
from driftline.platform.errors import ArtefactError, ContractError, ResourceError

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
INDEX: Final = "index.parquet"
TOKENS: Final = "T"
MAX_OPEN_FILES: Final = 256  # a mapped file costs a file descriptor; a process has 1,024 or so
BYTES_PER_GIGABYTE: Final = 10**9

FeatureType = Literal["float16", "float32"]

INDEX_SCHEMA: Final = pa.schema(
    [
        pa.field("input_hash", pa.int64(), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        pa.field("no_click", pa.float32(), nullable=False),
        pa.field("click", pa.float32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class FeatureShape:
    """Shape of one tensor for one input; ``"T"`` stands where the number of tokens does."""

    dims: tuple[int | str, ...]

    def of(self, length: int) -> tuple[int, ...]:
        """The shape for an input of so many tokens."""
        return tuple(length if dim == TOKENS else int(dim) for dim in self.dims)

    def num_values(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Values of each input. ``[N]``."""
        fixed = prod(int(dim) for dim in self.dims if dim != TOKENS)
        return fixed * lengths.astype(np.int64) ** self.dims.count(TOKENS)


FeatureShapes = Mapping[FeatureKey, FeatureShape]


@dataclass(frozen=True)
class _Segment:
    """One segment; ``starts`` are places of its inputs in each flat file, one more than inputs."""

    path: Path
    hashes: NDArray[np.int64]
    lengths: NDArray[np.int64]
    logits: NDArray[np.float32]
    starts: dict[FeatureKey, NDArray[np.int64]]


class TeacherFeatures:
    """Reads and extends one store. One process at a time may extend it; see ``SoftLabels``.

    Open it with ``open`` or ``create``. An open store sees segments that others added after
    ``refresh``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise ContractError(
                f"teacher features {folder} have format {manifest.get('format')}, this code reads "
                f"{FORMAT}; remove the folder, the next pass of the teacher writes it anew"
            )
        self.teacher: str = manifest["teacher"]
        """Hash of the teacher whose tensors these are."""
        self.dtype: FeatureType = manifest["dtype"]
        self.shapes: dict[FeatureKey, FeatureShape] = dict(map(_shape_of, manifest["tensors"]))
        self._segments: list[_Segment] = []
        self._maps: dict[Path, NDArray[Any]] = {}
        self.refresh()

    @classmethod
    def open(
        cls, folder: Path, *, teacher: str | None = None, dtype: FeatureType | None = None
    ) -> "TeacherFeatures":
        """Open a store.

        Args:
            folder: Its folder.
            teacher: Hash of the teacher it must be of; any when not given.
            dtype: Type its values must have; any when not given.

        Raises:
            ContractError: there is none, or it is of another teacher or of another type.
            ArtefactError: one of its files is cut short, altered or missing.
        """
        if not (folder / MANIFEST).exists():
            raise ContractError(
                f"no teacher features in {folder}; label with the matches' tensors first, or "
                "remove the matches from the objective"
            )
        store = cls(folder)
        if teacher is not None and store.teacher != teacher:
            raise ContractError(
                f"teacher features {folder} are of teacher {store.teacher[:12]}, the labels are "
                f"of {teacher[:12]}; use the features of the same teacher"
            )
        if dtype is not None and store.dtype != dtype:
            raise ContractError(
                f"teacher features {folder} hold {store.dtype}, the settings ask for {dtype}; "
                "undo the change, or remove the folder to have it written anew"
            )
        return store

    @classmethod
    def create(
        cls, folder: Path, *, teacher: str, shapes: FeatureShapes, dtype: FeatureType = "float16"
    ) -> "TeacherFeatures":
        """An empty store, or the one that is there.

        Raises:
            ValueError: no tensor, or ``dtype`` is not float16 or float32.
            ContractError: there is one of another teacher, dtype, or other tensors.
        """
        if dtype not in get_args(FeatureType):
            raise ValueError(f"dtype must be one of {get_args(FeatureType)}, got {dtype!r}")
        if not shapes:
            raise ValueError(f"teacher features {folder} need at least one tensor, got none")
        if not (folder / MANIFEST).exists():
            tensors = [
                {"kind": key.kind, "place": key.place, "shape": list(shape.dims)}
                for key, shape in shapes.items()
            ]
            manifest = {"format": FORMAT, "teacher": teacher, "dtype": dtype, "tensors": tensors}
            write_json(folder / MANIFEST, manifest)
        store = cls.open(folder, teacher=teacher, dtype=dtype)
        if store.shapes != dict(shapes):
            raise ContractError(
                f"teacher features {folder} hold {_names(store.shapes)}, this pass would write "
                f"{_names(shapes)}; use another folder"
            )
        return store

    # --- reading ------------------------------------------------------------------------------

    @property
    def keys(self) -> tuple[FeatureKey, ...]:
        """The tensors it holds."""
        return tuple(self.shapes)

    def __len__(self) -> int:
        return int(self._bases[-1])

    def rows_of(self, input_hashes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row of each input, -1 where the teacher was never asked. ``[B]``."""
        if not len(self):
            return np.full(len(input_hashes), -1, np.int64)
        at = np.searchsorted(self._hashes[:-1], input_hashes, sorter=self._order)
        rows = self._order[np.minimum(at, len(self) - 1)]
        return np.where(self._hashes[rows] == input_hashes, rows, -1)

    def lengths(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """Tokens of each row as the teacher saw it, [CLS] and [SEP] included; 0 for -1. ``[B]``."""
        return self._lengths[rows]

    def logits(self, rows: NDArray[np.integer]) -> NDArray[np.float32]:
        """What the same forward pass said; NaN for -1. ``[B, 2]``."""
        return self._logits[rows]

    def read(
        self, key: FeatureKey, rows: NDArray[np.integer], *, num_tokens: int | None = None
    ) -> Tensor:
        """One tensor for some rows, padded with zeros; only these rows are read from disk.

        Args:
            key: Which tensor.
            rows: Rows of the store, -1 for one without (all zeros). ``[B]``.
            num_tokens: Size of the token dimensions; longer rows are cut. The longest of the rows
                when not given.

        Returns:
            ``[B, *dims]`` float32, on the CPU.

        Raises:
            ContractError: the store does not hold this tensor.
            IndexError: there is no such row.
        """
        shape = self._shape(key)
        wanted = np.asarray(rows, np.int64)
        if len(wanted) and not -1 <= int(wanted.min()) <= int(wanted.max()) < len(self):
            raise IndexError(
                f"rows of {self.folder} must lie in [-1, {len(self)}), got {wanted.min()}.."
                f"{wanted.max()}"
            )
        longest = int(self.lengths(wanted).max(initial=0)) if num_tokens is None else num_tokens
        found = np.zeros((len(wanted), *shape.of(longest)), np.float32)
        for place, row in enumerate(wanted.tolist()):
            if row >= 0:
                own = self._read_row(key, shape, row)
                sizes = np.minimum(own.shape, found.shape[1:])
                inside = tuple(slice(0, int(size)) for size in sizes)
                found[place][inside] = own[inside]
        return torch.from_numpy(found)

    def fingerprint(self, rows: NDArray[np.integer]) -> str:
        """Hash of what any store gives for these inputs, without reading: teacher and inputs.

        What else a store keeps, and at which rows, changes nothing.
        """
        known = np.where(np.asarray(rows) < 0, 0, self._hashes[rows])
        inputs = hashlib.sha256(known.tobytes()).hexdigest()
        return hash_value([FORMAT, self.teacher, self.dtype, inputs])

    def _shape(self, key: FeatureKey) -> FeatureShape:
        if key not in self.shapes:
            raise ContractError(
                f"teacher features {self.folder} do not hold {key}, only {_names(self.shapes)}; "
                "label again with this tensor among the keys"
            )
        return self.shapes[key]

    def _read_row(self, key: FeatureKey, shape: FeatureShape, row: int) -> NDArray[Any]:
        number = int(np.searchsorted(self._bases, row, side="right")) - 1
        segment = self._segments[number]
        place = row - int(self._bases[number])
        start, end = segment.starts[key][place : place + 2].tolist()
        values = self._mapped(segment.path / f"{key}.npy")[start:end]
        return values.reshape(shape.of(int(segment.lengths[place])))

    def _mapped(self, path: Path) -> NDArray[Any]:
        if path not in self._maps:
            if len(self._maps) >= MAX_OPEN_FILES:
                self._maps.clear()
            self._maps[path] = np.load(path, mmap_mode="r", allow_pickle=False)
        return self._maps[path]

    def refresh(self) -> None:
        """See the segments that were added since."""
        while (path := self.folder / f"{len(self._segments):06d}").exists():
            self._segments.append(self._open_segment(path))
        nothing = np.zeros(1, np.int64)  # stands last, where row -1 looks
        unknown = np.full((1, 2), np.nan, np.float32)
        self._hashes = np.concatenate([*(s.hashes for s in self._segments), nothing])
        self._lengths = np.concatenate([*(s.lengths for s in self._segments), nothing])
        self._logits = np.concatenate([*(s.logits for s in self._segments), unknown])
        self._order = np.argsort(self._hashes[:-1], kind="stable")
        self._bases = np.cumsum([0, *(len(s.hashes) for s in self._segments)])

    def _open_segment(self, path: Path) -> _Segment:
        try:
            table = pq.read_table(path / INDEX, schema=INDEX_SCHEMA)
            lengths = table["length"].to_numpy().astype(np.int64)
            starts = {key: _starts(shape, lengths) for key, shape in self.shapes.items()}
            for key, start in starts.items():
                found = np.load(path / f"{key}.npy", mmap_mode="r", allow_pickle=False)
                if (found.shape, str(found.dtype)) != ((int(start[-1]),), self.dtype):
                    raise ValueError(
                        f"{key}.npy holds {found.shape} {found.dtype}, not {start[-1]} {self.dtype}"
                    )
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise ArtefactError(
                f"teacher features {path} are damaged ({error}); remove {self.folder} and the "
                "example files that point to it, the next pass of the teacher writes them anew"
            ) from error
        logits = np.column_stack([table["no_click"].to_numpy(), table["click"].to_numpy()])
        return _Segment(path, table["input_hash"].to_numpy(), lengths, logits, starts)

    # --- writing ------------------------------------------------------------------------------

    @property
    def num_bytes(self) -> int:
        """Size of all values on disk."""
        return feature_bytes(self.shapes, self._lengths[:-1], self.dtype)

    def check_room(self, lengths: NDArray[np.int64], *, max_gigabytes: float) -> None:
        """Refuse a pass whose features would not fit, before it begins.

        Args:
            lengths: Tokens of the inputs that are to be added. ``[N]``.
            max_gigabytes: Limit of the whole store, in 10^9 bytes.

        Raises:
            ResourceError: it would grow beyond the limit.
        """
        needed = (self.num_bytes + feature_bytes(self.shapes, lengths, self.dtype)) / (
            BYTES_PER_GIGABYTE
        )
        if needed > max_gigabytes:
            raise ResourceError(
                f"teacher features {self.folder} would grow to {needed:.3g} GB with "
                f"{len(lengths):,} more inputs ({_names(self.shapes)}, {self.dtype}), the limit is "
                f"{max_gigabytes:g} GB; raise teacher.features.max_gigabytes, match fewer layers "
                "or cls instead of hidden, use float16, or label fewer rows "
                "(labels.soft_label_share)"
            )

    @contextmanager
    def segment(
        self, input_hashes: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> Iterator["SegmentWriter"]:
        """Add inputs: fill the writer inside the block; they are there when it ends.

        Raises:
            ValueError: an input was not filled, or is known already.
        """
        if (self.rows_of(input_hashes) >= 0).any():
            raise ValueError(f"teacher features {self.folder}: inputs must be new, some are known")
        with whole_directory(self.folder / f"{len(self._segments):06d}") as scratch:
            writer = SegmentWriter(scratch, self.shapes, self.dtype, lengths)
            yield writer
            writer.close(input_hashes)
        self.refresh()


class SegmentWriter:
    """The values of one segment while they arrive, straight into mapped files."""

    def __init__(
        self,
        folder: Path,
        shapes: FeatureShapes,
        dtype: FeatureType,
        lengths: NDArray[np.int64],
    ) -> None:
        self._folder = folder
        self._shapes = shapes
        self._lengths = lengths
        self._logits = np.full((len(lengths), 2), np.nan, np.float32)
        self._starts = {key: _starts(shape, lengths) for key, shape in shapes.items()}
        self._files = {
            key: open_memmap(
                folder / f"{key}.npy", mode="w+", dtype=np.dtype(dtype), shape=(int(starts[-1]),)
            )
            for key, starts in self._starts.items()
        }

    def write(
        self,
        places: NDArray[np.integer],
        logits_B2: NDArray[np.float32],
        features: Mapping[FeatureKey, NDArray[np.float32]],
    ) -> None:
        """Put in one batch of the teacher.

        Args:
            places: Which inputs of the segment. ``[B]``.
            logits_B2: What the teacher said. ``[B, 2]``.
            features: Padded tensors of the batch. ``[B, *dims]`` each.

        Raises:
            ValueError: a value does not fit into the store's type.
        """
        self._logits[places] = logits_B2
        for key, shape in self._shapes.items():
            for place, padded in zip(places.tolist(), features[key], strict=True):
                own = shape.of(int(self._lengths[place]))
                with np.errstate(over="ignore"):
                    values = padded[tuple(map(slice, own))].astype(self._files[key].dtype)
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"{key} holds values that {values.dtype} cannot ({np.abs(padded).max():g} "
                        "at most); set teacher.features.dtype to float32"
                    )
                start, end = self._starts[key][place : place + 2]
                self._files[key][start:end] = values.reshape(-1)

    def close(self, input_hashes: NDArray[np.int64]) -> None:
        """Write the index, and all values to disk."""
        if np.isnan(self._logits).any():
            raise ValueError(f"segment {self._folder}: not every input was filled")
        for file in self._files.values():
            file.flush()
        self._files.clear()
        columns = (input_hashes, self._lengths, self._logits[:, 0], self._logits[:, 1])
        arrays = [pa.array(c, f.type) for c, f in zip(columns, INDEX_SCHEMA, strict=True)]
        pq.write_table(pa.Table.from_arrays(arrays, schema=INDEX_SCHEMA), self._folder / INDEX)


def feature_bytes(shapes: FeatureShapes, lengths: NDArray[np.int64], dtype: FeatureType) -> int:
    """Bytes of these tensors for inputs of these lengths; nothing is computed."""
    values = sum(int(shape.num_values(lengths).sum()) for shape in shapes.values())
    return values * np.dtype(dtype).itemsize


def _starts(shape: FeatureShape, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(shape.num_values(lengths))])


def _shape_of(raw: Mapping[str, Any]) -> tuple[FeatureKey, FeatureShape]:
    kind: FeatureKind = raw["kind"]
    return FeatureKey(kind, raw["place"]), FeatureShape(tuple(raw["shape"]))


def _names(keys: Sequence[FeatureKey] | FeatureShapes) -> str:
    return ", ".join(str(key) for key in keys)
