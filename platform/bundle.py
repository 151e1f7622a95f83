"""A bundle: everything one model version needs, immutable, known by one fingerprint.

Arms, cached vectors, head, scales, calibration, tokeniser, feature-view versions and contract lie
in one folder with a manifest of content hashes. A head is valid only with the vectors it was
trained on; because both stand under one fingerprint, no other combination can be loaded.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from driftline.platform.artefacts import (
    hash_file,
    hash_files,
    hash_value,
    link_or_copy,
    map_tensors,
    read_json,
    scratch_directory,
    write_json,
)
from driftline.platform.errors import BundleError
from driftline.platform.fused_head import PAGE_FILE, Projected
from driftline.platform.tabular import TabularEncoder

MANIFEST: Final = "manifest.json"
FORMAT: Final = 1
HEAD, ARMS, VECTORS = "head.safetensors", "arms.safetensors", "vectors.safetensors"
TABULAR, CALIBRATION, CONTRACT = "tabular.json", "calibration.json", "contract.json"
TOKENIZER, STUDENT = "tokenizer.model", "student.json"
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
        moved = logits.astype(np.float64) + np.log(self.keep_rate)
        return 1.0 / (1.0 + np.exp(-(self.slope * moved + self.intercept)))


@dataclass(frozen=True)
class VectorCache:
    """Cached [CLS] vectors by text: ``text_id`` ascending ``[N]``, ``page`` and ``ad`` ``[N, H]``.

    Source: papers.md S0.11. Keyed by the hash of the text, so an edited product has a new key.
    """

    text_id: NDArray[np.int64]
    page: NDArray[np.float32]
    ad: NDArray[np.float32]

    def __post_init__(self) -> None:
        shapes = (len(self.text_id), len(self.page), len(self.ad))
        if len(set(shapes)) != 1 or (np.diff(self.text_id) <= 0).any():
            raise BundleError(f"vectors need one row for each ascending text_id, got {shapes} rows")

    @classmethod
    def load(cls, path: Path) -> "VectorCache":
        """Map a safetensors file: nothing is read until it is asked for."""
        return cls(**map_tensors(path))

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file({"text_id": self.text_id, "page": self.page, "ad": self.ad}, path)

    def rows(self, text_ids: NDArray[np.int64]) -> NDArray[np.int32]:
        """Row of each text, -1 for one that is not cached; 0 stands for "no text". ``[B]``."""
        if not len(self.text_id):
            return np.full(len(text_ids), -1, np.int32)
        at = np.minimum(np.searchsorted(self.text_id, text_ids), len(self.text_id) - 1)
        return np.where(self.text_id[at] == text_ids, at, -1).astype(np.int32)

    def merged(self, other: "VectorCache") -> "VectorCache":
        """Both caches in one; ``other`` holds texts this one lacks."""
        order = np.argsort(ids := np.concatenate([self.text_id, other.text_id]))
        return VectorCache(
            ids[order],
            np.concatenate([self.page, other.page])[order],
            np.concatenate([self.ad, other.ad])[order],
        )


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
        return VectorCache.load(self.path / VECTORS)

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
        core = {"format": FORMAT, "files": hash_files(scratch), "lineage": dict(parts.lineage)}
        fingerprint = hash_value(core)[:FINGERPRINT_LENGTH]
        write_json(scratch / MANIFEST, {"fingerprint": fingerprint, **core})
        destination = bundles / fingerprint
        if not destination.exists():
            scratch.rename(destination)
    return Bundle.open(destination, verify=False)


def _verify(path: Path, manifest: Mapping[str, Any]) -> None:
    for name, expected in manifest["files"].items():
        if not (path / name).is_file():
            raise BundleError(f"bundle {path.name}: {name} is missing; publish it again")
        if (found := hash_file(path / name)) != expected:
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
