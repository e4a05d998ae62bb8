"""Which blocks read in and out by the same parameters: `config.shared`, as an object."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..backbones.base import Parts


class Sharing:
    """What blocks have of embeddings, final norm and head: all the stock model's, or (`per_block`) each its own, so that blocks
    can be trained apart: denoisers around one fixed table of targets.

    The stock model's embeddings are then block 0's, and its final norm and head the last block's, so that these and the
    layers still make up the stock model. Where the plain model ties its head to its token embedding, so does each block
    that has both; no two blocks share a weight.

    Args:
        num_blocks: B.
        around: paths of what stands before the stock model's layers, and after them.
        embeds_later: whether blocks after the first embed.
        reads_earlier: whether blocks before the last read out as the stock model does.
    """

    def __init__(
        self, per_block: bool, num_blocks: int, around: tuple[list[str], list[str]], embeds_later: bool, reads_earlier: bool
    ):
        self._per_block, self._last = per_block, num_blocks - 1
        self._before, self._after = around
        self._later_embeddings = self._before if embeds_later else []
        self._earlier_readouts = self._after if reads_earlier else []
        #: names of the modules that `modules` makes
        self.own_modules = ("block_embeddings", "block_readouts") if per_block else ()
        self.num_copies = num_blocks if per_block else 1  #: of what the stock model has not: sigma embeddings and the like

    def modules(self, plain: nn.Module) -> dict[str, nn.Module]:
        """Modules of the blocks' own, by their names in the model."""
        paths = dict(zip(self.own_modules, (self._later_embeddings, self._earlier_readouts)))
        return {name: nn.ModuleList(Parts(plain, of) for _ in range(self._last)) for name, of in paths.items()}

    def embeddings(self, block_index: int) -> str:
        """Path of what holds the modules that embed a block's input."""
        return f"block_embeddings.{block_index - 1}" if self._per_block and block_index > 0 else "backbone"

    def readout(self, block_index: int) -> str:
        """Path of what holds a block's final norm and head."""
        return f"block_readouts.{block_index}" if self._per_block and block_index < self._last else "backbone"

    def copy(self, block_index: int) -> int:
        """Which of the copies a block uses."""
        return block_index if self._per_block else 0

    def prefixes(self, block_index: int, copied: Sequence[str]) -> list[str]:
        """How the names of the parameters begin that are one block's, beside its layers'. `copied` has copies."""
        if not self._per_block:
            return []
        found = [f"{name}.{block_index}." for name in (*copied, "block_readouts")] + [f"block_embeddings.{block_index - 1}."]
        if block_index == 0:
            found += [f"backbone.{path}." for path in self._before]
        if block_index == self._last:
            found += [f"backbone.{path}." for path in self._after]
        return found

    def own_paths(self, block_index: int) -> dict[str, str]:
        """The stock model's modules that a block has copies of, by path, and the paths of these."""
        pairs = ((self.embeddings(block_index), self._later_embeddings), (self.readout(block_index), self._earlier_readouts))
        return {path: f"{own}.{path}" for own, paths in pairs if own != "backbone" for path in paths}

    def ties(self, resident_blocks: Sequence[int], stock: dict[str, str]) -> dict[str, str]:
        """Heads that are their block's token embedding, by name; `stock` are the stock model's."""
        ties = {}
        for target, source in stock.items():
            for block in resident_blocks:
                if _within(source, self._after):  # of one head
                    ties[f"{self.readout(block)}.{target}"] = f"{self.readout(block)}.{source}"
                elif block == 0 or _within(source, self._later_embeddings):
                    ties[f"{self.readout(block)}.{target}"] = f"{self.embeddings(block)}.{source}"
        return ties


def _within(name: str, paths: Sequence[str]) -> bool:
    return name.startswith(tuple(f"{path}." for path in paths))
