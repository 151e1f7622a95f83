"""Matches of the student's inner features with the teacher's (papers.md C12). One door to all.

The base and where a match takes place: ``match_points``; states and any module:
``hidden_matches``; attention: ``attention_matches``. Nothing here imports torch.
"""

from driftline.platform.distillation.attention_matches import (
    AttentionCe,
    AttentionCeMean,
    AttentionKl,
    AttentionMatch,
    AttentionMse,
    AttentionMseSum,
)
from driftline.platform.distillation.hidden_matches import (
    Cos,
    EmbeddingMse,
    Fsp,
    HiddenMse,
    ModuleMatch,
    Nst,
    Pkd,
    masked_mean,
)
from driftline.platform.distillation.match_points import LayerMatch, Match, ModelShape, Point

__all__ = [
    "AttentionCe",
    "AttentionCeMean",
    "AttentionKl",
    "AttentionMatch",
    "AttentionMse",
    "AttentionMseSum",
    "Cos",
    "EmbeddingMse",
    "Fsp",
    "HiddenMse",
    "LayerMatch",
    "Match",
    "ModelShape",
    "ModuleMatch",
    "Nst",
    "Pkd",
    "Point",
    "masked_mean",
]
