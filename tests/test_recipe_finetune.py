"""The fine-tuning recipes: objectives, adapters, new labels, the stock model at the end, errors."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from instruction_runs import (
    CHATS, PROMPTS, TRAINING, cross_entropy, files, instructions, model, plain, prompt_rows, tokenizer,
)  # fmt: skip
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer, GPT2LMHeadModel,
    ViTForImageClassification,
)  # fmt: skip

import hf_diffusionblocks as db
from hf_diffusionblocks.saving import shards
from hf_diffusionblocks import lora
from hf_diffusionblocks.cli import train as train_verb
from hf_diffusionblocks.recipes import finetune_causal_lm, finetune_image_classification, train_image_classification

pytestmark = pytest.mark.usefixtures("own_cache")
#: --multi_gpu is accelerate's torchrun launcher; the arguments' use_cpu makes it gloo.
TWO_PROCESSES = [
    "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--main_process_port", "0",
]  # fmt: skip


# ---- text


def test_text_is_packed_and_the_whole_model_gets_better(tmp_path, files, model, plain):
    long = ["--updates_per_block", "20"]
    metrics = finetune_causal_lm.main([*model, *TRAINING, *files, *long, "--output_dir", str(tmp_path)])
    before = json.loads((plain / "eval_results.json").read_text())
    assert metrics["eval_loss"] < before["eval_loss"] - 0.1
    assert "eval_bits_per_byte" in metrics
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert (config.denoiser, config.context, config.prior_fraction) == ("factorized", "carried", 1.0)
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).objective == "exact"


@pytest.mark.parametrize(
    "tuned", [[], ["--peft", "lora"], ["--peft", "lora", "--ema_decay", "0.9"]], ids=["whole", "lora", "averages"]
)
def test_the_exported_model_is_the_trained_one(tmp_path, files, model, tuned, tokenizer):
    folders = ["--output_dir", str(tmp_path / "out"), "--export_plain", str(tmp_path / "plain")]
    metrics = finetune_causal_lm.main([*model, *TRAINING, *files, *PROMPTS, *tuned, *folders])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(exported) is GPT2LMHeadModel
    rows = prompt_rows(AutoTokenizer.from_pretrained(tmp_path / "plain"), 40, 61)
    assert metrics["eval_loss"] == pytest.approx(cross_entropy(exported, rows), abs=1e-5)


def test_adapters_alone_move_and_are_saved(tmp_path, files, model, plain):
    options = ["--peft", "lora", "--lora_r", "3", "--lora_alpha", "5", "--lora_target_modules", "c_fc"]
    finetune_causal_lm.main([*model, *TRAINING, *files, *options, "--output_dir", str(tmp_path)])
    assert not list(tmp_path.glob("model*.safetensors"))
    for block in (0, 1):
        config = json.loads((tmp_path / f"block_{block}" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 5, ["c_fc"])
    source = db.convert(plain, 2, denoiser="factorized", context="carried")
    weights = source.state_dict()
    tuned = lora.load_block_adapters(source, tmp_path).state_dict()
    frozen = {name: weight for name, weight in tuned.items() if "lora_" not in name}
    assert all(torch.equal(weight, weights[name.replace(".base_layer", "")]) for name, weight in frozen.items())
    assert all(weight.any() for name, weight in tuned.items() if "lora_B" in name)


def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path, files, model):
    options = [*model, *TRAINING, *files, *PROMPTS, "--peft", "lora", "--save_strategy", "steps", "--save_steps", "3"]
    whole = finetune_causal_lm.main([*options, "--output_dir", str(tmp_path / "whole")])
    os.makedirs(tmp_path / "resumed")
    os.rename(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    again = ["--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "last"]
    assert finetune_causal_lm.main([*options, *again])["eval_loss"] == whole["eval_loss"]


@pytest.mark.parametrize("objective", ["local", "final"])
def test_one_block_is_trained_alone(tmp_path, files, model, plain, objective):
    options = ["--train_blocks", "0", "--train_shared", "false", "--objective", objective]
    finetune_causal_lm.main([*model, *TRAINING, *files, *options, "--output_dir", str(tmp_path)])
    before = AutoModelForCausalLM.from_pretrained(plain).state_dict()
    after = shards.load_block_state_dict(tmp_path, 0)
    assert all(not torch.equal(after[name], before[name.removeprefix("backbone.")]) for name in after)
    saved = set(shards.saved_index(tmp_path).files)
    assert saved == ({"shared", "0"} if objective == "local" else {"shared", "0", "1"})


# ---- images


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> dict[str, list[str]]:
    """Files of the digits 0 to 4, and of 5 to 9, named."""
    folder = tmp_path_factory.mktemp("digits")
    images, targets = load_digits().images, load_digits().target
    files = {}
    for name, low in (("first", 0), ("second", 5)):
        rows = [k for k in range(len(images)) if low <= targets[k] < low + 5][:96]
        table = {"image": [], "label": [f"digit {targets[k]}" for k in rows]}
        for k in rows:
            Image.fromarray((images[k] * 15).astype(np.uint8)).save(buffer := io.BytesIO(), format="png")
            table["image"].append({"bytes": buffer.getvalue(), "path": None})
        table = pyarrow.table(table)
        pyarrow.parquet.write_table(table.slice(0, 64), folder / f"{name}-train.parquet")
        pyarrow.parquet.write_table(table.slice(64), folder / f"{name}-test.parquet")
        files[name] = [
            "--train_file", str(folder / f"{name}-train.parquet"), "--validation_file", str(folder / f"{name}-test.parquet")
        ]  # fmt: skip
    return files


@pytest.fixture(scope="module")
def plain_vit(tmp_path_factory, digits) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    config = "hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4"
    fresh = ["--config_name", "vit", "--config_overrides", f"{config}, num_channels=1", "--end_to_end"]
    train_image_classification.main([*TRAINING, *fresh, *digits["first"], "--output_dir", str(folder)])
    return folder


@pytest.mark.parametrize("tuned", [[], ["--peft", "lora"]], ids=["whole", "lora"])
def test_a_new_label_set_gets_a_new_classifier(tmp_path, digits, plain_vit, tuned):
    """Though there are as many of them; it is trained whole, and is in the exported model."""
    rate = ["--learning_rate", "5e-3"]
    options = ["--model_name_or_path", str(plain_vit), "--updates_per_block", "120", *rate, *tuned]
    folders = ["--output_dir", str(tmp_path / "out"), "--export_plain", str(tmp_path / "plain")]
    metrics = finetune_image_classification.main([*TRAINING, *options, *digits["second"], *folders])
    exported = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    assert type(exported) is ViTForImageClassification
    assert list(exported.config.id2label.values()) == [f"digit {k}" for k in range(5, 10)]
    assert (tmp_path / "plain" / "preprocessor_config.json").is_file()
    assert metrics["eval_accuracy"] > 0.5
    old = ViTForImageClassification.from_pretrained(plain_vit)
    cosine = F.cosine_similarity(exported.classifier.weight.flatten(), old.classifier.weight.flatten(), 0)
    assert cosine < 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        (["--train_shared", "false"], "train_shared=False must be True: the labels are new"),
        (["--peft", "lora", "--train_blocks", "0"], "train_blocks=[0] must include 1: the labels are new"),
    ],
)
def test_a_new_classifier_that_nothing_would_train_is_refused(tmp_path, digits, plain_vit, options, message):
    run = ["--model_name_or_path", str(plain_vit), *options, *TRAINING, *digits["second"]]
    with pytest.raises(SystemExit, match=re.escape(message)):
        finetune_image_classification.main([*run, "--output_dir", str(tmp_path)])


def test_the_model_s_own_labels_keep_its_classifier(tmp_path, digits, plain_vit):
    options = ["--model_name_or_path", str(plain_vit), "--learning_rate", "0", "--export_plain", str(tmp_path / "plain")]
    finetune_image_classification.main([*TRAINING, *options, *digits["first"], "--output_dir", str(tmp_path / "out")])
    old, new = (ViTForImageClassification.from_pretrained(folder) for folder in (plain_vit, tmp_path / "plain"))
    assert old.config.id2label == new.config.id2label
    assert all(torch.equal(new.state_dict()[name], weight) for name, weight in old.state_dict().items())


# ---- the launcher, and errors


@pytest.mark.parametrize("processes", [["--cpu", "--num_processes", "1"], TWO_PROCESSES], ids=["one", "two"])
def test_accelerate_launch(tmp_path, files, model, processes):
    folders = ["--output_dir", str(tmp_path / "out"), "--export_plain", str(tmp_path / "plain")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in instructions(40, 56)))
    data = [*files[:2], "--validation_file", str(tmp_path / "test.jsonl")]  # 16 rows: as many for each process
    launch(processes, finetune_causal_lm, *model, *TRAINING, *data, *PROMPTS, "--peft", "lora", *folders)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(exported) is GPT2LMHeadModel
    loss = json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"]
    rows = prompt_rows(AutoTokenizer.from_pretrained(tmp_path / "plain"), 40, 56)
    assert loss == pytest.approx(cross_entropy(exported, rows), abs=1e-5)


@pytest.mark.parametrize(
    "tuned",
    [["--updates_per_block", "60", "--learning_rate", "2e-3"], ["--updates_per_block", "30", "--peft", "lora"]],
    ids=["whole", "lora"],
)
def test_blocks_are_tuned_in_parallel(tmp_path, digits, plain_vit, tuned):
    """Each in a process of its own, on the whole model's loss; the exported model has what both have trained."""
    options = ["--model_name_or_path", str(plain_vit), "--block_parallel", "true", *tuned]
    folders = ["--output_dir", str(tmp_path / "out"), "--export_plain", str(tmp_path / "plain")]
    launch(TWO_PROCESSES, finetune_image_classification, *TRAINING, *options, *digits["second"], *folders)
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["eval_accuracy"] > 0.5
    exported, old = (ViTForImageClassification.from_pretrained(folder) for folder in (tmp_path / "plain", plain_vit))
    for layer in (0, 1):
        states = (model.vit.layers[layer].state_dict() for model in (exported, old))
        assert any(not torch.equal(*pair) for pair in zip(*(state.values() for state in states)))
    # The same training as in use: the exported model's loss is the one that was evaluated.
    rows = pyarrow.parquet.read_table(digits["second"][3]).to_pylist()
    images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows]
    labels = torch.tensor([exported.config.label2id[row["label"]] for row in rows])
    with torch.no_grad():
        logits = exported.eval()(**AutoImageProcessor.from_pretrained(tmp_path / "plain")(images, return_tensors="pt")).logits
    assert results["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-4)


@pytest.mark.parametrize("name", ["finetune_gpt2", "finetune_vit_lora"])
def test_the_configs_that_come_along_run(tmp_path, name, request):
    """With a smaller model and fewer updates."""
    config = ["--config", str(Path(finetune_causal_lm.__file__).parent / "configs" / f"{name}.yaml")]
    folders = ["--output_dir", str(tmp_path / "out"), "--export_plain", str(tmp_path / "plain")]
    if name == "finetune_gpt2":
        inputs = [*request.getfixturevalue("model"), *request.getfixturevalue("files")]
        metrics = finetune_causal_lm.main([*config, *TRAINING, *inputs, *folders])
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")) is GPT2LMHeadModel
    else:
        inputs = ["--model_name_or_path", str(request.getfixturevalue("plain_vit"))]
        inputs += request.getfixturevalue("digits")["second"]
        metrics = finetune_image_classification.main([*config, *TRAINING, *inputs, *folders])
        assert type(AutoModelForImageClassification.from_pretrained(tmp_path / "plain")) is ViTForImageClassification
    assert metrics["eval_loss"] > 0


def launch(processes: list[str], recipe, *arguments: str) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", *processes, recipe.__file__, *arguments]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_command_finds_the_recipes():
    recipes = train_verb.find_recipes()
    assert recipes["finetune-causal-lm"] == finetune_causal_lm.__file__
    assert recipes["finetune-image-classification"] == finetune_image_classification.__file__


LORA = ["--peft", "lora"]
BAD_INPUTS = {
    "no model": (["--model_name_or_path", ""], "model_name_or_path must name the model to fine-tune"),
    "rank without adapters": (["--lora_r", "4"], "lora_r=4 needs peft='lora'"),
    "rank": ([*LORA, "--lora_r", "0"], "lora_r=0 must be at least 1"),
    "dropout": ([*LORA, "--lora_dropout", "1"], "lora_dropout=1.0 must be from 0 to below 1"),
    "another method": (["--peft", "ia3"], "invalid choice: 'ia3'"),
    "adapters end to end": ([*LORA, "--end_to_end"], "peft='lora' must not be set with end_to_end"),
    "export end to end": (["--end_to_end", "--export_plain", "{new}"], "must not be set with end_to_end"),
    "export of a joint model": (["--export_plain", "{new}", "--denoiser", "joint"], "needs denoiser='factorized'"),
    "export over something": (["--export_plain", "{plain}"], "must be a new or empty folder"),
    "export of a part": (
        ["--export_plain", "{new}", "--train_blocks", "0", "--objective", "local"], "needs all blocks: with train_blocks=[0]"
    ),
    "prompts alone": (["--prompt_column", "prompt"], "prompt_column='prompt' and completion_column=None must be set together"),
    "both": ([*PROMPTS, *CHATS], "messages_column='messages' and prompt_column='prompt': set one of them"),
    "bound of prompts": ([*PROMPTS, "--eval_nll_bound", "2"], "eval_nll_bound=2 must be 0 with prompts or chats"),
    "no such column": (["--messages_column", "x"], "messages_column='x' must be a column of the train data"),
    "prompts that are chats": (
        ["--prompt_column", "messages", "--completion_column", "text"], "prompt_column='messages' must hold text"
    ),
    "chats that are texts": (["--messages_column", "text"], "messages_column='text' must hold lists of messages"),
    "nothing left": ([*PROMPTS, "--sequence_length", "2"], "no completion within sequence_length=2"),
    "fresh weights": (["--config_name", "gpt2"], "--config_name"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_one_line_and_a_failure(tmp_path, files, model, plain, capsys, options, message):
    options = [option.format(new=tmp_path / "new", plain=plain) for option in options]
    with pytest.raises(SystemExit) as stop:
        finetune_causal_lm.main([*model, *TRAINING, *files, *options, "--output_dir", str(tmp_path / "out")])
    printed = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert stop.value.code not in (0, None)
    assert printed.startswith("finetune_causal_lm.py: error: ") and len(printed.splitlines()) == 1
    assert message in printed
