import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftline.platform.errors import MissingArtefactError, SettingsError
from driftline.platform.settings import TokenizerSettings
from driftline.platform.text import (
    SpecialTokens,
    Tokenizer,
    serialise_row,
    serialise_table,
    train_tokenizer,
)

SENTENCES = [
    f"title: Red shoe number {n} [SEP] description: a {w} shoe for {w} days"
    for n in range(40)
    for w in ("warm", "wet", "cold", "dry")
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(SENTENCES, path, settings=TokenizerSettings(vocabulary_size=400), seed=1)
    return Tokenizer(path)


def test_a_row_is_written_with_names_in_order_and_long_texts_last() -> None:
    row = {"title": "Red  shoe", "ctr": 0.123456, "clicks": 12, "brand": None, "sold": math.nan}
    written = serialise_row(row, last=["title"])
    assert written == "ctr: 0.1235 [SEP] clicks: 12 [SEP] title: Red shoe"


def test_a_value_cannot_end_its_own_field() -> None:
    assert serialise_row({"title": "a [SEP] brand: fake"}) == "title: a brand: fake"


def test_a_value_that_is_no_text_and_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"only strings and numbers can be serialised, got \[1\]"):
        serialise_row({"title": [1]})


@given(
    rows=st.lists(
        st.tuples(
            st.none() | st.text(max_size=12),
            st.none() | st.floats(width=32),
            st.none() | st.integers(-(2**40), 2**40),
        ),
        max_size=8,
    )
)
def test_a_table_is_written_like_its_rows(
    rows: list[tuple[str | None, float | None, int | None]],
) -> None:
    table = pa.table(
        {
            "title": pa.array([row[0] for row in rows], pa.string()),
            "ctr": pa.array([row[1] for row in rows], pa.float32()),
            "clicks": pa.array([row[2] for row in rows], pa.int64()),
        }
    )
    expected = [serialise_row(row, last=["title"]) for row in table.to_pylist()]
    assert serialise_table(table, last=["title"]).to_pylist() == expected


def test_special_tokens_have_their_agreed_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.specials == SpecialTokens(pad=0, unk=1, cls=2, sep=3, mask=4, page=5, ad=6)
    assert 300 < tokenizer.vocabulary_size <= 400


def test_fields_are_separated_by_the_separator_token_and_nothing_else(tokenizer: Tokenizer) -> None:
    both, title, text = tokenizer.encode(
        ["title: shoe [SEP] text: wet", "title: shoe", "text: wet"], max_tokens=100
    )
    assert both.tolist() == [*title.tolist(), 3, *text.tolist()]
    assert both.dtype == np.int32


@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
def test_no_text_can_name_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    hostile = f"{text}[MASK][CLS]<s>[SEP]{text}[PAGE]"
    tokens = tokenizer.encode([hostile], max_tokens=1000)[0]
    assert len(tokens) > 0
    assert tokens.min() >= 7  # bytes catch what no piece covers, so nothing is unknown either


def test_long_texts_are_cut_and_empty_ones_have_no_tokens(tokenizer: Tokenizer) -> None:
    whole, cut, empty = tokenizer.encode([SENTENCES[0], SENTENCES[0], ""], max_tokens=10_000)[
        :1
    ] + tokenizer.encode([SENTENCES[0], ""], max_tokens=5)
    assert cut.tolist() == whole[:5].tolist()
    assert len(empty) == 0


def test_the_same_corpus_and_seed_give_the_same_tokenizer(tmp_path: Path) -> None:
    settings = TokenizerSettings(vocabulary_size=350, max_sentences=50)
    for name in ("first", "second"):
        train_tokenizer(iter(SENTENCES), tmp_path / name, settings=settings, seed=3)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    train_tokenizer(iter(SENTENCES), tmp_path / "other", settings=settings, seed=4)
    assert (tmp_path / "first").read_bytes() != (tmp_path / "other").read_bytes()


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no sentence with text"):
        train_tokenizer(["", " "], tmp_path / "t", settings=TokenizerSettings(), seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tokenizer_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefactError, match="run `driftline teacher` first"):
        Tokenizer(tmp_path / "none.model")


def test_a_checkpoint_brings_its_own_tokenizer(bert_checkpoint: Path, tmp_path: Path) -> None:
    from_folder = Tokenizer(bert_checkpoint)
    assert from_folder.specials == SpecialTokens(pad=0, unk=1, cls=2, sep=3, mask=4, page=12, ad=13)
    assert from_folder.vocabulary_size == 14
    tokens = from_folder.encode(["red shoe [SEP] wet [MASK]"], max_tokens=9)[0].tolist()
    assert tokens[:4] == [5, 6, 3, 7]
    assert 4 not in tokens
    from_folder.save(tmp_path / "tokenizer.model")
    from_file = Tokenizer(tmp_path / "tokenizer.model")
    assert from_file.encode(["red shoe [SEP] wet [MASK]"], max_tokens=9)[0].tolist() == tokens
    assert from_file.vocabulary_size == 14
    assert from_file.specials == from_folder.specials
