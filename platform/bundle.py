"""A bundle: everything one model version needs, immutable, known by one fingerprint.

Arms, cached vectors, head, scales, calibration, tokeniser, feature-view versions and contract lie
in one folder with a manifest of content hashes. A head is valid only with the vectors it was
trained on; because both stand under one fingerprint, no other combination can be loaded.
"""

import math
from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from driftline.platform.artefacts import (
    hash_value,
    link_or_copy,
    map_tensors,
    read_json,
    scratch_directory,
    write_json,
)
from driftline.platform.errors import BundleError
from driftline.platform.fused_head import PAGE_FILE, Projected
from driftline.platform.key_directory import KeyDirectory
from driftline.platform.tabular import TabularEncoder
from driftline.platform.verified_files import VerifiedFiles

MANIFEST: Final = "manifest.json"
FORMAT: Final = 1
HEAD, ARMS, VECTORS = "head.safetensors", "arms.safetensors", "vectors.safetensors"
TABULAR, CALIBRATION, CONTRACT = "tabular.json", "calibration.json", "contract.json"
TOKENIZER, STUDENT = "tokenizer.model", "student.json"
VECTOR_INDEX: Final = "vector_index.safetensors"
"""Finds the rows of texts where there are very many; see ``key_directory``."""
FINGERPRINT_LENGTH: Final = 16


@dataclass(frozen=True)
class Calibration:
    """From the head's logit to a probability on the natural click rate.

    ``p = sigmoid(slope * (logit + log(keep_rate)) + intercept)``. The middle part undoes the
    thinned negatives exactly (papers.md S0.25, T.2); the rest is fitted on validation rows.
    """

    keep_rate: float
    slope: float = 1.0
    intercept: float = 0.0

    def probabilities(self, logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Click probabilities, float64. ``[B]`` to ``[B]``."""
        odds = logits.astype(np.float64)  # against a click, in the end; one array for all
        odds *= -self.slope
        odds -= self.slope * math.log(self.keep_rate) + self.intercept
        np.exp(odds, out=odds)
        odds += 1.0
        return np.reciprocal(odds, out=odds)


@dataclass(frozen=True)
class VectorCache:
    """Cached [CLS] vectors by text: ``text_id`` ascending ``[N]``, ``page`` and ``ad`` ``[N, H]``.

    Source: papers.md S0.11. Keyed by the hash of the text, so an edited product has a new key.
    """

    text_id: NDArray[np.int64]
    page: NDArray[np.float32]
    ad: NDArray[np.float32]
    directory: KeyDirectory | None = None
    """Finds rows among very many texts; without one, binary search does."""
    late: "VectorCache | None" = None
    """Texts that came after a bundle was published; their rows follow those of this cache."""
    trusted: InitVar[bool] = False
    """The order was checked when the file was written: a look at every id would read them all."""

    def __post_init__(self, trusted: bool) -> None:
        shapes = (len(self.text_id), len(self.page), len(self.ad))
        if len(set(shapes)) != 1 or not (trusted or self.is_ascending()):
            raise BundleError(f"vectors need one row for each ascending text_id, got {shapes} rows")

    @classmethod
    def load(cls, path: Path) -> "VectorCache":
        """Map a safetensors file: nothing is read until it is asked for."""
        return cls(*_mapped(path), trusted=True)

    @classmethod
    def open(cls, folder: Path) -> "VectorCache":
        """Map the vectors of a bundle, and their index if there is one."""
        index = folder / VECTOR_INDEX
        directory = KeyDirectory.from_arrays(map_tensors(index)) if index.exists() else None
        return cls(*_mapped(folder / VECTORS), directory=directory, trusted=True)

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file({"text_id": self.text_id, "page": self.page, "ad": self.ad}, path)

    def is_ascending(self) -> bool:
        """Whether the ids ascend; reads all of them."""
        return bool((np.diff(self.text_id) > 0).all())

    def rows(self, text_ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Row of each text, -1 for one that is not cached; 0 stands for "no text". ``[B]``."""
        rows = self._own_rows(text_ids)
        if self.late is not None and (rows < 0).any():
            late = self.late.rows(text_ids)
            rows = np.where((rows < 0) & (late >= 0), late + len(self.text_id), rows)
        return rows.astype(np.int32)

    def part(self, text_ids: NDArray[np.int64]) -> "VectorCache":
        """The vectors of some texts, ascending and without duplicates; unknown ones are left out.

        Args:
            text_ids: Ascending, without duplicates.
        """
        rows = self._own_rows(text_ids)
        rows = rows[rows >= 0]
        mine = VectorCache(self.text_id[rows], self.page[rows], self.ad[rows])
        return mine if self.late is None else mine.merged(self.late.part(text_ids))

    def merged(self, other: "VectorCache") -> "VectorCache":
        """Both caches in one; ``other`` holds texts this one lacks."""
        order = np.argsort(ids := np.concatenate([self.text_id, other.text_id]))
        return VectorCache(
            ids[order],
            np.concatenate([self.page, other.page])[order],
            np.concatenate([self.ad, other.ad])[order],
        )

    def _own_rows(self, text_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.directory is not None:
            return self.directory.find(text_ids)
        if not len(self.text_id):
            return np.full(len(text_ids), -1, np.int64)
        at = np.minimum(np.searchsorted(self.text_id, text_ids), len(self.text_id) - 1)
        return np.where(self.text_id[at] == text_ids, at, -1)


@dataclass(frozen=True)
class BundleParts:
    """What goes into a bundle. Paths are shared by hard link, never copied twice."""

    head: Path
    arms: Path | None
    vectors: Path
    tokenizer: Path | None
    tabular: TabularEncoder
    calibration: Calibration
    student: Mapping[str, Any]
    """The student's ``ModelSpec`` as JSON."""
    contract: Mapping[str, Any]
    """Key type, columns and context features: enough to check a request without the settings."""
    lineage: Mapping[str, Any]
    """As-of time, kind, windows, teacher, arms, parent, feature views, code version."""
    projected: Projected | None = None
    """The vectors after the head's first layer: what answers are made from."""


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; parts are read when first asked for."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> "Bundle":
        """Open a folder and, by default, check every byte against the fingerprint.

        Large files are read once on each machine (``verified_files``), not at every opening.

        Raises:
            BundleError: no manifest, another format, or a file that is missing or altered.
        """
        if not (path / MANIFEST).is_file():
            raise BundleError(f"{path} is no bundle: it has no {MANIFEST}")
        try:
            manifest = read_json(path / MANIFEST)
        except ValueError as error:
            raise BundleError(f"{path / MANIFEST} is not JSON: {error}") from error
        if manifest.get("format") != FORMAT:
            raise BundleError(
                f"{path}: bundle format must be {FORMAT}, got {manifest.get('format')!r}; "
                "publish it again with this version"
            )
        if verify:
            _verify(path, manifest)
        return cls(path, manifest)

    @property
    def fingerprint(self) -> str:
        """Hash over the content of all files and the lineage."""
        return str(self.manifest["fingerprint"])

    @property
    def lineage(self) -> Mapping[str, Any]:
        """As-of time, kind, windows, teacher, arms, parent, feature views, code version."""
        lineage = self.manifest["lineage"]
        assert isinstance(lineage, dict)
        return lineage

    @cached_property
    def tabular(self) -> TabularEncoder:
        """Vocabularies and scales."""
        return TabularEncoder.from_json((self.path / TABULAR).read_text())

    @cached_property
    def calibration(self) -> Calibration:
        """From logits to natural probabilities."""
        return Calibration(**read_json(self.path / CALIBRATION))

    @cached_property
    def vectors(self) -> VectorCache:
        """Cached vectors of all products known at publication."""
        return VectorCache.open(self.path)

    @cached_property
    def projected(self) -> Projected | None:
        """The same after the head's first layer, mapped; None in a bundle published without."""
        return Projected.open(self.path) if (self.path / PAGE_FILE).exists() else None

    @cached_property
    def student(self) -> Mapping[str, Any]:
        """The student's ``ModelSpec`` as JSON."""
        return read_json(self.path / STUDENT)

    @cached_property
    def contract(self) -> Mapping[str, Any]:
        """Key type, columns and context features."""
        return read_json(self.path / CONTRACT)


def write_bundle(bundles: Path, parts: BundleParts) -> Bundle:
    """Publish a bundle folder named by its fingerprint; the same parts give the same folder."""
    with scratch_directory(bundles) as scratch:
        link_or_copy(parts.head, scratch / HEAD)
        link_or_copy(parts.vectors, scratch / VECTORS)
        _index_vectors(scratch)
        if parts.arms is not None:
            link_or_copy(parts.arms, scratch / ARMS)
        if parts.tokenizer is not None:
            link_or_copy(parts.tokenizer, scratch / TOKENIZER)
        if parts.projected is not None:
            parts.projected.save(scratch)
        (scratch / TABULAR).write_text(parts.tabular.to_json())
        write_json(scratch / CALIBRATION, asdict(parts.calibration))
        write_json(scratch / STUDENT, parts.student)
        write_json(scratch / CONTRACT, parts.contract)
        files = VerifiedFiles(bundles).hash_all(scratch)
        core = {"format": FORMAT, "files": files, "lineage": dict(parts.lineage)}
        fingerprint = hash_value(core)[:FINGERPRINT_LENGTH]
        write_json(scratch / MANIFEST, {"fingerprint": fingerprint, **core})
        destination = bundles / fingerprint
        if not destination.exists():
            scratch.rename(destination)
    return Bundle.open(destination, verify=False)


def _mapped(path: Path) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    tensors = map_tensors(path)
    # Plain arrays are quicker to index than np.memmap.
    text_id, page, ad = (np.asarray(tensors[name]) for name in ("text_id", "page", "ad"))
    return text_id, page, ad


def _index_vectors(folder: Path) -> None:
    """Check the vectors of a bundle to be, and index them where they are very many."""
    vectors = VectorCache.load(folder / VECTORS)
    if not vectors.is_ascending():
        raise BundleError(f"{folder / VECTORS}: the ids of its texts do not ascend")
    directory = KeyDirectory.of(vectors.text_id)
    if directory is not None:
        save_file(directory.to_arrays(), folder / VECTOR_INDEX)


def _verify(path: Path, manifest: Mapping[str, Any]) -> None:
    known = VerifiedFiles(path.parent)
    for name, expected in manifest["files"].items():
        if not (path / name).is_file():
            raise BundleError(f"bundle {path.name}: {name} is missing; publish it again")
        if (found := known.hash(path / name)) != expected:
            raise BundleError(
                f"bundle {path.name}: {name} was altered (hash {found[:12]}, "
                f"manifest says {expected[:12]}); publish it again"
            )
    core = {key: manifest[key] for key in ("format", "files", "lineage")}
    if (found := hash_value(core)[:FINGERPRINT_LENGTH]) != manifest["fingerprint"]:
        raise BundleError(
            f"bundle {path.name}: manifest was altered (fingerprint {manifest['fingerprint']}, "
            f"content gives {found}); publish it again"
        )
