"""The text recipe: sources, what it measures, errors before any work, resume; the launcher."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from refusals import refusal
from text_recipe_runs import (
    LENGTH, MODEL, OVERRIDES, SIZES, TRAINING, data, files, folder, paragraphs, sequences, tokenizer,
)  # fmt: skip
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM, pipeline,
)  # fmt: skip

import hf_diffusionblocks as db
from hf_diffusionblocks.saving import shards
from hf_diffusionblocks.cli import train as train_verb
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


# ---- runs


@pytest.mark.parametrize("ending", ["txt", "parquet", "jsonl"])
def test_a_fresh_model_from_every_kind_of_file(tmp_path, folder, ending):
    run = [*MODEL, *TRAINING, *files(folder, ending), "--output_dir", str(tmp_path)]
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


@pytest.mark.parametrize("family", OVERRIDES)
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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_end_to_end_takes_as_many_updates_as_a_block(tmp_path, data, family):
    model = [*SIZES, "--config_name", family, "--config_overrides", OVERRIDES[family], "--end_to_end"]
    metrics = train_causal_lm.main([*TRAINING, *data, *model, "--output_dir", str(tmp_path)])
    assert type(load(tmp_path)) is {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}[family]
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 4
    assert metrics["eval_loss"] == pytest.approx(cross_entropy(tmp_path, paragraphs(120, 150)), abs=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))


@pytest.mark.parametrize("origin", ["fresh", "pretrained"])
def test_one_block_a_job_then_merged(tmp_path, data, origin):
    """The recipe's own way to it: every job loads and trains a block, the tokenizer is found again."""
    model = MODEL
    if origin == "pretrained":
        train_causal_lm.main([*MODEL, *TRAINING, *data, "--end_to_end", "--output_dir", str(tmp_path / "plain")])
        model = ["--num_blocks", "2", "--sequence_length", str(LENGTH), "--model_name_or_path", str(tmp_path / "plain")]
    apart = ["--preset", "paper", "--shared", "per_block"]
    jobs = [str(tmp_path / f"job{block}") for block in (0, 1)]
    for block, job in enumerate(jobs):
        run = [*model, *TRAINING, *data, *apart, "--train_blocks", str(block), "--output_dir", job]
        train_causal_lm.main(run)
        assert set(shards.saved_index(job).files) == {"shared", str(block)}
    db.merge_blocks(jobs, tmp_path / "whole")
    assert load(tmp_path / "whole").config.training_report["updates_per_block"] == [4, 4]


@pytest.mark.parametrize("extra", [[], ["--end_to_end"]], ids=["blocks", "end_to_end"])
def test_streamed_it_saves_the_same_weights(tmp_path, data, extra):
    for name, streamed in (("held", []), ("streamed", ["--stream"])):
        train_causal_lm.main([*MODEL, *TRAINING, *data, *extra, *streamed, "--output_dir", str(tmp_path / name)])
    held, streamed = (load(tmp_path / name).state_dict() for name in ("held", "streamed"))
    assert all(torch.equal(weight, streamed[name]) for name, weight in held.items())


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


RESUMED = {
    "blocks": [],
    "end_to_end": ["--end_to_end"],
    "paper": ["--preset", "paper"],
}


@pytest.mark.parametrize("extra", RESUMED.values(), ids=RESUMED.keys())
def test_resumed_run_ends_as_the_uninterrupted_one(tmp_path, data, extra):
    options = [*MODEL, *TRAINING, *data, *extra, "--save_strategy", "steps", "--save_steps", "0.5"]
    train_causal_lm.main([*options, "--output_dir", str(tmp_path / "whole")])
    half = "checkpoint-2" if "--end_to_end" in extra else "checkpoint-4"
    shutil.copytree(tmp_path / "whole" / half, tmp_path / "resumed" / half)
    train_causal_lm.main([*options, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "last"])
    whole, resumed = (load(tmp_path / name) for name in ("whole", "resumed"))
    states = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


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


def test_the_command_finds_the_recipe():
    assert train_verb.find_recipes()["causal-lm"] == str(RECIPE)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_end_token_is_trained_though_it_pads(tmp_path, data, family):
    fresh = [*SIZES, "--config_name", family, "--config_overrides", OVERRIDES[family], "--end_to_end"]
    train_causal_lm.main([*TRAINING, *data, *fresh, "--output_dir", str(tmp_path / "plain")])
    further = [*SIZES, "--model_name_or_path", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "blocks")]
    train_causal_lm.main([*TRAINING, *data, *further])
    plain, blocks = (load(tmp_path / name).get_input_embeddings().weight[0] for name in ("plain", "blocks"))
    assert plain.norm() > 0.01 and not torch.equal(plain, blocks)


def test_random_rows_stay_in_order():
    rows = common._sample(datasets.Dataset.from_dict({"n": range(100)}), 10, seed=0)["n"]
    assert len(rows) == 10 and list(rows) == sorted(rows) != list(range(10))


# ---- errors

TRAIN = ["--train_file", "{train}"]
LLAMA = [*SIZES, "--config_name", "llama", "--config_overrides"]
BAD_FILES = {
    "fake.parquet": b"no parquet",
    "json.json": b"[1, {",
    "latin.txt": b"\xe9t\xe9\n\n" * 9,
    "empty.txt": b"",
    "void.jsonl": b"",
    "short.txt": b"one word",
}
BAD_INPUTS = {
    "no model": (TRAIN, "exactly one of model_name_or_path, config_name"),
    "no data": (MODEL, "exactly one of dataset_name, train_file, not none"),
    "no such file": ([*MODEL, "--train_file", "x.txt"], "train_file='x.txt' must be an existing file"),
    "file of another kind": ([*MODEL, "--train_file", __file__], "must end in one of .txt, .parquet, .json, .jsonl"),
    "not parquet": ([*MODEL, "--train_file", "{fake}"], "train_file='{fake}' cannot be read: Parquet magic bytes"),
    "not json": ([*MODEL, "--train_file", "{json}"], "train_file='{json}' cannot be read: "),
    "not UTF-8": ([*MODEL, "--train_file", "{latin}"], "train_file='{latin}' cannot be read: 'utf-8' codec can't decode"),
    "empty": ([*MODEL, "--train_file", "{empty}"], "train_file='{empty}' cannot be read: it is empty"),
    "empty lines": ([*MODEL, *TRAIN, "--validation_file", "{void}"], "validation_file='{void}' cannot be read: it is empty"),
    "no batch": ([*MODEL, *TRAIN, "--per_device_train_batch_size", "0"], "per_device_train_batch_size=0 must be a whole"),
    "no micro-batch": ([*MODEL, *TRAIN, "--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0 must be a"),
    "no rate": ([*MODEL, *TRAIN, "--learning_rate", "nan"], "learning_rate=nan must be a finite number from 0"),
    "no seed": ([*MODEL, *TRAIN, "--seed", "-1"], "seed=-1 must be a whole number from 0"),
    "no such column": ([*MODEL, *TRAIN, "--text_column", "x"], "text_column='x' must be a column of the train data"),
    "not text": ([*MODEL, *TRAIN, "--text_column", "id"], "text_column='id' must hold text, in the train data it"),
    "one document": ([*MODEL, "--train_file", "{short}"], "validation_split=0.1 of 1 row of data cannot be set aside"),
    "too little text": (
        [*MODEL, "--train_file", "{short}", "--validation_split", "0"],
        "the train data has too little text for one",
    ),
    "too long": (
        [*MODEL, *TRAIN, "--sequence_length", "25"],
        "sequence_length=25 must be at most the model's max_position_embeddings=24",
    ),
    "too short": ([*MODEL, *TRAIN, "--sequence_length", "1"], "sequence_length=1 must be at least 2"),
    "few tokens": ([*MODEL, *TRAIN, "--vocab_size", "256"], "vocab_size=256 must be at least 257"),
    "two vocabularies": ([*LLAMA, "vocab_size=99", *TRAIN], "config_overrides must not set vocab_size"),
    "no tokenizer": ([*MODEL, *TRAIN, "--tokenizer_name", "{folder}"], "{folder} has no tokenizer"),
    "blocks of the plain": ([*MODEL, *TRAIN, "--end_to_end", "--train_blocks", "0"], "must not be set with end_to_end"),
    "bound of a block": (
        [*MODEL, *TRAIN, "--eval_nll_bound", "1", "--train_blocks", "0", "--train_shared", "false"],
        "needs all blocks",
    ),
    "a job that moves what is shared": (
        [*MODEL, *TRAIN, "--train_blocks", "0"],
        "train_shared=True with train_blocks=[0] of 2 blocks: separate jobs",
    ),
    "no such block": ([*MODEL, *TRAIN, "--train_blocks", "2"], "train_blocks=[2] must be a list of different blocks of 0..1"),
    "averages of the plain": ([*MODEL, *TRAIN, "--end_to_end", "--ema_decay", "0.9"], "ema_decay=0.9 must not be set with"),
    "bound of the plain": ([*MODEL, *TRAIN, "--end_to_end", "--eval_nll_bound", "1"], "must be 0 with end_to_end"),
    "bound of nothing": (
        [*MODEL, *TRAIN, "--validation_split", "0", "--eval_nll_bound", "1"],
        "eval_nll_bound=1 needs validation data",
    ),
    "negative bound": ([*MODEL, *TRAIN, "--eval_nll_bound", "-1"], "eval_nll_bound=-1 must be at least 0"),
    "width zero": ([*LLAMA, "hidden_size=0", *TRAIN], "config_overrides='hidden_size=0' makes no model that runs"),
    "inner width zero": ([*LLAMA, "intermediate_size=0", *TRAIN], "makes a model with weights of no width"),
    "no heads": ([*LLAMA, "num_attention_heads=0", *TRAIN], "=0' makes no config: ZeroDivisionError"),
    "no such activation": ([*LLAMA, "hidden_act=foo", *TRAIN], "makes no model that runs: KeyError: 'foo'"),
    "heads that do not fit": ([*LLAMA, "num_key_value_heads=5", *TRAIN], "makes no model that runs: RuntimeError"),
    "the same end to end": ([*LLAMA, "head_dim=0", *TRAIN, "--end_to_end"], "makes no model that runs"),
    "image model": ([*SIZES, *TRAIN, "--config_name", "vit"], "task='text-generation' must be 'image-classification'"),
    "bad field": ([*MODEL, *TRAIN, "--num_blocks", "3"], "num_blocks=3 must be at most"),
    "nothing to resume": ([*MODEL, *TRAIN, "--resume_from_checkpoint", "last"], "no checkpoint"),
    "unknown option": ([*MODEL, *TRAIN, "--block_size", "3"], "--block_size"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("options", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_one_line_and_a_failure(tmp_path, folder, capsys, options, message):
    names = {"train": folder / "train.parquet", "folder": tmp_path}
    for name, content in BAD_FILES.items():
        names[name.split(".")[0]] = tmp_path / name
        (tmp_path / name).write_bytes(content)
    options = [option.format(**names) for option in options]
    given = [*options, "--use_cpu", "--output_dir", str(tmp_path / "out")]
    assert message.format(**names) in refusal(train_causal_lm.main, given, "train_causal_lm.py", capsys)


def test_a_tokenizer_too_large_for_pretrained_weights(tmp_path, data, tokenizer):
    plain = ["--vocab_size", "257", "--end_to_end", "--output_dir", str(tmp_path / "plain")]
    train_causal_lm.main([*MODEL, *TRAINING, *data, *plain])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = ["--model_name_or_path", str(tmp_path / "plain"), "--tokenizer_name", str(tmp_path / "tokenizer")]
    with pytest.raises(SystemExit, match="has 300 tokens, but the model knows 257"):
        train_causal_lm.main([*SIZES, *TRAINING, *data, *options, "--output_dir", str(tmp_path / "out")])


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        train_causal_lm.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    one_of_each = ("config_overrides", "sequence_length", "vocab_size", "local_head_layers", "updates_per_block")
    assert all(f"--{name} " in text for name in one_of_each)
