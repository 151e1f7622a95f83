"""The frozen teacher of a training stage: what it is, and whether a student can be matched with it.

Everything is checked here, before the first step.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from driftline.platform.artefacts import hash_file
from driftline.platform.distillation.anatomy import shape_of
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.distillation.matches import Match, ModelShape
from driftline.platform.distillation.matching import Matching
from driftline.platform.distillation.row_matching import RowMatching
from driftline.platform.errors import ContractError, SettingsError
from driftline.platform.inference import load_model
from driftline.platform.inputs import ClickInputs, TowerInputs
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import (
    HeadOnlySpec,
    MlpSpec,
    ModelSpec,
    SingleSpec,
    TeacherSpec,
    TwinSpec,
    parse_spec,
)
from driftline.platform.settings import ObjectiveSettings
from driftline.platform.teacher_features import TeacherFeatures

NUM_TRIED: Final = 2  # rows that a model is tried on before training
MAX_COMPARED: Final = 10_000
LOGIT_TOLERANCE: Final = 0.01  # the same teacher in another precision or batch


@dataclass(frozen=True)
class FrozenTeacher:
    """A teacher, by its shape; with weights also live.

    Without weights it is known through its soft labels and stored features only.
    """

    model: ModelSpec
    weights: tuple[Path, ...] = ()

    def identity(self) -> dict[str, Any]:
        """What decides its answers."""
        return {
            "model": self.model.model_dump(mode="json"),
            "weights": [hash_file(path) for path in self.weights],
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values with absolute paths; inverse of ``from_json``."""
        return {
            "model": self.model.model_dump(mode="json"),
            "weights": [str(path.absolute()) for path in self.weights],
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "FrozenTeacher":
        """Read what ``to_json`` gave."""
        return cls(parse_spec(raw["model"]), tuple(Path(path) for path in raw["weights"]))


def token_view(spec: ModelSpec) -> str:
    """How a model cuts a row into tokens; models that can be matched by token say the same."""
    match spec:
        case TeacherSpec() | SingleSpec():
            encoder = spec.encoder
            return (
                f"rows of {encoder.max_tokens} tokens at most from {encoder.vocabulary_size} "
                f"pieces, specials {','.join(map(str, encoder.specials.ids))}"
            )
        case TwinSpec():
            return "two product texts a row"
        case HeadOnlySpec() | MlpSpec():
            return "no sequence"


def shape_of_spec(spec: ModelSpec) -> ModelShape:
    """Shape of a model that need not exist; built without memory."""
    with torch.device("meta"):
        model = build_model(spec, pretrained=False)
    return shape_of(model, tokens=token_view(spec))


def teacher_keys(
    matches: Iterable[Match],
    student: ModelSpec,
    teacher: ModelSpec,
    *,
    tokens: tuple[str, str] | None = None,
) -> tuple[FeatureKey, ...]:
    """Tensors of the teacher that a student's matches need, to be written beside its labels.

    Args:
        matches: Of an objective.
        student: What it is.
        teacher: What it is.
        tokens: Names of the ways in which student and teacher cut rows into tokens, where more is
            known than ``token_view`` says: equal names must mean equal token ids.

    Raises:
        ValueError: a match is impossible between the two; or it names a module whose width only a
            run can tell.
    """
    shapes = [shape_of_spec(student), shape_of_spec(teacher)]
    if tokens is not None:
        shapes = [replace(shape, tokens=name) for shape, name in zip(shapes, tokens, strict=True)]
    with torch.random.fork_rng(devices=[]):
        return Matching(tuple(matches), *shapes).teacher_keys


def match_rows(
    student: nn.Module,
    spec: ModelSpec,
    objective: ObjectiveSettings,
    *,
    teacher: FrozenTeacher,
    features: Path | None,
    label_teacher: str | None,
    inputs: tuple[ClickInputs, ...],
    device: torch.device,
) -> RowMatching:
    """A click student beside its teacher.

    Args:
        student: On its device.
        spec: What it is.
        objective: With its matches.
        teacher: Live if it has weights and there are no features.
        features: Folder of its stored tensors.
        label_teacher: Hash of the teacher that gave the soft labels, where that is known.
        inputs: Training rows first, then validation rows if any.
        device: Where the student is.

    Raises:
        SettingsError: a match is impossible; the message names the alternatives.
        ContractError: the store is of another teacher than the labels, lacks a tensor, or holds
            them for other tokens.
    """
    rows = np.arange(min(NUM_TRIED, inputs[0].num_rows))
    arguments = inputs[0].arguments(rows, device=device)
    store = None if features is None else TeacherFeatures.open(features, teacher=label_teacher)
    live = load_model(teacher.model, *teacher.weights) if store is None else None
    if live is not None and token_view(spec) != token_view(teacher.model):
        raise SettingsError(
            f"a live teacher reads the student's own input, but the student reads "
            f"{token_view(spec)} and the teacher {token_view(teacher.model)}; write the teacher's "
            "soft labels and features first, and give their folder"
        )
    try:
        own = shape_of(student, tokens=token_view(spec), run=lambda: student(*arguments))
        if store is not None:
            other = _stored_shape(teacher.model, store)
        else:
            assert live is not None
            other = shape_of(live, tokens=token_view(teacher.model), run=lambda: live(*arguments))
        matching = Matching(objective.matches, own, other)
        matching.projections.to(device)
        found = RowMatching(student, matching, store=store, teacher=live)
    except ValueError as error:
        raise SettingsError(f"{error}") from error
    if store is not None:
        for part in inputs:
            _check_store(store, matching, part, labels_known=label_teacher is not None)
        _check_some(store, inputs[0])
    return found


def fingerprint(store: TeacherFeatures, rows: NDArray[np.int64]) -> str:
    """What ``TeacherFeatures.fingerprint`` gives.

    Raises:
        ContractError: the store does not hold so many rows.
    """
    if (largest := int(rows.max(initial=-1))) >= len(store):
        raise ContractError(
            f"the examples point to row {largest} of the teacher features {store.folder}, which "
            f"hold {len(store)}; they belong to another store"
        )
    return store.fingerprint(rows)


def _stored_shape(spec: ModelSpec, store: TeacherFeatures) -> ModelShape:
    """Of the teacher's spec, with the widths of modules as they were stored."""
    shape = shape_of_spec(spec)
    stored = {
        str(key.place): int(dims.dims[-1])
        for key, dims in store.shapes.items()
        if key.kind == "module" and dims.dims
    }
    return replace(shape, modules=stored)


def _check_some(store: TeacherFeatures, inputs: ClickInputs) -> None:
    if inputs.teacher_rows is None or not (inputs.teacher_rows >= 0).any():
        raise ContractError(
            f"no row of the examples has features in {store.folder} (column teacher_rows); label "
            "the rows with the matches' tensors first, or leave out the matches"
        )


def _check_store(
    store: TeacherFeatures, matching: Matching, inputs: ClickInputs, *, labels_known: bool
) -> None:
    missing = [str(key) for key in matching.teacher_keys if key not in store.keys]
    if missing:
        raise ContractError(
            f"teacher features {store.folder} lack {', '.join(missing)}, which the matches need; "
            "label again with these tensors"
        )
    if inputs.teacher_rows is None:
        return
    rows = np.flatnonzero(inputs.teacher_rows >= 0)
    if not labels_known:
        _check_labels(store, inputs, rows)
    if isinstance(inputs, TowerInputs) and matching.by_token:
        own, theirs = inputs.num_tokens(rows), store.lengths(inputs.teacher_rows[rows])
        assert own is not None
        if (differs := np.flatnonzero(own != theirs)).size:
            first = differs[0]
            raise ContractError(
                f"{' and '.join(matching.by_token)} must read the same tokens on both sides, but "
                f"row {rows[first]} has {own[first]} for the student and {theirs[first]} in the "
                f"teacher features {store.folder}: they were not cut alike; give both the same "
                "tokeniser and max_tokens, or match whole rows (pkd, module on pooled vectors)"
            )


def _check_labels(store: TeacherFeatures, inputs: ClickInputs, rows: NDArray[np.int64]) -> None:
    """Without a name for the labels' teacher, its answers tell whether it is the store's."""
    if inputs.teacher_logits is None or inputs.teacher_rows is None:
        return
    rows = rows[:MAX_COMPARED]
    labels, stored = inputs.teacher_logits[rows], store.logits(inputs.teacher_rows[rows])
    known = ~(np.isnan(labels) | np.isnan(stored)).any(axis=1)
    gap = np.abs(_margin(labels[known]) - _margin(stored[known])).max(initial=0.0)
    if gap > LOGIT_TOLERANCE:
        raise ContractError(
            f"the soft labels are of another teacher than the features {store.folder}: their "
            f"margins differ by up to {gap:.3g}; take both from one teacher, or, where that is "
            "meant (labels of several teachers), say so by label_teacher"
        )


def _margin(logits_B2: NDArray[np.float32]) -> NDArray[np.float32]:
    return logits_B2[:, 1] - logits_B2[:, 0]
