"""The fine-tuning recipes: objectives, adapters, instruction data, new labels, the stock model at the end, errors."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
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
from hf_diffusionblocks.recipes import (
    completions, finetune_causal_lm, finetune_image_classification, train_causal_lm, train_image_classification,
)  # fmt: skip

LENGTH = 64
TRAINING = [
    "--num_blocks", "2", "--updates_per_block", "3", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2",
    "--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no",
]  # fmt: skip
#: --multi_gpu is accelerate's torchrun launcher; the arguments' use_cpu makes it gloo.
TWO_PROCESSES = [
    "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--main_process_port", "0",
]  # fmt: skip
PROMPTS = ["--prompt_column", "prompt", "--completion_column", "completion"]
CHATS = ["--messages_column", "messages"]
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = str(tmp_path_factory.getbasetemp() / "datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(cache))
    monkeypatch.setenv("HF_DATASETS_CACHE", cache)  # of sub-processes


def instructions(start: int, end: int) -> list[dict]:
    """Rows that are texts, prompts with completions, and chats; completions of very different lengths."""
    rows = []
    for number, (name, text) in list(enumerate(topics.items()))[start:end]:
        answer = text.strip()[: 10 + 9 * (number % 4)]
        chat = [("user", f"{name}?"), ("assistant", answer[:8]), ("user", "More"), ("assistant", answer[8:])]
        rows.append({
            "text": text[:300], "prompt": f"{name}: ", "completion": answer,
            "messages": [{"role": role, "content": content} for role, content in chat],
        })  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("instructions")
    for name, rows in (("train", instructions(0, 40)), ("test", instructions(40, 61))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--train_file", str(folder / "train.jsonl"), "--validation_file", str(folder / "test.jsonl")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, files) -> Path:
    """A stock GPT-2 and its tokenizer."""
    folder = tmp_path_factory.mktemp("plain")
    fresh = ["--config_name", "gpt2", "--config_overrides", f"n_layer=2, n_embd=32, n_head=2, n_positions={LENGTH}"]
    run = [*TRAINING, *files, *fresh, "--end_to_end", "--vocab_size", "300", "--sequence_length", str(LENGTH)]
    train_causal_lm.main([*run, "--output_dir", str(folder)])
    return folder


@pytest.fixture
def model(plain) -> list[str]:
    return ["--model_name_or_path", str(plain), "--sequence_length", str(LENGTH)]


@pytest.fixture
def tokenizer(plain):
    return AutoTokenizer.from_pretrained(plain)


def cross_entropy(model, rows: list[tuple[list[int], list[int]]]) -> float:
    """Nats a labelled token, a row at a time."""
    total, count = 0.0, 0
    for tokens, labels in rows:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([tokens])).logits[0, :-1]
        total += F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum").item()
        count += sum(label != -100 for label in labels[1:])
    return total / count


def prompt_rows(tokenizer, start: int, end: int) -> list[tuple[list[int], list[int]]]:
    """What the recipe has to make of prompts and completions."""
    rows = []
    for row in instructions(start, end):
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        rows.append(([*prompt, *completion][:LENGTH], [*[-100] * len(prompt), *completion][:LENGTH]))
    return rows


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


# ---- instruction data


def test_only_completions_have_a_loss(tmp_path, files, model, plain, tokenizer):
    """And every token of them counts alike, however they fall into batches."""
    options = [*PROMPTS, "--learning_rate", "0", "--per_device_eval_batch_size", "5"]
    metrics = finetune_causal_lm.main([*model, *TRAINING, *files, *options, "--output_dir", str(tmp_path)])
    expected = cross_entropy(AutoModelForCausalLM.from_pretrained(plain), prompt_rows(tokenizer, 40, 61))
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert "eval_bits_per_byte" not in metrics


def encoded(tokenizer, row: dict, length: int = LENGTH, **columns) -> dict:
    args = finetune_causal_lm.DataArguments(sequence_length=length, **columns)
    data = datasets.DatasetDict(train=datasets.Dataset.from_list([row]))
    return completions.encode(data, tokenizer, args)["train"][0]


def with_loss(tokenizer, row: dict) -> str:
    return tokenizer.decode([token for token, label in zip(row["input_ids"], row["labels"]) if label != -100])


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain template", "the tokenizer's"])
def test_every_answer_of_a_chat_has_a_loss(tokenizer, template):
    tokenizer.chat_template = template
    chat = instructions(3, 4)[0]["messages"]
    row = encoded(tokenizer, {"messages": chat}, length=500, messages_column="messages")
    end = tokenizer.eos_token + "\n" if template is None else "<|end|>"
    assert with_loss(tokenizer, row) == "".join(
        f"{' ' if template is None else ''}{m['content']}{end}" for m in chat if m["role"] == "assistant"
    )
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(chat, tokenize=False)
    # What the model is asked in use, token by token, is what it was asked in training.
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    assert row["input_ids"][: len(prompt)] == prompt


def test_answers_that_a_template_writes_anew_are_texts_of_their_own(tokenizer):
    """As Qwen3's, which leaves out the thoughts of all answers but the last."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and loop.last %}<think>{% endif %}"
        "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    args = finetune_causal_lm.DataArguments(sequence_length=500, messages_column="messages")
    said = (("user", "A?"), ("assistant", "B."), ("user", "C?"), ("assistant", "D."))
    chat = [{"role": role, "content": text} for role, text in said]
    data = datasets.DatasetDict(train=datasets.Dataset.from_list([{"messages": chat}]))
    made = completions.encode(data, tokenizer, args)["train"]
    assert [with_loss(tokenizer, row) for row in made] == ["<think>B.<|end|>", "<think>D.<|end|>"]
    whole = "<|user|>A?<|end|><|assistant|>B.<|end|><|user|>C?<|end|><|assistant|><think>D.<|end|>"
    assert tokenizer.decode(made[1]["input_ids"]) == whole


ALTERNATE = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
BAD_CHATS = {
    "not a chat": ("text", None, "messages_column='messages' must hold lists of messages with 'role' and 'content'"),
    "assistant first": ([("assistant", "Hi")], CHATML, "messages_column='messages': a chat must begin with another than"),
    "template's own error": ([("system", "Hi"), ("assistant", "Hi")], ALTERNATE, "the chat template says no system role, of"),
    "answer before its question": (
        [("user", "Hi"), ("assistant", "Hi")], "{% for m in messages|reverse %}{{ m['content'] }}.{% endfor %}{{ bos_token }}",
        "does not begin with what it writes to ask for it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CHATS)
def test_chats_that_cannot_be_read_are_named(tokenizer, name):
    chat, tokenizer.chat_template, message = BAD_CHATS[name]
    if isinstance(chat, list):
        chat = [{"role": role, "content": content} for role, content in chat]
    with pytest.raises(ValueError, match=message):
        encoded(tokenizer, {"messages": chat}, messages_column="messages")


def test_prompts_go_through_the_tokenizer_s_chat_template(tokenizer):
    columns = {"prompt_column": "prompt", "completion_column": "completion"}
    row = {"prompt": "Why?", "completion": "So."}
    assert tokenizer.decode(encoded(tokenizer, row, **columns)["input_ids"]) == "Why?So.<|endoftext|>"
    tokenizer.chat_template = CHATML
    made = encoded(tokenizer, row, **columns)
    assert tokenizer.decode(made["input_ids"]) == "<|user|>Why?<|end|><|assistant|>So.<|end|>"
    assert with_loss(tokenizer, made) == "So.<|end|>"


def test_a_template_made_here_is_saved_with_the_tokenizer(tmp_path, files, model):
    folders = ["--output_dir", str(tmp_path / "out"), "--export_plain", str(tmp_path / "plain")]
    finetune_causal_lm.main([*model, *TRAINING, *files, *CHATS, *folders])
    for folder in ("out", "plain"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).chat_template == completions.TEMPLATE


def test_rows_without_a_completion_are_left_out(tokenizer, caplog):
    args = finetune_causal_lm.DataArguments(sequence_length=8, prompt_column="p", completion_column="c")
    rows = [{"p": "a", "c": "b"}, {"p": "a" * 20, "c": "b"}, {"p": "a", "c": ""}, {"p": "", "c": "bcd"}]
    data = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
    made = completions.encode(data, tokenizer, args)["train"]
    assert [with_loss(tokenizer, row) for row in made] == ["b<|endoftext|>", "cd<|endoftext|>"]  # nothing predicts a first token
    assert "2 of 4 rows of the train data are left out" in caplog.text


def test_batches_are_filled_up_without_a_loss():
    batch = completions.collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [-100]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]


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
