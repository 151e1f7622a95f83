"""Which rows a training step sees, and how token lists become rectangles.

Shape suffixes: B sequences, T tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from driftline.platform.examples import Ragged
from driftline.platform.models.student import TokenGroup

Rows = NDArray[np.int64]

SORT_BATCHES: Final = 32  # length-sorted neighbourhood, in batches: little padding, well shuffled
SORT_SHARE: Final = 4  # and at most this part of an epoch, so that a small set is shuffled as well
GROUP_STEP: Final = 16  # texts whose lengths differ by less than this are encoded together
MIN_GROUP: Final = 24  # fewer texts than this do not pay for a pass of their own
MAX_GROUP_TOKENS: Final = 32_768  # bounds the memory of one pass


@dataclass
class BatchPlan:
    """Rows of every batch, from the seed alone: any batch can be asked for, in any process.

    The rows of a batch are the same for any number of workers; worker r takes every world-size-th
    row from r on, so that N workers do what one does. A step, one update of the weights, takes
    ``accumulation`` batches; those left over when a pass ends are carried into the next (TextBrewer
    drops them, papers.md B9).
    """

    num_rows: int
    batch_size: int
    num_epochs: float
    seed: int
    first_row: int = 0
    lengths: NDArray[np.int64] | None = None
    """Tokens of each row; rows of similar length then share a batch. ``[first_row + num_rows]``."""
    block_rows: int = 1
    """Neighbouring rows that stay together: ads of one page, whose text is then encoded once."""
    accumulation: int = 1
    """Batches of a step; the last step may have fewer."""
    fixed_steps: int | None = None
    """Steps in all, instead of ``num_epochs``."""
    _epoch: int = field(default=-1, init=False)
    _batches: list[Rows] = field(default_factory=list, init=False)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in a whole pass; the last may be smaller."""
        return -(-self.num_rows // self.batch_size)

    @property
    def num_batches(self) -> int:
        """Batches in all, at least one."""
        if self.fixed_steps is not None:
            return self.fixed_steps * self.accumulation
        return max(1, round(self.num_epochs * self.batches_per_epoch))

    @property
    def num_steps(self) -> int:
        """Steps in all, at least one."""
        return -(-self.num_batches // self.accumulation)

    def batches(self, step: int) -> range:
        """Batches of a step, counted from 0."""
        first = step * self.accumulation
        return range(first, min(first + self.accumulation, self.num_batches))

    def rows(self, batch: int) -> Rows:
        """Rows of a batch, counted from 0. ``[B]``."""
        epoch, place = divmod(batch, self.batches_per_epoch)
        if epoch != self._epoch:
            self._batches = list(self._shuffle(np.random.default_rng((self.seed, epoch))))
            self._epoch = epoch
        return self._batches[place]

    def _permute(self, random: np.random.Generator) -> Rows:
        """Whole blocks, cut at a different place in every epoch, in random order."""
        shift = int(random.integers(self.block_rows))
        inner = np.arange(-shift, self.num_rows + self.block_rows, self.block_rows)
        blocks = random.permutation(inner)
        order = (blocks[:, None] + np.arange(self.block_rows)).reshape(-1)
        return order[(order >= 0) & (order < self.num_rows)]

    @property
    def _sorted_batches(self) -> int:
        return max(1, min(SORT_BATCHES, self.batches_per_epoch // SORT_SHARE))

    def _shuffle(self, random: np.random.Generator) -> Iterator[Rows]:
        order = self._permute(random) + self.first_row
        starts = np.arange(0, self.num_rows, self.batch_size)
        if self.lengths is not None:
            neighbourhood = self.batch_size * self._sorted_batches
            for start in range(0, self.num_rows, neighbourhood):
                piece = order[start : start + neighbourhood]
                piece[:] = piece[np.argsort(self.lengths[piece], kind="stable")]
            starts = random.permutation(starts)
        for first in starts:
            yield order[first : first + self.batch_size]


def by_length(lengths: NDArray[np.int64], *, max_tokens: int, width: int) -> Iterator[Rows]:
    """Cut rows into batches of similar length for inference, longest first.

    Args:
        lengths: Tokens of each row. ``[N]``.
        max_tokens: Rows times longest row of a batch stay at or below this.
        width: Tokens added to each row ([CLS], role, [SEP]).
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, max_tokens // int(lengths[order[start]] + width))
        yield order[start : start + size]
        start += size


def length_groups(lengths: NDArray[np.int64]) -> list[Rows]:
    """Cut the texts of one batch into a few groups of similar length; covers each once."""
    order = np.argsort(lengths, kind="stable")
    steps = lengths[order] // GROUP_STEP
    groups: list[Rows] = []
    waiting: Rows = order[:0]
    for piece in np.split(order, np.flatnonzero(np.diff(steps)) + 1):
        waiting = np.concatenate([waiting, piece])
        if len(waiting) >= MIN_GROUP:
            groups.append(waiting)
            waiting = order[:0]
    if len(waiting):
        groups.append(waiting)
    return [part for group in groups for part in _bounded(group, int(lengths[group[-1]]))]


def _bounded(group: Rows, longest: int) -> list[Rows]:
    num_parts = -(-len(group) * (longest + 3) // MAX_GROUP_TOKENS)
    return np.array_split(group, num_parts)


def frame_tokens(
    tokens: Ragged,
    rows: NDArray[np.integer],
    *,
    prefix: tuple[int, ...],
    sep: int,
    pad: int,
    max_tokens: int,
) -> TokenGroup:
    """Rows as a rectangle: prefix ([CLS] and role), tokens, [SEP], padding to the longest.

    Args:
        tokens: All token lists.
        rows: Which of them, -1 for an empty one. ``[B]``.
        prefix: Ids before the tokens.
        sep: Id after them.
        pad: Id of the padding.
        max_tokens: Longest sequence, prefix and [SEP] included; tokens beyond it are cut.

    Returns:
        Ids ``[B, T]`` int64 and mask ``[B, T]`` bool.
    """
    starts = tokens.offsets[rows]
    room = max_tokens - len(prefix) - 1
    lengths = np.minimum(tokens.offsets[rows + 1] - starts, room)
    lengths[rows < 0] = 0
    longest = int(lengths.max(initial=0))
    place = np.arange(longest)
    ids_BT = np.full((len(rows), len(prefix) + longest + 1), pad, np.int64)
    ids_BT[:, : len(prefix)] = prefix
    inside = place < lengths[:, None]
    if longest:
        at = np.where(inside, starts[:, None] + place, 0)
        ids_BT[:, len(prefix) : -1] = np.where(inside, tokens.values[at], pad)
    ids_BT[np.arange(len(rows)), len(prefix) + lengths] = sep
    mask_BT = np.arange(ids_BT.shape[1]) <= (len(prefix) + lengths)[:, None]
    return torch.from_numpy(ids_BT), torch.from_numpy(mask_BT)
