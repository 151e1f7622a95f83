"""Settings of models: encoders, teacher, head, student. Import from ``settings``."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from driftline.platform.data_settings import FeatureName, Settings
from driftline.platform.models.grid import named_size
from driftline.platform.objective_settings import ObjectiveSettings
from driftline.platform.strategy_settings import ArmsRefreshSettings
from driftline.platform.training_settings import SelfTrainingSettings, StageSettings


class ConfigEncoder(Settings):
    """A BERT encoder from a size: heads = H/64, feed-forward = 4H (papers.md S1.6).

    ``size: tiny`` (mini, small, medium, base) stands for the published depth and width (S1.9).
    """

    kind: Literal["config"] = "config"
    num_layers: PositiveInt = 2
    hidden_size: PositiveInt = 128
    heads: PositiveInt | None = None
    """Attention heads; one for each 64 units when not given. Narrow students of paper 004 have
    other ones (papers.md A4.8)."""
    max_tokens: PositiveInt = 64

    @model_validator(mode="before")
    @classmethod
    def _named_size(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or "size" not in raw:
            return raw
        name, given = raw["size"], {key: value for key, value in raw.items() if key != "size"}
        size = named_size(name)
        meant = {"num_layers": size.num_layers, "hidden_size": size.hidden_size}
        if meant.keys() & given.keys():
            raise ValueError(
                f"size {name!r} says {', '.join(meant)} already; give one or the other"
            )
        return given | meant

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.heads is not None:
            if self.hidden_size % self.heads:
                raise ValueError(
                    f"heads must divide hidden_size {self.hidden_size}, got {self.heads}"
                )
        elif self.hidden_size > 64 and self.hidden_size % 64:
            raise ValueError(
                f"hidden_size must be below 64 or a multiple of 64, got {self.hidden_size}; "
                "for another width say how many heads it has"
            )
        return self

    @property
    def num_heads(self) -> int:
        """Attention heads, as given or one for each 64 units."""
        return self.heads or max(1, self.hidden_size // 64)


class CheckpointEncoder(Settings):
    """An encoder from a local ``transformers`` checkpoint folder, with its own tokeniser."""

    kind: Literal["checkpoint"]
    path: Path
    layers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """Which of its layers the encoder is made of, counted from 1: a student of half the depth takes
    1, 3, 5, 8, 10, 12 (papers.md S3.3). All when not given."""
    max_tokens: PositiveInt = 64


def _encoder_kind(raw: Any) -> str:
    """``config`` may be left out."""
    kind = raw.get("kind", "config") if isinstance(raw, dict) else getattr(raw, "kind", "config")
    return str(kind)


Encoder = Annotated[
    Annotated[ConfigEncoder, Tag("config")] | Annotated[CheckpointEncoder, Tag("checkpoint")],
    Discriminator(_encoder_kind),
]


class TokenizerSettings(Settings):
    """SentencePiece BPE with byte fallback (papers.md S0.26, A0.13)."""

    vocabulary_size: Annotated[int, Field(ge=300)] = 32_000
    max_sentences: PositiveInt = 200_000
    """Sentences sampled for training the tokeniser."""


class TeacherMember(Settings):
    """One more teacher beside the first; the labels are then a mean (papers.md C14, S2.12).

    What is not given is as in the first teacher. Each is trained once and frozen as that one is.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,40}$")]
    """Its folder below ``teachers/`` in the workspace."""
    seed: NonNegativeInt | None = None
    """Of its weights, the order of its rows and the draw of its non-clicks."""
    window: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0, 1)
    """Part of the stale window that it learns from: ``[0.5, 1]`` is the newer half."""
    encoder: Encoder | None = None
    columns: tuple[str, ...] | None = None
    """Frame columns it reads beside the text."""
    negative_keep_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    label: FeatureName | None = None
    """Another outcome than the click, a feature of kind ``label``, that it learns. It then speaks
    of that alone and is not part of the mean."""
    mlm: StageSettings | Literal["same"] | None = "same"
    """Masked-language training before the clicks; none starts from the encoder as it is."""
    supervised: StageSettings | None = None

    @model_validator(mode="after")
    def _window_has_a_length(self) -> Self:
        start, end = self.window
        if not start < end:
            raise ValueError(f"window must start before it ends, got {[start, end]}")
        return self


class TeacherFeatureSettings(Settings):
    """How the teacher's inner tensors are kept for matches (papers.md C9)."""

    dtype: Literal["float16", "float32"] = "float16"
    max_gigabytes: PositiveFloat = 20.0
    """Limit of one store in 10^9 bytes; a pass that would need more is refused before it begins."""


class TeacherSettings(Settings):
    """One tower over every feature as ``name: value``; trained once (papers.md S0.5-S0.8)."""

    encoder: Encoder = ConfigEncoder()
    columns: tuple[str, ...] | None = None
    """Frame columns it reads beside the text, such as ``ad__ctr_24h``; all when not given."""
    negative_keep_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of non-clicks it learns from; ``labels.negative_keep_rate`` when not given."""
    mlm: StageSettings | None = StageSettings()
    supervised: StageSettings = StageSettings(num_epochs=2)
    ensemble: tuple[TeacherMember, ...] = ()
    """More teachers; the soft labels are the mean of all their logits, this one's included."""
    features: TeacherFeatureSettings = TeacherFeatureSettings()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [member.name for member in self.ensemble]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"names of teachers must differ, {', '.join(twice)} stands twice")
        return self


class HeadSettings(Settings):
    """The fusion MLP over both vectors and the tabular part (papers.md S0.12)."""

    hidden_sizes: tuple[PositiveInt, ...] = (512, 256)
    category_embedding_size: PositiveInt = 16
    num_bins: NonNegativeInt = 24
    """Pieces in which a number of the impression is also given; 0 for none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


class HeadRefreshSettings(Settings):
    """The fast refresh: the fusion MLP alone, on cached vectors (papers.md A0.17)."""

    window_hours: PositiveInt = 24
    """Length of the training window."""
    replay_share: Annotated[float, Field(ge=0)] = 1.0
    """Rows drawn from before the window, as a multiple of the window's rows."""
    replay_hours: PositiveInt = 168
    """How far before the window those rows may lie."""
    warm_start: bool = True
    """Continue from the champion's head; else start from the arms refresh's head."""
    objective: ObjectiveSettings = ObjectiveSettings(alpha=0.1)
    finetune: StageSettings = StageSettings(learning_rate=1e-3)
    self_training: SelfTrainingSettings = SelfTrainingSettings(enabled=False)
    num_workers: NonNegativeInt = 0
    """0 trains in a warm actor without a worker group (Ray Train's local mode)."""

    @model_validator(mode="after")
    def _learns_clicks(self) -> Self:
        self.objective.check_task("clicks")
        if self.objective.matches:
            raise ValueError(
                "objective.matches: a head over cached vectors has no layers to match; put matches "
                "into student.arms_refresh.objective"
            )
        return self


class OutcomeSettings(Settings):
    """One more outcome that a student learns beside the click (papers.md C14)."""

    label: FeatureName
    """A feature of kind ``label``."""
    teacher: str | None = None
    """A member of ``teacher.ensemble`` that learned this label, for soft labels; without one the
    outcome is learned from itself alone."""
    objective: ObjectiveSettings | None = None
    """How soft labels count; the defaults when there is a teacher. Needs one."""

    @model_validator(mode="after")
    def _soft_labels_need_a_teacher(self) -> Self:
        if self.objective is not None and self.teacher is None:
            raise ValueError(
                f"outcome {self.label!r} has an objective but no teacher; name a member of "
                "teacher.ensemble that learned the label, or leave the objective out"
            )
        if self.objective is not None:
            self.objective.check_task("clicks")
        return self


class MultiTaskSettings(Settings):
    """A student of several outcomes: shared arms and fusion layers, an output layer for each."""

    outcomes: Annotated[tuple[OutcomeSettings, ...], Field(min_length=1)]
    """Beside the click, whose objective is that of the arms refresh."""
    tau: NonNegativeFloat = 1.0
    """A batch is of one outcome, drawn in proportion to (number of its rows)^tau: 1 by size, 0 all
    alike (papers.md section 3.2)."""
    stage: StageSettings = StageSettings()

    @model_validator(mode="after")
    def _outcomes_differ(self) -> Self:
        names = ["click", *(outcome.label for outcome in self.outcomes)]
        if len(set(names)) < len(names):
            raise ValueError(f"outcomes must differ from each other and from 'click', got {names}")
        return self


class StudentSettings(Settings):
    """Twin arms and a head; the part that is kept fresh (papers.md S0.10-S0.14)."""

    encoder: Encoder = ConfigEncoder(max_tokens=32)
    vocabulary_size: Annotated[int, Field(ge=300)] | None = None
    """Pieces of a small vocabulary of the student's own (papers.md S4.1), learned from the same
    corpus; the teacher's tokeniser when not given."""
    tie_arms: bool = True
    """One backbone for both roles, told apart by a role marker (papers.md S0.14)."""
    head: HeadSettings = HeadSettings()
    arms_refresh: ArmsRefreshSettings = ArmsRefreshSettings()
    head_refresh: HeadRefreshSettings = HeadRefreshSettings()
    tasks: MultiTaskSettings | None = None
    """What `driftline tasks` teaches."""

    @model_validator(mode="after")
    def _one_vocabulary(self) -> Self:
        if self.vocabulary_size is not None and isinstance(self.encoder, CheckpointEncoder):
            raise ValueError(
                f"vocabulary_size {self.vocabulary_size} is for an encoder of kind 'config'; the "
                f"checkpoint {self.encoder.path} brings its own tokeniser; leave one of them out"
            )
        return self
