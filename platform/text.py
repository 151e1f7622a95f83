"""Rows as text, and text as tokens.

Serialised text is ``name: value [SEP] name: value``. A ``[SEP]`` between fields becomes the
separator's token; nothing inside a value can become a special token.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import sentencepiece as spm
from numpy.typing import NDArray
from pydantic import NonNegativeInt

from driftline.platform.artefacts import whole_file
from driftline.platform.errors import MissingArtefactError, SettingsError
from driftline.platform.settings import Settings, TokenizerSettings

SEPARATOR: Final = " [SEP] "
MAX_SENTENCE_BYTES: Final = 16_384
CHARACTER_COVERAGE: Final = 0.9995  # rarer characters become bytes


class SpecialTokens(Settings):
    """Token ids with a meaning of their own; never masked, never drawn at random."""

    pad: NonNegativeInt = 0
    unk: NonNegativeInt = 1
    cls: NonNegativeInt = 2
    sep: NonNegativeInt = 3
    mask: NonNegativeInt = 4
    page: NonNegativeInt = 5
    """Role marker of the page product, after [CLS], when both arms share a backbone."""
    ad: NonNegativeInt = 6
    """Role marker of the ad product."""

    @property
    def ids(self) -> tuple[int, ...]:
        """All of them."""
        return (self.pad, self.unk, self.cls, self.sep, self.mask, self.page, self.ad)


# --- rows to text -------------------------------------------------------------------------


def serialise_row(values: Mapping[str, object], *, last: Sequence[str] = ()) -> str:
    """Write a row as ``name: value [SEP] ...`` in the order of the mapping.

    Numbers become ``%.4g``; a missing value (None, NaN, blank) omits its field. The fields named
    in ``last`` (long texts) go to the end, so that truncation cuts only them.

    Source: papers.md S0.5.
    """
    ordered = [name for name in values if name not in last]
    ordered += [name for name in last if name in values]
    written = ((name, _write_value(values[name])) for name in ordered)
    return SEPARATOR.join(f"{name}: {value}" for name, value in written if value)


def serialise_table(table: pa.Table, *, last: Sequence[str] = ()) -> pa.Array:
    """``serialise_row`` for every row of a table, column by column. Strings, never null."""
    ordered = [name for name in table.column_names if name not in last]
    ordered += [name for name in last if name in table.column_names]
    columns = ((name, _write_column(table[name])) for name in ordered)
    fields = [
        pc.fill_null(pc.binary_join_element_wise(f"{name}: ", values, SEPARATOR, ""), "")
        for name, values in columns
    ]
    if not fields:
        return pa.array([""] * table.num_rows, pa.string())
    joined = pc.binary_join_element_wise(*fields, "")
    return pc.replace_substring_regex(joined, f"{re.escape(SEPARATOR)}$", "")


def _write_value(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | str | np.bool_):
        return " ".join(str(value).replace(SEPARATOR.strip(), " ").split())
    if isinstance(value, int | float | np.integer | np.floating):
        return "" if np.isnan(value) else f"{value:.4g}"
    raise ValueError(f"only strings and numbers can be serialised, got {value!r:.60}")


def _write_column(column: pa.ChunkedArray) -> pa.Array:
    """Values as strings, null when missing; each distinct value is written once."""
    encoded = column.combine_chunks().dictionary_encode()
    written = [_write_value(value) or None for value in encoded.dictionary.to_pylist()]
    return pa.array(written, pa.string()).take(encoded.indices)


# --- text to tokens -----------------------------------------------------------------------


def train_tokenizer(
    sentences: Iterable[str],
    destination: Path,
    *,
    settings: TokenizerSettings,
    seed: int,
    setting: str = "tokenizer.vocabulary_size",
) -> None:
    """Train SentencePiece BPE with byte fallback and write the model file.

    A corpus too small for the vocabulary gives a smaller one. Sentences beyond
    ``settings.max_sentences`` are sampled evenly from ``seed``. ``setting`` is what a message calls
    the size.

    Source: papers.md S0.26, A0.13.

    Raises:
        SettingsError: no sentence holds text, or the vocabulary cannot even hold the characters.
    """
    specials = SpecialTokens()
    corpus = _sample(_fields(sentences), settings.max_sentences, seed=seed)
    if not corpus:
        raise SettingsError(
            "tokenizer: no sentence with text to train on; declare a feature of kind 'text' that "
            "has values, or none at all"
        )
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=model,
            model_type="bpe",
            vocab_size=settings.vocabulary_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=CHARACTER_COVERAGE,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=1,
            pad_id=specials.pad,
            unk_id=specials.unk,
            bos_id=specials.cls,
            eos_id=specials.sep,
            pad_piece="[PAD]",
            unk_piece="[UNK]",
            bos_piece="[CLS]",
            eos_piece="[SEP]",
            control_symbols=["[MASK]", "[PAGE]", "[AD]"],
            minloglevel=2,
        )
    except RuntimeError as error:
        raise SettingsError(
            f"{setting} {settings.vocabulary_size} does not fit this corpus of "
            f"{len(corpus)} sentences; change it ({error})"
        ) from error
    with whole_file(destination) as scratch:
        scratch.write_bytes(model.getvalue())


class Tokenizer:
    """Text to token ids: our SentencePiece model, or the tokeniser of a local checkpoint.

    Args:
        path: A SentencePiece file, a checkpoint folder, or a file written by ``save``.

    Raises:
        MissingArtefactError: there is nothing at ``path``.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise MissingArtefactError(
                f"tokeniser {path} does not exist; run `driftline teacher` first"
            )
        self.path = path
        self._fast: Any = None
        if path.is_dir():
            self._open_fast(_load_fast(path), checkpoint_specials(path))
        elif (head := path.read_bytes()).startswith(b"{"):
            self._open_saved(json.loads(head))
        else:
            self._pieces = spm.SentencePieceProcessor(model_proto=head)
            self.specials = SpecialTokens()
            self.vocabulary_size = int(self._pieces.vocab_size())
            self._encode: Callable[[list[str]], list[list[int]]] = self._encode_pieces

    def encode(self, texts: Sequence[str], *, max_tokens: int) -> list[NDArray[np.int32]]:
        """Token ids without [CLS], role and last [SEP], cut to ``max_tokens``.

        A separator between two fields is kept as its token. An empty text has no tokens.
        """
        fields = [text.split(SEPARATOR) if text else [] for text in texts]
        flat = self._encode([field for row in fields for field in row])
        joined, at = [], 0
        for row in fields:
            tokens: list[int] = []
            for place in range(at, at + len(row)):
                tokens += [self.specials.sep, *flat[place]] if place > at else flat[place]
                if len(tokens) >= max_tokens:
                    break
            joined.append(np.array(tokens[:max_tokens], np.int32))
            at += len(row)
        return joined

    @property
    def pieces(self) -> tuple[str, ...]:
        """What each id stands for, as the tokeniser writes it; nothing for ids it does not use."""
        if self._fast is None:
            return tuple(self._pieces.id_to_piece(list(range(self.vocabulary_size))))
        by_id = {number: piece for piece, number in self._fast.get_vocab().items()}
        return tuple(by_id.get(number, "") for number in range(self.vocabulary_size))

    def save(self, destination: Path) -> None:
        """Write one self-contained file that ``Tokenizer`` opens again."""
        with whole_file(destination) as scratch:
            scratch.write_bytes(self._content())

    @property
    def hash(self) -> str:
        """SHA-256 of what ``save`` writes, in hex."""
        return hashlib.sha256(self._content()).hexdigest()

    def _content(self) -> bytes:
        if self._fast is None:
            return self.path.read_bytes()
        saved = {
            "specials": self.specials.model_dump(),
            "tokenizer": json.loads(self._fast.to_str()),
        }
        return json.dumps(saved).encode()

    def _encode_pieces(self, fields: list[str]) -> list[list[int]]:
        return list(self._pieces.encode(fields, out_type=int)) if fields else []

    def _encode_fast(self, fields: list[str]) -> list[list[int]]:
        found = self._fast.encode_batch_fast(fields, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def _open_saved(self, raw: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        fast = FastTokenizer.from_str(json.dumps(raw["tokenizer"]))
        self._open_fast(fast, SpecialTokens.model_validate(raw["specials"]))

    def _open_fast(self, fast: Any, specials: SpecialTokens) -> None:
        fast.no_padding()
        fast.no_truncation()
        fast.encode_special_tokens = True  # "[MASK]" inside a text is text
        self._fast = fast
        self._encode = self._encode_fast
        self.specials = specials
        self.vocabulary_size = 1 + max(fast.get_vocab_size(), *specials.ids)


def checkpoint_specials(path: Path) -> SpecialTokens:
    """Special tokens of a checkpoint's tokeniser; role markers get two new rows after its own.

    Raises:
        SettingsError: no fast tokeniser in the folder, or it lacks [CLS], [SEP] or a mask.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, use_fast=True)
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"encoder checkpoint {path} has no usable tokeniser: {error}"
        ) from error
    ids = {
        "pad": tokenizer.pad_token_id,
        "unk": tokenizer.unk_token_id,
        "cls": tokenizer.cls_token_id,
        "sep": tokenizer.sep_token_id,
        "mask": tokenizer.mask_token_id,
    }
    if missing := [name for name, value in ids.items() if value is None]:
        raise SettingsError(
            f"encoder checkpoint {path}: its tokeniser has no {', '.join(missing)} token; "
            "choose a BERT-like checkpoint"
        )
    free = max(config.vocab_size, len(tokenizer))
    return SpecialTokens(**ids, page=free, ad=free + 1)


def _load_fast(path: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, use_fast=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SettingsError(f"encoder checkpoint {path} has no fast tokeniser (tokenizer.json)")
    return backend


def _fields(sentences: Iterable[str]) -> Iterable[str]:
    for sentence in sentences:
        yield from (field for field in sentence.split(SEPARATOR) if field.strip())


def _sample(sentences: Iterable[str], size: int, *, seed: int) -> list[str]:
    """Reservoir sample, in a deterministic order."""
    random = np.random.default_rng(seed)
    kept: list[str] = []
    for place, sentence in enumerate(sentences):
        if place < size:
            kept.append(sentence)
        elif (slot := int(random.integers(place + 1))) < size:
            kept[slot] = sentence
    return kept
