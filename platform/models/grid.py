"""The 24 miniature BERTs of papers.md S1.9, counted exactly and built of nothing but numbers.

This module is read with the settings and loads no torch.
"""

from dataclasses import dataclass
from typing import Final, Literal, get_args

BERT_VOCABULARY: Final = 30_522
BYTES: Final = 4  # float32
MEBIBYTE: Final = 2**20

SizeName = Literal["tiny", "mini", "small", "medium", "base"]


@dataclass(frozen=True)
class BertSize:
    """A BERT of some depth and width: heads = H/64, feed-forward = 4H (papers.md S1.6).

    Counts follow papers.md S1.10; they equal those of the real modules.
    """

    num_layers: int
    hidden_size: int
    vocabulary_size: int = BERT_VOCABULARY
    num_positions: int = 512
    num_segments: int = 2

    @property
    def num_heads(self) -> int:
        """Attention heads, one for each 64 units."""
        return max(1, self.hidden_size // 64)

    @property
    def name(self) -> str:
        """The published name, or ``layers/width``."""
        for name, (num_layers, hidden_size) in NAMED.items():
            if (num_layers, hidden_size) == (self.num_layers, self.hidden_size):
                return name
        return f"{self.num_layers}/{self.hidden_size}"

    @property
    def embedding_parameters(self) -> int:
        """Tables of tokens, positions and segments, and the norm after them."""
        rows = self.vocabulary_size + self.num_positions + self.num_segments
        return rows * self.hidden_size + 2 * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """All transformer layers."""
        width = self.hidden_size
        return self.num_layers * (12 * width**2 + 13 * width)

    @property
    def pooler_parameters(self) -> int:
        """The dense layer over [CLS]; our own encoders have none."""
        return self.hidden_size**2 + self.hidden_size

    @property
    def pretraining_parameters(self) -> int:
        """Heads of masked language (tied to the token table) and of next-sentence prediction."""
        width = self.hidden_size
        return width**2 + width + 2 * width + self.vocabulary_size + 2 * width + 2

    def num_parameters(self, *, pooler: bool = True, heads: bool = False) -> int:
        """Parameters of the encoder, with or without pooler and pre-training heads.

        The papers count differently: with everything (S1.9, S4.1), without heads (S3.2), and
        without pooler (S3.3).
        """
        total = self.embedding_parameters + self.layer_parameters
        total += self.pooler_parameters if pooler else 0
        return total + (self.pretraining_parameters if heads else 0)

    def disk_bytes(self, *, pooler: bool = True, heads: bool = False) -> int:
        """Size of the weights in float32, without a file's header."""
        return BYTES * self.num_parameters(pooler=pooler, heads=heads)

    def row(self) -> dict[str, str | int | float]:
        """One line of a table of sizes (papers.md S1.9, and T4.1 and T4.2 of S3.22)."""
        return {
            "name": self.name,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_heads": self.num_heads,
            "embedding_parameters": self.embedding_parameters,
            "encoder_parameters": self.layer_parameters,
            "num_parameters": self.num_parameters(),
            "num_parameters_without_pooler": self.num_parameters(pooler=False),
            "num_parameters_with_heads": self.num_parameters(heads=True),
            "disk_mebibytes": self.disk_bytes() / MEBIBYTE,
        }


NAMED: Final[dict[SizeName, tuple[int, int]]] = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
}
DEPTHS: Final = (2, 4, 6, 8, 10, 12)
WIDTHS: Final = (128, 256, 512, 768)


def named_size(name: SizeName, *, vocabulary_size: int = BERT_VOCABULARY) -> BertSize:
    """The size of a published name.

    Raises:
        ValueError: there is no such name.
    """
    if not isinstance(name, str) or name not in NAMED:
        raise ValueError(f"size must be one of {', '.join(get_args(SizeName))}, got {name!r}")
    return BertSize(*NAMED[name], vocabulary_size=vocabulary_size)


def grid(*, vocabulary_size: int = BERT_VOCABULARY) -> tuple[BertSize, ...]:
    """All 24 sizes, by width, then by depth: the order of papers.md S1.14, widest last."""
    return tuple(
        BertSize(num_layers, hidden_size, vocabulary_size=vocabulary_size)
        for hidden_size in WIDTHS
        for num_layers in DEPTHS
    )


def grid_rows(*, vocabulary_size: int = BERT_VOCABULARY) -> list[dict[str, str | int | float]]:
    """The grid as a table, one dictionary a size."""
    return [size.row() for size in grid(vocabulary_size=vocabulary_size)]
