"""What a job that trains some of the blocks may do, and which parameters it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..models import DiffusionBlocksPreTrainedModel
from ..models.partial import checked_blocks
from .arguments import DiffusionBlocksTrainingArguments


def blocks_to_train(model: DiffusionBlocksPreTrainedModel, args: DiffusionBlocksTrainingArguments) -> list[int]:
    """The blocks of this job, ascending.

    Raises:
        ValueError: a block is not loaded; carried context needs an earlier block that is not; or parameters that all
            blocks share would be trained by this job and by others.
    """
    resident = model.resident_blocks
    if args.train_blocks is None:
        blocks = resident
    else:
        blocks = checked_blocks(args.train_blocks, model.num_blocks, "train_blocks")
    absent = sorted(set(blocks) - set(resident))
    if absent:
        raise ValueError(f"train_blocks={blocks} must be loaded, and {absent} are not: resident_blocks={resident}")
    earlier = sorted(set(range(max(blocks))) - set(resident)) if model.carried else []
    if earlier:
        raise ValueError(
            f"train_blocks={blocks} with context='carried' needs the earlier blocks {earlier}, which run forward: "
            f"load them too, as they are at the end of their training (resident_blocks={resident})"
        )
    if len(blocks) < model.num_blocks and args.train_shared and not model.per_block:
        raise ValueError(
            f"train_shared=True with train_blocks={blocks} of {model.num_blocks} blocks: separate jobs would each move "
            "what all blocks share. Set train_shared=False, or give each block its own with shared='per_block'"
        )
    return blocks


@contextmanager
def only_training(
    model: DiffusionBlocksPreTrainedModel, blocks: Sequence[int], train_shared: bool
) -> Iterator[None]:
    """Ask for no gradients of what the job does not train, until it ends."""

    def is_trained(name: str) -> bool:
        owner = model.block_of_parameter(name)
        return train_shared if owner is None else owner in blocks

    frozen = [p for name, p in model.named_parameters() if p.requires_grad and not is_trained(name)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
