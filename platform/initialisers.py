"""What a student's weights are before anything is distilled into it (papers.md S0.17, S1.13, C7).

This module is read with the settings and loads no torch; the weights are cut in ``transplant``.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from driftline.platform.kinds import Kind

if TYPE_CHECKING:
    from driftline.platform.models.spec import ModelSpec, TeacherSpec
    from driftline.platform.stages import StageResult
    from driftline.platform.text import Tokenizer


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

    def pretrain(self, spec: "ModelSpec | None" = None) -> Path:
        """Masked-language training on the product texts: weights of the encoders only.

        Of the student, or of another model over the same texts.
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

        None where the teacher had no such stage.
        """


class Initialiser(Kind):
    """Base of all initialisers."""

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

    def weights(self, nursery: Nursery) -> tuple[Path, ...]:
        """Encoders only."""
        return (nursery.pretrain(),)


class SupervisedStart(Initialiser):
    """Supervised training on stale clicks (papers.md S0.17c)."""

    kind: Literal["supervised"] = "supervised"

    def weights(self, nursery: Nursery) -> tuple[Path, ...]:
        """Arms and head."""
        return (nursery.supervise(),)
