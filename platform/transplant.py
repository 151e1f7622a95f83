"""Surgery on weights: layers and embeddings of one encoder become those of another.

Works on safetensors files by the names of their tensors, one tensor in memory at a time until the
result is written; nothing is built and nothing is trained. A *donor* is an encoder in a file, ours
(``encoder.*``, ``arms.backbones.N.*``) or a ``transformers`` checkpoint's.

Shape suffixes: H hidden width, R rows of a table.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from driftline.platform.checkpoints import save_weights
from driftline.platform.errors import BundleError, SettingsError
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import EncoderSpec, ModelSpec, SingleSpec, TeacherSpec, TwinSpec

TOKENS: Final = "embeddings.word_embeddings.weight"
POSITIONS: Final = "embeddings.position_embeddings.weight"
LAYER: Final = re.compile(r"^((?:\w+\.)*layers?)\.(\d+)\.(.+)$")
ROLE_MARKERS: Final = 2  # rows that a checkpoint's token table grows by
NEW_ROW_STD: Final = 0.02


@dataclass(frozen=True)
class Donor:
    """One encoder in safetensors files."""

    source: str
    """What a message calls it."""
    prefix: str
    """What stands before its tensors' own names."""
    shapes: Mapping[str, tuple[int, ...]]
    """By own name, such as ``encoder.layer.3.output.dense.weight``."""
    files: Mapping[str, Path]
    """Where each tensor lies, by own name."""
    num_heads: int | None = None
    """Attention heads; None where the file does not tell."""

    @property
    def hidden_size(self) -> int:
        """Width of its vectors."""
        return self.shapes[TOKENS][1]

    @property
    def vocabulary_size(self) -> int:
        """Rows of its token table."""
        return self.shapes[TOKENS][0]

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        found = (LAYER.match(name) for name in self.shapes)
        return 1 + max((int(match[2]) for match in found if match), default=-1)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, by own name."""
        with safe_open(self.files[name], framework="pt") as opened:
            value: Tensor = opened.get_tensor(self.prefix + name)
        return value


def open_donors(source: Path) -> tuple[Donor, ...]:
    """All encoders in a weights file, or in a ``transformers`` checkpoint folder.

    Raises:
        SettingsError: there is no such file or folder, or no BERT-like encoder in it.
        BundleError: a file is no safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    for path in _weight_files(source):
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
                    files[name] = path
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{path} cannot be read as safetensors: {error}") from error
    config = json.loads((source / "config.json").read_text()) if source.is_dir() else {}
    prefixes = sorted(name.removesuffix(TOKENS) for name in shapes if name.endswith(TOKENS))
    if not prefixes:
        raise SettingsError(
            f"{source} holds no encoder: none of its {len(shapes)} tensors is named *{TOKENS}"
        )
    return tuple(
        Donor(
            source=str(source),
            prefix=prefix,
            shapes={n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)},
            files={n.removeprefix(prefix): f for n, f in files.items() if n.startswith(prefix)},
            num_heads=config.get("num_attention_heads"),
        )
        for prefix in prefixes
    )


def _weight_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not (source / "config.json").is_file():
        raise SettingsError(
            f"{source} must be a weights file, or a folder with config.json and safetensors; "
            "nothing is downloaded"
        )
    index = source / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [name for name in names if not (source / name).is_file()]
    if missing:
        raise SettingsError(
            f"{source} lacks {', '.join(missing)}; a pickled checkpoint (pytorch_model.bin) is "
            "never loaded, save it again with safe_serialization=True"
        )
    return [source / name for name in names]


# --- checks -------------------------------------------------------------------------------


def encoder_of(spec: ModelSpec) -> EncoderSpec:
    """The encoder that an initialiser fills.

    Raises:
        SettingsError: the model has none.
    """
    if isinstance(spec, TeacherSpec | SingleSpec | TwinSpec):
        return spec.encoder
    raise SettingsError(
        f"this init needs a student with an encoder, kind {spec.kind!r} has none; use init: random "
        "or supervised"
    )


def of_depth(spec: ModelSpec, num_layers: int) -> ModelSpec:
    """The same model with another number of layers.

    Raises:
        SettingsError: it has no encoder, or its encoder is a checkpoint of a fixed depth.
    """
    encoder = encoder_of(spec)
    if encoder.architecture is not None:
        raise SettingsError(
            "this init pre-trains a model of another depth, which needs encoder.kind: config; a "
            "checkpoint encoder starts from its own weights, with `layers` from some of its layers"
        )
    changed = encoder.model_copy(update={"num_layers": num_layers})
    return spec.model_copy(update={"encoder": changed})


def check_layers(layers: Sequence[int], *, num_student: int, num_donor: int, source: str) -> None:
    """Make sure that picked layers, counted from 1, exist and are as many as the student has.

    Raises:
        SettingsError: they do not, or are not.
    """
    if len(layers) != num_student:
        raise SettingsError(
            f"init: layers must name one layer of {source} for each of the student's {num_student} "
            f"layers, got {len(layers)}: {list(layers)}"
        )
    outside = [layer for layer in layers if not 1 <= layer <= num_donor]
    if outside:
        raise SettingsError(
            f"init: layers must lie in 1..{num_donor}, the layers of {source}, got {outside[0]}"
        )


def check_widths(
    student: EncoderSpec,
    *,
    hidden_size: int,
    vocabulary_size: int,
    num_heads: int | None,
    source: str,
) -> None:
    """Make sure that tensors of another encoder fit, and mean the same.

    Raises:
        SettingsError: it has another width, other heads or another vocabulary.
    """
    if hidden_size != student.hidden_size:
        raise SettingsError(
            f"init: {source} has hidden_size {hidden_size}, the student {student.hidden_size}; "
            "layers can only be taken from an encoder of the same width"
        )
    if num_heads not in (None, student.num_heads):
        raise SettingsError(
            f"init: {source} has {num_heads} attention heads, the student {student.num_heads}; "
            "its matrices would be cut into other heads"
        )
    grown = ROLE_MARKERS if student.architecture is not None else 0
    if not student.vocabulary_size - grown <= vocabulary_size <= student.vocabulary_size:
        raise SettingsError(
            f"init: {source} has a vocabulary of {vocabulary_size} tokens, the student of "
            f"{student.vocabulary_size}; token ids must mean the same in both"
        )


# --- surgery ------------------------------------------------------------------------------


def transplant(
    destination: Path,
    spec: ModelSpec,
    donors: Sequence[Donor],
    *,
    layers: Sequence[int] | None = None,
    tokens_only: bool = False,
    seed: int = 0,
) -> None:
    """Write the encoders of a model, cut from donors; whole or not at all.

    Untied arms take one donor each, or all the same one.

    Args:
        destination: The weights, named as in the model.
        spec: The model to be filled.
        donors: Encoders of the same width and vocabulary.
        layers: The donor's layer for each of the model's, counted from 1; the bottom ones when not
            given (papers.md S1.13c, A1.6: truncation takes embeddings and bottom layers).
        tokens_only: Only the word-piece embeddings (papers.md S1.13b).
        seed: Of rows that a donor's table lacks, as for role markers of a checkpoint.

    Raises:
        SettingsError: widths, vocabularies or layers do not fit.
    """
    encoder = encoder_of(spec)
    for donor in donors:
        check_donor(encoder, donor, layers=layers, tokens_only=tokens_only)
    recipients = _recipients(spec)
    if len(donors) not in (1, len(recipients)):
        raise SettingsError(
            f"init: {donors[0].source} holds {len(donors)} encoders, the student has "
            f"{len(recipients)}; give one, or as many"
        )
    found: dict[str, Tensor] = {}
    for number, (prefix, shapes) in enumerate(recipients.items()):
        donor = donors[number % len(donors)]
        for name, shape in shapes.items():
            if tokens_only and name != TOKENS:
                continue
            value = donor.tensor(_donor_name(name, layers))
            found[prefix + name] = _fit(value, shape, name=name, donor=donor, seed=seed)
    save_weights(destination, found)


def check_donor(
    encoder: EncoderSpec,
    donor: Donor,
    *,
    layers: Sequence[int] | None = None,
    tokens_only: bool = False,
) -> None:
    """Make sure that a donor fits, before anything is cut.

    Raises:
        SettingsError: widths, vocabularies or layers do not fit.
    """
    check_widths(
        encoder,
        hidden_size=donor.hidden_size,
        vocabulary_size=donor.vocabulary_size,
        num_heads=donor.num_heads,
        source=donor.source,
    )
    if tokens_only:
        return
    if layers is not None:
        check_layers(
            layers,
            num_student=encoder.num_layers,
            num_donor=donor.num_layers,
            source=donor.source,
        )
    elif donor.num_layers < encoder.num_layers:
        raise SettingsError(
            f"init: {donor.source} has {donor.num_layers} layers, the student needs "
            f"{encoder.num_layers}"
        )
    for name, shape in _recipient_shapes(encoder).items():
        there = donor.shapes.get(_donor_name(name, layers))
        if there is None or (there != shape and name not in (TOKENS, POSITIONS)):
            raise SettingsError(
                f"init: {donor.source} has {there or 'nothing'} for {name}, the student {shape}; "
                "the two encoders are not of one architecture"
            )


def _donor_name(name: str, layers: Sequence[int] | None) -> str:
    match = LAYER.match(name)
    if match is None or layers is None:
        return name
    return f"{match[1]}.{layers[int(match[2])] - 1}.{match[3]}"


def _fit(value: Tensor, shape: tuple[int, ...], *, name: str, donor: Donor, seed: int) -> Tensor:
    """A table with more rows than are needed is cut, one with fewer grows."""
    if tuple(value.shape) == shape:
        return value
    table_RH = value[: shape[0]]
    missing = shape[0] - len(table_RH)
    if missing:
        generator = torch.Generator().manual_seed(seed)
        new_RH = torch.randn((missing, shape[1]), generator=generator) * NEW_ROW_STD
        table_RH = torch.cat([table_RH, new_RH.to(table_RH.dtype)])
    assert tuple(table_RH.shape) == shape, (name, donor.source)
    return table_RH


def _recipients(spec: ModelSpec) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of a model's encoders by prefix and own name; built without memory."""
    with torch.device("meta"):
        state = build_model(spec, pretrained=False).state_dict()
    prefixes = sorted(name.removesuffix(TOKENS) for name in state if name.endswith(TOKENS))
    return {
        prefix: {
            name.removeprefix(prefix): tuple(value.shape)
            for name, value in state.items()
            if name.startswith(prefix)
        }
        for prefix in prefixes
    }


def _recipient_shapes(encoder: EncoderSpec) -> dict[str, tuple[int, ...]]:
    (shapes,) = _recipients(SingleSpec(encoder=encoder)).values()
    return shapes
