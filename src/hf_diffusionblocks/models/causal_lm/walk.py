"""The walk of a joint text denoiser: from noise to the next token, for one position or for many at once."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import LogitsProcessorList

from ...diffusion.randomness import noise_of_positions, noise_of_rows
from ...diffusion.samplers import hard_bridge, walk
from ...whole_numbers import check_whole
from ..base import DiffusionBlocksPreTrainedModel
from ..block import Block
from .streams import CleanKeys, Streams, Text, join


class TextWalk:
    """What walks share from token to token: levels, targets, and all that depends on sigma alone, computed once.

    Args:
        model: of the paper's formulation.
        logits_processor: controls of generation. At the end of a walk z has made its logits next to a point mass: they
            act at every evaluation.
        sample: whether noise and each evaluation's token are drawn for every row, from the global generator as
            everywhere in generation, rather than noise keyed and the likeliest token taken. (Keyed noise, the same for all
            samples at a position, would favour the same tokens in all of them.)
        num_steps: evaluations of a walk; None is the config's `num_inference_steps`.

    Raises:
        ValueError: `num_steps` is no whole number from 1.
    """

    def __init__(
        self,
        model: DiffusionBlocksPreTrainedModel,
        logits_processor: LogitsProcessorList | None = None,
        sample: bool = False,
        num_steps: int | None = None,
    ):
        if num_steps is not None:
            check_whole("num_steps", num_steps, 1, ", or None")
        self.model, self.config, self.logits_processor, self.sample = model, model.config, logits_processor, sample
        self.generated: torch.Tensor | None = None  # all tokens so far, for the controls
        self.bridge = _drawn_bridge if sample else hard_bridge
        self.targets = model.target_vectors()
        self.sigmas = model.noise_schedule.inference_sigmas(num_steps or model.config.num_inference_steps)
        self.blocks = [model.blocks[k] for k in model.noise_schedule.block_of(self.sigmas[:-1]).tolist()]
        self.levels = self.sigmas.to(model.device, torch.float32).split(1)
        self.clean_modulations = [block.clean_modulations() for block in model.blocks]
        self.noisy_modulations = [block.modulations(level) for block, level in zip(self.blocks, self.levels)]
        self._joint_modulations = {}

    def joint_modulations(self, step: int) -> list:
        """For one clean and one noisy token."""
        if step not in self._joint_modulations:
            pairs = zip(self.clean_modulations[self.blocks[step].index], self.noisy_modulations[step])
            self._joint_modulations[step] = [join(clean, noisy, 1, 1) for clean, noisy in pairs]
        return self._joint_modulations[step]

    def logits(self, text: Text, kept: torch.Tensor) -> torch.Tensor:
        """Walk the tokens after the clean tokens `kept`, `[Q]` of the S given. Clean tokens are added to the text's cache,
        if it has one.

        Returns:
            Logits of the last evaluation, `[N, Q, V]`.
        """
        run = _Run(self, text, kept)
        logits, _ = walk(run.denoise, self.targets, self.sigmas, run.noise(), self.bridge)
        if text.past_key_values is not None:  # blocks that the walk did not visit have clean tokens to remember, too
            run.advance_to(self.config.num_blocks)
        return logits.unflatten(0, (run.num_rows, len(kept)))

    def trajectory(self, text: Text, kept: torch.Tensor) -> torch.Tensor:
        """Walk as [`logits`] does; the probabilities at every evaluation, `[N, Q, T, V]`, at the highest noise first."""
        run, seen = _Run(self, text, kept), []

        def denoise(z: torch.Tensor, step: int) -> torch.Tensor:
            logits = run.denoise(z, step)
            seen.append(logits.softmax(-1))
            return logits

        walk(denoise, self.targets, self.sigmas, run.noise(), self.bridge)
        return torch.stack(seen, 1).unflatten(0, (run.num_rows, len(kept)))

    def block_logits(self, text: Text) -> torch.Tensor:
        """Every block's logits at sigma_max, from keyed noise: `[N, B, S, V]`."""
        run, first = _Run(self, text, torch.arange(text.tokens.shape[1], device=self.model.device)), self.levels[0]
        z = first * run.noise()
        logits = []
        for block in self.model.blocks:
            run.advance_to(block.index + 1)
            hidden = run.streams.run_noisy(block, z, first, block.modulations(first))
            logits.append(run.read(block, hidden.flatten(0, 1), z, first))
        return torch.stack(logits).unflatten(1, (run.num_rows, text.tokens.shape[1])).transpose(0, 1)


class _Run:
    """One batch on its walk: how far its clean tokens have come through the blocks."""

    def __init__(self, plan: TextWalk, text: Text, kept: torch.Tensor):
        self.plan, self.model = plan, plan.model
        self.num_rows, self.num_tokens = text.tokens.shape[:2]
        # (Not an empty cache: with one, Transformers does not look for packed texts.)
        cache = CleanKeys() if text.past_key_values is None else text.past_key_values
        self.streams = Streams(self.model, text, kept, cache)
        self.positions = self.streams.noisy_position_ids.expand(self.num_rows, -1).flatten()
        self._done = 0  # blocks that the clean tokens have run through
        self._embedded: torch.Tensor | None = None

    def noise(self) -> torch.Tensor:
        """What the walk starts from, standard normal `[N * Q, D]`."""
        positions, width = self.positions, self.plan.targets.shape[-1]
        if self.plan.sample:
            return noise_of_rows(len(positions), width, 0, torch.default_generator, positions.device)
        return noise_of_positions(positions, width, self.plan.config.inference_seed)

    def _entering(self, block: Block) -> torch.Tensor:
        if self._embedded is None or block.embeds_apart:
            self._embedded = self.streams.enter(block)
        return self._embedded

    def advance_to(self, block_index: int) -> None:
        """Run the clean tokens through all blocks before this one."""
        while self._done < block_index:
            block = self.model.blocks[self._done]
            self.streams.run_clean(block, self._entering(block), self.plan.clean_modulations[block.index])
            self._done += 1

    def denoise(self, z: torch.Tensor, step: int) -> torch.Tensor:
        """`z [N * Q, D]` to logits `[N * Q, V]` at one level of the walk."""
        plan, block, level = self.plan, self.plan.blocks[step], self.plan.levels[step]
        if self.num_tokens == 1 and self._done <= block.index:
            # One new token: clean and noisy together, in one pass over the block.
            self.advance_to(block.index)
            clean = self._entering(block)
            hidden = self.streams.run_together(block, clean, z, level, plan.joint_modulations(step))
            self._done += 1
        else:
            self.advance_to(block.index + 1)
            hidden = self.streams.run_noisy(block, z, level, plan.noisy_modulations[step])
        return self.read(block, hidden.flatten(0, 1), z, level)

    def read(self, block: Block, hidden: torch.Tensor, z: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Logits `[R, V]` from what left a block, `[R, D]`, controls applied."""
        logits, controls = self.model.formulation.logits(block, hidden, z, level), self.plan.logits_processor
        return logits if controls is None else controls(self.plan.generated, logits)


def _drawn_bridge(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A token drawn from softmax(logits), `[N, D]`."""
    return F.embedding(torch.multinomial(logits.softmax(-1), 1)[:, 0], targets)
