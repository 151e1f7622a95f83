"""The student of a dual training, without what trained it (papers.md S4.7, T.7)."""

from pathlib import Path

from torch import Tensor

from driftline.platform.checkpoints import save_weights
from driftline.platform.models.spec import ModelSpec, TwinSpec
from driftline.platform.vocabulary.dual_model import DualModel


def student_weights(model: DualModel, student: ModelSpec) -> dict[str, Tensor]:
    """Encoder weights by the names a student has them under: ``arms.*``, or ``encoder.*``.

    Prediction heads, bridge, shared projections and teacher stay behind. The file made of them is
    one to start a stage from (``StageJob.initial``).
    """
    prefix = "arms.backbones.{}." if isinstance(student, TwinSpec) else "encoder."
    return {
        prefix.format(number) + name: value
        for number, encoder in enumerate(model.encoders)
        for name, value in encoder.state_dict().items()
    }


def export_student(model: DualModel, student: ModelSpec, destination: Path) -> None:
    """Write the student's encoders, whole or not at all."""
    save_weights(destination, student_weights(model, student))
