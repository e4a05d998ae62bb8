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
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Config, PreTrainedTokenizerFast, ViTConfig

import hf_diffusionblocks as db
from hf_diffusionblocks.cli import main

WORDS = ["<end>", "once", "upon", "a", "time", "there", "was"]
MASK = len(WORDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of images, a pipeline with a VAE, a model of text, one of masked text, one of classes."""
    root = tmp_path_factory.mktemp("saved")
    made().save_pretrained(root / "images")
    quiet(made(4), made_vae()).save_pretrained(root / "pipeline")
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=7, n_positions=32, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    randomized(db.convert(config, 2)).save_pretrained(root / "text")
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(root / "text")
    words.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    masked = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", mask_token="<mask>")
    for name in ("config", "masked"):
        masked.save_pretrained(root / name)
    config.save_pretrained(root / "config")
    randomized(db.convert(config, 2, task="fill-mask", mask_token_id=MASK)).save_pretrained(root / "masked")
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


def test_seed_stream_and_a_file_of_options(folders, tmp_path):
    """A row a class; each image has noise of its own, whatever it is made with."""
    options = tmp_path / "options.yaml"
    lines = ["class_labels: [0, owl]", "num_images: 3", "num_inference_steps: 4", "guidance_scale: 2.0", "sampler: heun"]
    options.write_text("\n".join(lines))
    runs = {"a": ["--seed", 1], "streamed": ["--seed", 1, "--stream"], "other": ["--seed", 2], "one": ["--seed", 1]}
    runs["one"] += ["--class_labels", "cat", "--num_images", 1]
    for name, more in runs.items():
        generate(folders / "images", "--config", options, "--output", tmp_path / f"{name}.png", *more)
    found = {name: pixels(tmp_path / f"{name}.png").astype(int) for name in runs}
    assert found["a"].shape == (16, 24)
    assert np.array_equal(found["streamed"], found["a"]) and not np.array_equal(found["other"], found["a"])
    assert abs(found["one"] - found["a"][:8, :8]).max() <= 1


def test_text_goes_on_from_the_prompt(folders, capsys):
    def told(*args) -> str:
        generate(folders / "text", "--prompt", "once upon a", "--max_new_tokens", 12, *args)
        return capsys.readouterr().out

    greedy = told()
    model = db.DiffusionBlocksForCausalLM.from_pretrained(folders / "text")
    tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=12)[0].tolist()
    assert greedy.split() == [WORDS[token] for token in tokens if token]
    assert told("--stream") == greedy
    sampled = {told("--temperature", 5.0, "--seed", seed) for seed in (1, 1, 2)}
    assert len(sampled) == 2


def test_masks_follow_the_prompt_or_stand_in_it(folders, capsys):
    """BERT's tokenizers close a prompt, as this one does: that end is no part of what goes on."""
    model = db.DiffusionBlocksForMaskedLM.from_pretrained(folders / "masked")

    def told(prompt, *args) -> str:
        generate(folders / "masked", "--prompt", prompt, *args)
        return capsys.readouterr().out

    def spelled(tokens) -> list[str]:
        return [WORDS[token] for token in tokens[0].tolist() if token]

    options = ("--seed", 1, "--num_inference_steps", 3, "--temperature", 2.0)
    settings = {"num_inference_steps": 3, "temperature": 2.0}
    plain = told("once upon a", *options, "--max_new_tokens", 9)
    written = model.generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=9, generator=torch.Generator().manual_seed(1), **settings
    )
    assert plain.split() == spelled(written)
    filled = told("once <mask> <mask> time", *options)
    z = torch.tensor([[1, MASK, MASK, 4, 0]])
    assert filled.split() == spelled(model.infill(z, generator=torch.Generator().manual_seed(1), **settings))
    assert told("once upon a", *options, "--max_new_tokens", 9, "--stream") == plain


def test_drafts_show_the_masks_that_are_left(folders, capsys):
    for prompt, more in (("once upon a", ["--max_new_tokens", 4]), ("once <mask> <mask> time", [])):
        options = ["--prompt", prompt, "--seed", 1, "--num_inference_steps", 2, *more]
        generate(folders / "masked", *options)
        plain = capsys.readouterr().out
        generate(folders / "masked", *options, "--drafts")
        *drafts, last = capsys.readouterr().out.split("\0338\033[J")  # each is taken from the screen
        assert [draft.count("<mask>") for draft in drafts] == ([2, 0] if more else [1, 0])
        assert plain.split() == (drafts[0].split("\0337")[0] + last).split()


def test_task_of_a_config_and_the_mask_of_its_tokenizer(folders, tmp_path, capsys):
    for source in (folders / "config", folders / "config" / "config.json"):
        main(["convert", str(source), str(tmp_path / source.name), "--fresh", "--task", "fill-mask", "--num_blocks", "2"])
        model = db.DiffusionBlocksForMaskedLM.from_pretrained(tmp_path / source.name)
        assert model.mask_token_id == AutoTokenizer.from_pretrained(tmp_path / source.name).mask_token_id == MASK
    capsys.readouterr()
    sizes = ["--num_blocks", "2", "--sequence_length", "8"]
    main(["estimate", "--model", str(folders / "config"), "--task", "fill-mask", *sizes])
    told = capsys.readouterr().out
    assert "paper" in told and "recommended" not in told  # GPT-2's usual task has two formulations


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["classes"], "for image-classification, which generates nothing: pipeline('image-classification') runs it"),
        (["images", "--class_labels", "0"], "--output must name a .png file"),
        (["images", "--output", "a.jpg"], "--output a.jpg must name a .png file"),
        (["images", "--output", "a.png", "--prompt", "once"], "--prompt once is not for image-generation, which has --class"),
        (["images", "--output", "a.png", "--guidance_scale", "2"], "guidance_scale=2.0 must be at most 1 for images"),
        (["images", "--output", "a.png", "--class_labels", "cow"], "class label 'cow' must be one of 'cat', 'dog'"),
        (["text"], "--prompt must be a text to begin with"),
        (["text", "--prompt", "once", "--num_images", "2"], "--num_images 2 is not for text-generation, which has --pro"),
        (["text", "--prompt", "once", "--drafts"], "--drafts True is not for text-generation, which has --prompt"),
        (["masked"], "--prompt must be a text to begin with, or one with mask tokens"),
        (["masked", "--prompt", "<mask>", "--remasking", "x"], "remasking='x' must be one of 'random', 'low_confidence'"),
        (["masked", "--prompt", "<mask>", "--max_new_tokens", "2"], "--max_new_tokens 2 is not for a --prompt with mask"),
        (["masked", "--prompt", "once"], "max_new_tokens=50 after 1 must make at most max_position_embeddings=32"),
        (["masked", "--prompt", "<mask> " * 33], "input_ids of 34 tokens a text must be at most max_position_embeddings=32"),
        (["masked", "--prompt", "once", "--grid", "equal"], "--grid equal is not for fill-mask, which has --prompt"),
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


@pytest.mark.parametrize("device", ["zz", "meta"])
def test_a_device_that_is_not_there_is_one_line(folders, device, capsys):
    with pytest.raises(SystemExit):
        main(["generate", str(folders / "text"), "--prompt", "once", "--device", device])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("diffusionblocks generate: error: device=") and device in line
