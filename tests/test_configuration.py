"""Bad fields and combinations: one ValueError that names the field, the value and what is allowed."""

from __future__ import annotations

import json
import math

import pytest
from transformers import AutoConfig, AutoModelForImageClassification

from hf_diffusionblocks import DiffusionBlocksConfig, DiffusionBlocksForImageClassification, NoiseSchedule

TABLE = [[0.002, 0.0], [0.3, 0.2], [2.0, 0.7], [80.0, 1.0]]
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
    ({"sigma_data": "large"}, r"sigma_data='large' must be a finite number above 0, or 'auto'"),
    ({"overlap": -0.1}, r"overlap=-0.1 must be a finite number from 0, or None"),
    ({"denoiser": "both"}, r"denoiser='both' must be one of 'joint', 'factorized'"),
    ({"context": None}, r"context=None must be one of"),
    ({"bridge": "warm"}, r"bridge='warm' must be one of None, 'soft', 'hard'"),
    ({"sampler": "heun"}, r"sampler='heun' must be one of 'euler', 'ancestral'"),
    ({"denoiser": "factorized", "readout": "edm"}, r"readout='edm' must be 'posterior' with denoiser='factorized'"),
    ({"local_head_layers": 1}, r"local_head_layers=1 must be 0 with context='independent'"),
    ({"prior_fraction": 1.5}, r"prior_fraction=1.5 must be a finite number from 0 to 1"),
    ({"num_inference_steps": 0}, r"num_inference_steps=0 must be a whole number from 1"),
    ({"loss_weighting": "min-snr"}, r"loss_weighting='min-snr' must be one of None, 'edm'"),
    ({"shared": "none"}, r"shared='none' must be one of 'common', 'per_block'"),
    ({"id2label": ["cat"]}, r"id2label=\['cat'\] must be a dictionary of class numbers and their names, or None"),
    ({"training_report": "done"}, r"training_report='done' must be a dictionary, or None"),
    ({"format_version": 1}, r"format_version=1 must be 2: the model was saved by .*: convert again"),
    ({"noise_distribution": "uniform"}, r"noise_distribution='uniform' must be one of 'lognormal', 'information'"),
    ({"noise_table": TABLE}, r"noise_distribution='lognormal' must be 'information' with a noise_table"),
    *(
        ({"noise_distribution": "information", "noise_table": table},
         r"noise_table=.* must rise in both columns from \[sigma_min=0.002, 0.0\] to \[sigma_max=80.0, 1.0\]")
        for table in ([[0.01, 0.0], *TABLE[1:]], [*TABLE[:-1], [70.0, 1.0]], [*TABLE[:-1], [80.0, 0.9]],
                      [[0.002, 0.1], *TABLE[1:]], [TABLE[0], TABLE[2], TABLE[1], TABLE[3]],
                      [TABLE[0], [0.3, 0.4], [2.0, 0.4], TABLE[3]])
    ),
]  # fmt: skip


@pytest.mark.parametrize("fields, message", BAD_FIELDS, ids=[str(fields) for fields, _ in BAD_FIELDS])
def test_bad_field_is_named(plain_config, fields, message):
    with pytest.raises(ValueError, match=message):
        DiffusionBlocksConfig(source_config=plain_config, **fields)


def test_defaults_are_the_paper_s(plain_config):
    config = DiffusionBlocksConfig(source_config=plain_config)
    assert (config.sigma_min, config.sigma_max, config.p_mean, config.p_std, config.sigma_data) == (
        0.002, 80.0, -1.2, 1.2, 0.5,
    )  # fmt: skip
    assert (config.denoiser, config.context, config.readout, config.sampler) == (
        "joint", "independent", "edm", "euler",
    )  # fmt: skip


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"num_blocks": 4}, [[0], [1], [2], [3]]),
        ({"num_blocks": 3}, [[0, 1], [2], [3]]),
        ({"num_blocks": 2, "layers_per_block": [1, 3]}, [[0], [1, 2, 3]]),
        ({"num_blocks": 1}, [[0, 1, 2, 3]]),
    ],
)
def test_layers_of_blocks(plain_config, fields, expected):
    config = DiffusionBlocksConfig(source_config=plain_config, **fields)
    assert [list(config.block_layers(k)) for k in range(config.num_blocks)] == expected


def test_round_trip_through_auto_config(plain_config, tmp_path):
    config = DiffusionBlocksConfig(source_config=plain_config, num_blocks=2, overlap=0.1, sigma_data="auto")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, DiffusionBlocksConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.source_config.to_dict() == config.source_config.to_dict()


@pytest.mark.parametrize("source_config", ["vit", ["vit"], 4], ids=str)
def test_a_source_config_of_another_type_is_named(source_config):
    with pytest.raises(ValueError, match="source_config=.* must be a config, a dictionary of its fields, or None"):
        DiffusionBlocksConfig(source_config=source_config)


@pytest.mark.parametrize("version", [None, 0, 1, "2"])
@pytest.mark.parametrize("load", [AutoConfig, DiffusionBlocksConfig, AutoModelForImageClassification])
def test_a_model_saved_in_another_format_is_refused(plain_config, load, version, tmp_path):
    model = DiffusionBlocksForImageClassification(DiffusionBlocksConfig(source_config=plain_config, num_blocks=2))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("format_version") == 2
    path.write_text(json.dumps(config if version is None else {**config, "format_version": version}))
    with pytest.raises(ValueError, match=f"format_version={version!r} must be 2: .*earlier version .*: convert again"):
        load.from_pretrained(tmp_path)


def test_a_noise_table_makes_the_schedule_and_survives_a_reload(plain_config, tmp_path):
    config = DiffusionBlocksConfig(
        source_config=plain_config, num_blocks=2, noise_distribution="information", noise_table=TABLE
    )
    config.save_pretrained(tmp_path)
    boundaries = AutoConfig.from_pretrained(tmp_path).noise_schedule(0.0).boundaries
    assert boundaries.tolist() == NoiseSchedule(2, table=TABLE).boundaries.tolist()


def test_bridge_defaults_to_the_task_s(plain_config):
    config = DiffusionBlocksConfig(source_config=plain_config)
    assert (config.bridge, DiffusionBlocksForImageClassification(config).bridge) == (None, "soft")


def test_it_shows_what_users_of_a_plain_config_read(plain_config):
    config = DiffusionBlocksConfig(source_config=plain_config)
    assert (config.hidden_size, config.num_hidden_layers, config.num_labels) == (32, 4, 5)
    assert config.id2label == plain_config.id2label
    assert config.get_text_config() is config.source_config


def test_auto_sigma_data_is_the_target_s_scale(plain_config):
    config = DiffusionBlocksConfig(source_config=plain_config, sigma_data="auto")
    assert config.target_scale(32) == 32**-0.5
