"""What recipes run on: prose, digits and rows of answers in files, tiny models, tokenizers; runs of each recipe."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    AutoTokenizer, DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, LlamaConfig, LlamaForCausalLM,
    PreTrainedTokenizerFast, ViTConfig, ViTForImageClassification, ViTImageProcessorPil,
)  # fmt: skip

import hf_diffusionblocks as db
from hf_diffusionblocks.cli import train as train_verb
from hf_diffusionblocks.recipes.text import ModelArguments, trained_tokenizer

LENGTH, CANVAS = 24, 8
LAYERS = "num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48"
OVERRIDES = {
    "gpt2": "n_layer=2, n_embd=32, n_head=2, n_positions=24",
    "llama": f"{LAYERS}, num_key_value_heads=2, max_position_embeddings=24",
    "bert": f"{LAYERS}, max_position_embeddings=24",
    "vit": f"{LAYERS}, image_size=8, patch_size=4, num_channels=1",
    "dit-transformer-2d": "num_layers=2, num_attention_heads=2, attention_head_dim=8, patch_size=4, sample_size=8, "
    "in_channels=1",
}
SIZES = ["--num_blocks", "2", "--vocab_size", "300", "--sequence_length", str(LENGTH)]
MODEL = [*SIZES, "--config_name", "gpt2", "--config_overrides", OVERRIDES["gpt2"]]
QUIET = ["--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--learning_rate", "1e-2"]
TRAINING = [*QUIET, "--updates_per_block", "4", "--per_device_train_batch_size", "8", "--save_strategy", "no"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def refusal(main: Callable, options: list[str], program: str, capsys) -> str:
    """The one line that a recipe's main program ends with, of bad input."""
    with pytest.raises(SystemExit) as stop:
        main(options)
    # A status that is a string is printed by the interpreter, which then exits with 1.
    printed = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert stop.value.code not in (0, None)
    assert printed.startswith(f"{program}: error: ") and len(printed.splitlines()) == 1
    return printed


# ---- prose


def paragraphs(start: int, end: int) -> list[str]:
    """English prose, with a few characters of several bytes."""
    text = "".join(f"{name} \N{EM DASH} \N{GREEK SMALL LETTER PI}\n\n{topic}\n\n" for name, topic in topics.items())
    return [part for part in text.split("\n\n") if part][start:end]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name, rows in (("train", paragraphs(0, 120)), ("test", paragraphs(120, 150))):
        (folder / f"{name}.txt").write_text("\n\n".join(rows))
        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(rows)), "text": rows}), folder / f"{name}.parquet")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return folder


@pytest.fixture
def data(folder) -> list[str]:
    return text_files(folder, "parquet")


def text_files(folder: Path, ending: str) -> list[str]:
    return ["--train_file", str(folder / f"train.{ending}"), "--validation_file", str(folder / f"test.{ending}")]


def sequences(tokenizer, texts: list[str]) -> torch.Tensor:
    """What packing has to give."""
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return trained_tokenizer([*paragraphs(0, 120), None], ModelArguments(vocab_size=300), is_main=True)


# ---- images


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Parquet files as found in the wild: bytes and path of each image; labels as numbers, or words for 0 to 4 and 5 to 9."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits().images, load_digits().target
    for name, chosen in (("", labels < 10), ("first-", labels < 5), ("second-", labels >= 5)):
        rows = [index for index, is_chosen in enumerate(chosen) if is_chosen]
        for split, part in (("train", rows[:64]), ("test", rows[64:96])):
            table = {"image": [], "label": [f"digit {labels[row]}" if name else labels[row] for row in part]}
            for row in part:
                Image.fromarray((images[row] * 15).astype(np.uint8)).save(buffer := io.BytesIO(), format="png")
                table["image"].append({"bytes": buffer.getvalue(), "path": None})
            pyarrow.parquet.write_table(pyarrow.table(table), folder / f"{name}{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> str:
    """A stock ViT of the digits 0 to 4, and its processor."""
    folder, names = tmp_path_factory.mktemp("vit"), {k: f"digit {k}" for k in range(5)}
    config = ViTConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1, id2label=names, label2id={name: k for k, name in names.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)
    return str(folder)


# ---- answers


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A stock Llama and its tokenizer, with a chat template."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = trained_tokenizer(paragraphs(0, 60), ModelArguments(vocab_size=300), is_main=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
        max_position_embeddings=256, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def save_masked(model: str, folder: Path, num_blocks: int) -> db.DiffusionBlocksForMaskedLM:
    """The plain model as a masked one, saved with a tokenizer that has a mask token, as the recipe saves one."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    tokenizer.save_pretrained(folder)
    made = db.convert(model, num_blocks, "fill-mask", mask_token_id=tokenizer.mask_token_id)
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def masked(tmp_path_factory, model) -> str:
    """A masked model of two blocks."""
    save_masked(model, folder := tmp_path_factory.mktemp("masked"), 2)
    return str(folder)


def block_diffusion_config(vocab_size: int, canvas_length: int) -> DiffusionGemmaConfig:
    sizes = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16, "sliding_window": 8, "num_experts": 2,
        "top_k_experts": 1, "moe_intermediate_size": 32, "max_position_embeddings": 1024, "initializer_range": 0.2,
        "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 8, "patch_size": 4,
    }  # fmt: skip
    tokens = {"image_token_id": vocab_size - 1, "boi_token_id": vocab_size - 2, "eoi_token_id": vocab_size - 3}
    return DiffusionGemmaConfig(text_config=sizes, vision_config=vision, canvas_length=canvas_length, **tokens)


@pytest.fixture(scope="module")
def writer(tmp_path_factory, model) -> str:
    """A block diffusion model with a tokenizer that has a chat template."""
    folder, tokenizer = tmp_path_factory.mktemp("writer"), AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    made = DiffusionGemmaForBlockDiffusion(block_diffusion_config(len(tokenizer), CANVAS))
    made.generation_config.update(max_denoising_steps=2, eos_token_id=0, pad_token_id=0)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def chat(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": said} for turn in turns for role, said in zip(("user", "assistant"), turn)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Rows of every form."""
    folder = tmp_path_factory.mktemp("instructions")
    rows = [(name, text.strip()[: 10 + 9 * (number % 4)]) for number, (name, text) in enumerate(topics.items())][:24]
    forms = {
        "chats": [{"messages": chat((name, answer[:8]), ("More", answer[8:]))} for name, answer in rows],
        "prompts": [{"prompt": f"{name}: ", "completion": answer} for name, answer in rows],
        "texts": [{"text": f"{name}: {answer}"} for name, answer in rows],
        "classes": [{"text": answer, "label": name[0]} for name, answer in rows],
        "nulls": [{"prompt": "Why?", "completion": answer} for answer in ("So.", None)],
        "silent": [{"messages": chat(("Why?", answer))} for answer in ("So.", None)],
        "flat": [{"messages": f"{name}: {answer}"} for name, answer in rows],
        "unasked": [{"prompt": "", "completion": answer} for _, answer in rows],
        "numbers": [{"number": number} for number in range(3)],
    }
    for form, made in forms.items():
        (folder / f"{form}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return {form: str(folder / f"{form}.jsonl") for form in forms} | {"nowhere": str(folder / "nowhere.jsonl")}


def prepared(recipe, monkeypatch) -> list:
    """The trainers that a recipe prepares, from now on."""
    made, original = [], recipe.prepare

    def prepare(*arguments):
        made.append((prepared := original(*arguments))[0])
        return prepared

    monkeypatch.setattr(recipe, "prepare", prepare)
    return made


# ---- runs


@pytest.fixture(scope="module")
def places(folder, digits, vit, model, masked, writer, files) -> dict[str, str]:
    """What options name in braces."""
    found = {f"{kind}{part}": f"{at}/{part}.parquet" for kind, at in (("", folder), ("images_", digits)) for part in SPLITS}
    second = {f"second_{part}": f"{digits}/second-{part}.parquet" for part in SPLITS}
    return files | found | second | {"vit": vit, "model": model, "masked": masked, "writer": writer}


SPLITS = ("train", "test")
BLOCKS = ["--num_blocks", "2", "--updates_per_block", "4", "--per_device_train_batch_size", "8"]
TUNING = ["--max_steps", "3", "--per_device_train_batch_size", "4", "--max_length", "96"]
ACCUMULATED = ["--gradient_accumulation_steps", "2", "--max_grad_norm", "0.1", "--weight_decay", "0.1"]
TEXTS = ["--train_file", "{train}", "--validation_file", "{test}", *SIZES[2:]]
IMAGES = ["--train_file", "{images_train}", "--validation_file", "{images_test}"]
#: Task of the command `train` -> options of a short run.
RUNS = {
    "causal-lm": [*BLOCKS, *TEXTS, *MODEL],
    "masked-lm": [*BLOCKS, *TEXTS, "--config_name", "llama", "--config_overrides", OVERRIDES["llama"]],
    "text-classification": [
        *BLOCKS, "--train_file", "{classes}", "--vocab_size", "300", "--max_length", "24", "--config_name", "bert",
        "--config_overrides", OVERRIDES["bert"],
    ],
    "image-classification": [*BLOCKS, *IMAGES, "--config_name", "vit", "--config_overrides", OVERRIDES["vit"]],
    "image-generation": [
        *BLOCKS, *IMAGES, "--label_column", "label", "--config_name", "dit-transformer-2d", "--config_overrides",
        OVERRIDES["dit-transformer-2d"], "--num_inference_steps", "2",
    ],
    "finetune": [*TUNING, *ACCUMULATED, "--model", "{model}", "--data", "{chats}", "--packing", "--bf16", "false"],
    "finetune-masked-lm": [*BLOCKS[2:], "--max_length", "96", "--model", "{masked}", "--data", "{prompts}"],
    "finetune-block-diffusion": [*TUNING, *ACCUMULATED, "--model", "{writer}", "--data", "{chats}", "--samples", "0"],
    "finetune-image-classification": [
        *TUNING[:4], "--model", "{vit}", "--train_file", "{second_train}", "--validation_file", "{second_test}"
    ],
}  # fmt: skip


def recipe_of(task: str):
    return importlib.import_module(f"hf_diffusionblocks.recipes.{Path(train_verb.find_recipes()[task]).stem}")


def run(task: str, places: dict[str, str], output: Path, *options) -> dict[str, float]:
    given = [option.format(**places) for option in RUNS[task]]
    return recipe_of(task).main([*given, *QUIET, *map(str, options), "--output_dir", str(output)])
