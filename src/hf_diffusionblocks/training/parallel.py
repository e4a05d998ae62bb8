"""Several processes: which ranks train which blocks on which rows, and what they tell one another.

DDP is not used: its buckets hold a gradient of every block on every rank. Here only gradients that exist are averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


class Layout:
    """Ranks in lanes: each lane trains blocks of its own, and its ranks share out the rows of every batch.

    Without `block_parallel` there is one lane: plain data parallelism. Ranks of a lane are neighbours.

    Args:
        blocks: that are trained, ascending.
        world_size, rank: number of processes, and which this is.
        block_parallel: as many lanes as there are blocks, or ranks where these are fewer.

    Raises:
        ValueError: the ranks, or the blocks, cannot be dealt out evenly.
    """

    def __init__(self, blocks: Sequence[int], world_size: int, rank: int, block_parallel: bool):
        self.num_lanes = min(world_size, len(blocks)) if block_parallel else 1
        if world_size % self.num_lanes or len(blocks) % self.num_lanes:
            raise ValueError(
                f"block_parallel=True with {world_size} processes and blocks {list(blocks)}: the number of processes must "
                "be a multiple of the number of blocks, or divide it"
            )
        self.world_size, self.num_replicas = world_size, world_size // self.num_lanes
        self.lane, self.replica = divmod(rank, self.num_replicas)
        share = len(blocks) // self.num_lanes
        #: the blocks of each lane
        self.lanes = [list(blocks[lane * share : (lane + 1) * share]) for lane in range(self.num_lanes)]
        self._mesh = None

    @property
    def blocks(self) -> list[int]:
        """Those that this rank trains."""
        return self.lanes[self.lane]

    def owner(self, block: int) -> int:
        """The first rank of those that train a block."""
        return next(lane for lane, blocks in enumerate(self.lanes) if block in blocks) * self.num_replicas

    def _group(self, dimension: str, device: torch.device) -> dist.ProcessGroup:
        if self._mesh is None:
            shape = (self.num_lanes, self.num_replicas)
            self._mesh = init_device_mesh(device.type, shape, mesh_dim_names=("lanes", "replicas"))
        return self._mesh.get_group(dimension)

    def average_gradients(self, own: Sequence[nn.Parameter], shared: Sequence[nn.Parameter]) -> None:
        """Mean gradients: of the own block over the ranks of this lane, of what is shared over all.

        Either may be empty: of a block that is frozen, or where nothing is shared.
        """
        if self.num_replicas > 1:  # (groups are made by all ranks at once, so also by those that have nothing to average)
            _average(own, self._group("replicas", next(iter([*own, *shared])).device))
        if self.num_lanes > 1:
            _reach_alike(shared)
        if self.world_size > 1:
            _average(shared, dist.group.WORLD)

    def clip_gradients(
        self, own: Sequence[nn.Parameter], shared: Sequence[nn.Parameter], max_norm: float
    ) -> torch.Tensor:
        """Scale gradients to the norm of those of all lanes together, so that shared ones stay equal everywhere.

        Returns:
            the norm before.
        """
        device = shared[0].device  # (the norm of nothing is on the CPU)
        own_square, shared_square = (get_total_norm(gradients_of(part)).square().to(device) for part in (own, shared))
        dist.all_reduce(own_square, group=self._group("lanes", own_square.device))
        total = (own_square + shared_square).sqrt()
        clip_grads_with_norm_([*own, *shared], max_norm, total)
        return total


def broadcast(tensors: Iterable[torch.Tensor], source: int) -> None:
    """Overwrite tensors by those of one rank."""
    for tensor in tensors:
        dist.broadcast(tensor.data, source)
        torch.autograd.graph.increment_version(tensor)  # by which others know that it has changed


@contextmanager
def all_states(
    optimizer: torch.optim.Optimizer, parameters: Mapping[int | None, Sequence[nn.Parameter]], layout: Layout
) -> Iterator[None]:
    """Give rank 0's optimizer the states of all lanes, for as long as it takes to save them."""
    own = {}
    if layout.replica == 0:
        own = {
            block: [send_to_device(optimizer.state.get(parameter, {}), "cpu") for parameter in parameters[block]]
            for block in layout.blocks
        }
    gathered = [None] * layout.world_size if dist.get_rank() == 0 else None
    dist.gather_object(own, gathered)
    foreign = [
        (parameter, state)
        for blocks in (gathered or [])[1:]
        for block, states in blocks.items()
        for parameter, state in zip(parameters[block], states)
        if state
    ]
    for parameter, state in foreign:
        optimizer.state[parameter] = state
    try:
        yield
    finally:
        for parameter, _ in foreign:
            del optimizer.state[parameter]


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Those that are there."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _reach_alike(shared: Sequence[nn.Parameter]) -> None:
    """Lanes differ in which shared parameters they reach: a gradient of zero for those that others do. One that none reaches
    keeps none. (The host waits for the device here, as ranks of one lane need not.)"""
    if not shared:
        return
    reached = torch.tensor([p.grad is not None for p in shared], dtype=torch.uint8, device=shared[0].device)
    dist.all_reduce(reached, dist.ReduceOp.MAX)
    for parameter, is_reached in zip(shared, reached.tolist()):
        if is_reached and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _average(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    pending = []
    for gradient in gradients_of(parameters):
        gradient /= dist.get_world_size(group)
        pending.append(dist.all_reduce(gradient, group=group, async_op=True))
    for work in pending:
        work.wait()
