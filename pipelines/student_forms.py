"""Forms of student that read the same rows differently (papers.md S0.30, Table 2).

A form knows its model, writes its example files and scores rows. Strategies know nothing of forms.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.laboratory_rows import Rows, TextSet
from driftline.pipelines.teacher_input import RowSerialiser, TeacherInput, teacher_columns
from driftline.pipelines.training_sets import clicks, write_pair_examples
from driftline.platform.examples import (
    Ragged,
    Texts,
    TokenRows,
    open_texts,
    write_texts,
    write_tokens,
)
from driftline.platform.inference import load_model, predict_logits
from driftline.platform.inputs import open_inputs
from driftline.platform.models.spec import (
    EncoderSpec,
    HeadOnlySpec,
    HeadSpec,
    MlpSpec,
    ModelSpec,
    SingleSpec,
    TwinSpec,
    encoder_spec,
    head_spec,
)
from driftline.platform.sampling import unit_hash
from driftline.platform.tabular import TabularEncoder

FormName = Literal["twin", "twin_text", "single", "mlp"]
"""``twin`` is the student that is served; ``twin_text`` is the same without categories and
numbers; ``single`` reads the teacher's serialisation in one tower of the student's size; ``mlp``
is the baseline."""

HELD_OUT_TEXTS: Final = 0.05
MIN_HELD_OUT_TEXTS: Final = 50  # fewer would stop masked-language training by chance
MAX_SERIALISED_ROWS: Final = 50_000


@dataclass
class StudentForm(ABC):
    """A form of student in one laboratory."""

    laboratory: Laboratory

    @cached_property
    @abstractmethod
    def spec(self) -> ModelSpec:
        """The model that stages train."""

    @abstractmethod
    def write(self, destination: Path, rows: Rows) -> None:
        """Write rows as this model reads them."""

    @abstractmethod
    def language(self) -> tuple[Path, Path | None]:
        """Texts for masked-language training, and held-out ones if there are enough."""

    @property
    def has_encoder(self) -> bool:
        """Whether masked-language training has anything to train."""
        return not isinstance(self.spec, HeadOnlySpec | MlpSpec)

    @property
    def reader(self) -> TeacherInput | None:
        """How a row becomes one sequence of tokens, for a form that reads rows so."""
        return None

    def examples(self, rows: Rows) -> Path:
        """The example file of these rows; written once."""
        name = f"{type(self).__name__.lower()}.arrow"
        return self.laboratory.make(name, lambda path: self.write(path, rows), key=rows.key)

    def texts(self, texts: TextSet) -> Path | None:
        """The file of texts beside the examples, if this form reads one."""
        return self.laboratory.text_file(texts) if self.laboratory.has_text else None

    def logits(self, rows: Rows, *weights: Path) -> NDArray[np.float64]:
        """Logits of (no click, click) on the thinned prior; later weights win. ``[N, 2]``."""
        inputs = open_inputs(self.spec, self.examples(rows), texts=self.texts(rows.texts))
        with torch.inference_mode():
            return predict_logits(load_model(self.spec, *weights), inputs).astype(np.float64)


class TwinForm(StudentForm):
    """Twin arms and a head; without text a head alone (papers.md S0.10-S0.14)."""

    @cached_property
    def tabular(self) -> TabularEncoder:
        """What the head reads beside the vectors."""
        return self.laboratory.tabular

    @cached_property
    def encoder(self) -> EncoderSpec | None:
        """One arm."""
        return student_encoder(self.laboratory) if self.laboratory.has_text else None

    @cached_property
    def head(self) -> HeadSpec:
        """The fusion."""
        return head_spec(
            self.laboratory.settings.student.head,
            vector_size=self.encoder.hidden_size if self.encoder else 0,
            cardinalities=self.tabular.cardinalities,
            num_numbers=self.tabular.num_numbers,
        )

    @cached_property
    def spec(self) -> ModelSpec:
        """Arms and head."""
        if self.encoder is None:
            return HeadOnlySpec(head=self.head)
        tie_arms = self.laboratory.settings.student.tie_arms
        return TwinSpec(encoder=self.encoder, tie_arms=tie_arms, head=self.head)

    def write(self, destination: Path, rows: Rows) -> None:
        """Pairs."""
        write_pair_examples(
            destination,
            rows.frame,
            tabular=self.tabular,
            text_ids=rows.texts.table["text_id"].to_numpy(),
            teacher_logits=rows.teacher_logits,
            teacher_rows=rows.teacher_rows,
        )

    def language(self) -> tuple[Path, Path | None]:
        """One sequence a product (papers.md A0.18)."""
        laboratory = self.laboratory
        whole = laboratory.text_file(laboratory.texts)
        position = unit_hash(laboratory.texts.table["text_id"], salt="driftline-mlm")
        held_out = position < HELD_OUT_TEXTS
        if held_out.sum() < MIN_HELD_OUT_TEXTS:
            return whole, None
        files = (
            laboratory.make(
                name,
                lambda path, chosen=chosen: _write_part(whole, path, chosen),  # type: ignore[misc]
                key=laboratory.texts.key,
            )
            for name, chosen in (("learned.arrow", ~held_out), ("held_out.arrow", held_out))
        )
        learned, validation = files
        return learned, validation


class TwinTextForm(TwinForm):
    """The twin student that knows no category and no number."""

    @cached_property
    def tabular(self) -> TabularEncoder:
        """Nothing."""
        return TabularEncoder((), ())


class SingleForm(StudentForm):
    """One tower of the student's size over the teacher's serialisation: not factorised."""

    @cached_property
    def spec(self) -> ModelSpec:
        """The student's encoder, as long as the teacher's rows."""
        max_tokens = self.laboratory.settings.teacher.encoder.max_tokens
        encoder = student_encoder(self.laboratory).model_copy(update={"max_tokens": max_tokens})
        return SingleSpec(encoder=encoder)

    def write(self, destination: Path, rows: Rows) -> None:
        """Serialised rows."""
        tokens = Ragged.of(self._reader(rows.texts).tokens(rows.frame))
        labels = (clicks(rows.frame), rows.teacher_logits, rows.teacher_rows)
        write_tokens(destination, TokenRows(tokens, *labels))

    def language(self) -> tuple[Path, Path | None]:
        """Serialised stale rows, as the teacher learned them (papers.md A0.18)."""
        laboratory = self.laboratory
        train, validation = laboratory.click_rows("ood", max_rows=MAX_SERIALISED_ROWS)
        return self.examples(train), self.examples(validation)

    def texts(self, texts: TextSet) -> Path | None:
        """The rows hold their texts."""
        return None

    @property
    def reader(self) -> TeacherInput:
        """As the market's first teacher does, with the student's tokeniser."""
        return self._reader(self.laboratory.texts)

    def _reader(self, texts: TextSet) -> TeacherInput:
        laboratory = self.laboratory
        return TeacherInput(
            RowSerialiser(teacher_columns(laboratory.settings), texts.table),
            laboratory.tokenizer,
            laboratory.settings.teacher.encoder.max_tokens,
        )


class MlpForm(StudentForm):
    """The baseline: hashed ids, bag of words, categories, numbers (papers.md S0.34)."""

    @cached_property
    def spec(self) -> ModelSpec:
        """As the replay's peer."""
        settings, tabular = self.laboratory.settings, self.laboratory.tabular
        return MlpSpec(
            cardinalities=tabular.cardinalities,
            num_numbers=tabular.num_numbers,
            num_word_buckets=settings.tokenizer.vocabulary_size + 8,
            hidden_sizes=settings.student.head.hidden_sizes,
            dropout=settings.student.head.dropout,
        )

    def write(self, destination: Path, rows: Rows) -> None:
        """Pairs with hashed products."""
        assert isinstance(self.spec, MlpSpec)
        write_pair_examples(
            destination,
            rows.frame,
            tabular=self.laboratory.tabular,
            text_ids=rows.texts.table["text_id"].to_numpy(),
            teacher_logits=rows.teacher_logits,
            teacher_rows=rows.teacher_rows,
            product_buckets=self.spec.num_product_buckets,
        )

    def language(self) -> tuple[Path, Path | None]:
        """There is no encoder.

        Raises:
            ValueError: always.
        """
        raise ValueError("the mlp baseline has no encoder; give it init random or supervised")


FORMS: Final[dict[FormName, type[StudentForm]]] = {
    "twin": TwinForm,
    "twin_text": TwinTextForm,
    "single": SingleForm,
    "mlp": MlpForm,
}


def student_form(name: FormName, laboratory: Laboratory) -> StudentForm:
    """The form of that name in this laboratory.

    Raises:
        ValueError: there is no such form.
    """
    if name not in FORMS:
        raise ValueError(f"form must be one of {get_args(FormName)}, got {name!r}")
    return FORMS[name](laboratory)


def student_encoder(laboratory: Laboratory) -> EncoderSpec:
    """The student's encoder over its own vocabulary."""
    return encoder_spec(
        laboratory.settings.student.encoder,
        vocabulary_size=laboratory.tokenizer.vocabulary_size,
    )


def _write_part(source: Path, destination: Path, chosen: NDArray[np.bool_]) -> None:
    whole = open_texts(source)
    offsets, values = whole.tokens.offsets, whole.tokens.values
    rows = np.flatnonzero(chosen)
    tokens = [values[offsets[row] : offsets[row + 1]] for row in rows]
    write_texts(destination, Texts(whole.text_id[rows], Ragged.of(tokens)))
