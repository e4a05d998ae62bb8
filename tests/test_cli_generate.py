"""`diffusionblocks generate`: images and text of saved models, and what it says where there is nothing to make."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import randomized
from PIL import Image
from test_image_pipeline import made, made_vae, quiet
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, PreTrainedTokenizerFast, ViTConfig

import hf_diffusionblocks as db
from hf_diffusionblocks.cli import main

WORDS = ["<end>", "once", "upon", "a", "time", "there", "was"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of images, a pipeline with a VAE, a model of text, one of classes."""
    root = tmp_path_factory.mktemp("saved")
    made().save_pretrained(root / "images")
    quiet(made(4), made_vae()).save_pretrained(root / "pipeline")
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=7, n_positions=32, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    randomized(db.convert(config, 2)).save_pretrained(root / "text")
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(root / "text")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    db.convert(ViTConfig(num_hidden_layers=2, **sizes), 2).save_pretrained(root / "classes")
    return root


def generate(*args) -> None:
    main(["generate", *map(str, args), "--device", "cpu"])


def pixels(file) -> np.ndarray:
    return np.array(Image.open(file))


def test_images_are_the_pipelines(folders, tmp_path, capsys):
    steps = ("--num_inference_steps", 4)
    generate(folders / "images", "--class_labels", "owl", 0, "--output", tmp_path / "a.png", *steps)
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}: 2 images\n"
    expected = quiet(made())([2, 0], 4).images
    assert np.array_equal(pixels(tmp_path / "a.png"), np.concatenate(expected, axis=1))

    generate(folders / "pipeline", "--num_images", 3, "--output", tmp_path / "new" / "b.png", *steps)
    assert pixels(tmp_path / "new" / "b.png").shape == (16, 16, 3)


def test_seed_offload_and_a_file_of_options(folders, tmp_path):
    """A row a class; each image has noise of its own, whatever it is made with."""
    options = tmp_path / "options.yaml"
    lines = ["class_labels: [0, owl]", "num_images: 3", "num_inference_steps: 4", "guidance_scale: 2.0", "sampler: heun"]
    options.write_text("\n".join(lines))
    runs = {"a": ["--seed", 1], "offloaded": ["--seed", 1, "--offload"], "other": ["--seed", 2], "one": ["--seed", 1]}
    runs["one"] += ["--class_labels", "cat", "--num_images", 1]
    for name, more in runs.items():
        generate(folders / "images", "--config", options, "--output", tmp_path / f"{name}.png", *more)
    found = {name: pixels(tmp_path / f"{name}.png").astype(int) for name in runs}
    assert found["a"].shape == (16, 24)
    assert np.array_equal(found["offloaded"], found["a"]) and not np.array_equal(found["other"], found["a"])
    assert abs(found["one"] - found["a"][:8, :8]).max() <= 1


def test_text_goes_on_from_the_prompt(folders, capsys):
    def told(*args) -> str:
        generate(folders / "text", "--prompt", "once upon a", "--max_new_tokens", 12, *args)
        return capsys.readouterr().out

    greedy = told()
    model = db.DiffusionBlocksForCausalLM.from_pretrained(folders / "text")
    tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=12)[0].tolist()
    assert greedy.split() == [WORDS[token] for token in tokens if token]
    assert told("--offload") == greedy
    sampled = {told("--temperature", 5.0, "--seed", seed) for seed in (1, 1, 2)}
    assert len(sampled) == 2


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["classes"], "for image-classification, which generates nothing: pipeline('image-classification') runs it"),
        (["images", "--class_labels", "0"], "--output must name a .png file"),
        (["images", "--output", "a.jpg"], "--output a.jpg must name a .png file"),
        (["images", "--output", "a.png", "--prompt", "once"], "--prompt once is not for image-generation, which has --class"),
        (["images", "--output", "a.png", "--class_labels", "cow"], "class label 'cow' must be one of 'cat', 'dog'"),
        (["text"], "--prompt must be a text to begin with"),
        (["text", "--prompt", "once", "--num_images", "2"], "--num_images 2 is not for text-generation, which has --pro"),
        (["nowhere", "--prompt", "once"], "nowhere"),
    ],
)
def test_what_is_wrong_is_one_line(folders, args, named, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        generate(*args)
    line = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 1 and line.startswith("diffusionblocks generate: error: ") and named in line
