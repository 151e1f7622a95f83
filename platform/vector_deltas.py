"""Vectors of products that came after a bundle was published, in small files beside it.

``FINGERPRINT.deltas/000001.safetensors`` holds texts that the bundle's cache lacks: their vectors
from the bundle's own arms, and the same after its head's first layer. The bundle stays what it is;
a server adds the rows behind its mapped tables (``mapped_tables``). A delta names its bundle and
the hash of its content, so one from other arms, or half of one, is refused. The next head refresh
puts all of them into the cache of its bundle.

Shape suffixes: M texts of a delta, H vector width, V width of the head's first layer.
"""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from driftline.platform.artefacts import hash_value, whole_file
from driftline.platform.bundle import Bundle, VectorCache
from driftline.platform.errors import BundleError
from driftline.platform.fused_head import AD_FILE, PAGE_FILE, Projected
from driftline.platform.mapped_tables import grow_table
from driftline.platform.scorer import Scorer

logger = logging.getLogger(__name__)

Table = NDArray[Any]

_NAME: Final = re.compile(r"\d{6}\.safetensors")
_TENSORS: Final = ("text_id", "page", "ad", "projected_page", "projected_ad")


@dataclass(frozen=True)
class VectorDelta:
    """Some texts of a bundle that its cache lacks."""

    vectors: VectorCache
    """Ascending ids ``[M]``, vectors ``[M, H]``."""
    projected: Projected
    """``[M, V]``; without the last row of a bundle's own tables."""

    @classmethod
    def of(cls, scorer: Scorer, vectors: VectorCache) -> Self:
        """Vectors from a bundle's arms, and the same after its head's first layer."""
        projected = Projected.of(scorer.head, vectors.page, vectors.ad)
        return cls(vectors, Projected(projected.page[:-1], projected.ad[:-1]))

    @classmethod
    def read(cls, path: Path, *, fingerprint: str) -> Self:
        """Read a file and check that it is whole and belongs to a bundle.

        Raises:
            BundleError: another bundle's, altered, or no such file at all.
        """
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in _TENSORS}
        except (SafetensorError, OSError) as error:
            raise BundleError(f"vector delta {path} cannot be read: {error}") from error
        if metadata.get("bundle") != fingerprint:
            raise BundleError(
                f"vector delta {path} belongs to bundle {metadata.get('bundle')}, whose arms and "
                f"head are others than those of {fingerprint}; run `driftline catalogue encode`"
            )
        if metadata.get("content") != _content(fingerprint, found):
            raise BundleError(f"vector delta {path} was altered; remove it and encode again")
        vectors = VectorCache(found["text_id"], found["page"], found["ad"])
        return cls(vectors, Projected(found["projected_page"], found["projected_ad"]))

    def write(self, bundle: Bundle) -> Path:
        """Write it as the next delta of a bundle, whole or not at all."""
        folder = deltas_folder(bundle)
        folder.mkdir(exist_ok=True)
        tensors = {
            "text_id": self.vectors.text_id,
            "page": self.vectors.page,
            "ad": self.vectors.ad,
            "projected_page": self.projected.page,
            "projected_ad": self.projected.ad,
        }
        plain = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        content = _content(bundle.fingerprint, plain)
        with FileLock(folder / ".lock"):
            last = max((int(path.stem) for path in _files(folder)), default=0)
            path = folder / f"{last + 1:06d}.safetensors"
            with whole_file(path) as scratch:
                save_file(
                    plain, scratch, metadata={"bundle": bundle.fingerprint, "content": content}
                )
        return path


class DeltaReader:
    """Finds a bundle's deltas as they come; a file is read once.

    Args:
        bundle: Whose deltas.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._folder = deltas_folder(bundle)
        self._fingerprint = bundle.fingerprint
        self._read: dict[str, VectorDelta | None] = {}
        """By name of the file; ``None`` for one that was refused."""

    def look(self) -> bool:
        """Read what is new; whether there was anything. A file that is no good is left out."""
        new = [path for path in _files(self._folder) if path.name not in self._read]
        found = False
        for path in new:
            try:
                self._read[path.name] = VectorDelta.read(path, fingerprint=self._fingerprint)
                found = True
            except BundleError as error:
                logger.warning("vectors not taken: %s", error)
                self._read[path.name] = None
        return found

    @property
    def deltas(self) -> tuple[VectorDelta, ...]:
        """All that are good, in order."""
        return tuple(delta for _, delta in sorted(self._read.items()) if delta is not None)


def deltas_folder(bundle: Bundle) -> Path:
    """Where the deltas of a bundle lie."""
    return bundle.path.with_name(f"{bundle.path.name}.deltas")


def known_vectors(bundle: Bundle) -> VectorCache:
    """The vectors of a bundle and its deltas, of which those that are no good are left out."""
    reader = DeltaReader(bundle)
    late = _joined(bundle.vectors, reader.deltas) if reader.look() else None
    return bundle.vectors if late is None else bundle.vectors.merged(late.vectors)


def scorer_with_deltas(bundle: Bundle) -> Scorer:
    """The scorer of a bundle and all its deltas: what a server answers with that looks now."""
    reader = DeltaReader(bundle)
    reader.look()
    return grown_scorer(Scorer.of(bundle), bundle, reader.deltas)


def grown_scorer(scorer: Scorer, bundle: Bundle, deltas: Sequence[VectorDelta]) -> Scorer:
    """A bundle's scorer that knows the texts of its deltas, too.

    Their rows follow those of the bundle, whose pages stay shared by all processes. Scores of texts
    that the bundle knows do not change.

    Args:
        scorer: The bundle's own, without any delta.
        bundle: Where its tables lie.
        deltas: All of them.
    """
    late = _joined(scorer.vectors, deltas)
    if late is None:
        return scorer
    page = _grown(scorer.projected.page, bundle.path / PAGE_FILE, late.projected.page)
    ad = _grown(scorer.projected.ad, bundle.path / AD_FILE, late.projected.ad)
    vectors = replace(scorer.vectors, late=late.vectors, trusted=True)
    return replace(scorer, vectors=vectors, published=Projected(page, ad))


def _grown(own: Table, path: Path, rows: Table) -> Table:
    """A bundle's table with more rows before its last one, which stands for "no text"."""
    if not path.exists():  # published without: computed in memory
        return np.concatenate([own[:-1], rows, own[-1:]])
    table = grow_table(path, len(rows))
    table[len(own) - 1 : -1], table[-1] = rows, own[-1]
    table.setflags(write=False)
    return table


def _joined(own: VectorCache, deltas: Sequence[VectorDelta]) -> VectorDelta | None:
    """The texts of all deltas that a bundle lacks, of two alike the first."""
    if not deltas:
        return None
    ids = np.concatenate([delta.vectors.text_id for delta in deltas])
    distinct, first = np.unique(ids, return_index=True)
    first = first[own.rows(distinct) < 0]
    if not len(first):
        return None
    page, ad, projected_page, projected_ad = (
        np.concatenate(parts)[first]
        for parts in (
            [delta.vectors.page for delta in deltas],
            [delta.vectors.ad for delta in deltas],
            [delta.projected.page for delta in deltas],
            [delta.projected.ad for delta in deltas],
        )
    )
    return VectorDelta(VectorCache(ids[first], page, ad), Projected(projected_page, projected_ad))


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning("vector deltas in %s cannot be looked at: %s", folder, error)
        return []


def _content(fingerprint: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    hashes = {
        name: [
            hashlib.sha256(tensor.tobytes()).hexdigest(),
            str(tensor.dtype),
            list(tensor.shape),
        ]
        for name, tensor in tensors.items()
    }
    return hash_value([fingerprint, hashes])
