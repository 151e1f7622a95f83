"""Example files of a tiny market for the tests of training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from driftline.platform.examples import (
    PairRows,
    Ragged,
    Texts,
    TokenRows,
    write_pairs,
    write_texts,
    write_tokens,
)
from driftline.platform.models.spec import (
    EncoderSpec,
    HeadOnlySpec,
    HeadSpec,
    MlpSpec,
    TeacherSpec,
    TwinSpec,
)
from driftline.platform.settings import StageSettings
from driftline.platform.stages import StageJob

NUM_TEXTS = 60
VOCABULARY = 90
WIDTH = 16


@dataclass(frozen=True)
class TinyMarket:
    """Files and specs that fit together; ``job`` makes a stage of them."""

    root: Path
    twin: TwinSpec
    head: HeadOnlySpec
    mlp: MlpSpec
    teacher: TeacherSpec

    def file(self, name: str) -> Path:
        return self.root / name

    def job(self, kind: str, folder: Path, **changes: Any) -> StageJob:
        """A quick stage of a kind (head, twin, mlp, teacher, mlm) below ``folder``."""
        files: dict[str, Any] = {
            "head": {"model": self.head, "vectors": self.file("vectors.safetensors")},
            "twin": {"model": self.twin, "texts": self.file("texts.arrow")},
            "mlp": {"model": self.mlp, "texts": self.file("texts.arrow")},
            "teacher": {
                "model": self.teacher,
                "examples": self.file("rows.arrow"),
                "validation": self.file("rows.arrow"),
            },
            "mlm": {
                "model": self.twin,
                "task": "mlm",
                "examples": self.file("texts.arrow"),
                "validation": self.file("texts.arrow"),
            },
        }
        job: dict[str, Any] = {
            "name": kind,
            "task": "clicks",
            "examples": self.file("train.arrow"),
            "validation": self.file("validation.arrow"),
            "output": folder / f"{kind}.safetensors",
            "checkpoints": folder / f"{kind}-checkpoints",
            "stage": StageSettings(batch_size=64, learning_rate=3e-3, num_epochs=2),
            "seed": 5,
            "stop_on": "loss",
        }
        return StageJob(**(job | files[kind] | changes))


def tiny_pairs(num_rows: int, *, seed: int) -> PairRows:
    """Pairs whose clicks follow one number, one category and the first token of the ad."""
    random = np.random.default_rng(seed)
    numbers = random.normal(size=(num_rows, 3)).astype(np.float32)
    categories = random.integers(0, 4, (num_rows, 2)).astype(np.int32)
    ad = random.integers(-1, NUM_TEXTS, num_rows).astype(np.int32)
    logit = 1.5 * numbers[:, 0] + 0.5 * (categories[:, 0] - 1.5) + np.where(ad % 2 == 0, 1.0, -1.0)
    clicked = (random.random(num_rows) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    teacher = np.stack([np.zeros(num_rows), logit], axis=1).astype(np.float32)
    teacher[::5] = np.nan
    page = random.integers(-1, NUM_TEXTS, num_rows).astype(np.int32)
    return PairRows(page, ad, categories, numbers, clicked, teacher, page, ad)


def tiny_texts() -> Ragged:
    """Texts of 0 to 12 tokens; the first token tells odd from even."""
    random = np.random.default_rng(0)
    rows = [
        np.append(7 + number % 2, random.integers(9, VOCABULARY, number % 12))
        for number in range(NUM_TEXTS)
    ]
    return Ragged.of([row[: number % 13].astype(np.int32) for number, row in enumerate(rows)])


@pytest.fixture(scope="session")
def tiny_market(tmp_path_factory: pytest.TempPathFactory) -> TinyMarket:
    root = tmp_path_factory.mktemp("tiny-market")
    texts = tiny_texts()
    write_pairs(root / "train.arrow", tiny_pairs(640, seed=1))
    write_pairs(root / "validation.arrow", tiny_pairs(300, seed=2))
    write_texts(root / "texts.arrow", Texts(np.arange(100, 100 + NUM_TEXTS), texts))
    clicked = (np.arange(NUM_TEXTS) % 2).astype(np.float32)
    write_tokens(root / "rows.arrow", TokenRows(texts, clicked))
    random = np.random.default_rng(3)
    vectors = random.normal(size=(NUM_TEXTS, WIDTH)).astype(np.float32)
    vectors[:, 0] = np.where(np.arange(NUM_TEXTS) % 2 == 0, 1.0, -1.0)
    save_file({"page": vectors, "ad": vectors}, root / "vectors.safetensors")
    encoder = EncoderSpec(
        hidden_size=WIDTH, num_layers=2, num_heads=1, vocabulary_size=VOCABULARY, max_tokens=12
    )
    head = HeadSpec(vector_size=WIDTH, cardinalities=(4, 4), num_numbers=3, hidden_sizes=(32, 16))
    return TinyMarket(
        root=root,
        twin=TwinSpec(encoder=encoder, head=head),
        head=HeadOnlySpec(head=head),
        mlp=MlpSpec(cardinalities=(4, 4), num_numbers=3, num_product_buckets=NUM_TEXTS),
        teacher=TeacherSpec(encoder=encoder),
    )


@pytest.fixture(scope="session")
def bert_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local checkpoint folder: a tiny BERT with a word tokeniser of 12 tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert-checkpoint")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "shoe", "wet", "[", "]", "a", "b"]
    tokenizer = Tokenizer(
        models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder
