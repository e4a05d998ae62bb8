"""What every family does in training, in every formulation: see test_families.py."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from families import grid, reloaded, same, trainer_of
from transformers import TrainerCallback

import hf_diffusionblocks as db
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.memory.scenarios import ledger_of
from hf_diffusionblocks.memory.ways import Way, Workload

everywhere = pytest.mark.parametrize(**grid(lambda case: case.trained))
#: Formulations that the rest of the house knows apart: what passes on, and what is modulated.
FEW = ("vit", "gpt2", "bert", "tiny-denoiser", "dit-transformer-2d")
few = pytest.mark.parametrize(**grid(lambda case: case.trained and case.config.model_type in FEW and not case.is_own))


class Moves(TrainerCallback):
    """Notes the active block and the parameters that moved, of each optimizer step."""

    def __init__(self):
        self.trainer, self.seen = None, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._before = copy.deepcopy(dict(model.named_parameters()))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, self._before[name])}
        self.seen.append((self.trainer.active_block, moved))


@everywhere
def test_a_step_moves_its_block_and_shared_parameters_only(case, tmp_path):
    """Of two batches. Every parameter, weight decay on: a gradient of zero, rather than none, would let decay move the others."""
    model, moves = case.model(), Moves()
    arguments = {"max_steps": 4, "gradient_accumulation_steps": 2, "block_schedule": "random"}
    moves.trainer = trainer_of(model, case, tmp_path, callbacks=[moves], **arguments)
    moves.trainer.train()
    assert sorted(block for block, _ in moves.seen) == sorted([*case.blocks] * (4 // len(case.blocks)))
    for block, moved in moves.seen:
        assert {name for name, _ in model.named_parameters() if model.block_of_parameter(name) == block} <= moved
        assert {model.block_of_parameter(name) for name in moved} == {block} | (set() if case.is_own else {None})


@everywhere
def test_training_resumes_bit_equal(case, tmp_path):
    """Stopped within an epoch and a round of blocks; dropout on, so the global generator matters, too."""
    case = case.with_dropout(0.1)
    arguments = {"max_steps": 7, "lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 3}
    whole, resumed = case.model(), case.model()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter += 1  # all comes from the checkpoint
    trainer_of(whole, case, tmp_path, **arguments).train()
    trainer_of(resumed, case, tmp_path, **arguments).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(whole.state_dict(), resumed.state_dict())
    assert not same(whole.state_dict(), case.model().state_dict())


@everywhere
def test_the_trainer_evaluates_without_the_labels(case, tmp_path):
    model = case.model()
    found = trainer_of(model, case, tmp_path).evaluate()["eval_loss"]
    with torch.no_grad():
        assert found == pytest.approx(model.eval()(**case.rows(16)).loss.item(), abs=1e-4)


@everywhere
def test_a_job_moves_its_block_alone(case, tmp_path):
    model = case.model()
    before = copy.deepcopy(model.state_dict())
    trainer_of(model, case, tmp_path, train_blocks=[case.last_block], train_shared=False).train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {model.block_of_parameter(name) for name in moved} == {case.last_block}
    assert all(parameter.requires_grad for parameter in model.parameters())  # as before the job


@few
def test_jobs_are_merged_into_one_model(case, tmp_path):
    jobs = [tmp_path / "job0", tmp_path / "job1"]
    for block, folder in enumerate(jobs):
        model = case.model(shared="per_block")
        if block:  # around the first block, as it is at the end
            model.load_state_dict(reloaded(model, jobs[0]).state_dict())
        trainer = trainer_of(model, case, folder, train_blocks=[block])
        trainer.train()
        trainer.save_model()
    db.merge_blocks(jobs, tmp_path / "merged")
    merged = reloaded(model, tmp_path / "merged")
    for block, folder in enumerate(jobs):
        assert same(db.load_block_state_dict(tmp_path / "merged", block), db.load_block_state_dict(folder, block))
    assert merged.provenance.updates == [3, 3] and torch.isfinite(merged(**case.rows()).loss)


@few
def test_a_job_that_lacks_blocks_is_evaluated_on_its_own(case, tmp_path):
    case.model().save_pretrained(tmp_path / "whole")
    blocks = [0] if case.is_local else [1]
    part = case.task.model_class.from_pretrained(tmp_path / "whole", resident_blocks=blocks)
    trainer = trainer_of(part, case, tmp_path / "job", train_shared=False)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    **grid(lambda case: case.config.model_type in FEW[2:] and not case.has_known_targets and not case.is_own)
)
def test_the_estimate_is_what_a_step_holds(case):
    """Of all blocks in turn: what is followed without memory, and what is taken. (test_estimate.py has the library's.)"""
    fields = {name: value for name, value in case.fields.items() if name != "task"}
    workload = Workload(case.config, 2, batch_size=3, sequence_length=case.length, task_name=case.task.name)
    way = Way("in turn", {"shared": "common", "preset": "paper", **fields})
    estimate = db.estimate_memory(case.model(), batch_size=3, sequence_length=case.length)
    followed = next(ledger for name, ledger in estimate.ledgers.items() if name.endswith("all blocks in turn"))
    torch.manual_seed(0)
    measured = ledger_of(way, workload)
    assert followed.parts.total == pytest.approx(measured.parts.total, rel=0.02)
    assert str(estimate).count("\n") > 5


@few
def test_card_and_inspect_say_what_it_is(case, tmp_path, capsys):
    model = case.model()
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    level = f" | {model.noise_schedule.level_name}" if model.noise_schedule else ""
    assert f"pipeline_tag: {case.task.pipeline_tag or model.task}" in card and f"| block | layers{level} | parameters |" in card
    main(["inspect", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == model.task and len(found["blocks"]) == 2
    if level:
        assert found["blocks"][0][model.noise_schedule.level_name] == list(model.noise_schedule.interval(0))
    main(["card", str(tmp_path), "--stdout"])
    assert capsys.readouterr().out.strip() == card.strip()
