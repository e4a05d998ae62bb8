"""Which blocks read in and out by the same parameters: `config.shared`, as an object."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..backbones.base import Parts


class CommonParts:
    """All blocks read and train the same embeddings, final norm and head: the stock model's."""

    own_modules = ()  #: names of the modules that `modules` makes
    num_copies = 1  #: of what the stock model has not: sigma embeddings and the like

    def __init__(self, num_blocks: int, around: tuple[list[str], list[str]], embeds_later: bool):
        pass

    def modules(self, plain: nn.Module) -> dict[str, nn.Module]:
        """Modules of the blocks' own, by their names in the model."""
        return {}

    def embeddings(self, block_index: int) -> str:
        """Path of what holds the modules that embed a block's input."""
        return "backbone"

    def readout(self, block_index: int) -> str:
        """Path of what holds a block's final norm and head."""
        return "backbone"

    def copy(self, block_index: int) -> int:
        """Which of the copies a block uses."""
        return 0

    def prefixes(self, block_index: int, copied: Sequence[str]) -> list[str]:
        """How the names of the parameters begin that are one block's, beside its layers'. `copied` has copies."""
        return []

    def ties(self, resident_blocks: Sequence[int], stock: dict[str, str]) -> dict[str, str] | None:
        """Heads that are their block's token embedding, by name; None leaves that to the stock model, whose ties are these."""
        return None

    def own_paths(self, block_index: int) -> list[tuple[str, Sequence[str]]]:
        """Of each part of a block's own: its path, and the paths of the stock model's modules that it has copies of."""
        return []


class OwnParts:
    """Each block has its own, so that blocks can be trained apart: denoisers around one fixed table of targets.

    The stock model's embeddings are then block 0's, and its final norm and head the last block's, so that these and the
    layers still make up the stock model. Where the plain model ties its head to its token embedding, so does each block
    that has both; no two blocks share a weight.

    Args:
        num_blocks: B.
        around: paths of what stands before the stock model's layers, and after them.
        embeds_later: whether blocks after the first embed.
    """

    own_modules = ("block_embeddings", "block_readouts")

    def __init__(self, num_blocks: int, around: tuple[list[str], list[str]], embeds_later: bool):
        self._before, self._after = around
        self._later_embeddings = self._before if embeds_later else []
        self.num_copies = num_blocks
        self._last = num_blocks - 1

    def modules(self, plain: nn.Module) -> dict[str, nn.Module]:
        return {
            "block_embeddings": nn.ModuleList(Parts(plain, self._later_embeddings) for _ in range(self._last)),
            "block_readouts": nn.ModuleList(Parts(plain, self._after) for _ in range(self._last)),
        }

    def embeddings(self, block_index: int) -> str:
        return f"block_embeddings.{block_index - 1}" if block_index > 0 else "backbone"

    def readout(self, block_index: int) -> str:
        return f"block_readouts.{block_index}" if block_index < self._last else "backbone"

    def copy(self, block_index: int) -> int:
        return block_index

    def prefixes(self, block_index: int, copied: Sequence[str]) -> list[str]:
        found = [f"{name}.{block_index}." for name in (*copied, "block_readouts")] + [f"block_embeddings.{block_index - 1}."]
        if block_index == 0:
            found += [f"backbone.{path}." for path in self._before]
        if block_index == self._last:
            found += [f"backbone.{path}." for path in self._after]
        return found

    def own_paths(self, block_index: int) -> list[tuple[str, Sequence[str]]]:
        pairs = ((self.embeddings(block_index), self._later_embeddings), (self.readout(block_index), self._after))
        return [(own, paths) for own, paths in pairs if own != "backbone"]

    def ties(self, resident_blocks: Sequence[int], stock: dict[str, str]) -> dict[str, str]:
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


SHARINGS = {"common": CommonParts, "per_block": OwnParts}
