"""Encode, while serving, a text that the catalogue has and the bundle's cache lacks."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from driftline.features.texts import texts_path
from driftline.platform.bundle import ARMS, TOKENIZER, Bundle, VectorCache
from driftline.platform.examples import Ragged
from driftline.platform.inputs import frame_texts
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import TwinSpec
from driftline.platform.models.student import AD, PAGE, TextArms, TwinStudent
from driftline.platform.scorer import twin_spec
from driftline.platform.settings import DriftlineSettings
from driftline.platform.text import Tokenizer, serialise_row

logger = logging.getLogger(__name__)

MAX_REMEMBERED: Final = 10_000
MAX_AT_ONCE: Final = 64
"""Texts encoded for one request; the others are neutral in it, so that no request waits long."""

Vectors = tuple[NDArray[np.float32], NDArray[np.float32]]


class ArmsEncoder:
    """A bundle's arms on the texts of the catalogue. Used by one thread, refreshed by another."""

    def __init__(
        self,
        arms: TextArms,
        tokenizer: Tokenizer,
        *,
        spec: TwinSpec,
        names: tuple[str, ...],
        texts: Path,
    ) -> None:
        self._arms, self._tokenizer, self._spec = arms, tokenizer, spec
        self._names, self._path = names, texts
        self._texts = TextTable.empty()
        self._remembered: OrderedDict[int, Vectors] = OrderedDict()
        self._lock = threading.Lock()
        self.refresh()

    @classmethod
    def of(cls, bundle: Bundle, settings: DriftlineSettings) -> "ArmsEncoder | None":
        """The arms of a bundle; ``None`` for a market without text."""
        spec = twin_spec(bundle.student)
        if spec is None:
            return None
        student = build_model(spec, pretrained=False)
        assert isinstance(student, TwinStudent)
        state = load_file(bundle.path / ARMS)
        weights = {
            name.removeprefix("arms."): value
            for name, value in state.items()
            if name.startswith("arms.")
        }
        student.arms.load_state_dict(weights)
        return cls(
            student.arms.eval(),
            Tokenizer(bundle.path / TOKENIZER),
            spec=spec,
            names=tuple(bundle.contract["text_features"]),
            texts=texts_path(settings),
        )

    def refresh(self) -> None:
        """Read the table of texts again if it has changed."""
        if self._path.exists() and (stamp := self._path.stat().st_mtime_ns) != self._texts.stamp:
            self._texts = TextTable.read(self._path, stamp=stamp)

    def encode(self, text_ids: NDArray[np.int64]) -> VectorCache | None:
        """Vectors of those texts that the catalogue has; ``None`` if it has none of them.

        Args:
            text_ids: Ascending, without duplicates. ``[N]``.
        """
        with self._lock:
            new = [int(i) for i in text_ids if int(i) not in self._remembered][:MAX_AT_ONCE]
            self._remembered.update(self._encode_new(new))
            known = [int(i) for i in text_ids if int(i) in self._remembered]
            pages = [self._remembered[i][PAGE] for i in known]
            ads = [self._remembered[i][AD] for i in known]
            while len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        if not known:
            return None
        return VectorCache(np.array(known, np.int64), np.stack(pages), np.stack(ads))

    def _encode_new(self, text_ids: list[int]) -> dict[int, Vectors]:
        found = self._texts.rows(np.array(text_ids, np.int64), names=self._names)
        if not found:
            return {}
        texts = [serialise_row(row) for row in found.values()]
        encoder = self._spec.encoder
        tokens = Ragged.of(self._tokenizer.encode(texts, max_tokens=encoder.max_tokens))
        rows = np.arange(len(texts))
        vectors = []
        with torch.inference_mode():
            for role in (PAGE, AD):
                marker = role if self._spec.tie_arms else None
                ids, mask = frame_texts(encoder, tokens, rows, role=marker)
                vectors.append(self._arms.encode(ids, mask, role).float().numpy())
        logger.debug("encoded %d texts that the cache lacks", len(texts))
        return {i: (vectors[PAGE][n], vectors[AD][n]) for n, i in enumerate(found)}


@dataclass(frozen=True)
class TextTable:
    """All distinct texts, ascending by id."""

    text_id: NDArray[np.int64]
    fields: pa.Table
    stamp: int

    @classmethod
    def empty(cls) -> "TextTable":
        """No text yet."""
        return cls(np.empty(0, np.int64), pa.table({}), stamp=0)

    @classmethod
    def read(cls, path: Path, *, stamp: int) -> "TextTable":
        """Read ``texts.parquet``."""
        table = pq.read_table(path).sort_by("text_id")
        return cls(table["text_id"].to_numpy(), table.drop_columns(["text_id"]), stamp)

    def rows(
        self, text_ids: NDArray[np.int64], *, names: tuple[str, ...]
    ) -> dict[int, Mapping[str, Any]]:
        """The text fields of those ids that are there, by id."""
        if not len(self.text_id) or not len(text_ids):
            return {}
        at = np.minimum(np.searchsorted(self.text_id, text_ids), len(self.text_id) - 1)
        hit = self.text_id[at] == text_ids
        rows = self.fields.select(list(names)).take(pa.array(at[hit])).to_pylist()
        return dict(zip(text_ids[hit].tolist(), rows, strict=True))
