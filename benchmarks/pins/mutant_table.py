"""The mutants: what is changed where, and which tests are to notice. See `mutants.py`."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A bug that could be made.

    Args:
        name: what is wrong.
        file: below `src/hf_diffusionblocks`.
        old: text that is there exactly once.
        new: what it becomes.
        tests: arguments of pytest that choose the tests which are to fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


NOISE = [
    Mutant(
        "a sigma is the previous block's", "diffusion/schedule.py",
        "return self.num_blocks - 1 - torch.bucketize(sigma, inner)",
        "return (self.num_blocks - torch.bucketize(sigma, inner)).clamp(max=self.num_blocks - 1)",
        "tests/test_noise.py",
    ),
    Mutant(
        "a boundary is the other block's", "diffusion/schedule.py",
        "torch.bucketize(sigma, inner)", "torch.bucketize(sigma, inner, right=True)", "tests/test_noise.py",
    ),
    Mutant(
        "overlap is not applied in training", "diffusion/schedule.py",
        "self.interval(block_index, self.overlap)", "self.interval(block_index)", "tests/test_noise.py",
    ),
    Mutant(
        "overlap is applied in the bound", "models/causal_lm/bound.py",
        "block.interval())", "block.interval(model.noise_schedule.overlap))", "tests/test_causal_lm.py -k bound",
    ),
    Mutant(
        "the grid of inference is 1 - i/T", "diffusion/schedule.py",
        "self.quantile(torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps)",
        "self.quantile(1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps)",
        "tests/test_noise.py",
    ),
    Mutant(
        "the prior's share is the others'", "diffusion/schedule.py",
        "generator) < self.prior_fraction", "generator) > self.prior_fraction",
        "tests/test_image_classification.py -k prior_fraction",
    ),
    Mutant(
        "extra layers go to the last blocks", "configuration.py",
        "even + (k < extra)", "even + (k >= self.num_blocks - extra)", "tests/test_configuration.py",
    ),
]  # fmt: skip

DENOISING = [
    Mutant(
        "Euler steps away from the estimate", "diffusion/gaussian.py",
        "return ratio * z + (1 - ratio) * denoised", "return (2 - ratio) * z - (1 - ratio) * denoised",
        "tests/test_denoising.py",
    ),
    Mutant(
        "ancestral noise of another scale", "diffusion/gaussian.py",
        "sigma_next * (1 - ratio) ** 0.5 * noise", "sigma_next * (1 - ratio) * noise", "tests/test_denoising.py",
    ),
    Mutant(
        "keyed noise is the same at all positions", "diffusion/randomness.py",
        "pages[position // PAGE][position % PAGE]", "pages[position // PAGE][0]", "tests/test_denoising.py",
    ),
    # One place weighs the losses of all families, and the test of images notices for them.
    Mutant(
        "w(sigma) is an outer product, images", "diffusion/objectives.py",
        "else loss * edm_loss_weight(sigma, sigma_data)",
        "else loss[:, None] * edm_loss_weight(sigma, sigma_data)",
        "tests/test_image_classification.py -k edm_weight",
    ),
    Mutant(
        "w(sigma) is an outer product, text", "diffusion/objectives.py",
        "else loss * edm_loss_weight(sigma, sigma_data)",
        "else (loss[:, None] * edm_loss_weight(sigma, sigma_data)).mean(1)",
        "tests/test_image_classification.py -k edm_weight",
    ),
    Mutant(
        "label targets are not normalised", "models/targets.py",
        "return F.normalize(self.weight.float(), dim=-1)", "return self.weight.float()",
        "tests/test_image_classification.py -k targets",
    ),
    Mutant(
        "fixed targets are not normalised", "models/targets.py",
        "return F.normalize(self.table.float(), dim=-1)", "return self.table.float()",
        "tests/test_image_classification.py tests/test_causal_lm.py -k targets",
    ),
    Mutant(
        "token targets are not normalised", "models/causal_lm/model.py",
        "return F.normalize(weight.float(), dim=-1)", "return weight.float()", "tests/test_causal_lm.py -k targets",
    ),
]  # fmt: skip

STREAMS = [
    Mutant(
        "noisy tokens are not scaled by c_in", "models/causal_lm/joint.py",
        "(c_in * z).to(clean.dtype)", "z.to(clean.dtype)", "tests/test_causal_lm.py -k scaled_by_c_in",
    ),
    Mutant(
        "noisy tokens of a walk are not scaled by c_in", "models/causal_lm/walk.py",
        "embeds = (level.c.input * z).to", "embeds = z.to",
        "tests/test_generation.py -k 'entropy_grows and per_block'",
    ),
    Mutant(
        "noisy labels are not scaled by c_in", "models/image_classification/denoisers.py",
        "(c_in[:, None] * z)[:, None, :]", "z[:, None, :]", "tests/test_image_classification.py -k scaled_by_c_in",
    ),
    Mutant(
        "a noisy token sees its clean copy", "models/causal_lm/streams.py",
        "rows = clean_mask[:, :, kept]", "rows = clean_mask[:, :, (kept + 1).clamp(max=clean_mask.shape[2] - 1)]",
        "tests/test_causal_lm.py -k 'know'",
    ),
    Mutant(
        "noisy tokens see each other", "models/causal_lm/streams.py",
        "own = torch.eye(len(kept), dtype=torch.bool, device=rows.device)",
        "own = torch.ones(len(kept), len(kept), dtype=torch.bool, device=rows.device)",
        "tests/test_causal_lm.py -k noisy",
    ),
    Mutant(
        "noisy tokens stand a position early", "models/causal_lm/streams.py",
        "self.noisy_position_ids = position_ids[:, kept] + 1", "self.noisy_position_ids = position_ids[:, kept]",
        "tests/test_causal_lm.py -k 'stand_at'",
    ),
    Mutant(
        "a factorized row is its own target's", "models/causal_lm/factorized.py",
        "text.block_input)[:, :-1]", "text.block_input)[:, 1:]",
        "tests/test_causal_lm.py -k 'know'",
    ),
    Mutant(
        "the clean stream is conditioned on sigma_max", "models/block.py",
        "torch.full((1,), self.model.config.sigma_min,", "torch.full((1,), self.model.config.sigma_max,",
        "tests/test_image_classification.py -k clean_stream",
    ),
]  # fmt: skip

BLOCKS = [
    Mutant(
        "gradient flows into carried context", "models/base.py",
        "    @torch.no_grad()\n    def passed_on(", "    def passed_on(",
        "tests/test_image_classification.py tests/test_causal_lm.py -k gradient",
    ),
    Mutant(
        "dropout in earlier blocks", "models/base.py",
        "        with without_dropout(self.backbone):\n            hidden = self.blocks[0].embed(",
        "        with nullcontext():\n            hidden = self.blocks[0].embed(",
        "tests/test_image_classification.py -k carried",
    ),
    Mutant(
        "dropout in later blocks, final loss", "models/base.py",
        "            with without_dropout(self.backbone):\n                return self.blocks[k].run_clean(",
        "            with nullcontext():\n                return self.blocks[k].run_clean(",
        "tests/test_objective.py -k dropout",
    ),
    Mutant(
        "the next block sees the local head, training", "models/base.py",
        "                hidden = self.blocks[earlier].run_clean(hidden, **x.attention)",
        "                hidden = self.blocks[earlier].run_clean(hidden, **x.attention)\n"
        "                hidden = self.blocks[earlier].run_local_head(hidden, **x.attention)",
        "tests/test_image_classification.py tests/test_causal_lm.py -k 'head and not llama and not qwen3'",
    ),
    # (One place serves images and text, and the tests of text alone notice: no mutant of its own for images.)
    Mutant(
        "the next block sees the local head, inference of text", "models/base.py",
        "outputs.append(block.run_clean(hidden, **x.attention))",
        "outputs.append(block.run_local_head(block.run_clean(hidden, **x.attention), **x.attention))",
        "tests/test_causal_lm.py -k 'head and not llama and not qwen3'",
    ),
    Mutant(
        "fresh weights depend on what else is loaded", "saving/resident.py",
        "[seed, 0 if owner is None else owner + 1]", "[seed, len(model.resident_blocks)]",
        "tests/test_jobs.py -k a_part_is_that_part",
    ),
]  # fmt: skip

TRAINING = [
    Mutant(
        "inactive blocks have a gradient of zero", "training/trainer.py",
        "        # `loss` is already divided by the number of micro-batches.\n",
        "        for parameter in self.model.parameters():\n"
        "            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad\n",
        "tests/test_trainer.py -k a_step_moves",
    ),
    Mutant(
        "the learning rate runs on the global step", "training/trainer.py",
        "return lambda step: curve(own.updates_before(step, block))", "return lambda step: curve(step)",
        "tests/test_trainer.py -k learning_rate",
    ),
    Mutant(
        "a block is drawn for each micro-batch", "training/trainer.py",
        "        self._micro_batch += 1\n",
        "        self._micro_batch += 1\n"
        "        drawn = self.block_schedule.block_at(self.state.global_step + self._micro_batch - 1)\n"
        "        self.active = self._active(drawn)\n"
        "        inputs |= {'block_index': drawn, 'loss_block': self.active.reader}\n",
        "tests/test_trainer.py -k micro_batches",
    ),
    Mutant(
        "noise is not keyed by the row's number in the step", "training/trainer.py",
        "first = micro_batch * self.args.train_batch_size", "first = 0", "tests/test_processes.py -k accumulated_micro",
    ),
    Mutant(
        "all rows have the same noise", "diffusion/randomness.py",
        "SeedSequence([*key, row])", "SeedSequence([*key, 0])",
        "tests/test_trainer.py tests/test_processes.py tests/test_denoising.py -k 'accumulated_micro or noise or step'",
    ),
    Mutant(
        "a resumed run has other noise", "training/trainer.py",
        "        return keyed_generators([self.args.seed, self.state.global_step], ",
        "        self._calls = getattr(self, '_calls', -1) + 1\n"
        "        return keyed_generators([self.args.seed, self._calls // self.args.gradient_accumulation_steps], ",
        "tests/test_trainer.py -k resumed",
    ),
    Mutant(
        "a step's tokens are counted by micro-batch", "models/causal_lm/model.py",
        "    accepts_loss_kwargs = True", "    accepts_loss_kwargs = False", "tests/test_processes.py -k accumulated_micro",
    ),
    Mutant(
        "the final loss trains later blocks", "models/active.py",
        "parameter.requires_grad_(block in active.blocks)", "parameter.requires_grad_(True)",
        "tests/test_objective.py -k only_the_active",
    ),
    Mutant(
        "what is shared is trained in spite of train_shared=False", "models/active.py",
        "{None, *blocks} if train_shared else set(blocks)", "{None, *blocks}", "tests/test_jobs.py -k frozen_shared",
    ),
    Mutant(
        "an evicted block's weights are not written back", "models/offload.py",
        "parameter.data = host.copy_(parameter.data) if changed else host", "parameter.data = host",
        "tests/test_offload.py -k 'bit_for_bit and vit'",
    ),
    Mutant(
        "an evicted block's optimizer state is not written back", "models/offload.py",
        "self.optimizer.state[parameter][name] = host.copy_(value) if changed else host",
        "self.optimizer.state[parameter][name] = host",
        "tests/test_offload.py -k 'combines or evaluation or resumed'",
    ),
]  # fmt: skip

FILES = [
    Mutant(
        "merge does not check what is shared", "saving/merging.py",
        "    _check_shared(opened)\n", "", "tests/test_jobs.py -k other_targets",
    ),
    Mutant(
        "merge does not check predecessors", "saving/merging.py",
        "    _check_predecessors(opened, source_of, model.blocks)\n", "", "tests/test_jobs.py -k another_predecessor",
    ),
    Mutant(
        "merge does not check what made cached inputs", "saving/merging.py",
        "if job.provenance.predecessors != found[block]:", "if False:",
        "tests/test_jobs.py -k 'what_another_predecessor_made and gpt2'",
    ),
    Mutant(
        "a save leaves a stale model.safetensors", "saving/shards.py",
        "path.unlink(missing_ok=True)", "pass", "tests/test_checkpoint.py -k stale",
    ),
    Mutant(
        "a save is not written aside", "saving/shards.py",
        "        yield staging\n", "        yield folder\n", "tests/test_checkpoint.py -k 'fails_leaves'",
    ),
]  # fmt: skip

#: What blocks know of one another, which the code says in one place each.
RELATIONS = [
    Mutant(
        "carried blocks have no predecessors", "models/context.py",
        "return range(block_index)", "return range(0)", "tests/test_image_classification.py -k carried_context",
    ),
    Mutant(
        "only the last of independent blocks has a say", "models/context.py",
        "return range(num_blocks)", "return range(num_blocks - 1, num_blocks)",
        "tests/test_causal_lm.py -k independent_factorized",
    ),
    Mutant(
        "a reader may be an earlier block", "models/base.py",
        "readers=range(k, ", "readers=range(0, ", "tests/test_objective.py -k read_from_this_block",
    ),
    Mutant(
        "blocks that pass nothing on have later readers", "models/base.py",
        "self.num_blocks if self.context.passes_on and not modulated else k + 1", "self.num_blocks",
        "tests/test_objective.py -k what_it_needs",
    ),
    Mutant(
        "a block that only reads out trains", "models/active.py",
        "block in active.blocks", "block in (*active.blocks, active.reader)", "tests/test_objective.py -k only_the_active",
    ),
    Mutant(
        "the final loss is read where the block ends", "training/trainer.py",
        'reader = self.num_blocks - 1 if self.args.objective == "final" else block', "reader = block",
        "tests/test_jobs.py -k final_loss_evaluates",
    ),
    Mutant(
        "the last block is not passed through", "models/active.py",
        "range(self.last + 1, self.reader + 1)", "range(self.last + 1, self.reader)",
        "tests/test_objective.py -k gradients_are_those",
    ),
    Mutant(
        "later blocks keep their activations", "models/base.py",
        "checkpoint_activations(run, k, hidden, use_reentrant=False, preserve_rng_state=False)", "run(k, hidden)",
        "tests/test_objective.py -k keep_what_enters",
    ),
    Mutant(
        "a block embeds by another's embeddings", "models/sharing.py",
        'return f"block_embeddings.{block_index - 1}" if block_index > 0 else "backbone"', 'return "backbone"',
        "tests/test_causal_lm.py -k every_parameter_of_the_active",
    ),
    Mutant(
        "a block is read out by another's head", "models/sharing.py",
        'return f"block_readouts.{block_index}" if block_index < self._last else "backbone"', 'return "backbone"',
        "tests/test_causal_lm.py -k every_parameter_of_the_active",
    ),
    Mutant(
        "all blocks use the first one's copy", "models/sharing.py",
        "        return block_index\n", "        return 0\n", "tests/test_causal_lm.py -k every_parameter_of_the_active",
    ),
    Mutant(
        "what a run does not train asks for gradients", "models/active.py",
        "parameter.requires_grad_(owner in self._owners)", "parameter.requires_grad_(True)",
        "tests/test_jobs.py -k frozen_shared",
    ),
    Mutant(
        "what a run did not train is frozen for good", "models/active.py",
        "        for parameter in self._asked:\n            parameter.requires_grad_(True)", "        pass",
        "tests/test_jobs.py -k one_run_after_the_other",
    ),
    Mutant(
        "a job needs no predecessors", "training/checks.py",
        "earlier = sorted(set(model.blocks[max(blocks)].predecessors) - set(resident))", "earlier = []",
        "tests/test_jobs.py -k that_cannot_be_are_refused",
    ),
    Mutant(
        "a task serves every architecture", "tasks.py",
        "    if name not in served:\n", "    if name in TASKS:\n        return TASKS[name]\n    if name not in served:\n",
        "tests/test_conversion.py -k cannot_be_converted",
    ),
    Mutant(
        "a model takes another task's config", "models/base.py",
        "if config.task != self.task:", "if False:", "tests/test_families.py -k auto_class",
    ),
]  # fmt: skip

PROVENANCE = [
    Mutant(
        "a run does not note which blocks moved", "training/run_report.py",
        "Provenance(self._updates(), self._predecessors())", "Provenance([0] * self.num_blocks, self._predecessors())",
        "tests/test_families.py -k merged_into_one",
    ),
    Mutant(
        "a run does not note what made its inputs", "training/run_report.py",
        "Provenance(self._updates(), self._predecessors())", "Provenance(self._updates())",
        "tests/test_jobs.py -k 'what_another_predecessor_made and gpt2'",
    ),
    Mutant(
        "provenance is not written", "saving/shards.py",
        "if provenance is not None:", "if False:", "tests/test_families.py -k merged_into_one",
    ),
    Mutant(
        "a merged model does not tell who trained it", "saving/merging.py",
        "Provenance.of_all([job.provenance for job in jobs])", "None", "tests/test_families.py -k merged_into_one",
    ),
    Mutant(
        "a loaded model forgets who trained it", "saving/pretrained.py",
        "            model.provenance = index.provenance\n", "",
        "tests/test_families.py -k merged_into_one",
    ),
    Mutant(
        "a folder that does not tell is believed", "saving/merging.py",
        "            if silent:\n", "            if False:\n", "tests/test_jobs.py -k does_not_tell_what_it_trained_must_agree",
    ),
]  # fmt: skip

NOTICED_SINCE = [
    Mutant(
        "posterior without the norm of the target", "diffusion/categorical.py",
        "return logits.addr_(precision, half_norms, alpha=-1)", "return logits", "tests/test_denoising.py",
    ),
    Mutant(
        "text takes no weights", "models/causal_lm/model.py",
        "weighted(loss, self.config.loss_weighting, sigma, self.sigma_data)", "loss",
        "tests/test_families.py -k 'edm or weight'",
    ),
    Mutant(
        "a block's only predecessor is the nearest", "models/context.py",
        "return range(block_index)", "return range(max(block_index - 1, 0), block_index)", "tests/test_blocks.py",
    ),
    Mutant(
        "layer 1 owns layers 10 to 19", "models/base.py",
        'layers_path}.{layer}." for', 'layers_path}.{layer}" for', "tests/test_blocks.py",
    ),
    Mutant(
        "a loaded part forgets who trained it", "saving/resident.py",
        "    model.provenance = index.provenance\n", "", "tests/test_blocks.py",
    ),
    Mutant(
        "levels are the reader's", "models/causal_lm/model.py",
        "self.levels(active.last,", "self.levels(active.reader,", "tests/test_blocks.py",
    ),
]  # fmt: skip

MUTANTS = [*NOISE, *DENOISING, *STREAMS, *BLOCKS, *TRAINING, *FILES, *RELATIONS, *PROVENANCE, *NOTICED_SINCE]
