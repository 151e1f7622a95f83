"""What one frozen teacher said about each input it was ever asked about (papers.md C9).

``FOLDER/HOUR.parquet`` holds its logits, ``FOLDER/features`` the inner tensors that matches ask
for; both come from one forward pass, and no input goes through the teacher twice. A killed call
loses little and, called again, gives the same bits: a batch is made of new inputs of one hour, in
an order of their own.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from driftline.platform.artefacts import hash_value
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.inference import load_model
from driftline.platform.label_store import LabelStore
from driftline.platform.models.spec import TowerSpec
from driftline.platform.settings import TeacherFeatureSettings
from driftline.platform.teacher_features import MANIFEST, TeacherFeatures
from driftline.platform.teacher_pass import PassBatch, TeacherPass

ROWS_PER_PASS: Final = 8_192
"""Inputs that are lost at most when a pass is killed."""

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Inputs:
    """Token sequences for a teacher, and when each was met."""

    hours: NDArray[np.int64]
    """Hours since 1970. ``[N]``"""
    tokens: Sequence[NDArray[np.int32]]
    """Without [CLS] and the last [SEP]. ``[N]``"""

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def hashes(self) -> NDArray[np.int64]:
        """What an input is known by. ``[N]``."""
        return np.fromiter(map(_hash_tokens, self.tokens), np.int64, len(self))

    def take(self, places: Places) -> list[NDArray[np.int32]]:
        """Some of the sequences."""
        return [self.tokens[place] for place in places]

    def chunks(self, wanted: NDArray[np.bool_]) -> Iterator[Places]:
        """Distinct inputs among the wanted, by hour and hash, at most ``ROWS_PER_PASS`` at once.

        An input stands in the hour in which it first comes. What is left after some of the chunks
        were done is cut into the same other chunks.
        """
        places = np.flatnonzero(wanted)
        _, first = np.unique(self.hashes[places], return_index=True)
        fresh = places[first]  # by hash
        fresh = fresh[np.argsort(self.hours[fresh], kind="stable")]
        for hour in np.split(fresh, np.flatnonzero(np.diff(self.hours[fresh])) + 1):
            for start in range(0, len(hour), ROWS_PER_PASS):
                yield hour[start : start + ROWS_PER_PASS]


@dataclass(frozen=True)
class Labelled:
    """What teachers say about some rows."""

    logits: NDArray[np.float32]
    """``[B, 2]``"""
    teacher_rows: NDArray[np.int64] | None
    """Rows of ``TeacherFeatures``; None where no tensor was asked for. ``[B]``"""


@dataclass
class TeacherMemory:
    """Answers from the files, and asks the teacher what it does not know yet."""

    folder: Path
    teacher: str
    """Hash of the teacher."""
    spec: TowerSpec
    weights: Path
    keys: tuple[FeatureKey, ...] = ()
    """Inner tensors to keep of each pass."""
    limits: TeacherFeatureSettings = field(default_factory=TeacherFeatureSettings)
    num_passes: int = 0
    """Inputs that went through the teacher in this process."""

    @cached_property
    def labels(self) -> LabelStore:
        """Its logits."""
        store = LabelStore(self.folder)
        store.refresh()
        return store

    @cached_property
    def features(self) -> TeacherFeatures | None:
        """Its inner tensors; the oldest store that holds at least the wanted ones.

        So the choice stays the same when stores for other tensors come beside it.

        Raises:
            ValueError: the teacher has no such tensor.
            ContractError: the store that lies there is of another teacher or type.
        """
        if not self.keys:
            return None
        root, dtype = self.folder / "features", self.limits.dtype
        manifests = root.glob(f"{dtype}-*/{MANIFEST}")
        for manifest in sorted(manifests, key=lambda path: (path.stat().st_mtime_ns, path)):
            found = TeacherFeatures.open(manifest.parent, teacher=self.teacher, dtype=dtype)
            if set(self.keys) <= set(found.keys):
                return found
        name = hash_value(sorted(map(str, self.keys)))[:12]
        shapes = TeacherPass(self._model, self.spec, self.keys).shapes
        return TeacherFeatures.create(
            root / f"{dtype}-{name}", teacher=self.teacher, shapes=shapes, dtype=dtype
        )

    @cached_property
    def _model(self) -> nn.Module:
        return load_model(self.spec, self.weights)

    @cached_property
    def _forward(self) -> TeacherPass:
        keys = self.features.keys if self.features is not None else ()
        return TeacherPass(self._model, self.spec, keys)

    def check_room(self, parts: Iterator[Inputs]) -> None:
        """Refuse inputs whose features would not fit, before the first goes through the teacher.

        Raises:
            ResourceError: the features would take more than ``limits.max_gigabytes``.
        """
        if self.features is None:
            return
        new: dict[int, int] = {}
        for inputs in parts:
            unknown = np.flatnonzero(self.features.rows_of(inputs.hashes) < 0)
            lengths = self._forward.lengths(inputs.take(unknown))
            new.update(zip(inputs.hashes[unknown].tolist(), lengths.tolist(), strict=True))
        needed = np.fromiter(new.values(), np.int64, len(new))
        self.features.check_room(needed, max_gigabytes=self.limits.max_gigabytes)

    def answer(self, inputs: Inputs) -> Labelled:
        """Logits, and rows of the features, of every input; the teacher is asked if need be."""
        if self._missing(inputs).any():
            with self.labels.exclusive():
                if self.features is not None:
                    self.features.refresh()
                    self._recover(inputs)
                self._ask(inputs)
        rows = None if self.features is None else self.features.rows_of(inputs.hashes)
        return Labelled(self.labels.find(inputs.hashes), rows)

    def _missing(self, inputs: Inputs) -> NDArray[np.bool_]:
        missing: NDArray[np.bool_] = np.isnan(self.labels.find(inputs.hashes)[:, 0])
        if self.features is not None:
            missing |= self.features.rows_of(inputs.hashes) < 0
        return missing

    def _recover(self, inputs: Inputs) -> None:
        """Take over the logits of a segment after which a call was killed."""
        assert self.features is not None
        known = self.features.logits(self.features.rows_of(inputs.hashes))
        for chunk in inputs.chunks(~np.isnan(known[:, 0])):
            self._remember(inputs, chunk, known[chunk])

    def _ask(self, inputs: Inputs) -> None:
        """Send what is missing through the teacher, as many chunks at once as fit a segment."""
        waiting: list[Places] = []
        for chunk in inputs.chunks(self._missing(inputs)):
            if waiting and sum(map(len, waiting)) + len(chunk) > ROWS_PER_PASS:
                self._pass(inputs, waiting)
                waiting = []
            waiting.append(chunk)
        if waiting:
            self._pass(inputs, waiting)

    def _pass(self, inputs: Inputs, chunks: Sequence[Places]) -> None:
        places = np.concatenate(chunks)
        logits = np.empty((len(places), 2), np.float32)
        self.num_passes += len(places)
        if self.features is None:
            for at, batch in self._batches(inputs, chunks):
                logits[at] = batch.logits
        else:
            lengths = self._forward.lengths(inputs.take(places))
            with self.features.segment(inputs.hashes[places], lengths) as segment:
                for at, batch in self._batches(inputs, chunks):
                    logits[at] = batch.logits
                    segment.write(at, batch.logits, batch.features)
        parts = np.split(logits, np.cumsum([len(chunk) for chunk in chunks])[:-1])
        for chunk, part in zip(chunks, parts, strict=True):
            self._remember(inputs, chunk, part)

    def _batches(
        self, inputs: Inputs, chunks: Sequence[Places]
    ) -> Iterator[tuple[Places, PassBatch]]:
        """Each chunk is batched for itself; places count through all of them."""
        before = 0
        for chunk in chunks:
            for batch in self._forward.run(inputs.take(chunk)):
                yield before + batch.places, batch
            before += len(chunk)

    def _remember(self, inputs: Inputs, chunk: Places, logits: NDArray[np.float32]) -> None:
        """Write labels of one hour; what has one, keeps it."""
        new = np.isnan(self.labels.find(inputs.hashes[chunk])[:, 0])
        if new.any():
            hour = int(inputs.hours[chunk[0]])
            self.labels.add(hour, inputs.hashes[chunk][new], logits[new])


def _hash_tokens(tokens: NDArray[np.int32]) -> int:
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
