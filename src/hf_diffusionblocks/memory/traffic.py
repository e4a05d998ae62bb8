"""What crosses between host and device where inactive blocks are in host memory, by formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes that are copied while every block is updated once (a step that trains all, or a step of each).

    Args:
        to_device, to_host: bytes.
    """

    to_device: int
    to_host: int


def traffic(
    parameters: Sequence[int], states: Sequence[int], objective: str, together: bool, carried: bool, jobs: bool = False
) -> Traffic:
    """Of a round. In turns, and of fewer than three blocks, it is an upper bound: what is there already, since it trained before
    or trains next, is not copied again.

    Args:
        parameters: bytes of each block's.
        states: bytes of what the optimizer keeps of each.
        objective: as the Trainer's.
        together: whether a step trains all blocks.
        carried: whether a block starts from what earlier ones pass on.
        jobs: whether each block is trained by a job of its own, in which it stays on the device.
    """
    moved = 0 if jobs else sum(parameters) + sum(states)  # each block, when it trains, with its state; and back
    if together:
        # Exact: the forward pass takes parameters alone. The first block's are still there from the step before, and those of
        # the last two when they train.
        again = sum(parameters[1:-2]) if objective == "exact" else 0
        return Traffic(moved + again, moved)
    forward = 0
    for k in range(len(parameters)):
        forward += sum(parameters[:k]) if carried else 0
        if objective == "final":  # through the later blocks, and back: the last one is still there
            later = parameters[k + 1 :]
            forward += 2 * sum(later) - (later[-1] if later else 0)
    return Traffic(moved + forward, moved)
