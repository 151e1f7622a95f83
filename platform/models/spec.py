"""What a model is made of, as JSON: enough to build it again without settings or checkpoints."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter

from driftline.platform.errors import SettingsError
from driftline.platform.settings import (
    CheckpointEncoder,
    ConfigEncoder,
    Encoder,
    HeadSettings,
    Settings,
)
from driftline.platform.text import SpecialTokens, checkpoint_specials

Dropout = Annotated[float, Field(ge=0, lt=1)]


class EncoderSpec(Settings):
    """One text encoder: a BERT of a size, or the architecture of a local checkpoint."""

    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    vocabulary_size: PositiveInt
    """Rows of the token table, specials included."""
    max_tokens: PositiveInt
    """Longest sequence, [CLS], role and [SEP] included; longer texts are cut."""
    dropout: Dropout = 0.1
    attention_dropout: Dropout = 0.0
    """Off, unlike BERT's 0.1: it keeps PyTorch's fused attention from being used."""
    specials: SpecialTokens = SpecialTokens()
    architecture: dict[str, Any] | None = None
    """``config.json`` of a checkpoint; a plain BERT when not given."""
    checkpoint: Path | None = None
    """Folder whose weights a new model starts from."""
    checkpoint_layers: tuple[PositiveInt, ...] | None = None
    """Which of the checkpoint's layers, counted from 1; all when not given."""


class HeadSpec(Settings):
    """The late-fusion MLP (papers.md S0.12)."""

    vector_size: NonNegativeInt
    """Width of the cached vectors; 0 when there is no text."""
    cardinalities: tuple[PositiveInt, ...] = ()
    """Rows of each category's table, row 0 (unknown) included."""
    num_numbers: NonNegativeInt = 0
    hidden_sizes: tuple[PositiveInt, ...] = (512, 256)
    category_embedding_size: PositiveInt = 16
    dropout: Dropout = 0.1
    unknown_share: Dropout = 0.02
    """Share of categories and of vectors replaced in training by row 0 and by the neutral vector,
    so that both are learned although the training log knows every product."""


class TeacherSpec(Settings):
    """One tower over the whole serialised row (papers.md S0.6)."""

    kind: Literal["teacher"] = "teacher"
    encoder: EncoderSpec


class SingleSpec(Settings):
    """The unfactorised student: the teacher's shape at the student's size (papers.md S0.30)."""

    kind: Literal["single"] = "single"
    encoder: EncoderSpec


class TwinSpec(Settings):
    """Twin arms and a head (papers.md S0.10-S0.14)."""

    kind: Literal["twin"] = "twin"
    encoder: EncoderSpec
    tie_arms: bool = True
    head: HeadSpec


class HeadOnlySpec(Settings):
    """The head of a twin student over cached vectors (papers.md A0.17)."""

    kind: Literal["head"] = "head"
    head: HeadSpec


class MlpSpec(Settings):
    """The baseline: three layers over hashed ids, words and standardised numbers (S0.34)."""

    kind: Literal["mlp"] = "mlp"
    cardinalities: tuple[PositiveInt, ...] = ()
    num_numbers: NonNegativeInt = 0
    num_word_buckets: NonNegativeInt = 16_384
    """Rows of the bag-of-words table; tokens are hashed into it. 0: no text."""
    num_product_buckets: NonNegativeInt = 16_384
    """Rows of the product table that ``page_id_hash`` and ``ad_id_hash`` point to. 0: no ids."""
    embedding_size: PositiveInt = 16
    hidden_sizes: tuple[PositiveInt, ...] = (512, 256)
    dropout: Dropout = 0.1
    specials: SpecialTokens = SpecialTokens()
    max_tokens: PositiveInt = 64


ModelSpec = Annotated[
    TeacherSpec | SingleSpec | TwinSpec | HeadOnlySpec | MlpSpec, Field(discriminator="kind")
]
MODEL_SPEC: TypeAdapter[ModelSpec] = TypeAdapter(ModelSpec)
TowerSpec = TeacherSpec | SingleSpec


def parse_spec(raw: Any) -> ModelSpec:
    """Read a spec from its JSON form (``spec.model_dump(mode="json")``)."""
    return MODEL_SPEC.validate_python(raw)


def encoder_spec(settings: Encoder, *, vocabulary_size: int | None = None) -> EncoderSpec:
    """The encoder that the settings ask for.

    Args:
        settings: A size, or a checkpoint folder.
        vocabulary_size: Size of our own tokeniser; ignored by a checkpoint, which brings its own.

    Raises:
        SettingsError: the checkpoint folder lacks ``config.json``, or has too few positions or
            layers.
    """
    if isinstance(settings, CheckpointEncoder):
        return _checkpoint_spec(settings)
    assert isinstance(settings, ConfigEncoder)
    if vocabulary_size is None:
        raise ValueError("encoder_spec needs vocabulary_size for an encoder of kind 'config'")
    return EncoderSpec(
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        vocabulary_size=vocabulary_size,
        max_tokens=settings.max_tokens,
    )


def head_spec(
    settings: HeadSettings, *, vector_size: int, cardinalities: tuple[int, ...], num_numbers: int
) -> HeadSpec:
    """The head that the settings ask for, over these inputs."""
    return HeadSpec(
        vector_size=vector_size,
        cardinalities=cardinalities,
        num_numbers=num_numbers,
        hidden_sizes=settings.hidden_sizes,
        category_embedding_size=settings.category_embedding_size,
        dropout=settings.dropout,
    )


def _checkpoint_spec(settings: CheckpointEncoder) -> EncoderSpec:
    if not (settings.path / "config.json").is_file():
        raise SettingsError(
            f"encoder checkpoint {settings.path} must be a local folder with config.json, "
            "model.safetensors and tokenizer files; nothing is downloaded"
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(settings.path, local_files_only=True)
    positions = getattr(config, "max_position_embeddings", settings.max_tokens)
    if settings.max_tokens > positions:
        raise SettingsError(
            f"encoder.max_tokens must be at most {positions} for {settings.path}, "
            f"got {settings.max_tokens}"
        )
    if settings.layers is not None:
        if max(settings.layers) > config.num_hidden_layers:
            raise SettingsError(
                f"encoder.layers must lie in 1..{config.num_hidden_layers}, the layers of "
                f"{settings.path}, got {max(settings.layers)}"
            )
        config.num_hidden_layers = len(settings.layers)
    specials = checkpoint_specials(settings.path)
    architecture = {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("transformers_version", "_name_or_path")
    }
    architecture["vocab_size"] = max(config.vocab_size, 1 + max(specials.ids))
    return EncoderSpec(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        vocabulary_size=architecture["vocab_size"],
        max_tokens=settings.max_tokens,
        specials=specials,
        architecture=architecture,
        checkpoint=settings.path,
        checkpoint_layers=settings.layers,
    )
