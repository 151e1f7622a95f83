"""Language models that tell their scores, for masked-language distillation.

Shape suffixes: B texts, T tokens, P positions asked for, H hidden width, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from driftline.platform.checkpoints import load_weights
from driftline.platform.distillation.anatomy import shape_of
from driftline.platform.distillation.capture import Capture
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.distillation.matches import Match
from driftline.platform.distillation.matching import Matching
from driftline.platform.errors import SettingsError
from driftline.platform.masked_language import encoders_of, roles_of
from driftline.platform.models.build import build_model
from driftline.platform.models.encoder import MaskedLanguageModel, TextEncoder
from driftline.platform.models.spec import ModelSpec, TwinSpec

AskedTexts = tuple[Tensor, Tensor, Tensor]
"""Tokens ``[B, T]``, mask of real tokens ``[B, T]``, flat places asked for ``[P]``."""


class TokenModel(MaskedLanguageModel):
    """Encoders under a prediction head that gives scores and inner tensors, not a loss."""

    def __init__(self, encoders: Sequence[TextEncoder], keys: Sequence[FeatureKey] = ()) -> None:
        super().__init__(encoders)
        self.keys = tuple(keys)

    def forward(  # type: ignore[override]
        self, parts: Sequence[AskedTexts]
    ) -> list[tuple[Tensor, dict[FeatureKey, Tensor]]]:
        """For each part, in the order of ``MaskedLanguageModel``: ``[P, V]`` and features."""
        found = []
        for number, (tokens_BT, mask_BT, place_P) in enumerate(parts):
            encoder = self.encoders[number % len(self.encoders)]
            assert isinstance(encoder, TextEncoder)
            with Capture(encoder, self.keys) as seen:
                states_PH = encoder(tokens_BT, mask_BT).flatten(0, 1)[place_P]
                features = seen.features
            found.append((self.predictor(states_PH, encoder.token_table), features))
        return found


def language_teacher(spec: ModelSpec, weights: Sequence[Path]) -> TokenModel:
    """A frozen language model with the prediction head that it was trained with.

    Args:
        spec: What it is.
        weights: Of its encoders and head: the output of an ``mlm`` stage with ``keep_head``.

    Raises:
        SettingsError: no file holds a head.
        BundleError: the weights belong to a model of another shape.
    """
    model = build_model(spec, pretrained=False)
    load_weights(model, *weights)
    teacher = TokenModel(encoders_of(model))
    if not load_head(teacher, weights):
        raise SettingsError(
            f"the language teacher {[str(path) for path in weights]} has no prediction head; train "
            "it in an mlm stage with keep_head"
        )
    return teacher.eval().requires_grad_(False)


def load_head(model: MaskedLanguageModel, weights: Sequence[Path]) -> bool:
    """Take over the prediction head of whichever files hold one; False where none does.

    Raises:
        BundleError: the head is of another shape.
    """
    found = False
    for path in weights:
        if has_head(path):
            holder = nn.Module()
            holder.predictor = model.predictor
            load_weights(holder, path)
            found = True
    return found


def has_head(path: Path) -> bool:
    """Whether a file of weights holds a prediction head."""
    with safe_open(path, framework="pt") as file:
        return any(name.startswith("predictor.") for name in file.keys())  # noqa: SIM118


def check_language_matches(
    student: ModelSpec, teacher: ModelSpec, matches: Sequence[Match]
) -> None:
    """Make sure that the encoders of two language models can be matched; builds no weights.

    Raises:
        SettingsError: a match is impossible.
    """
    with torch.device("meta"):
        encoders = [
            encoders_of(build_model(each, pretrained=False))[0] for each in (student, teacher)
        ]
    shapes = [shape_of(encoder, tokens="same") for encoder in encoders]
    try:
        with torch.random.fork_rng(devices=[]):
            Matching(tuple(matches), *shapes)
    except ValueError as error:
        raise SettingsError(f"{error}") from error


def check_language_teacher(student: ModelSpec, teacher: ModelSpec) -> None:
    """Make sure that a teacher's tokens are the student's.

    Raises:
        SettingsError: their vocabularies, special tokens or lengths differ, or one of them has no
            encoder.
    """
    try:
        (own, own_roles), (other, other_roles) = roles_of(student), roles_of(teacher)
    except ValueError as error:
        raise SettingsError(f"masked-language distillation: {error}") from error
    for what, mine, theirs in (
        ("vocabulary of", own.vocabulary_size, other.vocabulary_size),
        ("special tokens", own.specials.ids, other.specials.ids),
    ):
        if mine != theirs:
            raise SettingsError(
                "masked-language distillation compares token by token, so both models need one "
                f"tokeniser: the student has a {what} {mine}, the teacher {theirs}; train the "
                "teacher with the student's tokeniser, or distil clicks (soft labels) instead"
            )
    if own.max_tokens > other.max_tokens:
        raise SettingsError(
            f"the language teacher reads {other.max_tokens} tokens at most, the student "
            f"{own.max_tokens}; lower the student's max_tokens"
        )
    if isinstance(teacher, TwinSpec) and own_roles != other_roles:
        raise SettingsError(
            "a twin student's language model teaches a twin student of the same arms only, got "
            f"roles {other_roles} for {own_roles}; train a language model of one tower (kind: "
            "teacher) instead"
        )
