"""The factorised student: twin text arms and a late-fusion head.

Shape suffixes: B rows, C categorical columns, D category embedding, F numeric inputs, G token
groups, H vector width, T tokens, U distinct texts of a batch.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor, nn

from driftline.platform.models.encoder import TextEncoder
from driftline.platform.models.layers import mlp
from driftline.platform.models.spec import HeadOnlySpec, HeadSpec, TwinSpec

PAGE: Final = 0
AD: Final = 1
TokenGroup = tuple[Tensor, Tensor]
"""Tokens ``[U, T]`` int64 and mask ``[U, T]`` bool of texts of similar length."""


class TextArms(nn.Module):
    """Two encoders, one for each role, or one backbone told apart by a role marker.

    Source: CTR-BERT, Figure 2 (papers.md S0.10, S0.14). The role marker is a token after [CLS];
    ``driftline.platform.batching`` puts it there.
    """

    def __init__(self, spec: TwinSpec, *, pretrained: bool = True) -> None:
        super().__init__()
        num_backbones = 1 if spec.tie_arms else 2
        self.backbones = nn.ModuleList(
            TextEncoder(spec.encoder, pretrained=pretrained) for _ in range(num_backbones)
        )

    def backbone(self, role: int) -> TextEncoder:
        """The encoder of a role (0 page, 1 ad)."""
        encoder = self.backbones[role if len(self.backbones) > 1 else 0]
        assert isinstance(encoder, TextEncoder)
        return encoder

    def encode(self, tokens_BT: Tensor, mask_BT: Tensor, role: int) -> Tensor:
        """[CLS] vectors of texts in a role; the tokens carry the role marker. ``[B, H]``."""
        return self.backbone(role).cls(tokens_BT, mask_BT)


class LateFusion(nn.Module):
    """MLP over two cached vectors, category embeddings and numbers.

    A product without text has the learned vector ``neutral_page`` or ``neutral_ad``; an unknown
    category has row 0. Both are trained by replacing a small share of inputs (``unknown_share``).

    Source: CTR-BERT, section 3.2 and Figure 2 (papers.md S0.12); widths are ours.
    """

    first_rows: Tensor

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.category_embedding_size
        self.neutral_page = nn.Parameter(torch.zeros(spec.vector_size))
        self.neutral_ad = nn.Parameter(torch.zeros(spec.vector_size))
        self.embeddings = nn.Embedding(max(1, sum(spec.cardinalities)), width)
        nn.init.normal_(self.embeddings.weight, std=0.05)
        first_rows = [0, *accumulate(spec.cardinalities)][: len(spec.cardinalities)]
        self.register_buffer("first_rows", torch.tensor(first_rows, dtype=torch.int64), False)
        fused = 2 * spec.vector_size + len(spec.cardinalities) * width + spec.num_numbers
        self.layers = mlp(max(1, fused), spec.hidden_sizes, dropout=spec.dropout)

    def forward(
        self, page_BH: Tensor, ad_BH: Tensor, categories_BC: Tensor, numbers_BF: Tensor
    ) -> Tensor:
        """Logits of (no click, click) for every (page, ad) pair.

        Args:
            page_BH: Vector of the page product. ``[B, H]``.
            ad_BH: Vector of the ad product, from the same arms. ``[B, H]``.
            categories_BC: Row of each category, 0 when unknown. ``[B, C]``, int64.
            numbers_BF: Normalised numbers. ``[B, F]``.

        Returns:
            Logits on the *thinned* prior of the training set. ``[B, 2]``.
        """
        logits: Tensor = self.layers(self.fuse(page_BH, ad_BH, categories_BC, numbers_BF))
        return logits

    def fuse(
        self, page_BH: Tensor, ad_BH: Tensor, categories_BC: Tensor, numbers_BF: Tensor
    ) -> Tensor:
        """Everything the MLP reads, side by side; the place for further interactions."""
        if self.training and self.spec.unknown_share > 0:
            page_BH = self._forget(page_BH, self.neutral_page)
            ad_BH = self._forget(ad_BH, self.neutral_ad)
            kept_BC = torch.rand(categories_BC.shape, device=page_BH.device)
            categories_BC = categories_BC * (kept_BC >= self.spec.unknown_share)
        embedded_BCD = self.embeddings(categories_BC + self.first_rows)
        parts = [page_BH, ad_BH, embedded_BCD.flatten(1), numbers_BF]
        if sum(part.shape[1] for part in parts) == 0:
            parts = [page_BH.new_zeros(len(page_BH), 1)]
        return torch.cat([part.to(page_BH.dtype) for part in parts], dim=1)

    def _forget(self, vectors_BH: Tensor, neutral_H: Tensor) -> Tensor:
        forgotten_B1 = torch.rand(len(vectors_BH), 1, device=vectors_BH.device)
        return torch.where(forgotten_B1 < self.spec.unknown_share, neutral_H, vectors_BH)


class TwinStudent(nn.Module):
    """Arms and head together; weights are named ``arms.*`` and ``head.*``."""

    def __init__(self, spec: TwinSpec, *, pretrained: bool = True) -> None:
        super().__init__()
        self.arms = TextArms(spec, pretrained=pretrained)
        self.head = LateFusion(spec.head)

    def forward(
        self,
        groups: Sequence[Sequence[TokenGroup]],
        page_B: Tensor,
        ad_B: Tensor,
        categories_BC: Tensor,
        numbers_BF: Tensor,
    ) -> Tensor:
        """Encode every distinct text once, then fuse.

        Args:
            groups: For each role (page, ad), groups of distinct texts of similar length.
            page_B: Which distinct text each row's page has: 1 + its place in the concatenation
                of the page groups; 0 for none. ``[B]``, int64.
            ad_B: The same for the ad.
            categories_BC: See ``LateFusion``.
            numbers_BF: See ``LateFusion``.

        Returns:
            Logits. ``[B, 2]``.
        """
        page_BH, ad_BH = (
            self._gather(role, groups[role], index_B, neutral_H)
            for role, index_B, neutral_H in (
                (PAGE, page_B, self.head.neutral_page),
                (AD, ad_B, self.head.neutral_ad),
            )
        )
        logits: Tensor = self.head(page_BH, ad_BH, categories_BC, numbers_BF)
        return logits

    def _gather(
        self, role: int, groups: Sequence[TokenGroup], index_B: Tensor, neutral_H: Tensor
    ) -> Tensor:
        encoded = [self.arms.encode(tokens, mask, role) for tokens, mask in groups]
        rows_UH = torch.cat([neutral_H[None], *(part.to(neutral_H.dtype) for part in encoded)])
        return rows_UH[index_B]


class HeadOnly(nn.Module):
    """The head of a twin student by itself, over cached vectors; weights named ``head.*``."""

    def __init__(self, spec: HeadOnlySpec) -> None:
        super().__init__()
        self.head = LateFusion(spec.head)

    def forward(
        self,
        page_BH: Tensor,
        ad_BH: Tensor,
        missing_B2: Tensor,
        categories_BC: Tensor,
        numbers_BF: Tensor,
    ) -> Tensor:
        """Logits; ``missing_B2`` tells which page and ad vectors do not exist. ``[B, 2]``."""
        page_BH = torch.where(missing_B2[:, :1], self.head.neutral_page, page_BH)
        ad_BH = torch.where(missing_B2[:, 1:], self.head.neutral_ad, ad_BH)
        logits: Tensor = self.head(page_BH, ad_BH, categories_BC, numbers_BF)
        return logits
