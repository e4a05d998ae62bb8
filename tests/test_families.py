"""What every family does: the library's, and two that only the tests have, to show what a new one has to bring (a masking
family whose z is the input, and one whose estimate is a point and whose stock model is no `PreTrainedModel`)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import masking_family
import point_family
import pytest
import torch
from conftest import randomized
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, BertConfig
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.memory.scenarios import Way, Workload, ledger_of
from hf_diffusionblocks.tasks import TASKS, task_of
from process_scenarios import GPT2, VIT

masking_family.register()
point_family.register()

BERT = BertConfig(
    vocab_size=48, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, max_position_embeddings=16
)
FACTORIZED = {"denoiser": "factorized", "prior_fraction": 1.0}


@dataclass
class Case:
    """A tiny model and its formulation."""

    config: object
    fields: dict = field(default_factory=dict)

    @property
    def length(self) -> int | None:
        return 12 if task_of(self.config).takes_sequence_length else None

    def rows(self, count: int) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return task_of(self.config).example(self.config, count, self.length)

    def dataset(self) -> Dataset:
        return Dataset.from_dict({name: tensor.tolist() for name, tensor in self.rows(16).items()})

    def model(self, **fields):
        torch.manual_seed(0)
        return randomized(db.convert(self.config, 2, preset="paper", **{**self.fields, **fields}))


CASES = {
    "text, joint": Case(GPT2, {"denoiser": "joint"}),
    "text, carried": Case(GPT2, {**FACTORIZED, "context": "carried"}),
    "images, joint": Case(VIT, {"denoiser": "joint"}),
    "images, carried": Case(VIT, {**FACTORIZED, "context": "carried"}),
    "masking": Case(BERT),
    "masking, carried": Case(BERT, {"context": "carried"}),
    "point": Case(point_family.TinyConfig()),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def trainer_of(model, case: Case, folder, **arguments) -> db.DiffusionBlocksTrainer:
    logging.set_verbosity_error()
    arguments = {"learning_rate": 1e-2, "save_strategy": "no", "updates_per_block": 3, **arguments}
    args = db.DiffusionBlocksTrainingArguments(
        str(folder), per_device_train_batch_size=4, weight_decay=0.1, report_to=[], use_cpu=True, disable_tqdm=True,
        **arguments,
    )  # fmt: skip
    return db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=case.dataset(), eval_dataset=case.dataset())


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_parameters_of_blocks_and_shared_ones_are_disjoint_and_complete(case):
    for shared in ("common", "per_block"):
        model = case.model(shared=shared)
        parts = [model.shared_parameters(), *(model.block_parameters(k) for k in range(2))]
        found = [id(parameter) for part in parts for parameter in part]
        assert sorted(found) == sorted(map(id, model.parameters())) and all(parts[1:])
        assert bool(parts[0]) is (shared == "common")


@pytest.mark.parametrize("block_index", [0, 1])
def test_a_step_has_gradients_of_its_block_and_of_what_is_shared_alone(case, block_index):
    model = case.model().train()
    model(**case.rows(4), block_index=block_index, generator=torch.Generator().manual_seed(0)).loss.backward()
    reached = {model.block_of_parameter(name) for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached - {None} == {block_index}


def test_training_resumes_bit_equal(case, tmp_path):
    whole, cut, resumed = case.model(), case.model(), case.model(inference_seed=1)
    trainer_of(whole, case, tmp_path / "whole").train()
    trainer_of(cut, case, tmp_path / "cut", save_strategy="steps", save_steps=3).train()
    trainer_of(resumed, case, tmp_path / "cut").train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert same(whole.state_dict(), resumed.state_dict()) and same(whole.state_dict(), cut.state_dict())
    assert not same(whole.state_dict(), case.model().state_dict())


def test_offload_changes_nothing(case, tmp_path):
    models = [case.model(), case.model()]
    trainer_of(models[0], case, tmp_path / "here").train()
    trainer_of(models[1], case, tmp_path / "away", offload_inactive_blocks="cpu").train()
    assert same(models[0].state_dict(), models[1].state_dict())


def test_jobs_are_merged_into_one_model(case, tmp_path):
    jobs = [tmp_path / "job0", tmp_path / "job1"]
    for block, folder in enumerate(jobs):
        model = case.model(shared="per_block")
        if block:  # around the first block, as it is at the end
            model.load_state_dict(TASKS[model.task].auto_class.from_pretrained(jobs[0]).state_dict())
        trainer = trainer_of(model, case, folder, train_blocks=[block])
        trainer.train()
        trainer.save_model()
    db.merge_blocks(jobs, tmp_path / "merged")
    merged = TASKS[model.task].auto_class.from_pretrained(tmp_path / "merged")
    for block, folder in enumerate(jobs):
        assert same(
            db.load_block_state_dict(tmp_path / "merged", block), db.load_block_state_dict(folder, block)
        )
    assert merged.provenance.updates == [3, 3] and torch.isfinite(merged(**case.rows(4)).loss)


def test_a_reloaded_model_evaluates_the_same(case, tmp_path):
    model, batch = case.model().eval(), case.rows(4)
    trainer = trainer_of(model, case, tmp_path)
    trainer.save_model()
    again = TASKS[model.task].auto_class.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch).loss, model(**batch).loss)
    assert trainer.evaluate()["eval_loss"] > 0
    assert again.config.task == model.task


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForImageClassification])
def test_an_auto_class_of_another_task_names_the_saved_one(case, auto_class, tmp_path):
    model = case.model()
    model.save_pretrained(tmp_path)
    if auto_class is TASKS[model.task].auto_class:
        assert auto_class.from_pretrained(tmp_path).task == model.task
        return
    with pytest.raises(ValueError, match=f"this model is for task '{model.task}'"):
        auto_class.from_pretrained(tmp_path)


def test_a_job_that_lacks_blocks_is_evaluated_on_its_own(case, tmp_path):
    case.model().save_pretrained(tmp_path / "whole")
    model_class = TASKS[task_of(case.config).name].model_class
    blocks = [0] if case.fields.get("context") == "carried" else [1]
    part = model_class.from_pretrained(tmp_path / "whole", resident_blocks=blocks)
    trainer = trainer_of(part, case, tmp_path / "job", train_shared=False)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_estimate_is_what_a_step_holds(case):
    """Of all blocks in turn, to the byte: what is followed without memory, and what is taken."""
    workload = Workload(case.config, 2, batch_size=3, sequence_length=case.length)
    way = Way("in turn", {**case.fields, "shared": "common"})
    estimate = db.estimate_memory(case.config, 2, batch_size=3, sequence_length=case.length, **case.fields)
    followed = next(ledger for name, ledger in estimate.ledgers.items() if name.endswith("all blocks in turn"))
    torch.manual_seed(0)
    measured = ledger_of(way, workload)
    assert followed.parts.total == pytest.approx(measured.parts.total, rel=0.02)
    assert str(estimate).count("\n") > 5


def test_card_and_inspect_say_what_it_is(case, tmp_path, capsys):
    model = case.model()
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    level = model.noise_schedule.level_name
    assert f"pipeline_tag: {model.task}" in card and f"| block | layers | {level} |" in card
    main(["inspect", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == model.task and len(found["blocks"]) == 2
    assert found["blocks"][0][level] == list(model.noise_schedule.interval(0))
    main(["card", str(tmp_path), "--stdout"])
    assert capsys.readouterr().out.strip() == card.strip()


def test_both_families_of_the_tests_fit_a_screen_or_two():
    for family in (masking_family, point_family):
        assert len(open(family.__file__).readlines()) <= 150
