"""How each kind of model reads its example file: rows in, the tensors of its ``forward`` out.

Shape suffixes: B rows, C categorical columns, F numeric inputs, H vector width, N rows of the file.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from driftline.platform.batching import Rows, frame_tokens, length_groups
from driftline.platform.devices import to_device
from driftline.platform.errors import ContractError
from driftline.platform.examples import (
    Float32,
    Int64,
    PairRows,
    Ragged,
    Texts,
    TokenRows,
    Vectors,
    open_pairs,
    open_texts,
    open_tokens,
)
from driftline.platform.models.spec import (
    EncoderSpec,
    HeadOnlySpec,
    HeadSpec,
    MlpSpec,
    ModelSpec,
    SingleSpec,
    TeacherSpec,
    TowerSpec,
    TwinSpec,
)
from driftline.platform.models.student import AD, PAGE, TokenGroup

NUM_FRAME_TOKENS: Final = 2  # [CLS] and [SEP] of a serialised row


class ClickInputs(ABC):
    """Rows of one example file for one kind of model."""

    num_rows: int
    clicked: Float32
    teacher_logits: Float32 | None
    teacher_rows: Int64 | None = None
    """Where the teacher's features of each row are, -1 for none; see ``TeacherFeatures``."""
    lengths: NDArray[np.int64] | None = None
    """Tokens of each row, where rows of similar length should share a batch."""
    block_rows: int = 1
    """Neighbouring rows that should share a batch."""

    @abstractmethod
    def collate(self, rows: Rows) -> tuple[object, ...]:
        """Arguments of the model's ``forward`` for these rows, on the CPU."""

    def arguments(self, rows: Rows, *, device: torch.device) -> list[Any]:
        """What ``collate`` gives, where the model is."""
        moved = to_device(self.collate(rows), device)
        assert isinstance(moved, list)
        return moved

    def logits(self, model: nn.Module, rows: Rows, *, device: torch.device) -> Tensor:
        """Run the model. ``[B, 2]``."""
        logits: Tensor = model(*self.arguments(rows, device=device))
        return logits

    def mask(self, arguments: Sequence[Any]) -> Tensor | None:
        """Which tokens of each row are real; None for a model that reads no row as tokens."""
        del arguments
        return None

    def num_tokens(self, rows: Rows) -> Int64 | None:
        """Tokens of each row as the model reads it; None where ``mask`` is None. ``[B]``."""
        del rows
        return None


class TowerInputs(ClickInputs):
    """Serialised rows for the teacher and the unfactorised student."""

    def __init__(self, spec: TowerSpec, rows: TokenRows) -> None:
        self.spec = spec.encoder
        self.tokens = rows.tokens
        self.num_rows = len(rows)
        self.clicked = rows.clicked if rows.clicked is not None else _unknown(len(rows))
        self.teacher_logits = rows.teacher_logits
        self.teacher_rows = rows.teacher_rows
        self.lengths = rows.tokens.lengths

    def collate(self, rows: Rows) -> tuple[object, ...]:
        """Framed tokens and their mask."""
        return frame_texts(self.spec, self.tokens, rows, role=None)

    def mask(self, arguments: Sequence[Any]) -> Tensor | None:
        """See ``ClickInputs``. ``[B, T]``."""
        mask: Tensor = arguments[1]
        return mask

    def num_tokens(self, rows: Rows) -> Int64 | None:
        """See ``ClickInputs``."""
        return np.minimum(self.tokens.lengths[rows] + NUM_FRAME_TOKENS, self.spec.max_tokens)


class _PairInputs(ClickInputs):
    """What all models of (page, ad) pairs share: categories and numbers, gathered by row."""

    def __init__(self, rows: PairRows, cardinalities: tuple[int, ...], num_numbers: int) -> None:
        self.rows = rows
        self.num_rows = len(rows)
        self.clicked = rows.clicked
        self.teacher_logits = rows.teacher_logits
        self.teacher_rows = rows.teacher_rows
        _check_shape(rows, cardinalities, num_numbers)

    def tabular(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Categories ``[B, C]`` int64 and numbers ``[B, F]`` float32."""
        categories_BC = self.rows.categories[rows].astype(np.int64)
        return torch.from_numpy(categories_BC), torch.from_numpy(self.rows.numbers[rows])


class TwinInputs(_PairInputs):
    """Pairs with the text of both products; each distinct (text, role) of a batch stands once."""

    block_rows = 4  # neighbours in time are ads of one page: a third fewer texts to encode

    def __init__(self, spec: TwinSpec, rows: PairRows, texts: Texts) -> None:
        super().__init__(rows, spec.head.cardinalities, spec.head.num_numbers)
        self.spec = spec
        self.texts = texts
        _check_texts(rows, len(texts.tokens))

    def collate(self, rows: Rows) -> tuple[object, ...]:
        """Token groups of each role, places of each row's texts, categories, numbers."""
        page_groups, page_B = self._distinct(self.rows.page_text[rows], PAGE)
        ad_groups, ad_B = self._distinct(self.rows.ad_text[rows], AD)
        return ([page_groups, ad_groups], page_B, ad_B, *self.tabular(rows))

    def _distinct(self, text_B: NDArray[np.int32], role: int) -> tuple[list[TokenGroup], Tensor]:
        found, place_B = np.unique(text_B, return_inverse=True)
        if found[0] >= 0:
            shift = 0
        elif len(found) > 1:
            found, shift = found[1:], -1
        else:  # no row has a text: encode an empty one, so that every weight has a gradient
            shift = -1
        lengths = self.texts.tokens.lengths[found] if found[-1] >= 0 else np.zeros(1, np.int64)
        groups = length_groups(lengths)
        new_place = np.empty(len(found) + 1, np.int64)
        new_place[0] = 0
        new_place[1 + np.concatenate(groups)] = np.arange(1, len(found) + 1)
        framed = [
            frame_texts(
                self.spec.encoder,
                self.texts.tokens,
                found[group],
                role=role if self.spec.tie_arms else None,
            )
            for group in groups
        ]
        return framed, torch.from_numpy(new_place[place_B + 1 + shift])


class HeadInputs(_PairInputs):
    """Pairs with cached vectors."""

    def __init__(self, spec: HeadSpec, rows: PairRows, vectors: Vectors) -> None:
        super().__init__(rows, spec.cardinalities, spec.num_numbers)
        num_texts, width = vectors.page.shape
        if width != spec.vector_size:
            raise ContractError(
                f"vectors must have width {spec.vector_size}, as the head was built, got {width}; "
                "encode the texts with the arms this head belongs to"
            )
        _check_texts(rows, num_texts)
        # One row more, so that "no text" can be gathered like any other; the model replaces it.
        empty_1H = np.zeros((1, width), np.float32)
        self._page_NH = np.concatenate([vectors.page, empty_1H])
        self._ad_NH = np.concatenate([vectors.ad, empty_1H])

    def collate(self, rows: Rows) -> tuple[object, ...]:
        """Vectors of page and ad, which of them are missing, categories, numbers."""
        page_B, ad_B = self.rows.page_text[rows], self.rows.ad_text[rows]
        missing_B2 = np.stack([page_B < 0, ad_B < 0], axis=1)
        page_BH, ad_BH = self._page_NH[page_B], self._ad_NH[ad_B]
        return (
            torch.from_numpy(page_BH),
            torch.from_numpy(ad_BH),
            torch.from_numpy(missing_B2),
            *self.tabular(rows),
        )


class MlpInputs(_PairInputs):
    """Pairs for the baseline: bags of words, hashed ids, categories, numbers."""

    def __init__(self, spec: MlpSpec, rows: PairRows, texts: Texts | None) -> None:
        super().__init__(rows, spec.cardinalities, spec.num_numbers)
        self.spec = spec
        self.tokens = texts.tokens if texts is not None else Ragged.of([])
        if spec.num_word_buckets and texts is not None:
            _check_texts(rows, len(self.tokens))
        self._page = rows.page_id_hash if rows.page_id_hash is not None else _none(len(rows))
        self._ad = rows.ad_id_hash if rows.ad_id_hash is not None else _none(len(rows))
        largest = max(self._page.max(initial=-1), self._ad.max(initial=-1))
        if largest >= spec.num_product_buckets:
            raise ContractError(
                f"page_id_hash and ad_id_hash must be below {spec.num_product_buckets}, "
                f"got {largest}"
            )

    def collate(self, rows: Rows) -> tuple[object, ...]:
        """Pieces and offsets of the distinct texts, places of texts, products, tabular part."""
        texts_B2 = np.stack([self.rows.page_text[rows], self.rows.ad_text[rows]], axis=1)
        if not len(self.tokens):
            texts_B2[:] = -1
        found, place_B2 = np.unique(np.append(texts_B2, -1), return_inverse=True)
        starts = self.tokens.offsets[found[1:]]
        lengths = np.minimum(self.tokens.offsets[found[1:] + 1] - starts, self.spec.max_tokens)
        offsets_U = np.concatenate([[0, 0], np.cumsum(lengths)[:-1]])[: len(found)]
        at = np.repeat(starts - offsets_U[1:], lengths) + np.arange(lengths.sum())
        products_B2 = np.stack([self._page[rows], self._ad[rows]], axis=1).astype(np.int64)
        return (
            torch.from_numpy(self.tokens.values[at].astype(np.int64)),
            torch.from_numpy(offsets_U),
            torch.from_numpy(place_B2[:-1].reshape(texts_B2.shape)),
            torch.from_numpy(products_B2),
            *self.tabular(rows),
        )


def open_inputs(
    spec: ModelSpec, examples: Path, *, texts: Path | None = None, vectors: Path | None = None
) -> ClickInputs:
    """Map an example file for a kind of model.

    Args:
        spec: The model.
        examples: Pairs (twin, head, mlp) or serialised rows (teacher, single).
        texts: Product texts; a twin student needs them, the baseline may use them.
        vectors: Cached vectors; a head with vectors needs them.

    Raises:
        ContractError: the file does not fit the model; the message names the column.
        ValueError: ``texts`` or ``vectors`` is needed and not given.
    """
    match spec:
        case TeacherSpec() | SingleSpec():
            return TowerInputs(spec, open_tokens(examples))
        case TwinSpec():
            if texts is None:
                raise ValueError("a twin student needs texts=, the file of product texts")
            return TwinInputs(spec, open_pairs(examples), open_texts(texts))
        case HeadOnlySpec():
            if vectors is None and spec.head.vector_size:
                raise ValueError("a head needs vectors=, the file of cached vectors")
            empty_0H = np.empty((0, spec.head.vector_size), np.float32)
            opened = Vectors.open(vectors) if vectors is not None else Vectors(empty_0H, empty_0H)
            return HeadInputs(spec.head, open_pairs(examples), opened)
        case MlpSpec():
            opened_texts = open_texts(texts) if texts is not None else None
            return MlpInputs(spec, open_pairs(examples), opened_texts)
        case _:
            assert_never(spec)


def frame_texts(
    spec: EncoderSpec, tokens: Ragged, rows: NDArray[np.integer], *, role: int | None
) -> TokenGroup:
    """[CLS], role marker if there is one, tokens, [SEP], padding; see ``frame_tokens``."""
    specials = spec.specials
    marker = () if role is None else ((specials.page, specials.ad)[role],)
    return frame_tokens(
        tokens,
        rows,
        prefix=(specials.cls, *marker),
        sep=specials.sep,
        pad=specials.pad,
        max_tokens=spec.max_tokens,
    )


def _check_shape(rows: PairRows, cardinalities: tuple[int, ...], num_numbers: int) -> None:
    found = (rows.categories.shape[1], rows.numbers.shape[1])
    if found != (len(cardinalities), num_numbers):
        raise ContractError(
            f"examples must have {len(cardinalities)} categories and {num_numbers} numbers, as the "
            f"model was built, got {found[0]} and {found[1]}"
        )
    for column, size in enumerate(cardinalities):
        values = rows.categories[:, column]
        low, high = int(values.min(initial=0)), int(values.max(initial=0))
        if low < 0 or high >= size:
            raise ContractError(
                f"examples: category {column} must lie in [0, {size}), got {low}..{high}"
            )


def _check_texts(rows: PairRows, num_texts: int) -> None:
    for name, values in (("page_text", rows.page_text), ("ad_text", rows.ad_text)):
        low, high = int(values.min(initial=-1)), int(values.max(initial=-1))
        if low < -1 or high >= num_texts:
            raise ContractError(
                f"examples: {name} must lie in [-1, {num_texts}), got {low}..{high}"
            )


def _unknown(num_rows: int) -> Float32:
    return np.full(num_rows, np.nan, np.float32)


def _none(num_rows: int) -> NDArray[np.int32]:
    return np.full(num_rows, -1, np.int32)
