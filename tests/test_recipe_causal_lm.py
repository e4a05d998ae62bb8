"""The text recipe: sources, what it measures, what is kept of a pretrained model; the launcher."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from recipe_runs import LENGTH, MODEL, OVERRIDES, SIZES, TRAINING, data, folder, paragraphs, sequences, text_files
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, pipeline

import hf_diffusionblocks as db
from hf_diffusionblocks.recipes import common, train_causal_lm

pytestmark = pytest.mark.usefixtures("own_cache")
RECIPE = Path(train_causal_lm.__file__)
ACCELERATE_CONFIG = RECIPE.parent / "accelerate_configs" / "multi_gpu.yaml"


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)


def cross_entropy(folder: Path, texts: list[str]) -> float:
    """Nats a token of a saved model, read as a user would."""
    tokens = sequences(AutoTokenizer.from_pretrained(folder), texts)
    with torch.no_grad():
        logits = load(folder)(tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize("ending", ["txt", "parquet", "jsonl"])
def test_a_fresh_model_from_every_kind_of_file(tmp_path, folder, ending):
    run = [*MODEL, *TRAINING, *text_files(folder, ending), "--output_dir", str(tmp_path)]
    metrics = train_causal_lm.main(run)
    assert metrics["eval_loss"] == pytest.approx(cross_entropy(tmp_path, paragraphs(120, 150)), abs=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    model = load(tmp_path)
    assert isinstance(model, db.DiffusionBlocksForCausalLM)
    report = model.config.training_report
    assert report["updates_per_block"] == [4, 4] and "dataset" not in report
    assert report["results"]["eval_perplexity"] == metrics["eval_perplexity"]
    saved = json.loads((tmp_path / "eval_results.json").read_text())
    assert saved["eval_bits_per_byte"] == metrics["eval_bits_per_byte"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_family_learns_and_writes(tmp_path, data, family):
    model = [*SIZES, "--config_name", family, "--config_overrides", OVERRIDES[family], "--updates_per_block", "20"]
    metrics = train_causal_lm.main([*TRAINING, *data, *model, "--output_dir", str(tmp_path)])
    assert metrics["eval_loss"] < math.log(300) - 0.5
    config = load(tmp_path).config
    assert config.source_config.model_type == family
    write = pipeline("text-generation", model=str(tmp_path))
    (written,) = write("The statement", max_new_tokens=8, do_sample=False)
    assert written["generated_text"].startswith("The statement")
    assert write.model.generation_config.eos_token_id == write.tokenizer.eos_token_id == 0


def test_end_to_end_takes_as_many_updates_as_a_block(tmp_path, data):
    metrics = train_causal_lm.main([*MODEL, *TRAINING, *data, "--end_to_end", "--output_dir", str(tmp_path)])
    assert type(load(tmp_path)) is GPT2LMHeadModel
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 4
    assert metrics["eval_loss"] == pytest.approx(cross_entropy(tmp_path, paragraphs(120, 150)), abs=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))


@pytest.mark.parametrize("extra", [[], ["--end_to_end"]], ids=["blocks", "end_to_end"])
def test_pretrained_weights_and_tokenizer_are_kept(tmp_path, data, extra):
    train_causal_lm.main([*MODEL, *TRAINING, *data, "--end_to_end", "--output_dir", str(tmp_path / "plain")])
    options = ["--model_name_or_path", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "trained")]
    metrics = train_causal_lm.main([*SIZES, *TRAINING, *data, *extra, *options, "--learning_rate", "0"])
    trained = load(tmp_path / "trained")
    weights = (trained if extra else trained.backbone).state_dict()
    plain = load(tmp_path / "plain").state_dict()
    assert all(torch.equal(weights[name], plain[name]) for name in plain)
    before = json.loads((tmp_path / "plain" / "eval_results.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-5)
    assert (tmp_path / "trained/tokenizer.json").read_text() == (tmp_path / "plain/tokenizer.json").read_text()


def test_the_bound_is_estimated_once_after_training(tmp_path, data):
    options = ["--eval_nll_bound", "4", "--eval_strategy", "steps", "--eval_steps", "4"]
    metrics = train_causal_lm.main([*MODEL, *TRAINING, *data, *options, "--output_dir", str(tmp_path)])
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert all("eval_perplexity" in entry for entry in history if "eval_loss" in entry)
    assert not any("eval_nll_bound" in entry for entry in history)  # which ends with training
    tokens = sequences(AutoTokenizer.from_pretrained(tmp_path), paragraphs(120, 150))[:4]
    expected = db.nll_bound(load(tmp_path), [{"input_ids": tokens, "labels": tokens}], seed=42)
    assert metrics["eval_nll_bound"] == pytest.approx(expected.nats_per_token, abs=1e-4)
    assert metrics["eval_nll_bound_standard_error"] == pytest.approx(expected.standard_error, abs=1e-4)
    report = load(tmp_path).config.training_report
    assert report["results"]["eval_nll_bound"] == metrics["eval_nll_bound"]


def test_a_share_of_the_documents_is_evaluated_on(tmp_path, folder):
    file = ["--train_file", str(folder / "train.parquet"), "--validation_split", "0.25", "--max_train_samples", "30"]
    metrics = train_causal_lm.main([*MODEL, *TRAINING, *file, "--output_dir", str(tmp_path)])
    assert metrics["eval_loss"] == pytest.approx(cross_entropy(tmp_path, paragraphs(90, 120)), abs=1e-5)


def test_accelerate_launch_with_yaml_files(tmp_path, data):
    config = tmp_path / "tiny.yaml"
    config.write_text(
        f"config_name: gpt2\nconfig_overrides: >-\n  {OVERRIDES['gpt2']}\nnum_blocks: 2\nvocab_size: 300\n"
        f"sequence_length: {LENGTH}\nupdates_per_block: 9\nper_device_train_batch_size: 4\nlearning_rate: 1.0e-3\n"
    )
    # Two processes: one tokenizer. The arguments' use_cpu makes it gloo.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE_CONFIG)]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    options = ["--config", str(config), *data, "--updates_per_block", "3"]
    options += ["--use_cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, str(RECIPE), *options, "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = load(tmp_path / "out")
    assert saved.config.preset == "recommended"  # the recipe's default
    assert saved.config.training_report["updates_per_block"] == [3, 3]  # the command line wins
    assert saved.config.training_report["batch_size"] == 8
    # Nearly: to fill the last batch of all processes, the Trainer evaluates some sequences twice.
    loss = json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"]
    assert loss == pytest.approx(cross_entropy(tmp_path / "out", paragraphs(120, 150)), abs=1e-3)


@pytest.mark.parametrize("path", sorted(ACCELERATE_CONFIG.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_field_of_its_files(path):
    assert load_config_from_file(str(path)).num_processes in (1, 4)


def test_the_end_token_is_trained_though_it_pads(tmp_path, data):
    fresh = [*SIZES, "--config_name", "llama", "--config_overrides", OVERRIDES["llama"], "--end_to_end"]
    train_causal_lm.main([*TRAINING, *data, *fresh, "--output_dir", str(tmp_path / "plain")])
    further = [*SIZES, "--model_name_or_path", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "blocks")]
    train_causal_lm.main([*TRAINING, *data, *further])
    plain, blocks = (load(tmp_path / name).get_input_embeddings().weight[0] for name in ("plain", "blocks"))
    assert plain.norm() > 0.01 and not torch.equal(plain, blocks)


def test_random_rows_stay_in_order():
    rows = common._sample(datasets.Dataset.from_dict({"n": range(100)}), 10, seed=0)["n"]
    assert len(rows) == 10 and list(rows) == sorted(rows) != list(range(10))
