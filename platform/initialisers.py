"""What a student's weights are before anything is distilled into it (papers.md S0.17, S1.13, C7).

This module is read with the settings and loads no torch; the weights are cut in ``transplant``.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, Self

from pydantic import Field, PositiveInt, model_validator

from driftline.platform.errors import SettingsError
from driftline.platform.kinds import Kind

if TYPE_CHECKING:
    from driftline.platform.models.spec import ModelSpec, TeacherSpec
    from driftline.platform.settings import ObjectiveSettings, StageSettings
    from driftline.platform.stage_teacher import FrozenTeacher
    from driftline.platform.stages import StageResult
    from driftline.platform.text import Tokenizer


Recipe = Literal["mlm", "supervised"]
"""A stage of ``student.arms_refresh`` that comes before the distillation."""


class Nursery(Protocol):
    """What an initialiser may use. Every stage is trained once, whoever asks for it."""

    @property
    def spec(self) -> "ModelSpec":
        """The student to be initialised."""

    @property
    def seed(self) -> int:
        """Of everything random."""

    @property
    def teacher(self) -> "tuple[TeacherSpec, Path]":
        """The frozen teacher and its weights."""

    def pretrain(self, spec: "ModelSpec | None" = None, *, keep_head: bool = False) -> Path:
        """Masked-language training on the product texts: weights of the encoders only.

        Of the student, or of another model over the same texts; with ``keep_head`` also of the
        prediction head: a deeper model may teach its language (``mlm_distil``) or give its layers.
        """

    def imitate(
        self,
        teacher: "FrozenTeacher",
        objective: "ObjectiveSettings",
        *,
        stage: "StageSettings | None" = None,
        start: tuple[Path, ...] = (),
    ) -> Path:
        """Masked-language distillation of the student on the same texts: its encoders only.

        By the recipe of ``pretrain`` unless a stage is given.
        """

    def supervise(self) -> Path:
        """Supervised training of the student on stale clicks; gives all its weights."""

    def make(self, name: str, write: Callable[[Path], None], *, key: object) -> Path:
        """A file that ``write`` writes, unless it was written before under the same key."""

    def train(self, name: str, run: "Callable[[Path, Path], StageResult]", *, key: object) -> Path:
        """Weights that a stage of the initialiser's own trains, unless trained before.

        ``run(output, checkpoints)`` trains into a file, resuming from a folder: both are the same
        in every call under the same key, so that a killed stage goes on. Its cost is counted.
        """

    @property
    def texts(self) -> "Sequence[str]":
        """All product texts as strings, as the arms read them; see ``text.serialise_table``."""

    @property
    def tokenizers(self) -> "tuple[Tokenizer, Tokenizer]":
        """The teacher's and the student's; twice the same where they share one vocabulary."""

    @property
    def masked_teacher(self) -> Path | None:
        """``encoder.*`` of the teacher after masked-language training, before it saw a click.

        And ``predictor.*``, its prediction head. None where the teacher had no such stage.
        """


class Initialiser(Kind):
    """Base of all initialisers."""

    @property
    def is_whole(self) -> bool:
        """Whether ``weights`` are those of a whole student; most starts leave the head to chance.

        One that does not say so needs a stage that trains a head.
        """
        return False

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """Stages of the strategy by whose recipes ``weights`` trains; a search tunes no others.

        ``pretrain`` and ``imitate`` go by ``mlm``, ``supervise`` by ``supervised``.
        """
        return ()

    def check(self, spec: "ModelSpec", teacher: "TeacherSpec | None" = None) -> None:
        """Make sure that this start fits the student, before anything is trained.

        ``weights`` checks again; a strategy calls this before its first stage, a search before its
        trials.

        Args:
            spec: The student.
            teacher: The teacher, where one is known.

        Raises:
            SettingsError: widths, depths, vocabularies or files do not fit.
        """
        return

    def check_sources(self, nursery: Nursery) -> None:
        """Make sure that what this start is made of exists, before anything is trained.

        Called where ``check`` is, for what only the market knows.

        Raises:
            SettingsError: it does not, or does not fit.
        """
        return

    @abstractmethod
    def weights(self, nursery: Nursery) -> tuple[Path, ...]:
        """Files of weights to start from, later ones win; none for a random start."""


class RandomStart(Initialiser):
    """Noise (papers.md S0.17a)."""

    kind: Literal["random"] = "random"

    def weights(self, nursery: Nursery) -> tuple[Path, ...]:
        """Nothing to start from."""
        return ()


class MlmStart(Initialiser):
    """Masked-language pre-training of the student's own encoders (papers.md S0.17b, S1.13d)."""

    kind: Literal["mlm"] = "mlm"

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """See ``Initialiser``."""
        return ("mlm",)

    def weights(self, nursery: Nursery) -> tuple[Path, ...]:
        """Encoders only."""
        return (nursery.pretrain(),)


class SupervisedStart(Initialiser):
    """Supervised training on stale clicks (papers.md S0.17c)."""

    kind: Literal["supervised"] = "supervised"

    @property
    def is_whole(self) -> bool:
        """See ``Initialiser``."""
        return True

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """See ``Initialiser``."""
        return ("supervised",)

    def weights(self, nursery: Nursery) -> tuple[Path, ...]:
        """Arms and head."""
        return (nursery.supervise(),)


class EmbeddingsStart(Initialiser):
    """Word-piece embeddings only, from a pre-trained one-layer model (papers.md S1.13b)."""

    kind: Literal["embeddings"] = "embeddings"

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """See ``Initialiser``."""
        return ("mlm",)

    def check(self, spec: "ModelSpec", teacher: "TeacherSpec | None" = None) -> None:
        """See ``Initialiser``."""
        from driftline.platform.transplant import of_depth

        of_depth(spec, 1)

    def weights(self, nursery: Nursery) -> tuple[Path, ...]:
        """The token table of each encoder; the one layer is thrown away."""
        from driftline.platform.transplant import of_depth

        self.check(nursery.spec)
        shallow = nursery.pretrain(of_depth(nursery.spec, 1))
        return (_cut(nursery, "token-embeddings", shallow, tokens_only=True),)


class TruncationStart(Initialiser):
    """Embeddings and bottom layers of a deeper pre-trained model (papers.md S1.13c, A1.6)."""

    kind: Literal["truncation"] = "truncation"
    num_layers: PositiveInt = 12
    """Depth of the deeper model; its width and vocabulary are the student's."""

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """See ``Initialiser``."""
        return ("mlm",)

    def check(self, spec: "ModelSpec", teacher: "TeacherSpec | None" = None) -> None:
        """See ``Initialiser``."""
        from driftline.platform.transplant import encoder_of, of_depth

        of_depth(spec, self.num_layers)
        needed = encoder_of(spec).num_layers
        if self.num_layers < needed:
            raise SettingsError(
                f"init.truncation: num_layers must be at least {needed}, the student's own depth, "
                f"got {self.num_layers}"
            )

    def weights(self, nursery: Nursery) -> tuple[Path, ...]:
        """Encoders only."""
        from driftline.platform.transplant import of_depth

        self.check(nursery.spec)
        deeper = nursery.pretrain(of_depth(nursery.spec, self.num_layers), keep_head=True)
        return (_cut(nursery, "truncated", deeper),)


class LayersStart(Initialiser):
    """Embeddings and picked layers of a deeper encoder of the same width (papers.md S3.3)."""

    kind: Literal["layers"] = "layers"
    layers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    """The other's layer for each of the student's, counted from 1: 1, 3, 5, 8, 10, 12."""
    source: Literal["deeper", "teacher", "masked_teacher"] = "deeper"
    """A deeper model pre-trained for this, the frozen teacher, or the teacher before its clicks."""
    num_layers: PositiveInt | None = None
    """Depth of the deeper model, 12 when not given; a teacher has its own."""

    @model_validator(mode="after")
    def _layers_exist(self) -> Self:
        if self.source != "deeper" and self.num_layers is not None:
            raise ValueError(
                f"num_layers is for source 'deeper', {self.source!r} has its own depth; "
                "leave it out"
            )
        if self.source == "deeper" and max(self.layers) > self._depth:
            raise ValueError(
                f"layers must lie in 1..{self._depth}, the layers of the deeper model "
                f"(num_layers), got {max(self.layers)}"
            )
        return self

    @property
    def _depth(self) -> int:
        return self.num_layers or 12

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """See ``Initialiser``."""
        return ("mlm",) if self.source == "deeper" else ()

    def check(self, spec: "ModelSpec", teacher: "TeacherSpec | None" = None) -> None:
        """See ``Initialiser``."""
        from driftline.platform.transplant import check_layers, check_widths, encoder_of, of_depth

        student = encoder_of(spec)
        if self.source == "deeper":
            of_depth(spec, self._depth)
            num_layers, source = self._depth, "the deeper model"
        elif teacher is None:
            return
        else:
            num_layers, source = teacher.encoder.num_layers, "the teacher"
            check_widths(
                student,
                hidden_size=teacher.encoder.hidden_size,
                vocabulary_size=teacher.encoder.vocabulary_size,
                num_heads=teacher.encoder.num_heads,
                source=source,
            )
        check_layers(
            self.layers, num_student=student.num_layers, num_donor=num_layers, source=source
        )

    def check_sources(self, nursery: Nursery) -> None:
        """See ``Initialiser``."""
        self.check(nursery.spec, None if self.source == "deeper" else nursery.teacher[0])
        if self.source == "masked_teacher" and nursery.masked_teacher is None:
            raise SettingsError(
                "init.layers: source 'masked_teacher' needs teacher.mlm, which this teacher went "
                "without; take source 'teacher'"
            )

    def weights(self, nursery: Nursery) -> tuple[Path, ...]:
        """Encoders only."""
        from driftline.platform.transplant import of_depth

        self.check_sources(nursery)
        if self.source == "deeper":
            donor = nursery.pretrain(of_depth(nursery.spec, self._depth), keep_head=True)
        elif self.source == "teacher":
            donor = nursery.teacher[1]
        else:
            masked = nursery.masked_teacher
            assert masked is not None, "check_sources"
            donor = masked
        return (_cut(nursery, "picked-layers", donor, layers=self.layers),)


class CheckpointStart(Initialiser):
    """Weights from a local file or folder; for a student whose token ids mean the same.

    For a student with a checkpoint's own tokeniser, see ``encoder.kind: checkpoint``.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    path: Path
    """A safetensors file of ours (a teacher's, a student's), or a ``transformers`` folder with
    config.json and safetensors."""
    layers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """The checkpoint's layer for each of the student's, counted from 1 (papers.md S3.3); it must
    have as many as the student when not given."""

    def check(self, spec: "ModelSpec", teacher: "TeacherSpec | None" = None) -> None:
        """See ``Initialiser``."""
        from driftline.platform.transplant import check_donor, encoder_of, open_donors

        encoder = encoder_of(spec)
        for donor in open_donors(self.path):
            check_donor(encoder, donor, layers=self.layers)
            if self.layers is None and donor.num_layers != encoder.num_layers:
                raise SettingsError(
                    f"init.checkpoint: {self.path} has {donor.num_layers} layers, the student "
                    f"{encoder.num_layers}; say which ones by `layers`"
                )

    def weights(self, nursery: Nursery) -> tuple[Path, ...]:
        """Encoders only: a head belongs to the inputs it was trained with."""
        self.check(nursery.spec)
        return (_cut(nursery, "checkpoint", self.path, layers=self.layers),)


def _cut(
    nursery: Nursery,
    name: str,
    source: Path,
    *,
    layers: tuple[int, ...] | None = None,
    tokens_only: bool = False,
) -> Path:
    """The student's encoders cut out of weights, once for the same content."""
    from driftline.platform.artefacts import hash_file
    from driftline.platform.transplant import open_donors, transplant

    spec, seed = nursery.spec, nursery.seed
    donors = open_donors(source)
    files = sorted({path for donor in donors for path in donor.files.values()})
    key = {
        "files": [hash_file(path) for path in files],
        "spec": spec.model_dump(mode="json"),
        "layers": layers,
        "tokens_only": tokens_only,
        "seed": seed,
    }

    def write(path: Path) -> None:
        transplant(path, spec, donors, layers=layers, tokens_only=tokens_only, seed=seed)

    return nursery.make(f"{name}.safetensors", write, key=key)
