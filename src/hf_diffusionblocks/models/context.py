"""What a block sees of the clean input: `config.context`, as an object."""

from __future__ import annotations

import torch


class IndependentContext:
    """Every block starts from the embedded input, and sees it through its own layers alone (the paper's)."""

    passes_on = False  #: whether what leaves a block is what the next starts from

    def predecessors(self, block_index: int) -> range:
        """The blocks that run before this one, to make its input."""
        return range(0)

    def answering(self, num_blocks: int) -> range:
        """The blocks whose priors make the model's answer, where no target is seen."""
        return range(num_blocks)

    def answer(self, priors: list[torch.Tensor]) -> torch.Tensor:
        """The mean of the blocks' log-probabilities, from the logits `[..., V]` of each."""
        return torch.stack([prior.float().log_softmax(-1) for prior in priors]).mean(0)


class CarriedContext:
    """A block starts from what the earlier blocks made of the clean input, so that all layers are context."""

    passes_on = True

    def predecessors(self, block_index: int) -> range:
        return range(block_index)

    def answering(self, num_blocks: int) -> range:
        return range(num_blocks - 1, num_blocks)

    def answer(self, priors: list[torch.Tensor]) -> torch.Tensor:
        """The last block's logits."""
        return priors[-1]


CONTEXTS = {"independent": IndependentContext, "carried": CarriedContext}
