"""A single tower over the serialised row: the teacher, and the unfactorised student.

Shape suffixes: B rows, T tokens, H hidden width.
"""

from torch import Tensor, nn

from driftline.platform.models.encoder import TextEncoder
from driftline.platform.models.layers import LogitLayer
from driftline.platform.models.spec import TowerSpec


class ClickTower(nn.Module):
    """BERT -> [CLS] -> extra LayerNorm -> MLP -> two logits.

    Source: CTR-BERT, Figure 1 (papers.md S0.6); the MLP's depth and width are ours.
    """

    def __init__(self, spec: TowerSpec, *, pretrained: bool = True) -> None:
        super().__init__()
        hidden = spec.encoder.hidden_size
        self.encoder = TextEncoder(spec.encoder, pretrained=pretrained)
        self.classifier = nn.Sequential(
            nn.LayerNorm(hidden),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(spec.encoder.dropout),
            LogitLayer(hidden),
        )

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Logits of (no click, click). ``[B, 2]``."""
        logits: Tensor = self.classifier(self.encoder.cls(tokens_BT, mask_BT))
        return logits
