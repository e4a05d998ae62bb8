"""The recipe that fine-tunes image models of diffusers: streamed and not, resumed, in the stock pipeline."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from families import same
from huggingface_hub.utils import filter_repo_objects
from image_recipe_runs import FAMILIES, STEPS, TRAINING, captioned, folders, options, samples_of, trainers
from PIL import Image
from safetensors.torch import load_file
from transformers import Trainer

from hf_diffusionblocks.recipes import finetune_image_model as recipe, image_trainer

pytestmark = pytest.mark.usefixtures("own_cache")


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.rglob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("name", "tuned"), [*((name, []) for name in FAMILIES), ("flux", ["--lora"]), ("sana", ["--lora"])])
def test_streaming_changes_nothing(tmp_path, options, name, tuned, capsys):
    """Bit for bit, after five steps with accumulation, clipping, decay, dropped captions and averages; beside a run with the
    Trainer's own switch of activation checkpointing."""
    given = [*options(name), *STEPS, *tuned, "--num_samples", "0"]
    recipe.main([*given, "--activation_checkpointing", "--output_dir", str(tmp_path / "plain")])
    recipe.main([*given, "--stream", "--output_dir", str(tmp_path / "streamed")])
    assert "at most 2 on the device at once" in capsys.readouterr().out
    plain, streamed = (weights_in(tmp_path / part) for part in ("plain", "streamed"))
    before = weights_in(Path(options(name)[1], "transformer"))
    moved = [key for key, weight in plain.items() if not torch.equal(weight, before.get(key, torch.zeros_like(weight)))]
    assert same(plain, streamed) and len(moved) > len(plain) / 2


@pytest.mark.parametrize(("name", "tuned"), [("qwen", []), ("flux", ["--lora"])], ids=["whole", "lora"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path, options, name, tuned):
    """Bit for bit, streamed, within an epoch; averages are those that would have been, too. Samples change nothing."""
    given = [*options(name), *STEPS, *tuned, "--stream", "--save_strategy", "steps", "--save_steps", "3"]
    recipe.main([*given, "--num_samples", "0", "--output_dir", str(tmp_path / "whole")])
    stopped = str(tmp_path / "whole" / "checkpoint-3")
    resumed = [*given, "--num_samples", "1", "--sample_every_n_steps", "1", "--resume_from_checkpoint", stopped]
    recipe.main([*resumed, "--output_dir", str(tmp_path / "resumed")])
    assert {each.name for each in (tmp_path / "resumed" / "samples").iterdir()} == {"step-00000004.png", "final.png"}
    for part in ("checkpoint-5", "."):
        one, other = ({file.name: load_file(file) for file in saved(tmp_path / run / part)} for run in ("whole", "resumed"))
        assert one and one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    shutil.rmtree(tmp_path / "resumed")
    with pytest.raises(SystemExit, match="is not of what this run trains: it "):
        recipe.main([*resumed, "--lora", "--lora_layers", "to_k,proj_out", "--output_dir", str(tmp_path / "resumed")])


def saved(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]


@pytest.mark.parametrize("name", ["_save", "_load_from_checkpoint", "_get_train_sampler"])
def test_an_overridden_method_has_the_stock_trainer_s_parameters(name):
    ours, stock = (list(inspect.signature(getattr(each, name)).parameters) for each in (image_trainer.ImageTrainer, Trainer))
    assert ours == stock


IMAGES = """
import sys, json, numpy, torch, diffusers
for name, folder, tuned, call in json.load(open(sys.argv[1])):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = [pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]]
    pipe.load_lora_weights(tuned)
    images.append(pipe(**call, generator=torch.Generator().manual_seed(0)).images[0])
    numpy.save(f"{tuned}/images.npy", numpy.stack([numpy.asarray(image) for image in images]))
"""


def test_adapters_load_in_the_stock_pipeline_which_then_draws_what_the_recipe_draws(tmp_path, options, folders, trainers):
    """In a fresh process; and before the first step, the streamed model draws what the stock pipeline does: 0.0 apart."""
    jobs, drawn = [], {}
    for name in FAMILIES:
        given = [*options(name), "--max_steps", "2", "--lora", "--lora_r", "4", "--num_samples", "1", "--learning_rate", "0.1"]
        recipe.main([*given, "--stream", "--output_dir", str(tmp_path / name)])
        (samples,) = samples_of(trainers[-1])
        ((call, _),) = samples._calls
        jobs.append((name, folders[name], str(tmp_path / name), call))
        drawn[name] = np.stack([np.asarray(image) for image in (trainers[-1].images_at_start[0][0], samples.images()[0])])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([sys.executable, "-c", IMAGES, tmp_path / "jobs.json"], check=True, capture_output=True, timeout=300)
    for name, folder, tuned, _ in jobs:
        ours, stock = drawn[name].astype(int), np.load(Path(tuned, "images.npy")).astype(int)
        assert (ours[0] == stock[0]).all() and (ours[0] != ours[1]).mean() > 0.5
        # (On a CPU, where weights lie in memory decides how sums of adapters are rounded: Sana and its own deep copy are 3e-6
        # apart, which may take a pixel to its neighbour.)
        assert np.abs(ours[1] - stock[1]).max() <= (1 if name == "sana" else 0)


def test_a_tuned_transformer_loads_in_the_stock_pipeline(tmp_path, options, folders, trainers):
    """Of a class-to-image model, with min-SNR weights, whose averages are what is saved."""
    given = [*options("dit"), "--max_steps", "3", "--snr_gamma", "5.0", "--ema_decay", "0.5", "--stream"]
    recipe.main([*given, "--sample_prompts", "3", "7", "--output_dir", str(tmp_path)])
    pipe = diffusers.DiTPipeline.from_pretrained(folders["dit"])
    stock = [draw(pipe, 3), draw(pipe, 7)]
    assert [np.asarray(image).tolist() for image in trainers[0].images_at_start[0]] == [each.tolist() for each in stock]
    pipe.transformer = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "transformer")
    grid = np.asarray(Image.open(tmp_path / "samples" / "final.png"))
    assert (np.concatenate([draw(pipe, 3), draw(pipe, 7)], axis=1) == grid).all() and (draw(pipe, 3) != stock[0]).any()
    own = trainers[0].transformer.state_dict()
    assert not same(own, pipe.transformer.state_dict())  # (those are averages)


def draw(pipe: diffusers.DiTPipeline, number: int) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(class_labels=[number], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    return np.asarray(drawn.images[0])


def test_a_file_s_name_says_nothing_of_its_split(tmp_path):
    """`datasets` would take the second for the split "test", and the others, with all captions, for none."""
    names = ["a.png", "test-shot.png", "train-station.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    rows = [json.dumps({"file_name": name, "text": name}) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert recipe.load_images(recipe.DataArguments(data=str(tmp_path)))["text"][:] == names


def test_latents_are_not_pushed(tmp_path, options, monkeypatch):
    pushed, hub = [], SimpleNamespace(upload_folder=lambda **given: pushed.append(given))
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, *args, **kwargs: setattr(self, "hub_model_id", "me/style"))
    given = [each for each in options("flux") if each != "--cache_dir" and "caches" not in each]
    recipe.main([*given, "--max_steps", "1", "--num_samples", "0", "--push_to_hub", "--output_dir", str(tmp_path)])
    names = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")]
    kept = [*filter_repo_objects(names, ignore_patterns=pushed[-1]["ignore_patterns"])]
    assert "transformer/config.json" in kept and not any("cache" in name for name in kept)


@pytest.mark.parametrize("card", ["12gb", "16gb"])
@pytest.mark.parametrize(("name", "family"), [("qwen_image", "qwen"), ("flux_dev", "flux"), ("sd35_large", "sd3")])
def test_the_configs_that_come_along_run(tmp_path, options, trainers, name, family, card):
    """With a smaller model, on smaller images, for a step."""
    config = Path(recipe.__file__).parent / "configs" / f"finetune_{name}_{card}.yaml"
    given = options(family)[: options(family).index(TRAINING[0])]
    small = ["--use_cpu", "--dtype", "float32", "--max_steps", "1", "--num_samples", "0", "--output_dir", str(tmp_path)]
    recipe.main(["--config", str(config), *given, *small])
    (trainer,) = trainers
    assert trainer.has_adapters == (card == "12gb") and len(saved(tmp_path)) == 1
