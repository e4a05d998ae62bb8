"""A folder and a hub cache in which what the documentation says can be typed as it stands, without network.

Models that the documentation names are tiny ones of the same architecture; of those that only `estimate` reads there is a
config of the real size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture
from recipe_runs import block_diffusion_config
from tiny_pipelines import save_pipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig, BertForMaskedLM, DiffusionGemmaForBlockDiffusion, GPT2Config, GPT2LMHeadModel, LlamaConfig,
    PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, ViTConfig, ViTForImageClassification, ViTImageProcessor,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
REVISION = "0" * 40
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<end>{% endfor %}"
TEXTS = [f"Once upon a time there were {n} owls and {n * n} mice in a wood, and none of them could count." for n in range(40)]


def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>", "<|mask|>"]))
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>", mask_token="<|mask|>")
    made.chat_template = CHAT
    return made


def snapshot(cache: Path, name: str) -> Path:
    """The folder in which the hub's cache has a model of that name."""
    at = cache / f"models--{name.replace('/', '--')}"
    (at / "refs").mkdir(parents=True)
    (at / "refs" / "main").write_text(REVISION)
    return at / "snapshots" / REVISION


def make_hub(cache: Path) -> None:
    """Every model that the documentation names."""
    words = tokenizer()
    sizes = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    tiny = {
        "Qwen/Qwen3-8B": Qwen3ForCausalLM(Qwen3Config(**sizes, **layers, num_key_value_heads=2, head_dim=16)),
        "google-bert/bert-base-uncased": BertForMaskedLM(BertConfig(**sizes, **layers)),
        "openai-community/gpt2": GPT2LMHeadModel(GPT2Config(**sizes, n_embd=32, n_layer=4, n_head=2)),
    }
    for name, model in tiny.items():
        model.save_pretrained(folder := snapshot(cache, name))
        words.save_pretrained(folder)
    images = {**layers, "image_size": 8, "patch_size": 4}
    ViTForImageClassification(ViTConfig(**images)).save_pretrained(vit := snapshot(cache, "google/vit-base-patch16-224"))
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(vit)
    save_pipeline("qwen", snapshot(cache, "Qwen/Qwen-Image"))
    writer = snapshot(cache, "google/diffusiongemma-26B-A4B-it")
    DiffusionGemmaForBlockDiffusion(block_diffusion_config(len(words), 8)).save_pretrained(writer)
    words.save_pretrained(writer)
    llama = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    llama.save_pretrained(snapshot(cache, "meta-llama/Llama-3.1-8B"))
    GPT2Config(n_layer=6, architectures=["GPT2LMHeadModel"]).save_pretrained(snapshot(cache, "distilbert/distilgpt2"))


def write_texts(folder: Path) -> None:
    folder.mkdir()
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        pairs = [{"prompt": text[:20], "chosen": text[20:], "rejected": text[30:]} for text in TEXTS]
        (folder / "preferences.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        chats = [[{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:]}] for text in TEXTS]
        (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        Dataset.from_dict({"text": TEXTS * 8, "label": [n % 2 for n in range(40)] * 8}).to_parquet(folder / f"{name}.parquet")


def write_images(folder: Path) -> None:
    """Parquet files, and a folder for each label."""
    draws = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    pictures = [Picture.fromarray(draw) for draw in draws]
    features = Features(image=Image(), label=ClassLabel(names=["mouse", "owl"]))
    for name in ("train", "test"):
        (folder / name).mkdir(parents=True)
        data = {"image": pictures, "label": [n % 2 for n in range(20)]}
        Dataset.from_dict(data, features=features).to_parquet(folder / f"{name}.parquet")
        for n, picture in enumerate(pictures):
            (of_label := folder / name / ("mouse", "owl")[n % 2]).mkdir(exist_ok=True)
            picture.save(of_label / f"{n}.png")


def write_captioned(folder: Path) -> None:
    """Two pictures of colour, and what they show."""
    folder.mkdir()
    for name in ("mouse", "owl"):
        Picture.new("RGB", (64, 64), "gray" if name == "mouse" else "brown").save(folder / f"{name}.png")
    lines = [{"file_name": f"{name}.png", "text": f"a {name}"} for name in ("mouse", "owl")]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Newcomer:
    """Types what is to be typed, in a folder that looks like a checkout with data beside.

    Args:
        hub: of [`make_hub`].
        home: an empty folder.
    """

    def __init__(self, hub: Path, home: Path):
        self.hub, self.folder = hub, home / "checkout"
        write_texts(self.folder)
        write_images(self.folder / "images")
        write_captioned(self.folder / "captioned")
        for name in ("recipes", "benchmarks", "docs", "tests", "src", "setup.cfg"):
            (self.folder / name).symlink_to(ROOT / name)
        (self.folder / ".venv").symlink_to(Path(sys.prefix))

    def types(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        settings = {
            "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(self.hub), "HF_DATASETS_CACHE": str(self.hub / "datasets"),
            "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        }  # fmt: skip
        return subprocess.run(command, cwd=self.folder, env=os.environ | settings, capture_output=True, text=True)
