"""What the teacher reads: every feature of an impression as ``name: value``, text last."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from driftline.platform.columns import PRODUCT_ALIASES, TEXT_ID_COLUMNS, head_columns
from driftline.platform.errors import SettingsError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.text import Tokenizer, serialise_table

SPECIALS_PER_ROW: Final = 3  # [CLS], [SEP] after the texts, [SEP] at the end
MAX_TABULAR_SHARE: Final = 0.6

Tokens = NDArray[np.int32]


def teacher_columns(settings: DriftlineSettings) -> tuple[str, ...]:
    """Frame columns the teacher reads beside the text, in order.

    Raises:
        SettingsError: ``teacher.columns`` names one that does not exist.
    """
    known = tuple(column.name for column in head_columns(settings))
    chosen = settings.teacher.columns
    if chosen is None:
        return known
    if wrong := [name for name in chosen if name not in known]:
        raise SettingsError(
            f"teacher.columns: {wrong} are no columns of a frame; choose from {list(known)}"
        )
    return chosen


@dataclass(frozen=True)
class RowSerialiser:
    """Frame rows as strings of ``name: value`` fields (papers.md S0.5)."""

    columns: tuple[str, ...]
    texts: pa.Table
    """``text_id`` and the text features."""

    def text_strings(self, role: str) -> list[str]:
        """Each distinct text as the page's or the ad's fields."""
        fields = self.texts.drop_columns(["text_id"])
        named = fields.rename_columns([f"{role} {name}" for name in fields.column_names])
        return _strings(named, self.texts.num_rows)

    def tabular_strings(self, frame: pa.Table) -> list[str]:
        """The rest of each row; missing fields are left out."""
        chosen = frame.select(self.columns)
        named = chosen.rename_columns([name.replace("__", " ") for name in self.columns])
        return _strings(named, frame.num_rows)


def _strings(table: pa.Table, num_rows: int) -> list[str]:
    if table.num_columns == 0:
        return [""] * num_rows
    strings: list[str] = serialise_table(table).to_pylist()
    return strings


@dataclass(frozen=True)
class TeacherInput:
    """Turns frame rows into the teacher's token sequences.

    Contextual and numeric fields come first, so that truncation cuts only the long texts, and both
    texts get an equal share of what is left. Each distinct text is tokenised once.
    """

    serialiser: RowSerialiser
    tokenizer: Tokenizer
    max_tokens: int

    @cached_property
    def _text_tokens(self) -> dict[str, list[Tokens]]:
        return {
            role: self.tokenizer.encode(
                self.serialiser.text_strings(role), max_tokens=self.max_tokens
            )
            for role in PRODUCT_ALIASES
        }

    @cached_property
    def _text_ids(self) -> NDArray[np.int64]:
        return self.serialiser.texts["text_id"].to_numpy()

    def tokens(self, frame: pa.Table) -> list[Tokens]:
        """One sequence a row, without [CLS] and the last [SEP]."""
        most = int(self.max_tokens * MAX_TABULAR_SHARE)
        tabular = self.tokenizer.encode(self.serialiser.tabular_strings(frame), max_tokens=most)
        pages, ads = (
            self._texts_of(frame, role, column)
            for role, column in zip(PRODUCT_ALIASES, TEXT_ID_COLUMNS, strict=True)
        )
        return [
            self._joined(part, page, ad) for part, page, ad in zip(tabular, pages, ads, strict=True)
        ]

    def _texts_of(self, frame: pa.Table, role: str, column: str) -> Sequence[Tokens]:
        wanted = frame[column].fill_null(0).to_numpy()
        known = {int(text_id): row for row, text_id in enumerate(self._text_ids)}
        nothing = np.empty(0, np.int32)
        tokens = self._text_tokens[role]
        return [tokens[row] if (row := known.get(int(i), -1)) >= 0 else nothing for i in wanted]

    def _joined(self, tabular: Tokens, page: Tokens, ad: Tokens) -> Tokens:
        room = self.max_tokens - SPECIALS_PER_ROW - len(tabular)
        page_room = max(room // 2, room - len(ad))
        page = page[:page_room]
        ad = ad[: room - len(page)]
        middle = np.array([self.tokenizer.specials.sep], np.int32)
        return np.concatenate([tabular, middle, page, middle, ad])[: self.max_tokens - 2]
