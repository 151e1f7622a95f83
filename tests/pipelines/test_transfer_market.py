"""Transfer sets of a real frame go where their rows must go: to the teacher and to the student."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny_market import AS_OF, TinyMarket, tiny_settings

from driftline.features.frame_files import read_frames
from driftline.features.texts import known_texts
from driftline.pipelines.teacher_input import RowSerialiser, TeacherInput, teacher_columns
from driftline.pipelines.training_sets import text_rows, write_pair_examples
from driftline.platform.columns import head_columns
from driftline.platform.examples import open_pairs
from driftline.platform.settings import DistilSettings, TokenizerSettings
from driftline.platform.tabular import TabularEncoder
from driftline.platform.text import Tokenizer, serialise_row, train_tokenizer
from driftline.platform.transfer import TransferRows, TransferSet, TransferSource
from driftline.platform.windows import HOUR, Window

SETS: list[dict[str, Any]] = [
    {"kind": "natural", "share": 0.1},
    {"kind": "other_domain", "columns": ["ad__category"], "values": ["c0"]},
    {"kind": "shuffled"},
    {"kind": "generated"},
    {"kind": "permuted_columns"},
    {"kind": "generated_rows"},
    {"kind": "re_paired", "category": "category", "within_hours": 6},
    {"kind": "bootstrap", "of": {"kind": "natural", "share": 0.1}, "times": 10},
    {"kind": "augmented", "steps": ["mask", "delete", "n_gram", "short_disorder"]},
    {
        "kind": "hybrid",
        "parts": [{"share": 0.5, "of": "natural"}, {"share": 0.5, "of": "generated_rows"}],
    },
]


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> TinyMarket:
    return TinyMarket.make(tiny_settings(tmp_path_factory.mktemp("transfer") / "market"))


@pytest.fixture(scope="module")
def source(market: TinyMarket, tmp_path_factory: pytest.TempPathFactory) -> TransferSource:
    frame = read_frames(market.settings, Window(AS_OF - 6 * HOUR, AS_OF))
    texts = known_texts(market.settings, as_of=AS_OF)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    sentences = [serialise_row(row) for row in texts.drop_columns(["text_id"]).to_pylist()]
    train_tokenizer(sentences, path, settings=TokenizerSettings(vocabulary_size=400), seed=0)
    return TransferSource(frame, texts, Tokenizer(path))


def build(raw: dict[str, Any], source: TransferSource) -> TransferRows:
    if raw["kind"] == "other_domain":
        raw = raw | {"values": [source.frame["ad__category"][0].as_py()]}
    return DistilSettings.model_validate({"transfer": raw}).transfer.build(source, seed=3)


@pytest.mark.parametrize("raw", SETS, ids=lambda raw: raw["kind"])
def test_teacher_and_student_read_the_rows_of_every_set(
    raw: dict[str, Any], market: TinyMarket, source: TransferSource, tmp_path: Path
) -> None:
    rows = build(raw, source)
    assert rows.frame.schema.equals(source.frame.schema)
    columns = teacher_columns(market.settings)
    reader = TeacherInput(RowSerialiser(columns, rows.texts), source.tokenizer, max_tokens=200)
    tokens = reader.tokens(rows.frame)
    assert len(tokens) == rows.frame.num_rows
    assert min(len(row) for row in tokens) > 10
    text_ids = rows.texts["text_id"].to_numpy()
    assert (text_rows(rows.frame, text_ids) >= 0).all()  # every product of this market has text
    tabular = TabularEncoder.fit(source.frame, head_columns(market.settings))
    path = write_pair_examples(
        tmp_path / "pairs.arrow", rows.frame, tabular=tabular, text_ids=text_ids
    )
    pairs = open_pairs(path)
    assert len(pairs) == rows.frame.num_rows
    assert np.isfinite(pairs.numbers).all()
    known = (pairs.categories > 0).mean()
    assert known > 0.9  # made-up rows hold categories the student knows


def test_a_composition_study_compares_sets_of_one_size(source: TransferSource) -> None:
    sample = {"kind": "natural", "share": 0.5}
    natural = build(sample, source).provenance
    for name in ("shuffled", "permuted_columns", "re_paired", "generated", "generated_rows"):
        told = build({"kind": name, "of": sample}, source).provenance
        assert told["num_rows"] == natural["num_rows"]
        exact = name not in ("generated", "generated_rows")
        assert told["num_tokens"] == pytest.approx(natural["num_tokens"], rel=0 if exact else 0.1)


def test_a_set_is_named_in_settings_by_its_kind() -> None:
    raw = {"transfer": {"kind": "shuffled", "of": {"kind": "natural", "share": 0.1}}}
    settings = DistilSettings.model_validate(raw)
    assert DistilSettings.model_validate(settings.model_dump(mode="json")) == settings
    assert isinstance(settings.transfer, TransferSet)
