"""A small corpus, two vocabularies learned from it, and models small enough for tests."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from driftline.platform.checkpoints import save_weights
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import EncoderSpec, HeadSpec, TeacherSpec, TwinSpec
from driftline.platform.settings import StageSettings, TokenizerSettings
from driftline.platform.stages import StageResult
from driftline.platform.text import Tokenizer, train_tokenizer
from driftline.platform.vocabulary.dual_training import DualJob
from driftline.platform.vocabulary.start import DualVocabulary
from driftline.platform.vocabulary.words import WordTexts, hold_out

COLOURS = ("red", "green", "purple", "yellow", "silver", "golden")
THINGS = ("running shoe", "umbrella", "winter jacket", "bicycle", "garden lamp", "notebook")
USES = ("for long rainy days", "with a warranty", "made of wood", "for children", "as a present")


def corpus() -> list[str]:
    """180 distinct product texts of two fields."""
    return [
        f"title: {colour} {thing} {number} [SEP] description: a {colour} {thing} {use}"
        for number, (colour, thing, use) in enumerate(
            (colour, thing, use) for colour in COLOURS for thing in THINGS for use in USES
        )
    ]


@dataclass(frozen=True)
class TwoVocabularies:
    """Corpus files, tokenisers, and specs that fit them."""

    root: Path
    teacher_tokenizer: Tokenizer
    student_tokenizer: Tokenizer
    teacher: TeacherSpec
    student: TwinSpec
    frozen: Path
    """Weights of the market's teacher, encoder and head."""

    def job(self, variant: str, **changes: Any) -> DualJob:
        """A quick dual training; ``recipe`` holds changes of the recipe."""
        stage = StageSettings(
            optimizer="lamb", learning_rate=2e-2, batch_size=32, num_epochs=2, patience=99
        )
        recipe = {"variant": variant, "stage": stage} | changes.pop("recipe", {})
        job = DualJob(
            name=variant,
            student=self.student,
            teacher=None if variant == "none" else self.teacher,
            recipe=DualVocabulary.model_validate(recipe),
            corpus=self.root / "train.safetensors",
            held_out=self.root / "held_out.safetensors",
            start=None if variant == "none" else self.frozen,
            seed=5,
        )
        return replace(job, **changes)


@pytest.fixture(scope="session")
def market(tmp_path_factory: pytest.TempPathFactory) -> TwoVocabularies:
    root = tmp_path_factory.mktemp("two-vocabularies")
    tokenizers = {}
    for name, size in (("teacher", 480), ("student", 340)):
        path = root / f"{name}.model"
        train_tokenizer(corpus(), path, settings=TokenizerSettings(vocabulary_size=size), seed=0)
        tokenizers[name] = Tokenizer(path)
    for name, texts in zip(("train", "held_out"), hold_out(corpus(), share=0.2), strict=True):
        WordTexts.of(texts, **tokenizers).save(root / f"{name}.safetensors")
    teacher = TeacherSpec(
        encoder=EncoderSpec(
            hidden_size=24,
            num_layers=3,
            num_heads=3,
            vocabulary_size=tokenizers["teacher"].vocabulary_size,
            max_tokens=40,
        )
    )
    student = TwinSpec(
        encoder=EncoderSpec(
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            vocabulary_size=tokenizers["student"].vocabulary_size,
            max_tokens=44,
        ),
        head=HeadSpec(vector_size=16, cardinalities=(4, 4), num_numbers=3, hidden_sizes=(8,)),
    )
    torch.manual_seed(1)
    save_weights(root / "frozen.safetensors", build_model(teacher).state_dict())
    return TwoVocabularies(
        root=root,
        teacher_tokenizer=tokenizers["teacher"],
        student_tokenizer=tokenizers["student"],
        teacher=teacher,
        student=student,
        frozen=root / "frozen.safetensors",
    )


@dataclass
class Nursery:
    """A nursery without a market around it: every file below one folder, by name."""

    root: Path
    spec: TwinSpec
    teacher: tuple[TeacherSpec, Path]
    tokenizers: tuple[Tokenizer, Tokenizer]
    masked_teacher: Path | None = None
    seed: int = 3
    texts: tuple[str, ...] = tuple(corpus())

    def pretrain(self, spec: object = None) -> Path:
        raise AssertionError("dual training pre-trains for itself")

    def supervise(self) -> Path:
        raise AssertionError("dual training sees no click")

    def make(self, name: str, write: Callable[[Path], None], *, key: object) -> Path:
        write(self.root / name)
        return self.root / name

    def train(self, name: str, run: Callable[[Path, Path], StageResult], *, key: object) -> Path:
        run(self.root / f"{name}.safetensors", self.root / f"{name}.checkpoints")
        return self.root / f"{name}.safetensors"


@pytest.fixture
def nursery(market: TwoVocabularies, tmp_path: Path) -> Nursery:
    tokenizers = (market.teacher_tokenizer, market.student_tokenizer)
    return Nursery(tmp_path, market.student, (market.teacher, market.frozen), tokenizers)
