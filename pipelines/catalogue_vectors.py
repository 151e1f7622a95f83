"""Vectors of products that came since the last refresh, for the bundles that are live now.

After each materialisation of ``driftline up``, or by ``driftline catalogue encode CONFIG``: servers
take what it writes within a second, and a new product is scored by its own text instead of the
neutral one. The next head refresh puts these vectors into the cache of its bundle.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from driftline.features.texts import known_texts
from driftline.pipelines.prepare import read_catalogue
from driftline.platform.bundle import ARMS, HEAD, TOKENIZER, Bundle, VectorCache
from driftline.platform.errors import MissingArtefactError
from driftline.platform.examples import Ragged
from driftline.platform.inference import encode_tokens, load_model
from driftline.platform.models.student import AD, PAGE
from driftline.platform.registry import read_champion
from driftline.platform.scorer import Scorer, twin_spec
from driftline.platform.settings import DriftlineSettings
from driftline.platform.text import Tokenizer, serialise_table
from driftline.platform.traffic import read_traffic
from driftline.platform.vector_deltas import VectorDelta, known_vectors
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EncodedBundle:
    """What one live bundle got."""

    bundle: str
    num_texts: int
    """Texts that it had no vector of."""
    delta: Path | None
    """``None`` when it had all of them."""


@dataclass(frozen=True)
class EncodeReport:
    """What :func:`encode_catalogue` did."""

    num_known: int
    """Texts of the catalogue."""
    bundles: tuple[EncodedBundle, ...]
    seconds: float

    def rows(self) -> list[tuple[str, Any]]:
        """For people."""
        lines: list[tuple[str, Any]] = [("texts of the catalogue", f"{self.num_known:,}")]
        lines += [(one.bundle, f"{one.num_texts:,} texts encoded") for one in self.bundles]
        return [*lines, ("seconds", f"{self.seconds:.2f}")]

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)

    @property
    def num_encoded(self) -> int:
        """Texts that at least one bundle lacked."""
        return max((one.num_texts for one in self.bundles), default=0)


def encode_catalogue(
    settings: DriftlineSettings, *, as_of: datetime, progress: Progress | None = None
) -> EncodeReport:
    """Encode texts published until ``as_of`` that the champion, canary or shadows lack.

    Reads the catalogue anew, writes one delta a bundle, none where nothing is new.

    Raises:
        MissingArtefactError: no champion yet.
    """
    started = time.monotonic()
    workspace = Workspace.of(settings)
    champion = read_champion(workspace.bundles)
    if champion is None:
        raise MissingArtefactError(
            f"{settings.name} has no champion to encode texts for; "
            "run `driftline refresh arms CONFIG` first"
        )
    read_catalogue(settings)
    texts = known_texts(settings, as_of=as_of)
    traffic = read_traffic(workspace.bundles)
    canary = [] if traffic.canary is None else [traffic.canary.bundle.path]
    paths = [champion.path, *canary, *(shadow.path for shadow in traffic.shadows)]
    done = []
    for path in dict.fromkeys(paths):
        bundle = Bundle.open(path)
        fresh = new_vectors(bundle, known_vectors(bundle), texts, progress=progress)
        written, num = None, 0
        if fresh is not None:
            written, num = (
                VectorDelta.of(Scorer.of(bundle), fresh).write(bundle),
                len(fresh.text_id),
            )
        done.append(EncodedBundle(bundle.fingerprint, num, written))
    return EncodeReport(texts.num_rows, tuple(done), time.monotonic() - started)


def new_vectors(
    bundle: Bundle, known: VectorCache, texts: pa.Table, *, progress: Progress | None = None
) -> VectorCache | None:
    """Vectors of those texts that are not known, from a bundle's arms; ``None`` if there are none.

    Args:
        bundle: Whose tokeniser and arms encode.
        known: What is cached already.
        texts: From ``known_texts``, ascending by id.
        progress: Called with texts done and texts in all, in both roles.
    """
    new = texts.filter(pa.array(known.rows(texts["text_id"].to_numpy()) < 0))
    twin = twin_spec(bundle.student)
    if new.num_rows == 0 or twin is None:
        return None
    strings = serialise_table(new.select(list(bundle.contract["text_features"]))).to_pylist()
    tokenizer = Tokenizer(bundle.path / TOKENIZER)
    tokens = Ragged.of(tokenizer.encode(strings, max_tokens=twin.encoder.max_tokens))
    model = load_model(twin, bundle.path / ARMS, bundle.path / HEAD)
    page, ad = (
        encode_tokens(
            model, twin, tokens, role=role, progress=_shifted(progress, role, new.num_rows)
        )
        for role in (PAGE, AD)
    )
    logger.info("encoded %d new texts with the arms of %s", new.num_rows, bundle.fingerprint)
    return VectorCache(new["text_id"].to_numpy().astype(np.int64), page, ad)


def _shifted(progress: Progress | None, role: int, num_texts: int) -> Progress | None:
    """Progress over both roles, one after the other."""
    if progress is None:
        return None
    return lambda done, _: progress(role * num_texts + done, 2 * num_texts)
