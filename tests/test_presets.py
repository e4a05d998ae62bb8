"""What `convert` gives by default; which schedule a run has by default."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from conftest import randomized
from process_scenarios import DIT, GPT2, VIT, trainer_of
from transformers import AutoConfig, GPT2LMHeadModel

import hf_diffusionblocks as db
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.cli.arguments import BlocksArguments
from hf_diffusionblocks.configuration import OF_FORMULATIONS, USER_FIELDS
from hf_diffusionblocks.presets import PRESETS, with_preset
from hf_diffusionblocks.recipes import common
from hf_diffusionblocks.recipes.formulation import blocks_fields
from hf_diffusionblocks.memory.ways import formulations_for
from hf_diffusionblocks.tasks import TASKS, backbone_for

SOURCES = {"text-generation": GPT2, "image-classification": VIT}
#: (task, start) -> layers of the local heads that it has by default
TABLE = {
    ("text-generation", "pretrained"): 0,
    ("image-classification", "pretrained"): 0,
    ("text-generation", "fresh"): 1,
    ("image-classification", "fresh"): 0,
}


@pytest.fixture(params=SOURCES)
def config(request):
    return SOURCES[request.param]


@pytest.fixture
def plain(config):
    torch.manual_seed(0)
    return randomized(backbone_for(config).plain_class(config)).eval()


@pytest.fixture
def gpt2(tmp_path):
    """A folder of a stock GPT-2."""
    GPT2LMHeadModel(GPT2).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def inputs_of(config) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if config is GPT2:
        return torch.randint(64, (3, 12), generator=generator)
    return torch.randn(3, 1, 8, 8, generator=generator)


def fields_of(config: db.DiffusionBlocksConfig) -> dict:
    return {name: getattr(config, name) for name in USER_FIELDS}


# ---- the table


@pytest.mark.parametrize(("task", "start"), TABLE)
@pytest.mark.parametrize("origin", ["model", "folder"])
def test_the_recommended_model(task, start, origin, tmp_path):
    source = SOURCES[task]
    if start == "pretrained":
        source = backbone_for(source).plain_class(source)
        if origin == "folder":
            source.save_pretrained(tmp_path)
            source = tmp_path
    config = db.convert(source, 2).config
    assert (config.preset, config.local_head_layers) == ("recommended", TABLE[task, start])


def test_fresh_blocks_that_denoise_images_have_ends_of_their_own():
    assert [db.convert(DIT, 2, **fields).config.shared for fields in ({}, {"preset": "paper"})] == ["per_block", "common"]
    assert db.convert(backbone_for(DIT).make_plain(DIT), 2).config.shared == "common"


def test_the_paper_s_model_has_the_class_s_defaults(config, plain):
    expected = fields_of(db.DiffusionBlocksConfig(source_config=config, preset="paper"))
    for source in (config, plain):
        assert fields_of(db.convert(source, preset="paper").config) == expected


def test_the_memory_of_both_formulations_is_estimated_where_there_are_two():
    found = {task: formulations_for(TASKS[task], config).keys() for task, config in SOURCES.items()}
    assert found == {task: {"recommended", "paper"} for task in SOURCES}
    assert formulations_for(TASKS["image-generation"], DIT).keys() == {"paper"}


def test_one_block_of_one_layer(config, tmp_path):
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": 1})
    for source in (config, backbone_for(config).plain_class(config)):
        model = randomized(db.convert(source, 1))
        trainer_of(model, SOURCES[model.task], tmp_path / "run", {"max_steps": 2}).train()
        model.eval().save_pretrained(tmp_path / "saved")
        reloaded, inputs = type(model).from_pretrained(tmp_path / "saved"), inputs_of(SOURCES[model.task])
        with torch.no_grad():
            assert torch.equal(reloaded(inputs).logits, model(inputs).logits)


# ---- what overrides it


def test_fields_override_the_preset_s():
    assert db.convert(GPT2, 2, local_head_layers=2).config.local_head_layers == 2
    assert db.convert(DIT, 2, shared="common").config.shared == "common"


def test_the_saved_config_holds_what_came_of_it(config, plain, tmp_path):
    for source in (config, plain):
        model = db.convert(source, 2)
        model.save_pretrained(tmp_path)
        assert fields_of(AutoConfig.from_pretrained(tmp_path)) == fields_of(model.config)


# ---- the schedule


@pytest.mark.parametrize(
    "fields, arguments, schedule",
    [
        ({}, {}, "together"),  # a turn of the last block would run all others again
        ({}, {"train_blocks": [1, 2], "train_shared": False}, "together"),
        ({}, {"train_blocks": [2], "train_shared": False}, "random"),
        ({"preset": "paper"}, {}, "random"),
        ({}, {"block_schedule": "random"}, "random"),
        ({"preset": "paper"}, {"block_schedule": "together"}, "together"),
    ],
    ids=str,
)
def test_blocks_train_together_where_turns_would_run_others_again(fields, arguments, schedule, tmp_path):
    model = db.convert(GPT2, 4, **fields)
    trainer = trainer_of(model, GPT2, tmp_path, {"max_steps": 1, **arguments})
    assert trainer.args.block_schedule == schedule


def test_the_caller_s_arguments_serve_another_model(tmp_path):
    args = db.DiffusionBlocksTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    for fields, schedule in (({}, "together"), ({"preset": "paper"}, "random")):
        model = db.convert(GPT2LMHeadModel(GPT2), 2, **fields)
        assert db.DiffusionBlocksTrainer(model=model, args=args).args.block_schedule == schedule
    assert args.block_schedule is None


# ---- the command line and the recipes


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize("fresh", [False, True])
def test_the_command_takes_a_preset(preset, fresh, gpt2, tmp_path, capsys):
    options = ([] if preset is None else ["--preset", preset]) + (["--fresh"] if fresh else [])
    main(["convert", str(gpt2), str(tmp_path / "out"), "--num_blocks", "2", *options])
    config = AutoConfig.from_pretrained(tmp_path / "out")
    source = GPT2 if fresh else GPT2LMHeadModel(GPT2)
    assert fields_of(config) == fields_of(db.convert(source, 2, preset=preset or "recommended").config)


@pytest.mark.parametrize(("task", "start"), TABLE)
@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_the_recipes_take_a_preset(preset, task, start):
    name = {"model_name_or_path" if start == "pretrained" else "config_name": "some"}
    fields = blocks_fields(common.ModelArguments(**name), BlocksArguments(num_blocks=2, preset=preset), task, SOURCES[task])
    assert fields == with_preset(preset or "recommended", task, start, {"num_blocks": 2}, backbone_for(SOURCES[task]))


@pytest.mark.parametrize("file", sorted((Path(common.__file__).parent / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_configs_that_come_along_leave_the_formulation_to_the_preset(file):
    assert yaml.safe_load(file.read_text()).keys() & {"preset", *OF_FORMULATIONS} <= {"sigma_data", "num_inference_steps"}


def test_all_options_of_the_config_are_left_to_the_preset():
    assert {field.default for field in dataclasses.fields(BlocksArguments)} == {None}
