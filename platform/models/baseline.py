"""The baseline that every delta is measured against.

Shape suffixes: B rows, C categorical columns, D embedding width, F numeric inputs, P pieces,
U distinct texts of a batch.
"""

from itertools import accumulate

import torch
from torch import Tensor, nn

from driftline.platform.models.layers import mlp
from driftline.platform.models.spec import MlpSpec


class MlpBaseline(nn.Module):
    """Three-layer ReLU MLP over hashed ids, categories, numbers and a bag of words.

    Source: papers.md S0.34 (inputs are our reading; the paper describes none).
    """

    first_rows: Tensor

    def __init__(self, spec: MlpSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.embedding_size
        self.categories = nn.Embedding(max(1, sum(spec.cardinalities)), width)
        self.words = nn.EmbeddingBag(max(1, spec.num_word_buckets), width, mode="mean")
        self.products = nn.Embedding(1 + spec.num_product_buckets, width)
        for table in (self.categories, self.words, self.products):
            nn.init.normal_(table.weight, std=0.05)
        first_rows = [0, *accumulate(spec.cardinalities)][: len(spec.cardinalities)]
        self.register_buffer("first_rows", torch.tensor(first_rows, dtype=torch.int64), False)
        inputs = len(spec.cardinalities) * width + spec.num_numbers + 4 * width
        self.layers = mlp(inputs, spec.hidden_sizes, dropout=spec.dropout)

    def forward(
        self,
        pieces_P: Tensor,
        offsets_U: Tensor,
        texts_B2: Tensor,
        products_B2: Tensor,
        categories_BC: Tensor,
        numbers_BF: Tensor,
    ) -> Tensor:
        """Logits of (no click, click).

        Args:
            pieces_P: Tokens of all distinct texts, one after the other. ``[P]``, int64.
            offsets_U: Where each distinct text starts; text 0 is empty. ``[U]``, int64.
            texts_B2: Distinct text of page and ad; 0 for none. ``[B, 2]``, int64.
            products_B2: Hashed product of page and ad, -1 for unknown. ``[B, 2]``, int64.
            categories_BC: Row of each category, 0 when unknown. ``[B, C]``, int64.
            numbers_BF: Normalised numbers. ``[B, F]``.

        Returns:
            ``[B, 2]``.
        """
        buckets_P = pieces_P % max(1, self.spec.num_word_buckets)
        words_UD = self.words(buckets_P, offsets_U)
        parts = [
            words_UD[texts_B2].flatten(1),
            self.products(products_B2 + 1).flatten(1),
            self.categories(categories_BC + self.first_rows).flatten(1),
            numbers_BF,
        ]
        logits: Tensor = self.layers(torch.cat([p.to(words_UD.dtype) for p in parts], dim=1))
        return logits
