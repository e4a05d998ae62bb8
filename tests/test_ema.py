"""Averages of weights: what they are, where they are used, and that training does not notice them."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from families import CASES, TEXT_CONFIGS, Case, same, trainer_of
from process_scenarios import GPT2, INDEPENDENT, made, trainer_of as trainer_of_scenario
from safetensors.torch import load_file
from transformers import TrainerCallback

import hf_diffusionblocks as db
from hf_diffusionblocks.memory.scenarios import ledger_of
from hf_diffusionblocks.memory.ways import Way, Workload
from hf_diffusionblocks.training.averages import FILE

DECAY = 0.3  # the warm-up's decay, (1 + n) / (10 + n), reaches it at the third update
CARRIED = {"preset": "recommended", "local_head_layers": 0}
TEXT = Case(TEXT_CONFIGS["llama"], CARRIED)  # head and embeddings are not tied: block 0's steps alone reach these
FAMILIES = {"text": TEXT, **{name: CASES[name] for name in ("vit, paper", "bert", "point")}}


def trained(case, folder, model=None, **arguments) -> db.DiffusionBlocksTrainer:
    model = case.model() if model is None else model
    trainer = trainer_of(model, case, folder, **{"ema_decay": DECAY, "max_steps": 9, **arguments})
    trainer.train()
    return trainer


def averages(trainer) -> dict[str, torch.Tensor]:
    with trainer.averaged_weights():
        return copy.deepcopy(trainer.model.state_dict())


class SlowAverages(TrainerCallback):
    """The formula, for each parameter that a step has moved; in float64."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.updates = Counter()
        self.of = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
        self.before = copy.deepcopy(dict(model.named_parameters()))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if not torch.equal(parameter, self.before[name]):
                self.updates[name] += 1
                n = self.updates[name]
                decay = min(DECAY, (1 + n) / (10 + n))
                self.of[name] = decay * self.of[name] + (1 - decay) * parameter.detach().double()
        self.before = copy.deepcopy(dict(model.named_parameters()))


@pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    "arguments",
    [{"block_schedule": "random"}, {"block_schedule": "random", "gradient_accumulation_steps": 2}],
    ids=["random", "accumulated"],
)
def test_they_are_those_of_a_slow_loop(case, arguments, tmp_path):
    """A block's move in its own steps, those that several micro-batches make one; the warm-up counts these."""
    slow = SlowAverages()
    trainer = trained(case, tmp_path, callbacks=[slow], **arguments)
    model, found = trainer.model, averages(trainer)
    for name, _ in model.named_parameters():
        torch.testing.assert_close(found[name], slow.of[name].float(), rtol=1e-5, atol=1e-6, msg=name)
        block = model.block_of_parameter(name)
        if block is not None:
            assert slow.updates[name] == trainer.block_schedule.updates_before(9, block) in (4, 5)
    assert not same(found, model.state_dict())


def test_embeddings_count_the_steps_that_reach_them(tmp_path):
    trainer = trained(TEXT, tmp_path, save_strategy="steps", save_steps=9, block_schedule="random")
    before = TEXT.model().backbone.model.embed_tokens.weight
    own = trainer.block_schedule.updates_before(9, 0)
    assert own < 9 and trainer.averages.updates["backbone.model.embed_tokens.weight"] == own
    assert trainer.averages.updates["backbone.lm_head.weight"] == 9
    assert not torch.equal(averages(trainer)["backbone.model.embed_tokens.weight"], before)


class Evaluates(TrainerCallback):
    """Where a step is about to train."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.evaluate()


@pytest.mark.parametrize("streamed", [False, True])
def test_evaluation_is_of_averages_and_training_does_not_notice(streamed, tmp_path):
    plain = trained(TEXT, tmp_path, ema_decay=None)
    model, evaluates = TEXT.model(), Evaluates()
    if streamed:
        db.stream_layers(model, "cpu")
    arguments = {"max_steps": 9, "eval_strategy": "steps", "eval_steps": 4}
    evaluates.trainer = trainer = trainer_of(model, TEXT, tmp_path, [evaluates], ema_decay=DECAY, **arguments)
    trainer.train()
    own = copy.deepcopy(trainer.model.state_dict())
    assert same(own, plain.model.state_dict())
    with pytest.raises(KeyError), trainer.averaged_weights():
        raise KeyError
    found = trainer.evaluate()["eval_loss"]
    assert same(trainer.model.state_dict(), own)
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == pytest.approx(found, abs=1e-5)
    assert plain.evaluate()["eval_loss"] != pytest.approx(found, abs=1e-4)
    other = TEXT.model()
    other.load_state_dict(averages(trainer))
    assert trainer_of(other, TEXT, tmp_path).evaluate()["eval_loss"] == found


def test_of_a_streamed_model_they_are_the_same_and_take_no_memory_of_the_device(tmp_path):
    kept = trained(TEXT, tmp_path)
    trainer = trainer_of(TEXT.model(), TEXT, tmp_path, ema_decay=DECAY, max_steps=9)
    with db.stream_layers(trainer.model, "cpu"):
        trainer.train()
    assert same(averages(kept), averages(trainer))
    own = sum(parameter.nbytes for parameter in kept.model.parameters())
    assert {ledger.parts.averages for ledger in kept.ledgers.values()} == {own}
    assert max(ledger.parts.averages for ledger in trainer.ledgers.values()) < own / 20


def test_a_checkpoint_has_the_weights_and_what_is_saved_the_averages(tmp_path):
    trainer = trained(TEXT, tmp_path, save_strategy="steps", save_steps=9)
    trainer.save_model()
    checkpoint, saved = (db.DiffusionBlocksForCausalLM.from_pretrained(each) for each in (tmp_path / "checkpoint-9", tmp_path))
    assert same(checkpoint.state_dict(), trainer.model.state_dict())
    assert same(saved.state_dict(), averages(trainer)) and not (tmp_path / FILE).exists()
    assert saved.config.training_report["ema_decay"] == DECAY and checkpoint.config.training_report["ema_decay"] is None
    assert load_file(tmp_path / "checkpoint-9" / FILE).keys() == dict(trainer.model.named_parameters()).keys()


def test_the_best_model_comes_back_with_its_averages(tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    trainer = trained(TEXT, tmp_path, load_best_model_at_end=True, greater_is_better=True, **steps)  # the first is "best"
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == max(losses) != losses[-1]


def test_parameters_in_bf16_are_averaged_in_float32(tmp_path):
    model = TEXT.model().to(torch.bfloat16)
    asked = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = trained(TEXT, tmp_path, model, save_strategy="steps", save_steps=9)
    saved = load_file(tmp_path / "checkpoint-9" / FILE)
    assert saved.keys() == asked and {tensor.dtype for tensor in saved.values()} == {torch.float32}
    found = averages(trainer)
    assert all(torch.equal(found[name], saved[name].to(found[name].dtype)) for name in asked)


def test_averages_of_jobs_are_merged(tmp_path):
    found = {}
    for block in range(2):
        trainer = trainer_of_scenario(made(GPT2, INDEPENDENT, [block]), GPT2, tmp_path / str(block), {"ema_decay": DECAY})
        trainer.train()
        trainer.save_model()
        found |= averages(trainer)
    db.merge_blocks([tmp_path / "0", tmp_path / "1"], tmp_path / "whole")
    assert same(db.DiffusionBlocksForCausalLM.from_pretrained(tmp_path / "whole").state_dict(), found)


def test_an_estimate_counts_them():
    """Of all that is trained, in 4 bytes each."""
    model = TEXT.model()
    all_trained = sum(parameter.numel() for parameter in model.parameters())
    job = Way("job", CARRIED, job=True, train_shared=False, carried=True)
    of_a_block = sum(parameter.numel() for parameter in model.block_parameters(1))
    ways = [(Way("in turn", CARRIED, carried=True), all_trained), (job, of_a_block)]
    plain = Workload(TEXT.config, 2, batch_size=2, sequence_length=12, dtype=torch.bfloat16)
    for way, in_averages in ways:
        without, ledger = (ledger_of(way, each) for each in (plain, replace(plain, ema=True)))
        assert ledger.parts.averages == ledger.total - without.total == 4 * in_averages


# ---- refused


def test_a_checkpoint_without_averages_or_with_others_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trained(TEXT, tmp_path, ema_decay=None, **saving)
    with pytest.raises(ValueError, match=f"checkpoint-2/{FILE} is missing, and ema_decay=0.3"):
        trainer_of(TEXT.model(), TEXT, tmp_path, ema_decay=DECAY, **saving).train(resume_from_checkpoint=True)
    frozen = TEXT.model()
    for parameter in frozen.shared_parameters():
        parameter.requires_grad_(False)
    trainer_of(frozen, TEXT, tmp_path, ema_decay=DECAY, **saving).train()
    with pytest.raises(ValueError, match=f"{FILE} is not of the parameters that this run trains: it lacks backbone"):
        trainer_of(TEXT.model(), TEXT, tmp_path, ema_decay=DECAY, **saving).train(resume_from_checkpoint=True)
