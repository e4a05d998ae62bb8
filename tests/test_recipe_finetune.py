"""The recipe that fine-tunes text by TRL: forms of data, adapters, the launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pydoc_data.topics import topics

import pytest
import torch
from peft import PeftModel
from recipe_runs import TEMPLATE, files, model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import hf_diffusionblocks as db
from hf_diffusionblocks.recipes import finetune

pytestmark = pytest.mark.usefixtures("own_cache")
TRAINING = [
    "--max_steps", "3", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--max_length", "96",
    "--use_cpu", "--bf16", "false", "--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no",
]  # fmt: skip
ACCUMULATION = [
    "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2", "--max_grad_norm", "0.1",
    "--weight_decay", "0.1",
]  # fmt: skip


@pytest.fixture
def trainers(monkeypatch) -> list:
    """The trainers of the runs, as they end."""
    made, shown = [], finetune.print_samples
    monkeypatch.setattr(finetune, "print_samples", lambda trainer, prompts: (made.append(trainer), shown(trainer, prompts)))
    return made


def with_loss(trainer, row: int = 0) -> str:
    labels = trainer.train_dataset[row]["labels"]
    return trainer.processing_class.decode([label for label in labels if label != -100])


@pytest.mark.parametrize("form", ["chats", "prompts"])
def test_only_completions_have_a_loss_and_the_model_gets_better(tmp_path, files, model, trainers, capsys, form):
    """And the saved model is the stock one, with its tokenizer and card; samples are printed."""
    only = ["--assistant_only_loss"] if form == "chats" else []
    options = ["--model", model, "--data", files[form], "--eval_data", files[form], *TRAINING, "--max_steps", "12", *only]
    metrics = finetune.main([*options, "--output_dir", str(tmp_path)])
    name, text = next(iter(topics.items()))
    answer = text.strip()[:10]
    expected = f"{answer[:8]}<|end|>{answer[8:]}<|end|>" if form == "chats" else f"{answer}<|endoftext|>"
    assert with_loss(trainers[0]) == expected
    asked = f"<|user|>{name}<|end|><|assistant|>{answer[:8]}<|end|><|user|>More<|end|><|assistant|>" if only else f"{name}: "
    assert f"\n{asked} -> " in capsys.readouterr().out
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(saved) is LlamaForCausalLM and AutoTokenizer.from_pretrained(tmp_path).chat_template == TEMPLATE
    assert "sft" in (tmp_path / "README.md").read_text()
    losses = [each["loss"] for each in trainers[0].state.log_history if "loss" in each]
    assert metrics["eval_loss"] < losses[0] - 0.5


def test_texts_are_packed_and_adapters_alone_are_saved(tmp_path, files, model, trainers):
    options = ["--model", model, "--data", files["texts"], *TRAINING, "--packing", "--lora", "--lora_r", "3"]
    finetune.main([*options, "--output_dir", str(tmp_path)])
    packed = trainers[0].train_dataset
    assert len(packed) < 24 and max(map(len, packed["input_ids"])) <= 96
    assert any(len(lengths) > 1 for lengths in packed["seq_lengths"])
    assert not (tmp_path / "model.safetensors").exists()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
    plain = AutoModelForCausalLM.from_pretrained(model)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path).merge_and_unload().state_dict()
    moved = {name for name, weight in plain.state_dict().items() if not torch.equal(weight, tuned[name])}
    assert moved == {f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qv"}


def test_an_optimizer_in_the_backward_pass_changes_nothing(tmp_path, files, model, trainers):
    options = ["--model", model, "--data", files["prompts"], *TRAINING, "--max_grad_norm", "0"]
    for name, extra in (("after", []), ("within", ["--optimizer_in_backward", "--stream"])):
        finetune.main([*options, *extra, "--output_dir", str(tmp_path / name)])
    callbacks = [[type(each) for each in trainer.callback_handler.callbacks] for trainer in trainers]
    assert [db.OptimizerInBackward in each for each in callbacks] == [False, True]
    after, within = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("after", "within"))
    assert after == within


def test_two_processes_end_where_one_does(tmp_path, files, model):
    """On as many rows a step, streamed; and each sample is printed once."""
    options = ["--model", model, "--data", files["prompts"], *TRAINING]
    finetune.main([*options, "--output_dir", str(tmp_path / "one")])
    half = ["--per_device_train_batch_size", "2", "--stream", "--output_dir", str(tmp_path / "two")]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", finetune.__file__, *options, *half,
    ]  # fmt: skip
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" -> ") == 2
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(two[name], one[name], atol=1e-3, rtol=0)
    assert (one[name] - start[name]).abs().mean() > 1e-2


def test_empty_prompts_are_trained_and_not_continued(tmp_path, files, model, capsys):
    finetune.main([*TRAINING, "--model", model, "--data", files["unasked"], "--output_dir", str(tmp_path)])
    assert " -> " not in capsys.readouterr().out
