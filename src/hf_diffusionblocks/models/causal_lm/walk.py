"""The walk of a joint text denoiser: from noise to the next token, for one position or for many at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from transformers import DynamicCache, LogitsProcessorList

from ...diffusion.gaussian import BRIDGES, posterior_logits, precondition
from ...diffusion.objectives import rows_per_chunk
from ...diffusion.samplers import NoiseSource, PositionNoise, walk, walk_on
from .streams import Rows, Streams, join

if TYPE_CHECKING:
    from .model import DiffusionBlocksForCausalLM


class TextWalk:
    """What walks share from token to token: levels, targets, and all that depends on sigma alone, computed once.

    Args:
        model: a joint model.
        logits_processor: controls of generation. At the end of a walk z has made its logits next to a point mass: they
            act at every evaluation, on the network's prior, before the likelihood of z is added (posterior readout),
            or on the whole (EDM readout).
        sample: whether noise and each evaluation's token are drawn for every row, from the global generator as
            everywhere in generation, rather than noise keyed and tokens bridged as the config says. (Keyed noise, the
            same for all samples at a position, would favour the same tokens in all of them.)
    """

    def __init__(
        self, model: DiffusionBlocksForCausalLM, logits_processor: LogitsProcessorList | None = None, sample: bool = False
    ):
        self.model, self.config, self.logits_processor, self.sample = model, model.config, logits_processor, sample
        self.generated: torch.Tensor | None = None  # all tokens so far, for the controls
        self.edm = self.config.readout == "edm"
        self.bridge = _drawn_bridge if sample else BRIDGES[model.bridge]
        self.targets = model.target_vectors()
        self.sigmas = model.noise_schedule.inference_sigmas(self.config.num_inference_steps or self.config.num_blocks)
        self.blocks = model.noise_schedule.block_of(self.sigmas[:-1]).tolist()
        self.levels = self.sigmas.to(model.device, torch.float32)
        self.preconditioning = [precondition(level[None], model.sigma_data) for level in self.levels]
        self.clean_modulations = [model.clean_modulations(k) for k in range(self.config.num_blocks)]
        self.noisy_modulations = [
            model.modulations_at(block, self.levels[step : step + 1]) for step, block in enumerate(self.blocks)
        ]
        self._joint_modulations = {}

    def joint_modulations(self, step: int) -> list:
        """For one clean and one noisy token."""
        if step not in self._joint_modulations:
            pairs = zip(self.clean_modulations[self.blocks[step]], self.noisy_modulations[step])
            self._joint_modulations[step] = [join(clean, noisy, 1, 1) for clean, noisy in pairs]
        return self._joint_modulations[step]

    def logits(self, inputs: dict, shape: torch.Tensor, attention_mask, kept: torch.Tensor, cache) -> torch.Tensor:
        """Walk the tokens after the clean tokens `kept`, `[Q]` of the S given.

        Args:
            inputs: what embeds the clean tokens.
            shape: their hidden states without width, `[N, S, 0]`, for dtype and device.
            attention_mask: `[N, P + S]` or None.
            cache: of the P earlier tokens, which these are added to; None if none is kept.

        Returns:
            Logits of the last evaluation, `[N, Q, V]`.
        """
        run = _Run(self, inputs, shape, attention_mask, kept, cache)
        logits, _ = walk(run.denoise, self.targets, self.sigmas, run.noise, self.config.sampler, self.bridge)
        if cache is not None:  # blocks that the walk did not visit have clean tokens to remember, too
            run.advance_to(self.config.num_blocks)
        return logits.unflatten(0, (run.num_rows, len(kept)))

    def losses(
        self, inputs: dict, shape: torch.Tensor, attention_mask, kept: torch.Tensor, cache, labels: torch.Tensor
    ) -> torch.Tensor:
        """Walk as [`logits`] does, and score its end: nats of `labels [N * Q]`, float32; none where these are -100.

        A chunk of rows is read out, bridged and moved on at a time: without gradients, no more logits are ever held.
        """
        run = _Run(self, inputs, shape, attention_mask, kept, cache)
        size, levels = rows_per_chunk(len(labels), len(self.targets)), self.sigmas.tolist()
        noises = [PositionNoise(positions, self.config.inference_seed) for positions in run.positions.split(size)]
        rows = [levels[0] * noise.normal(self.targets.shape[-1]) for noise in noises]
        nats = []
        for step, block in enumerate(self.blocks):
            hidden = run.hidden(torch.cat(rows), step).flatten(0, 1)
            for part, (chunk, label) in enumerate(zip(hidden.split(size), labels.split(size))):
                logits = run.read(block, chunk, rows[part], step)
                if step < len(self.blocks) - 1:
                    rows[part] = walk_on(
                        rows[part], logits, self.targets, levels[step], levels[step + 1], noises[part],
                        self.config.sampler, self.bridge,
                    )  # fmt: skip
                else:
                    nats.append(F.cross_entropy(logits, label, reduction="none"))
                del logits
        if cache is not None:
            run.advance_to(self.config.num_blocks)
        return torch.cat(nats)

    def prior_logits(self, inputs: dict, shape: torch.Tensor, attention_mask) -> torch.Tensor:
        """Every block's logits at sigma_max, from keyed noise: `[N, B, S, V]`."""
        tokens = shape.shape[1]
        run = _Run(self, inputs, shape, attention_mask, torch.arange(tokens, device=self.levels.device), None)
        z = self.levels[0] * run.noise.normal(self.targets.shape[-1])
        logits = []
        for block in range(self.config.num_blocks):
            run.advance_to(block + 1)
            modulations = self.model.modulations_at(block, self.levels[:1])
            logits.append(run.read(block, run.noisy(block, z, 0, modulations).flatten(0, 1), z, 0))
        return torch.stack(logits).unflatten(1, (run.num_rows, tokens)).transpose(0, 1)

    def controlled(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[N * Q, V]`, after the controls of generation."""
        if self.logits_processor is None:
            return logits
        return self.logits_processor(self.generated, logits)


class _Run:
    """One batch on its walk: how far its clean tokens have come through the blocks."""

    def __init__(self, plan: TextWalk, inputs: dict, shape: torch.Tensor, attention_mask, kept: torch.Tensor, cache):
        self.plan, self.model, self.inputs, self.kept, self.dtype = plan, plan.model, inputs, kept, shape.dtype
        self.num_rows, self.num_tokens = shape.shape[:2]
        cache = DynamicCache(config=self.model.config.source_config) if cache is None else cache
        self.streams = Streams(self.model, shape, attention_mask, inputs["position_ids"], kept, cache)
        self.positions = self.streams.noisy_position_ids.expand(self.num_rows, -1).flatten()
        if plan.sample:
            self.noise = NoiseSource(len(self.positions), 0, torch.default_generator, self.positions.device)
        else:
            self.noise = PositionNoise(self.positions, plan.config.inference_seed)
        self._done = 0  # blocks that the clean tokens have run through
        self._embedded: torch.Tensor | None = None
        self._clean: torch.Tensor | None = None  # what left the last of these, if context is carried

    def _entering(self, block: int) -> torch.Tensor:
        if block > 0 and self.model.carried:
            return self._clean
        if self._embedded is None or self.model.per_block:
            self._embedded = self.model.embed(block, self.inputs)
        return self._embedded

    def advance_to(self, block: int) -> None:
        """Run the clean tokens through all blocks before this one."""
        while self._done < block:
            last = self._done == self.model.num_blocks - 1
            self._clean = self.streams.run_clean(
                self._done,
                self._entering(self._done),
                self.plan.clean_modulations[self._done],
                output=self.model.carried and not last,
            )
            self._done += 1

    def denoise(self, z: torch.Tensor, step: int) -> torch.Tensor:
        """`z [N * Q, D]` to logits `[N * Q, V]` at one level of the walk."""
        return self.read(self.plan.blocks[step], self.hidden(z, step).flatten(0, 1), z, step)

    def hidden(self, z: torch.Tensor, step: int) -> torch.Tensor:
        """`z [N * Q, D]` to what leaves the block of one level of the walk, `[N, Q, D]`."""
        plan, block = self.plan, self.plan.blocks[step]
        if self.num_tokens == 1 and self._done <= block:
            # One new token: clean and noisy together, in one pass over the block.
            self.advance_to(block)
            noisy = self._embed_noisy(block, z, step)
            self._clean, hidden = self.streams.run_together(
                block, self._entering(block), noisy, plan.joint_modulations(step)
            )
            self._done += 1
            return hidden
        self.advance_to(block + 1)
        return self.noisy(block, z, step, plan.noisy_modulations[step])

    def _embed_noisy(self, block: int, z: torch.Tensor, step: int) -> torch.Tensor:
        embeds = (self.plan.preconditioning[step].input * z).to(self.dtype).unflatten(0, (self.num_rows, len(self.kept)))
        return self.model.embed_noisy(block, embeds, self.streams.noisy_position_ids)

    def noisy(self, block: int, z: torch.Tensor, step: int, modulations) -> torch.Tensor:
        """Noisy tokens through a block, `[N, Q, D]`."""
        return self.streams.run_noisy(block, self._embed_noisy(block, z, step), modulations)

    def read(self, block: int, hidden: torch.Tensor, z: torch.Tensor, step: int) -> torch.Tensor:
        """Logits `[R, V]` from what left a block, `[R, D]`, controls applied."""
        plan = self.plan
        if plan.edm:
            return plan.controlled(self.model.edm_logits(block, hidden, z, plan.preconditioning[step]))
        logits = plan.controlled(self.model.denoise(block, Rows(hidden, None, None)))
        if step > 0:  # at sigma_max z says nothing
            logits = posterior_logits(logits, z, plan.levels[step].expand(len(z)), plan.targets)
        return logits


def _drawn_bridge(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A token drawn from softmax(logits), `[N, D]`."""
    return F.embedding(torch.multinomial(logits.softmax(-1), 1)[:, 0], targets)
