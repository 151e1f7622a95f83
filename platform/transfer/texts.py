"""Texts of a transfer set taken apart into words, and put together again under new ids.

The unit is the word, not the piece: a text is stored as text and every reader (teacher, student
with a vocabulary of its own) tokenises it again. SentencePiece and WordPiece never join pieces
across white space, so words in another order are the same tokens in another order, for every
vocabulary at once; pieces out of their words would come back as other tokens.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from driftline.platform.columns import TEXT_ID_COLUMNS
from driftline.platform.errors import ContractError, SettingsError
from driftline.platform.examples import Ragged
from driftline.platform.sampling import request_keys
from driftline.platform.text import SEPARATOR, Tokenizer
from driftline.platform.transfer.sequences import join
from driftline.platform.transfer.sets import MadeRows

Unit = Literal["word", "character"]
Rewrite: TypeAlias = Callable[[Ragged, NDArray[np.int64]], Ragged]
"""Gives new sequences for those of one field; the second argument is how often each occurs."""

MASK_63_BITS: Final = 0x7FFF_FFFF_FFFF_FFFF
NO_LIMIT: Final = 2**62
"""Tokens of a text that is not cut."""


@dataclass(frozen=True)
class WrittenWords:
    """One text field as sequences of numbered words."""

    sequences: Ragged
    """``[T]`` texts; a missing text has no words."""
    words: NDArray[np.object_]
    """The word of each number."""
    joiner: str

    @classmethod
    def of(cls, values: pa.ChunkedArray, *, unit: Unit) -> "WrittenWords":
        """Take the texts of a field apart, as the serialiser will see them."""
        rows = [_split(value, unit=unit) for value in values.to_pylist()]
        flat = np.array([word for row in rows for word in row], dtype=object)
        numbers, words = pd.factorize(flat)
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        sequences = Ragged(np.asarray(numbers, np.int32), offsets)
        return cls(sequences, np.asarray(words, object), " " if unit == "word" else "")

    def written(self, sequences: Ragged) -> pa.Array:
        """The texts of sequences of these words; null where there is no word. ``[T]``."""
        words = self.words[sequences.values]
        bounds = zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
        texts = [self.joiner.join(words[start:end]).strip() or None for start, end in bounds]
        return pa.array(texts, pa.string())


def words_of(text: str | None) -> list[str]:
    """Words between white space, without the separator of fields; none for a missing text."""
    return (text or "").replace(SEPARATOR.strip(), " ").split()


def rewrite_words(rows: MadeRows, rewrite: Rewrite, *, unit: Unit, tag: str) -> MadeRows:
    """The rows with the words of each text field rewritten, each distinct text once.

    Raises:
        SettingsError: the rows have no text.
        ContractError: a row points to a text that is not there.
    """

    def rewrite_field(values: pa.ChunkedArray, uses: NDArray[np.int64]) -> pa.Array:
        written = WrittenWords.of(values, unit=unit)
        return written.written(rewrite(written.sequences, uses))

    return rewrite_texts(rows, rewrite_field, tag=tag)


def rewrite_lists(
    rows: MadeRows, change: Callable[[list[str]], list[str]], *, tag: str
) -> MadeRows:
    """The rows with the words of each text field changed, field by field, text by text.

    Raises:
        SettingsError: the rows have no text.
        ContractError: a row points to a text that is not there.
    """

    def rewrite_field(values: pa.ChunkedArray, _: NDArray[np.int64]) -> pa.Array:
        texts = [" ".join(change(words_of(value))) or None for value in values.to_pylist()]
        return pa.array(texts, pa.string())

    return rewrite_texts(rows, rewrite_field, tag=tag)


def rewrite_texts(
    rows: MadeRows,
    rewrite: Callable[[pa.ChunkedArray, NDArray[np.int64]], pa.Array],
    *,
    tag: str,
) -> MadeRows:
    """The rows with each text field rewritten; all of them count as made up.

    A text that comes out as it was keeps its id.

    Args:
        rows: What to start from; not changed.
        rewrite: New values for those of a field and for how many rows use each. ``[T]``.
        tag: Ends the ids of the new rows.

    Raises:
        SettingsError: the rows have no text.
        ContractError: a row points to a text that is not there.
    """
    used, uses = used_texts(rows.frame, rows.texts)
    if used.num_rows == 0:
        raise SettingsError(
            f"transfer set {tag}: no row has a text to rewrite; declare a feature of kind 'text', "
            "or choose a set that changes columns"
        )
    names = [name for name in used.column_names if name != "text_id"]
    fields = [rewrite(used[name], uses) for name in names]
    same = np.all(
        [_equal(field, used[name]) for name, field in zip(names, fields, strict=True)], axis=0
    )
    old_ids = used["text_id"].combine_chunks()
    new_ids = pc.if_else(pa.array(same), old_ids, content_ids(fields, names))
    pairs = zip(names, fields, strict=True)
    texts = pa.table(
        {"text_id": new_ids}
        | {name: field.cast(used.schema.field(name).type) for name, field in pairs}
    )
    frame = made_up_ids(rows.frame, tag=tag)
    for column in TEXT_ID_COLUMNS:
        at = pc.index_in(frame[column], value_set=old_ids)
        frame = with_column(frame, column, new_ids.take(at.combine_chunks()))
    made_up = np.ones(frame.num_rows, np.bool_)
    return replace(rows, frame=frame, texts=distinct_texts(texts), made_up=made_up)


def used_texts(frame: pa.Table, texts: pa.Table) -> tuple[pa.Table, NDArray[np.int64]]:
    """The texts that rows point to, ascending by id, and how many (row, role) use each. ``[T]``.

    Raises:
        ContractError: a row points to a text that is not there.
    """
    wanted = np.concatenate([frame[column].drop_null().to_numpy() for column in TEXT_ID_COLUMNS])
    ids, uses = np.unique(wanted.astype(np.int64), return_counts=True)
    used = texts.filter(pc.is_in(texts["text_id"], value_set=pa.array(ids)))
    if used.num_rows != len(ids):
        raise ContractError(
            f"{len(ids) - used.num_rows} of {len(ids)} texts that rows point to are not among the "
            f"{texts.num_rows} texts given; read the texts as of the end of the rows or later"
        )
    return used, uses.astype(np.int64)


def has_texts(frame: pa.Table) -> bool:
    """Whether any row points to a text."""
    return any(frame[column].null_count < frame.num_rows for column in TEXT_ID_COLUMNS)


def distinct_texts(texts: pa.Table) -> pa.Table:
    """One row for each id, ascending; texts without an id are left out."""
    texts = texts.filter(pc.is_valid(texts["text_id"]))
    _, first = np.unique(texts["text_id"].to_numpy(), return_index=True)
    return texts.take(pa.array(first)).combine_chunks()


def content_ids(fields: list[pa.Array], names: list[str]) -> pa.Array:
    """A positive 63-bit id for each text, by names and values; null where all are. ``[T]``."""
    columns = [field.to_pylist() for field in fields]
    return pa.array([_content_id(row, names) for row in zip(*columns, strict=True)], pa.int64())


def text_tokens(texts: pa.Table, tokenizer: Tokenizer) -> Ragged:
    """Tokens of the content of each text: no names of fields, no separators, not cut. ``[T]``."""
    names = [name for name in texts.column_names if name != "text_id"]
    if not names:
        return Ragged.of([np.empty(0, np.int32)] * texts.num_rows)
    fields = [[" ".join(words_of(value)) for value in texts[name].to_pylist()] for name in names]
    return join([Ragged.of(tokenizer.encode(f, max_tokens=NO_LIMIT)) for f in fields])


def made_up_ids(frame: pa.Table, *, tag: str) -> pa.Table:
    """Rows under impression ids of their own, in the request of the row they come from."""
    named = with_column(frame, "request_id", request_keys(frame))
    ids = pc.binary_join_element_wise(frame["impression_id"], tag, "~")
    return with_column(named, "impression_id", ids)


def with_column(frame: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The frame with other values in one column, of the type it has."""
    place = frame.schema.get_field_index(name)
    field = frame.schema.field(place)
    return frame.set_column(place, field, values.cast(field.type))


def _equal(first: pa.Array, second: pa.ChunkedArray) -> list[bool]:
    pairs = zip(first.to_pylist(), second.to_pylist(), strict=True)
    return [one == other for one, other in pairs]


def _split(text: str | None, *, unit: Unit) -> list[str]:
    words = words_of(text)
    return words if unit == "word" else list(" ".join(words))


def _content_id(values: tuple[str | None, ...], names: list[str]) -> int | None:
    parts = [
        f"{name}:{len(value)}:{value}"
        for name, value in zip(names, values, strict=True)
        if value is not None
    ]
    if not parts:
        return None
    digest = hashlib.blake2b("".join(parts).encode(), digest_size=8).digest()
    return max(int.from_bytes(digest, "little") & MASK_63_BITS, 1)
