from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftline.platform.errors import ContractError, SettingsError
from driftline.platform.settings import ConfigEncoder, parse_settings
from driftline.platform.text import SEPARATOR, Tokenizer
from driftline.platform.vocabulary.report import VocabularyUser, compare_vocabularies, overlap
from driftline.platform.vocabulary.words import (
    WordTexts,
    encode_words,
    hold_out,
    require_words,
    words_of,
)

ODD = "a é\u0308\u00a0\u3000\u000b\u0085\u200b\u2581\u00a8shoe12"
TEXTS = st.text(max_size=15) | st.text(alphabet=st.sampled_from(ODD), max_size=15)


def corpus(market: Any) -> list[str]:
    colours = ("red", "pink", "golden")
    return [f"title: {c} lamp {n} [SEP] description: a {c} lamp" for c in colours for n in range(9)]


@given(fields=st.lists(TEXTS.filter(lambda text: SEPARATOR not in text), min_size=1, max_size=3))
def test_word_by_word_a_text_has_the_pieces_it_has_as_a_whole(
    market: Any, fields: list[str]
) -> None:
    text = SEPARATOR.join(fields)
    for tokenizer in (market.teacher_tokenizer, market.student_tokenizer):
        whole = tokenizer.encode([text], max_tokens=10_000)[0].tolist()
        assert [piece for word in encode_words(tokenizer, text) for piece in word] == whole


def test_words_cut_at_other_white_space_would_not_be_the_whole(market: Any) -> None:
    text = "red\x0bshoe"  # SentencePiece drops the tab; Python would see two words
    tokenizer = market.student_tokenizer
    whole = tokenizer.encode([text], max_tokens=99)[0].tolist()
    cut = [piece for word in tokenizer.encode(text.split(), max_tokens=99) for piece in word]
    assert cut != whole


def test_fields_and_words_are_told_apart() -> None:
    assert words_of("title: red  shoe [SEP] text: wet") == [
        ["title:", "red", "shoe"],
        ["text:", "wet"],
    ]


def test_texts_in_words_are_read_as_they_were_written(market: Any, tmp_path: Path) -> None:
    texts = [*corpus(market), "", "red red"]
    words = WordTexts.of(texts, teacher=market.teacher_tokenizer, student=market.student_tokenizer)
    words.save(tmp_path / "words.safetensors")
    found = WordTexts.open(tmp_path / "words.safetensors")
    for number, text in enumerate(texts):
        row = found.texts.values[found.texts.offsets[number] : found.texts.offsets[number + 1]]
        for side, tokenizer in (
            (found.teacher, market.teacher_tokenizer),
            (found.student, market.student_tokenizer),
        ):
            pieces = [side.values[side.offsets[word] : side.offsets[word + 1]] for word in row]
            expected = tokenizer.encode([text], max_tokens=999)[0]
            assert np.array_equal(np.concatenate([*pieces, expected[:0]]), expected)
        assert found.num_pieces[number] == len(expected)


def test_another_file_is_no_corpus(market: Any) -> None:
    with pytest.raises(ContractError, match="holds no texts in two vocabularies"):
        WordTexts.open(market.frozen)


def test_a_tokenizer_whose_words_know_the_blank_before_them_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models, pre_tokenizers
    from transformers import BertConfig, PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: place for place, word in enumerate([*specials, "red", "Ġred", "Ġ"])}
    fast = FastTokenizer(models.WordLevel(words, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), specials, strict=True))
    PreTrainedTokenizerFast(
        tokenizer_object=fast, **{f"{name}_token": word for name, word in names.items()}
    ).save_pretrained(tmp_path)
    BertConfig(vocab_size=len(words)).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="writes 'red red' otherwise as a whole than word by"):
        require_words(Tokenizer(tmp_path), ["red", "red red"])


def test_a_text_stays_on_its_side_whatever_comes_and_goes() -> None:
    texts = [f"text {number}" for number in range(400)]
    train, held_out = hold_out(texts, share=0.25)
    assert sorted(train + held_out) == sorted(texts)
    assert 60 < len(held_out) < 140
    some, _ = hold_out([*texts[50:], "new", *texts[50:60]], share=0.25)
    assert set(some) - {"new"} == set(train) & set(texts[50:])


# --- report -------------------------------------------------------------------------------


def test_the_report_counts_what_a_slow_count_finds(market: Any) -> None:
    texts = corpus(market)
    users = [
        VocabularyUser(market.teacher_tokenizer, width=24, max_tokens=20),
        VocabularyUser(market.student_tokenizer, width=16, max_tokens=14),
    ]
    report = compare_vocabularies(*users, texts=texts)
    for use, user in zip((report.teacher, report.student), users, strict=True):
        tokens = [user.tokenizer.encode([text], max_tokens=999)[0].tolist() for text in texts]
        seps = sum(row.count(3) for row in tokens)
        words = sum(len(text.replace("[SEP]", "").split()) for text in texts)
        assert use.fertility == pytest.approx((sum(map(len, tokens)) - seps) / words)
        assert use.cut_share == np.mean([len(row) + 2 > user.max_tokens for row in tokens])
    assert report.student.fertility > report.teacher.fertility
    small, large = (user.tokenizer.vocabulary_size for user in reversed(users))
    assert report.embedding_share_saved == pytest.approx(1 - small * 16 / (large * 24))
    assert report.vocabulary_share_saved == pytest.approx(1 - small / large)


def test_a_small_bpe_vocabulary_is_almost_a_part_of_the_large_one(market: Any) -> None:
    small, large = market.student_tokenizer, market.teacher_tokenizer
    assert overlap(large, small) > 0.9
    assert overlap(small, large) < 0.9
    assert overlap(small, small) == 1


def test_the_report_is_readable(market: Any, tmp_path: Path) -> None:
    users = [
        VocabularyUser(tokenizer, width=8, max_tokens=9)
        for tokenizer in (market.teacher_tokenizer, market.student_tokenizer)
    ]
    report = compare_vocabularies(*users, texts=["red shoe"])
    report.save(tmp_path / "report.json")
    assert '"overlap": ' in (tmp_path / "report.json").read_text()
    assert [row["vocabulary"] for row in report.rows()] == ["teacher", "student"]
    with pytest.raises(ValueError, match="needs texts with words, got 2 without"):
        compare_vocabularies(*users, texts=["", " "])


# --- settings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"vocabulary_size": 400}, "student.vocabulary_size must be below tokenizer.vocab.* 400"),
        (
            {"vocabulary_size": 300, "encoder": {"kind": "checkpoint", "path": "bert"}},
            "checkpoint bert brings its own tokeniser",
        ),
        ({"encoder": {"hidden_size": 48, "heads": 5}}, "heads must divide hidden_size 48, got 5"),
    ],
)
def test_vocabularies_and_widths_that_cannot_be_are_refused(
    student: dict[str, Any], message: str
) -> None:
    raw = {
        "name": "tiny",
        "workspace": "w",
        "source": {"kind": "simulate", "start": "2026-01-01T00:00:00Z", "num_days": 2},
        "features": [],
        "tokenizer": {"vocabulary_size": 400},
    }
    with pytest.raises(SettingsError, match=message):
        parse_settings(raw | {"student": student}, origin="test")
    fine = {"vocabulary_size": 350, "encoder": {"hidden_size": 96, "heads": 12}}
    encoder = parse_settings(raw | {"student": fine}, origin="test").student.encoder
    assert isinstance(encoder, ConfigEncoder)
    assert encoder.num_heads == 12
