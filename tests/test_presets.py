"""What `convert` gives by default, what leaves it, and the objective that a model brings along."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from conftest import randomized
from process_scenarios import DIT, GPT2, VIT, arguments_of, trainer_of
from transformers import AutoConfig, GPT2LMHeadModel
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.saving import cards
from hf_diffusionblocks.backbones.base import backbone_for
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.cli.arguments import BlocksArguments
from hf_diffusionblocks.configuration import USER_FIELDS
from hf_diffusionblocks.presets import LEAVING, PRESETS, RECOMMENDED, with_preset
from hf_diffusionblocks.recipes import common
from hf_diffusionblocks.recipes.formulation import blocks_fields
from hf_diffusionblocks.memory.ways import formulations_for
from hf_diffusionblocks.tasks import TASKS

TRIPLE = {"denoiser": "factorized", "context": "carried", "prior_fraction": 1.0}
SOURCES = {"text-generation": GPT2, "image-classification": VIT}
#: (task, start) -> what the model is by default, local heads, objective
TABLE = {
    ("text-generation", "pretrained"): (0, "exact"),
    ("image-classification", "pretrained"): (0, "exact"),
    ("text-generation", "fresh"): (0, "exact"),
    ("image-classification", "fresh"): (0, "local"),
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


def formulation(config: db.DiffusionBlocksConfig) -> dict:
    return {name: getattr(config, name) for name in (*TRIPLE, "readout", "readout_layers", "objective")}


PAPER = {
    "denoiser": "joint", "context": "independent", "prior_fraction": 0.0, "readout": "edm", "readout_layers": 0,
    "objective": "local",
}  # fmt: skip


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
    heads, objective = TABLE[task, start]
    expected = {**TRIPLE, "readout": "posterior", "readout_layers": heads, "objective": objective}
    assert formulation(db.convert(source, 2).config) == expected
    assert TABLE.keys() | {("image-generation", "fresh")} == RECOMMENDED.keys()


def test_fresh_blocks_that_denoise_images_have_ends_of_their_own():
    assert [db.convert(DIT, 2, **fields).config.shared for fields in ({}, {"preset": "paper"})] == ["per_block", "common"]
    assert db.convert(backbone_for(DIT).make_plain(DIT), 2).config.shared == "common"


def test_the_paper_s_model_has_the_class_s_defaults(config, plain):
    for source in (config, plain):
        model = db.convert(source, preset="paper")
        assert formulation(model.config) == PAPER
        expected = db.DiffusionBlocksConfig(source_config=config)
        assert all(getattr(model.config, name) == getattr(expected, name) for name in USER_FIELDS)


def test_the_memory_of_the_recommended_model_is_that_of_a_pretrained_one_of_either_task():
    for task in SOURCES:
        fields = {name: value for name, value in RECOMMENDED[task, "pretrained"].items() if name != "objective"}
        assert formulations_for(TASKS[task], backbone_for(SOURCES[task]))["recommended"] == fields == TRIPLE


@pytest.mark.parametrize("fields", [{}, {"shared": "per_block"}, {"prior_fraction": 0.5}, {"sampler": "ancestral"}])
def test_a_pretrained_model_is_unchanged_bit_for_bit(config, plain, fields):
    model, inputs = db.convert(plain, 2, **fields).eval(), inputs_of(config)
    with torch.no_grad():
        expected = plain(inputs).logits
        assert torch.equal(model(inputs).logits, expected)
        assert torch.equal(model.to_plain()(inputs).logits, expected)


@pytest.mark.parametrize("layers", [1, 4])
def test_one_block_and_one_layer(config, layers, tmp_path):
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": layers})
    for source in (config, backbone_for(config).plain_class(config)):
        model = randomized(db.convert(source, 1))
        trainer_of(model, SOURCES[model.task], tmp_path / "run", {"max_steps": 2}).train()
        model.eval().save_pretrained(tmp_path / "saved")
        reloaded, inputs = type(model).from_pretrained(tmp_path / "saved"), inputs_of(SOURCES[model.task])
        with torch.no_grad():
            assert torch.equal(reloaded(inputs).logits, model(inputs).logits)


# ---- what overrides it, and what leaves it


def test_fields_override_the_preset_s():
    config = db.convert(GPT2, 2, prior_fraction=0.5, readout_layers=2, overlap=0.2).config
    assert formulation(config) == {
        **TRIPLE, "prior_fraction": 0.5, "readout": "posterior", "readout_layers": 2, "objective": "exact"
    }  # fmt: skip
    assert config.overlap == 0.2
    plain = GPT2LMHeadModel(GPT2)
    assert db.convert(plain, 2, objective="local").config.objective == "local"
    assert db.convert(plain, 2, shared="per_block").config.objective == "exact"


@pytest.mark.parametrize(
    "fields",
    [
        {"denoiser": "joint"}, {"denoiser": "factorized"}, {"context": "carried"}, {"context": "independent"},
        {"readout": "edm"}, {"readout": None}, {"denoiser": "factorized", "context": "carried"},
    ],
    ids=str,
)  # fmt: skip
def test_naming_the_formulation_leaves_the_preset(config, plain, fields):
    for source in (config, plain):
        expected = db.DiffusionBlocksConfig(source_config=config, num_blocks=2, **fields)
        assert formulation(db.convert(source, 2, **fields).config) == formulation(expected)
        assert expected.prior_fraction == 0 and expected.objective == "local"


@pytest.mark.parametrize("fields", [{}, {"denoiser": "joint"}])
def test_an_unknown_preset_is_refused(config, plain, fields):
    for source in (config, plain):
        with pytest.raises(ValueError, match="preset='best' must be one of 'recommended', 'paper'"):
            db.convert(source, 2, preset="best", **fields)


def test_the_saved_config_holds_what_came_of_it(config, plain, tmp_path):
    for source in (config, plain):
        model = db.convert(source, 2)
        model.save_pretrained(tmp_path)
        reloaded = AutoConfig.from_pretrained(tmp_path)
        assert all(getattr(reloaded, name) == getattr(model.config, name) for name in USER_FIELDS)
        assert not hasattr(reloaded, "preset")


# ---- the objective


@pytest.mark.parametrize("fields", [{}, {"denoiser": "factorized"}, {"context": "carried"}])
def test_the_final_objective_needs_blocks_that_run_on(fields):
    with pytest.raises(ValueError, match="objective='final' needs denoiser='factorized' and context='carried'"):
        db.DiffusionBlocksConfig(source_config=GPT2, num_blocks=2, objective="final", **fields)
    with pytest.raises(ValueError, match="objective='both' must be one of 'local', 'final', 'exact'"):
        db.DiffusionBlocksConfig(source_config=GPT2, num_blocks=2, objective="both")


@pytest.mark.parametrize("own", ["local", "final", "exact"])
@pytest.mark.parametrize("given", [None, "local", "final", "exact"])
def test_a_run_has_the_model_s_objective_unless_another_is_given(own, given, tmp_path):
    model = db.convert(GPT2LMHeadModel(GPT2), 2, objective=own)
    trainer = trainer_of(model, GPT2, tmp_path, {"objective": given, "max_steps": 2})
    expected = given or own
    assert trainer.args.objective == expected
    assert trainer.active.reader == (0 if expected == "local" else 1)
    assert trainer.args.block_schedule == ("random" if expected == "final" else "together")
    trainer.train()
    trainer.save_model()
    assert model.config.objective == own
    assert model.config.training_report["objective"] == expected
    card = (tmp_path / "README.md").read_text()
    assert f"- objective: {expected}" in card
    assert ("block-local training" in card) is ("each on a loss of its own" in card) is (expected == "local")
    assert ("on the whole model's loss" in card) is (expected != "local")


@pytest.mark.parametrize(
    "given, heads",
    [({}, 0), ({"objective": "final"}, 0), ({"objective": "local"}, 1), ({"resident_blocks": [0]}, 1)],
    ids=str,
)
def test_fresh_text_blocks_have_local_heads_for_their_own_losses(given, heads):
    """And so have those of a job that loads some of the blocks: it has no other loss."""
    config = db.convert(GPT2, 2, **given).config
    assert (config.readout_layers, config.formulation) == (heads, "factorized, carried")
    assert config.objective == given.get("objective", "local" if heads else "exact")


@pytest.mark.parametrize(
    "turns",
    [{"block_schedule": "sequential"}, {"block_schedule": "random"}, {"block_parallel": True}, {"block_switch_interval": 2}],
    ids=str,
)
def test_exact_is_the_final_loss_where_blocks_take_turns(turns, tmp_path, caplog):
    """Of the model's own objective; who asks a run for it is told that it needs all blocks in a step."""
    caplog.set_level("WARNING")
    logging.get_logger("hf_diffusionblocks").propagate = True
    trainer = trainer_of(db.convert(GPT2LMHeadModel(GPT2), 2), GPT2, tmp_path, turns)
    assert trainer.args.objective == "final"
    assert "the model's objective='exact' is 'final' in this run" in caplog.text


@pytest.mark.parametrize(
    "fields, arguments, schedule",
    [
        ({}, {}, "together"),  # a turn of the last block would run all others again
        ({}, {"train_blocks": [1, 2], "train_shared": False}, "together"),
        ({}, {"train_blocks": [2], "train_shared": False}, "random"),
        ({"context": "independent"}, {}, "random"),
        ({"denoiser": "joint", "prior_fraction": 0.5}, {}, "random"),  # (it cannot)
        ({}, {"objective": "final"}, "random"),
        ({}, {"block_switch_interval": 2}, "random"),
        ({}, {"block_schedule": "sequential"}, "sequential"),
        ({"context": "independent"}, {"block_schedule": "together"}, "together"),
    ],
    ids=str,
)
def test_blocks_train_together_where_turns_would_run_others_again(fields, arguments, schedule, tmp_path):
    model = db.convert(GPT2, 4, preset="paper", **{**TRIPLE, **fields})
    trainer = trainer_of(model, GPT2, tmp_path, {"max_steps": 1, **arguments})
    assert trainer.args.block_schedule == schedule


def test_the_caller_s_arguments_serve_another_model(tmp_path):
    args = db.DiffusionBlocksTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    for own in ("exact", "final", "local"):
        model = db.convert(GPT2LMHeadModel(GPT2), 2, objective=own)
        assert db.DiffusionBlocksTrainer(model=model, args=args).args.objective == own
    assert args.objective is None
    with pytest.raises(ValueError, match="objective='both' must be one of None, 'local', 'final', 'exact'"):
        db.DiffusionBlocksTrainingArguments(str(tmp_path), objective="both")


def test_one_block_alone_is_told_how_to_train_without_the_later_ones(tmp_path):
    model = db.convert(GPT2LMHeadModel(GPT2), 2, resident_blocks=[0])
    arguments = {"train_blocks": [0], "train_shared": False}
    with pytest.raises(ValueError, match=r"needs the later blocks \[1\]: load them, too, or set objective='local'"):
        trainer_of(model, GPT2, tmp_path, arguments)
    trainer_of(model, GPT2, tmp_path, {**arguments, "objective": "local"}).train()


@pytest.mark.parametrize("own", [{"prior_fraction": 0.5}, {"readout_layers": 1}], ids=str)
def test_what_is_for_own_losses_warns_beside_the_whole_model_s(own, tmp_path, caplog):
    logging.enable_propagation()
    (name, value), = own.items()
    for fields, arguments in (({}, {}), (own, {"objective": "local"}), (own, {})):
        assert f"{name}={value} with objective='exact'" not in caplog.text
        trainer_of(db.convert(GPT2LMHeadModel(GPT2), 2, **fields), GPT2, tmp_path, arguments)
    assert f"{name}={value} with objective='exact'" in caplog.text
    logging.disable_propagation()


def test_a_converted_card_speaks_of_the_model_s_objective(tmp_path):
    for objective, local in (("local", True), ("exact", False)):
        db.convert(GPT2, 2, objective=objective).save_pretrained(tmp_path)
        assert ("block-local training" in (tmp_path / "README.md").read_text()) is local


# ---- the command line and the recipes


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize("fresh", [False, True])
def test_the_command_takes_a_preset(preset, fresh, gpt2, tmp_path, capsys):
    options = ([] if preset is None else ["--preset", preset]) + (["--fresh"] if fresh else [])
    main(["convert", str(gpt2), str(tmp_path / "out"), "--num_blocks", "2", *options])
    config = AutoConfig.from_pretrained(tmp_path / "out")
    source = GPT2 if fresh else GPT2LMHeadModel(GPT2)
    assert formulation(config) == formulation(db.convert(source, 2, preset=preset or "recommended").config)


def test_the_command_s_options_override_the_preset(gpt2, tmp_path, capsys):
    options = ["--num_blocks", "2", "--objective", "local", "--prior_fraction", "0.5"]
    main(["convert", str(gpt2), str(tmp_path / "a"), *options])
    config = AutoConfig.from_pretrained(tmp_path / "a")
    assert formulation(config) == {
        **TRIPLE, "prior_fraction": 0.5, "readout": "posterior", "readout_layers": 0, "objective": "local"
    }  # fmt: skip
    (tmp_path / "options.yaml").write_text("denoiser: joint\nnum_blocks: 2\n")
    main(["convert", str(gpt2), str(tmp_path / "b"), "--config", str(tmp_path / "options.yaml")])
    assert formulation(AutoConfig.from_pretrained(tmp_path / "b")) == PAPER
    with pytest.raises(SystemExit):
        main(["convert", str(gpt2), str(tmp_path / "c"), "--preset", "best"])
    assert "--preset: invalid choice: 'best'" in capsys.readouterr().err


def fields_of_recipe(preset: str, given: dict, task: str, start: str, training_args) -> dict:
    name = {"model_name_or_path" if start == "pretrained" else "config_name": "some"}
    arguments = common.ModelArguments(preset=preset, **name)
    return blocks_fields(arguments, BlocksArguments(num_blocks=2, **given), training_args, task, SOURCES[task])


@pytest.mark.parametrize("run", [{"train_blocks": [0], "train_shared": False}, {"block_parallel": True}], ids=str)
def test_a_recipe_s_fresh_blocks_that_do_not_train_together_have_their_own_losses(run, tmp_path):
    fields = fields_of_recipe("recommended", {}, "text-generation", "fresh", arguments_of(tmp_path, run))
    assert (fields["objective"], fields["readout_layers"]) == ("local", 1)
    fields = fields_of_recipe("recommended", {}, "text-generation", "pretrained", arguments_of(tmp_path, run))
    assert (fields["objective"], fields["readout_layers"]) == ("exact", 0)


@pytest.mark.parametrize(("task", "start"), TABLE)
@pytest.mark.parametrize("given", [{}, {"prior_fraction": 0.5}, {"context": "carried"}], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_recipes_take_a_preset(preset, given, task, start, tmp_path):
    fields = fields_of_recipe(preset, given, task, start, arguments_of(tmp_path, {}))
    assert fields.keys() == USER_FIELDS.keys()
    made = db.DiffusionBlocksConfig(source_config=SOURCES[task], **fields)
    wanted = with_preset(preset, task, start, given, backbone_for(SOURCES[task]))
    assert formulation(made) == formulation(db.DiffusionBlocksConfig(source_config=SOURCES[task], num_blocks=2, **wanted))


@pytest.mark.parametrize("file", sorted((Path(common.__file__).parent / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_configs_that_come_along_leave_the_formulation_to_the_preset(file):
    assert not yaml.safe_load(file.read_text()).keys() & {*LEAVING, "objective"}


def test_all_options_of_the_config_are_left_to_the_preset():
    assert {field.default for field in dataclasses.fields(BlocksArguments)} == {None}
