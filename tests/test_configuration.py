"""Bad fields and combinations: one ValueError that names the field, the value and what is allowed."""

from __future__ import annotations

import json
import math

import pytest
from process_scenarios import DIT, GPT2, VIT
from transformers import AutoConfig, AutoModelForImageClassification, LlamaConfig

from hf_diffusionblocks import DiffusionBlocksConfig, DiffusionBlocksForImageClassification
from hf_diffusionblocks.configuration import OF_FORMULATIONS
from hf_diffusionblocks.presets import PRESETS

BAD_FIELDS = [
    ({"num_blocks": 0}, r"num_blocks=0 must be a whole number from 1"),
    ({"num_blocks": 5}, r"num_blocks=5 must be at most the model's 4 layers"),
    ({"num_blocks": 2.0}, r"num_blocks=2.0 must be"),
    ({"num_blocks": 2, "layers_per_block": [1, 2]}, r"layers_per_block=\[1, 2\] must be a list of 2 .* sum to the model's 4"),
    ({"num_blocks": 2, "layers_per_block": [4]}, r"layers_per_block=\[4\]"),
    ({"num_blocks": 2, "layers_per_block": [0, 4]}, r"layers_per_block=\[0, 4\]"),
    ({"num_blocks": 2, "layers_per_block": [1.0, 3.0]}, r"layers_per_block=\[1.0, 3.0\] must be a list of 2"),
    ({"num_blocks": 2, "layers_per_block": 2}, r"layers_per_block=2 must be a list of 2"),
    ({"sigma_min": 0}, r"sigma_min=0 must be a finite number above 0"),
    ({"sigma_max": 0.001}, r"sigma_max=0.001 must be a finite number above sigma_min=0.002"),
    ({"sigma_max": math.inf}, r"sigma_max=inf must be a finite number above sigma_min=0.002"),
    ({"p_std": -1.0}, r"p_std=-1.0 must be a finite number above 0"),
    ({"p_mean": 40.0}, r"p_mean=40.0"),
    ({"p_mean": "high"}, r"p_mean='high' must be a finite number"),
    ({"sigma_data": "large"}, r"sigma_data='large' must be a finite number above 0"),
    ({"overlap": -0.1}, r"overlap=-0.1 must be a finite number from 0"),
    ({"preset": "best"}, r"preset='best' must be one of 'recommended', 'paper'"),
    ({"local_head_layers": 13, "preset": "recommended"}, r"local_head_layers=13 must be at most the model's 4 layers"),
    ({"local_head_layers": -1, "preset": "recommended"}, r"local_head_layers=-1 must be a whole number from 0"),
    ({"num_inference_steps": 0}, r"num_inference_steps=0 must be a whole number from 1"),
    ({"shared": "none"}, r"shared='none' must be one of 'common', 'per_block'"),
    ({"id2label": ["cat"]}, r"id2label=\['cat'\] must be a dictionary of class numbers and their names, or None"),
    ({"training_report": "done"}, r"training_report='done' must be a dictionary, or None"),
    ({"format_version": 2}, r"format_version=2 must be 3: the model was saved by .*: convert again"),
]  # fmt: skip


@pytest.mark.parametrize("fields, message", BAD_FIELDS, ids=[str(fields) for fields, _ in BAD_FIELDS])
def test_bad_field_is_named(plain_config, fields, message):
    with pytest.raises(ValueError, match=message):
        DiffusionBlocksConfig(source_config=plain_config, **{"preset": "paper", **fields})


#: Task -> source, and the fields of either preset's formulation.
NOISE = {"sigma_min", "sigma_max", "p_mean", "p_std", "sigma_data", "overlap", "num_inference_steps", "inference_seed"}
NUMBERS = {
    "text-generation": (GPT2, {"local_head_layers"}, NOISE),
    "image-classification": (VIT, {"local_head_layers"}, NOISE),
    "fill-mask": (GPT2, *[{"overlap", "inference_seed", "mask_token_id"}] * 2),
    "image-generation": (DIT, *[NOISE | {"label_dropout"}] * 2),
}


@pytest.mark.parametrize("task", NUMBERS)
def test_a_saved_config_has_the_numbers_of_its_formulation_and_no_others(task, tmp_path):
    source, *expected = NUMBERS[task]
    for preset, numbers in zip(PRESETS, expected):
        DiffusionBlocksConfig(source_config=source, task=task, preset=preset).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()).keys() & {*OF_FORMULATIONS} == numbers


@pytest.mark.parametrize(
    "task, fields, message",
    [
        ("text-generation", {"sigma_max": 40.0}, r"sigma_max=40.0 must be None with preset='recommended' .* has local_head_layers "
         "alone; preset='paper' has it"),
        ("image-classification", {"preset": "paper", "local_head_layers": 1}, "local_head_layers=1 must be None with "
         "preset='paper' .* preset='recommended' has it"),
        ("fill-mask", {"sigma_min": 0.1}, "sigma_min=0.1 must be None with preset='recommended' for task 'fill-mask', .* alone$"),
        ("image-generation", {"mask_token_id": 3}, "mask_token_id=3 must be None"),
    ],
)  # fmt: skip
def test_a_number_of_another_formulation_is_refused(task, fields, message):
    with pytest.raises(ValueError, match=message):
        DiffusionBlocksConfig(source_config=NUMBERS[task][0], task=task, **fields)


def test_numbers_are_the_paper_s(plain_config):
    config = DiffusionBlocksConfig(source_config=plain_config, preset="paper")
    assert (config.sigma_min, config.sigma_max, config.p_mean, config.p_std, config.sigma_data, config.overlap) == (
        0.002, 80.0, -1.2, 1.2, 0.5, 0.05,
    )  # fmt: skip
    assert config.num_inference_steps == config.num_blocks


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"num_blocks": 4}, [[0], [1], [2], [3]]),
        ({"num_blocks": 3}, [[0, 1], [2], [3]]),
        ({"num_blocks": 2, "layers_per_block": [1, 3]}, [[0], [1, 2, 3]]),
        ({"num_blocks": 1}, [[0, 1, 2, 3]]),
        ({"layers_per_block": [3, 1]}, [[0, 1, 2], [3]]),
    ],
)
def test_layers_of_blocks(plain_config, fields, expected):
    config = DiffusionBlocksConfig(source_config=plain_config, **fields)
    assert [list(config.block_layers(k)) for k in range(config.num_blocks)] == expected


@pytest.mark.parametrize("layers, blocks", [(2, 2), (4, 4), (6, 4)])
def test_not_told_there_are_four_blocks_or_as_many_as_layers(plain_config, layers, blocks):
    plain_config.num_hidden_layers = layers
    assert DiffusionBlocksConfig(source_config=plain_config).num_blocks == blocks


def test_round_trip_through_auto_config(plain_config, tmp_path):
    config = DiffusionBlocksConfig(source_config=plain_config, num_blocks=2, preset="paper", overlap=0.1)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, DiffusionBlocksConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.source_config.to_dict() == config.source_config.to_dict()


@pytest.mark.parametrize("source_config", ["vit", ["vit"], 4], ids=str)
def test_a_source_config_of_another_type_is_named(source_config):
    with pytest.raises(ValueError, match="source_config=.* must be a config, a dictionary of its fields, or None"):
        DiffusionBlocksConfig(source_config=source_config)


@pytest.mark.parametrize("version", [None, 0, 2, "3"])
@pytest.mark.parametrize("load", [AutoConfig, DiffusionBlocksConfig, AutoModelForImageClassification])
def test_a_model_saved_in_another_format_is_refused(plain_config, load, version, tmp_path):
    model = DiffusionBlocksForImageClassification(DiffusionBlocksConfig(source_config=plain_config, num_blocks=2))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("format_version") == 3
    path.write_text(json.dumps(config if version is None else {**config, "format_version": version}))
    with pytest.raises(ValueError, match=f"format_version={version!r} must be 3: .*earlier version .*: convert again"):
        load.from_pretrained(tmp_path)


def test_it_shows_what_users_of_a_plain_config_read(plain_config):
    config = DiffusionBlocksConfig(source_config=plain_config)
    assert (config.hidden_size, config.num_hidden_layers, config.num_labels) == (32, 4, 5)
    assert config.id2label == plain_config.id2label
    assert config.get_text_config() is config.source_config


def test_it_answers_what_is_asked_of_the_plain_config():
    """Evaluation harnesses read positions and token ids."""
    source = LlamaConfig(max_position_embeddings=64, bos_token_id=3, eos_token_id=4, pad_token_id=5)
    config = DiffusionBlocksConfig(source_config=source)
    names = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "num_attention_heads", "vocab_size")
    assert [getattr(config, name) for name in names] == [getattr(source, name) for name in names]
    assert DiffusionBlocksConfig(source_config=GPT2).n_positions == GPT2.n_positions
    with pytest.raises(AttributeError):
        config.n_experts
