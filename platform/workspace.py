"""Where the artefacts of one market lie. One folder a step; a person can walk through it."""

from dataclasses import dataclass
from pathlib import Path

from driftline.platform.errors import MissingArtefactError
from driftline.platform.settings import DriftlineSettings


@dataclass(frozen=True)
class Workspace:
    """Paths below the workspace folder; nothing is created by asking for one."""

    root: Path

    @classmethod
    def of(cls, settings: DriftlineSettings) -> "Workspace":
        """The workspace of these settings, absolute."""
        return cls(settings.workspace.absolute())

    @property
    def log(self) -> Path:
        """Contract tables as ingested: ``impressions/``, ``catalogue/``, ``counters/``."""
        return self.root / "log"

    @property
    def clean(self) -> Path:
        """The same after the quality check, with ``quarantine/`` and ``verdict.json``."""
        return self.root / "clean"

    @property
    def scales(self) -> Path:
        """Measured drift time scales of all features."""
        return self.root / "scales.json"

    @property
    def features(self) -> Path:
        """Feast: ``registry.db``, ``sources/VIEW/*.parquet``, ``online/``."""
        return self.root / "features"

    @property
    def frames(self) -> Path:
        """Impressions with their features as known then, one Parquet file an hour."""
        return self.root / "frames"

    @property
    def tokenizer(self) -> Path:
        """SentencePiece model."""
        return self.root / "tokenizer" / "tokenizer.model"

    def student_tokenizer(self, vocabulary_size: int) -> Path:
        """SentencePiece model of a student with a small vocabulary; studies have several sizes."""
        return self.root / "tokenizer" / f"student-{vocabulary_size}.model"

    @property
    def teacher(self) -> Path:
        """The frozen teacher and its manifest."""
        return self.root / "teacher"

    @property
    def teachers(self) -> Path:
        """More frozen teachers, one folder each; see ``teacher.ensemble``."""
        return self.root / "teachers"

    @property
    def tasks(self) -> Path:
        """A student of several outcomes; see ``student.tasks``."""
        return self.root / "tasks"

    @property
    def labels(self) -> Path:
        """Soft labels, one folder a teacher."""
        return self.root / "labels"

    @property
    def laboratory(self) -> Path:
        """Stages and files that searches and studies share, by what decides them."""
        return self.root / "laboratory"

    @property
    def searches(self) -> Path:
        """One folder a search: table, results, the winner's settings."""
        return self.root / "search"

    @property
    def arms(self) -> Path:
        """Trained arms with their cached vectors, one folder a version."""
        return self.root / "arms"

    @property
    def bundles(self) -> Path:
        """Published bundles, one folder a fingerprint."""
        return self.root / "bundles"

    @property
    def registry(self) -> Path:
        """MLflow's SQLite file."""
        return self.root / "mlflow.db"

    @property
    def decisions(self) -> Path:
        """What was answered: ``YYYY-MM-DDTHH/REPLICA-NUMBER.parquet``, by hour of event time."""
        return self.root / "decisions"

    @property
    def reports(self) -> Path:
        """Gate pages, the replay report, pictures, JSON."""
        return self.root / "reports"

    @property
    def state(self) -> Path:
        """What runs: process ids, scheduler state, logs."""
        return self.root / "state"

    @property
    def scratch(self) -> Path:
        """Inputs and checkpoints of a training stage under way."""
        return self.root / "scratch"


def require(path: Path, *, made_by: str) -> Path:
    """The path, if it exists.

    Raises:
        MissingArtefactError: it does not; the message names the command that makes it.
    """
    if not path.exists():
        raise MissingArtefactError(f"{path} does not exist; run `driftline {made_by}` first")
    return path
