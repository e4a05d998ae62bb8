"""The masking process: how much of a text is hidden, which block answers for how much, and which tokens are drawn.

Pure functions of tensors; a text has `n` tokens, of which `L` may be masked and `l` are. Everything goes by counts, in
whole numbers: shares in floating point fall on the wrong side of a block's boundary. Sources: MDLM (arXiv 2406.07524) and
MD4 (2406.04329) for the bound, 2409.02908 for why no time enters the network, LLaDA (2502.09992) for the form in counts.
"""

from __future__ import annotations

from fractions import Fraction

import torch

from .randomness import Generators, draw


class MaskingSchedule:
    """Shares of masked tokens from 0 to 1, cut into B blocks of equal width: block 0 has the most masked.

    Args:
        num_blocks: B.
        overlap: gamma; a block trains on its own range widened by this share of its width on both sides.
    """

    level_name = "masked share"

    def __init__(self, num_blocks: int, overlap: float = 0.0):
        self.num_blocks, self.overlap = num_blocks, float(overlap)

    def interval(self, block_index: int, overlap: float = 0.0) -> tuple[float, float]:
        """`(low, high)`, a block's range of shares, open below and closed above, widened and clipped to 0..1.

        Raises:
            ValueError: there is no such block.
        """
        if not 0 <= block_index < self.num_blocks:
            raise ValueError(f"block_index={block_index} must lie in 0..{self.num_blocks - 1}")
        low = self.num_blocks - 1 - block_index
        return max(low - overlap, 0) / self.num_blocks, min(low + 1 + overlap, self.num_blocks) / self.num_blocks

    def block_of(self, masked: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The block that answers where `masked` of `tokens` (whole numbers, of one shape) are hidden: the only such rule.

        A text without any mask is the last block's.
        """
        parts = -(-masked * self.num_blocks // tokens.clamp(min=1))
        return (self.num_blocks - parts).clamp(0, self.num_blocks - 1)

    def counts(
        self, block_index: int, tokens: torch.Tensor, maskable: torch.Tensor, overlap: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers of masked tokens that a block answers for (with `overlap`, trains on): from the first to the second,
        `[N]` each. There are none where the first is the larger.

        Args:
            tokens: n of each text, `[N]`.
            maskable: L of each text, `[N]`.
        """
        gamma, low = Fraction(overlap).limit_denominator(10**6), self.num_blocks - 1 - block_index
        parts, width = self.num_blocks * gamma.denominator, gamma.denominator  # one block is so many of so many parts
        least = ((low * width - gamma.numerator) * tokens // parts + 1).clamp(min=1)
        most = ((low + 1) * width + gamma.numerator) * tokens // parts
        return least, torch.minimum(most, maskable)

    def most(self, block_index: int, tokens: int, overlap: float = 0.0) -> int:
        """The largest number of masked tokens that a block answers for, in a text of so many."""
        return int(self.counts(block_index, torch.tensor(tokens), torch.tensor(tokens), overlap)[1])


def draw_counts(least: torch.Tensor, most: torch.Tensor, generator: Generators) -> torch.Tensor:
    """How many tokens of each text to mask: uniform on `least..most` (`[N]` each), 0 where there is no such number.

    Stratified over the batch: each N-th part of the range is met by one text. Which one, and where within its part, the
    texts' own generators say; so a text's count depends on what it is batched with, though its distribution does not.
    """
    order, within = draw(torch.rand, (len(least), 2), generator, least.device, dtype=torch.float64).unbind(1)
    uniform = ((order.argsort().argsort() + within) / len(least)).to(least.device)
    size = (most - least + 1).clamp(min=0)
    counts = least + torch.minimum((uniform * size).long(), size - 1)
    return torch.where(size > 0, counts, 0)


def draw_masked(counts: torch.Tensor, maskable: torch.Tensor, generator: Generators) -> torch.Tensor:
    """A uniformly random set of exactly `counts` `[N]` of the maskable tokens: bool, `[N, S]` like these."""
    keys = draw(torch.rand, maskable.shape, generator, maskable.device, dtype=torch.float64).to(maskable.device)
    ranks = keys.masked_fill(~maskable, 2.0).argsort(1).argsort(1)  # (above any key)
    return ranks < counts[:, None]
