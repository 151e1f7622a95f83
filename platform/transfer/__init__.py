"""Transfer sets: what the teacher is asked about, and how far it lies from live traffic.

Importing the package makes all its kinds known to the settings; it loads neither torch nor Arrow.
"""

from driftline.platform.transfer.augmentations import Augmentation, Augmented
from driftline.platform.transfer.mixed_sets import Bootstrap, Hybrid, HybridPart
from driftline.platform.transfer.row_sets import GeneratedRows, PermutedColumns, RePaired
from driftline.platform.transfer.sets import (
    LoggedRows,
    MadeRows,
    Natural,
    OtherDomain,
    TransferRows,
    TransferSet,
    TransferSource,
)
from driftline.platform.transfer.text_sets import Generated, Shuffled

__all__ = [
    "Augmentation",
    "Augmented",
    "Bootstrap",
    "Generated",
    "GeneratedRows",
    "Hybrid",
    "HybridPart",
    "LoggedRows",
    "MadeRows",
    "Natural",
    "OtherDomain",
    "PermutedColumns",
    "RePaired",
    "Shuffled",
    "TransferRows",
    "TransferSet",
    "TransferSource",
]
