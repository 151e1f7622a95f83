"""What an initialiser may ask of a laboratory; see ``platform.initialisers.Nursery``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from driftline.pipelines.strategy_stages import Stages
from driftline.pipelines.teacher import open_tokenizer
from driftline.platform.artefacts import hash_value
from driftline.platform.kinds import foreign_code
from driftline.platform.models.spec import ModelSpec, TeacherSpec
from driftline.platform.settings import ArmsRefreshSettings, ObjectiveSettings, StageSettings
from driftline.platform.stage_teacher import FrozenTeacher
from driftline.platform.stages import StageResult
from driftline.platform.text import Tokenizer, serialise_table


@dataclass(frozen=True)
class StudentNursery:
    """Raises one strategy's student to the point where its distillation starts."""

    stages: Stages
    strategy: ArmsRefreshSettings

    @property
    def spec(self) -> ModelSpec:
        """The student."""
        return self.stages.form.spec

    @property
    def seed(self) -> int:
        """Of everything random."""
        return self.stages.laboratory.seed

    @property
    def teacher(self) -> tuple[TeacherSpec, Path]:
        """The frozen teacher and its weights."""
        return self.stages.teacher_spec, self.stages.laboratory.teacher.weights

    def pretrain(self, spec: ModelSpec | None = None, *, keep_head: bool = False) -> Path:
        """Masked-language training of the student, or of another model over its texts."""
        return self.stages.language(self.strategy.mlm, spec, keep_head=keep_head)

    def imitate(
        self,
        teacher: FrozenTeacher,
        objective: ObjectiveSettings,
        *,
        stage: StageSettings | None = None,
        start: tuple[Path, ...] = (),
    ) -> Path:
        """Masked-language distillation of the student on its texts."""
        recipe = stage or self.strategy.mlm
        return self.stages.imitate(teacher, objective, stage=recipe, start=start)

    def supervise(self) -> Path:
        """Supervised training on stale clicks, from noise."""
        return self.stages.clicks("supervised", "ood", self.strategy.supervised, start=())

    def make(self, name: str, write: Callable[[Path], None], *, key: object) -> Path:
        """A file of the laboratory."""
        return self.stages.laboratory.make(name, write, key=self._with_code(key))

    def train(self, name: str, run: Callable[[Path, Path], StageResult], *, key: object) -> Path:
        """A stage of the initialiser's own, as a node of the laboratory."""
        identity = hash_value(["initialiser", name, self._with_code(key)])
        return self.stages.laboratory.train_node(name, run, identity=identity)

    def _with_code(self, key: object) -> object:
        """An initialiser of the user's own may come to make something else under the same key."""
        code = foreign_code(self.strategy.init)
        return [key, code] if code else key

    @property
    def texts(self) -> Sequence[str]:
        """All product texts known, as the arms read them."""
        laboratory = self.stages.laboratory
        names = [feature.name for feature in laboratory.settings.select(kind="text")]
        table = laboratory.texts.table.select(names)
        return serialise_table(table).to_pylist() if names else []

    @property
    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """The teacher's and the student's."""
        laboratory = self.stages.laboratory
        return open_tokenizer(laboratory.settings), laboratory.tokenizer

    @property
    def masked_teacher(self) -> Path | None:
        """The teacher's language model of before its clicks, if its folder keeps it."""
        return self.stages.laboratory.teacher.masked
