"""Settings of models and their training. Import from ``settings``."""

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

from driftline.platform.data_settings import Settings


class ConfigEncoder(Settings):
    """A BERT encoder from a size: heads = H/64, feed-forward = 4H (papers.md S1.6)."""

    kind: Literal["config"] = "config"
    num_layers: PositiveInt = 2
    hidden_size: PositiveInt = 128
    max_tokens: PositiveInt = 64

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.hidden_size > 64 and self.hidden_size % 64:
            raise ValueError(
                f"hidden_size must be below 64 or a multiple of 64, got {self.hidden_size}"
            )
        return self

    @property
    def num_heads(self) -> int:
        """Attention heads, one for each 64 units."""
        return max(1, self.hidden_size // 64)


class CheckpointEncoder(Settings):
    """An encoder from a local ``transformers`` checkpoint folder, with its own tokeniser."""

    kind: Literal["checkpoint"]
    path: Path
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


class StageSettings(Settings):
    """One training stage (papers.md S0.9, S0.21)."""

    num_epochs: PositiveFloat = 1.0
    """Passes over the rows; fractions allowed."""
    batch_size: PositiveInt = 256
    learning_rate: PositiveFloat = 3e-4
    weight_decay: NonNegativeFloat = 0.01
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    clip_norm: PositiveFloat = 1.0
    evaluations_per_epoch: PositiveInt = 2
    patience: PositiveInt = 3
    """Evaluations without improvement before the stage stops; the best weights are kept."""
    max_rows: PositiveInt | None = None
    """Upper limit of rows, newest first."""
    autocast: Literal["off", "bfloat16"] = "off"


class ObjectiveSettings(Settings):
    """(1-a) CE + a t^2 KL(teacher || student), equation (1) (papers.md S0.16, A0.10)."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the frozen teacher's soft labels; 1 ignores the clicks."""
    temperature: PositiveFloat = 2.0
    tau_squared: bool = True
    """Multiply the soft loss by t^2, so that its gradient does not fade with t."""
    divergence: Literal["kl", "reverse_kl", "logit_mse"] = "kl"
    """``kl`` is KL(teacher || student); ``reverse_kl`` the paper's literal order of arguments."""


class SelfTrainingSettings(StageSettings):
    """The last round: learn from the student's own labels (papers.md S0.20)."""

    enabled: bool = True
    start: Literal["distilled", "finetuned"] = "distilled"
    """Weights the round starts from."""
    true_label_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the true click beside the student's own soft label."""

    @property
    def stage(self) -> StageSettings:
        """The training part alone."""
        return StageSettings(**{name: getattr(self, name) for name in StageSettings.model_fields})

    @property
    def objective(self) -> ObjectiveSettings:
        """The student's own labels take the teacher's place, as they are."""
        return ObjectiveSettings(alpha=1 - self.true_label_share, temperature=1.0)


class TeacherSettings(Settings):
    """One tower over every feature as ``name: value``; trained once (papers.md S0.5-S0.8)."""

    encoder: Encoder = ConfigEncoder()
    columns: tuple[str, ...] | None = None
    """Frame columns it reads beside the text, such as ``ad__ctr_24h``; all when not given."""
    negative_keep_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of non-clicks it learns from; ``labels.negative_keep_rate`` when not given."""
    mlm: StageSettings | None = StageSettings()
    supervised: StageSettings = StageSettings(num_epochs=2)


class HeadSettings(Settings):
    """The fusion MLP over both vectors and the tabular part (papers.md S0.12)."""

    hidden_sizes: tuple[PositiveInt, ...] = (512, 256)
    category_embedding_size: PositiveInt = 16
    num_bins: NonNegativeInt = 24
    """Pieces in which a number of the impression is also given; 0 for none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


class ArmsRefreshSettings(Settings):
    """The slow refresh: MLM, distillation, fine-tuning, self-training (papers.md S0.33).

    At its end the head is trained once more, over the finished vectors and all recent rows.
    """

    window_hours: PositiveInt = 168
    """Length of the window of recent rows for fine-tuning."""
    mlm: StageSettings | None = StageSettings()
    distil: StageSettings | None = StageSettings(num_epochs=2)
    objective: ObjectiveSettings = ObjectiveSettings()
    finetune: StageSettings = StageSettings()
    self_training: SelfTrainingSettings = SelfTrainingSettings()
    head: StageSettings = StageSettings(num_epochs=3, batch_size=1024, learning_rate=1e-3)
    """The head alone over the finished vectors: cheap, so it may see every row several times."""
    num_workers: NonNegativeInt = 0
    """Size of the worker group; 0 trains in a warm actor, right for one machine."""


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


class StudentSettings(Settings):
    """Twin arms and a head; the part that is kept fresh (papers.md S0.10-S0.14)."""

    encoder: Encoder = ConfigEncoder(max_tokens=32)
    tie_arms: bool = True
    """One backbone for both roles, told apart by a role marker (papers.md S0.14)."""
    head: HeadSettings = HeadSettings()
    arms_refresh: ArmsRefreshSettings = ArmsRefreshSettings()
    head_refresh: HeadRefreshSettings = HeadRefreshSettings()
