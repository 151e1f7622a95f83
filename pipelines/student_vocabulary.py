"""A student's own small vocabulary, learned from the teacher's corpus (papers.md S4.1, C3)."""

import logging
from collections.abc import Iterator

import pyarrow as pa

from driftline.features.log import ImpressionLog
from driftline.features.texts import known_texts
from driftline.pipelines.teacher_input import RowSerialiser, teacher_columns
from driftline.pipelines.training_sets import known_frame, split_rows
from driftline.platform.models.spec import encoder_spec
from driftline.platform.settings import DriftlineSettings
from driftline.platform.text import Tokenizer, serialise_table, train_tokenizer
from driftline.platform.vocabulary.report import (
    VocabularyReport,
    VocabularyUser,
    compare_vocabularies,
)
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)


def small_tokenizer(settings: DriftlineSettings, *, vocabulary_size: int) -> Tokenizer:
    """A tokeniser of this size; the first call trains it on the stale rows and texts.

    The corpus is that of the teacher's tokeniser (papers.md S0.26), so the file depends on nothing
    but the size, and studies of several sizes share a workspace.

    Raises:
        MissingArtefactError: the log has not been read, or its features not been computed.
        SettingsError: the size does not hold the characters of the corpus.
    """
    path = Workspace.of(settings).student_tokenizer(vocabulary_size)
    if not path.exists():
        train_tokenizer(
            _sentences(settings),
            path,
            settings=settings.tokenizer.model_copy(update={"vocabulary_size": vocabulary_size}),
            seed=settings.seed,
            setting="student.vocabulary_size",
        )
        logger.info("trained a vocabulary of %d pieces for the student", vocabulary_size)
    return Tokenizer(path)


def vocabulary_report(
    settings: DriftlineSettings, *, teacher: Tokenizer, student: Tokenizer
) -> VocabularyReport:
    """Both vocabularies on the product texts of the stale part, as the arms read them."""
    as_of = ImpressionLog.open(Workspace.of(settings).clean, settings).split.ood.end
    names = [feature.name for feature in settings.select(kind="text")]
    texts = serialise_table(known_texts(settings, as_of=as_of).select(names)).to_pylist()
    users = [
        VocabularyUser(
            tokenizer,
            width=encoder_spec(encoder, vocabulary_size=tokenizer.vocabulary_size).hidden_size,
            max_tokens=encoder.max_tokens,
        )
        for tokenizer, encoder in (
            (teacher, settings.teacher.encoder),
            (student, settings.student.encoder),
        )
    ]
    return compare_vocabularies(*users, texts=texts)


def _sentences(settings: DriftlineSettings) -> Iterator[str]:
    split = ImpressionLog.open(Workspace.of(settings).clean, settings).split
    texts = known_texts(settings, as_of=split.ood.end)
    serialiser = RowSerialiser(teacher_columns(settings), texts)
    yield from serialiser.text_strings("page")
    yield from serialiser.text_strings("ad")
    yield from serialiser.tabular_strings(_stale_rows(settings))


def _stale_rows(settings: DriftlineSettings) -> pa.Table:
    """The rows the teacher learned from."""
    ood = ImpressionLog.open(Workspace.of(settings).clean, settings).split.ood
    return split_rows(
        settings,
        known_frame(settings, ood, as_of=ood.end),
        max_rows=settings.teacher.supervised.max_rows,
        keep_rate=settings.teacher.negative_keep_rate or settings.labels.negative_keep_rate,
    ).train
