"""What a study can measure of a trained model, and how each measure is read. Imports nothing."""

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True)
class Measure:
    """How a number is named, printed and judged."""

    label: str
    better: Literal["higher", "lower"] = "higher"
    digits: int = 4
    relative: bool = False
    """Shown as a delta in percent of the baseline's, like the paper's tables (papers.md S0.28)."""
    exact: bool = False
    """The same for every seed, such as a count of parameters: one trial is enough to know it."""


MEASURES: Final[dict[str, Measure]] = {
    # Ranking
    "ood_auc": Measure("OOD AUC, finished", relative=True),
    "id_auc": Measure("ID AUC", relative=True),
    "id_soft_auc": Measure("ID soft AUC, finished", relative=True),
    "distilled_ood_auc": Measure("OOD AUC", relative=True),
    "distilled_id_auc": Measure("ID AUC before fine-tuning", relative=True),
    "distilled_id_soft_auc": Measure("ID soft AUC", relative=True),
    "head_auc": Measure("AUC, head products", relative=True),
    "tail_auc": Measure("AUC, tail products", relative=True),
    "new_auc": Measure("AUC, new products", relative=True),
    "mlm_accuracy": Measure("masked-word accuracy", relative=True),
    # Fit and level
    "log_loss": Measure("log loss", better="lower"),
    "normalised_entropy": Measure("NE", better="lower"),
    "calibration_ratio": Measure("predicted per click"),
    "calibration_error": Measure("calibration error", better="lower"),
    # What went in
    "transfer_rows": Measure("transfer rows", digits=0, exact=True),
    "transfer_tokens": Measure("transfer tokens", digits=0),
    "updates": Measure("updates", digits=0),
    "similarity": Measure("word-rank similarity S", digits=2),
    # What it cost
    "core_seconds": Measure("core-seconds", better="lower", digits=1),
    "new_core_seconds": Measure("core-seconds, not shared", better="lower", digits=1),
    "num_stages": Measure("stages", better="lower", digits=0),
    "num_stages_trained": Measure("stages trained", better="lower", digits=0),
    "teacher_passes": Measure("teacher passes", better="lower", digits=0),
    "distil_seconds": Measure("core-seconds of distillation", better="lower", digits=1),
    "encode_seconds": Measure("seconds to encode", better="lower", digits=3),
    "num_parameters": Measure("parameters", better="lower", digits=0, exact=True),
    "num_encoder_parameters": Measure(
        "parameters of the encoder", better="lower", digits=0, exact=True
    ),
    "num_embedding_parameters": Measure(
        "parameters of the embeddings", better="lower", digits=0, exact=True
    ),
    "model_mib": Measure("MiB on disk", better="lower", digits=1, exact=True),
}
"""All measures that a study's columns, orderings and plot may name.

``distilled_*`` are of the student before fine-tuning, where the paper measures its OOD and ID-soft
columns (papers.md A0.19)."""
