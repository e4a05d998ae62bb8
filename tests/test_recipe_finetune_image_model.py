"""The recipe that fine-tunes image models of diffusers: streamed and not, resumed, in the stock pipeline, errors."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import PIPELINES, save_pipeline
from transformers import Trainer

from hf_diffusionblocks.cli import train as train_verb
from hf_diffusionblocks.recipes import finetune_image_model as recipe
from hf_diffusionblocks.recipes import image_trainer
from hf_diffusionblocks.recipes.image_cache import BucketSampler, bucket_sizes, read
from hf_diffusionblocks.recipes.image_pipelines import WatchedPipeline

pytestmark = pytest.mark.usefixtures("own_cache")
FAMILIES = ["flux", "sd3", "qwen", "sana"]
CAPTIONS = ["a red cat", "a dog in the park", "blue"]
TRAINING = [
    "--dtype", "float32", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--use_cpu",
    "--disable_tqdm", "true", "--save_strategy", "no",
]  # fmt: skip
STEPS = [
    "--max_steps", "5", "--gradient_accumulation_steps", "2", "--max_grad_norm", "0.5", "--weight_decay", "0.1",
    "--ema_decay", "0.9", "--caption_dropout", "0.3",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Saved pipelines."""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: save_pipeline(name, root / name) for name in PIPELINES}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Seven images of three shapes."""
    folder, drawn, rows = tmp_path_factory.mktemp("images"), np.random.default_rng(0), []
    for number in range(7):
        shape = [(64, 64), (64, 128), (128, 64)][number % 3]
        Image.fromarray(drawn.integers(0, 255, (*shape, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"{CAPTIONS[number % 3]} {number}", "label": 100 * number})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="module")
def options(folders, data, tmp_path_factory):
    """Options for a family, whose runs share a cache."""
    caches = tmp_path_factory.mktemp("caches")
    sizes = {"sana": ["--resolution", "64", "--bucket_step", "32"], "dit": ["--resolution", "16", "--caption_column", "label"]}

    def of(name: str) -> list[str]:
        size = sizes.get(name, ["--resolution", "32"])
        size = size if "--bucket_step" in size else [*size, "--bucket_step", "8"]
        length = [] if name == "dit" else ["--max_sequence_length", "300" if name == "qwen" else "40"]
        given = ["--model", folders[name], "--data", data, "--cache_dir", str(caches / name)]
        return [*given, *size, *length, *TRAINING, "--sample_steps", "2"]

    return of


@pytest.fixture
def trainers(monkeypatch) -> list:
    """The trainers of the runs, and what they were at step 0."""
    made, train = [], recipe.common.train

    def noted(trainer, resume_from):
        trainer.images_at_start = [each.images() for each in samples_of(trainer)]
        made.append(trainer)
        return train(trainer, resume_from)

    monkeypatch.setattr(recipe.common, "train", noted)
    return made


def samples_of(trainer) -> list[image_trainer.Samples]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, image_trainer.Samples)]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.rglob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


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


# ---- the loss, beside what diffusers' training scripts compute


def by_script(name: str, pipe: diffusers.DiffusionPipeline, pixels: torch.Tensor, caption: str) -> tuple:
    """Latents of the VAE, scaled, and a function from noisy ones and sigma to the prediction; both unpacked."""
    vae, transformer, length = pipe.vae, pipe.transformer, 300 if name == "qwen" else 40
    if name == "qwen":
        mean, std = (torch.tensor(getattr(vae.config, f"latents_{kind}")).view(1, -1, 1, 1) for kind in ("mean", "std"))
        latents = (vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
    elif name == "sana":
        latents = vae.encode(pixels).latent * vae.config.scaling_factor
    else:
        latents = (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    rows, channels, height, width = latents.shape

    def packed(z: torch.Tensor) -> torch.Tensor:
        return pipe._pack_latents(z, rows, channels, height, width)

    def unpacked(tokens: torch.Tensor) -> torch.Tensor:
        return pipe._unpack_latents(tokens, height * 2, width * 2, 2).reshape(latents.shape)

    def predict(z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if name == "flux":
            embeddings, pooled, text_ids = pipe.encode_prompt(caption, None, max_sequence_length=length)
            ids = pipe._prepare_latent_image_ids(rows, height // 2, width // 2, "cpu", torch.float32)
            return unpacked(transformer(
                packed(z), embeddings, pooled, sigma, ids, text_ids, guidance=torch.full((1,), 3.5)
            )[0])  # fmt: skip
        if name == "qwen":
            embeddings, mask = pipe.encode_prompt(caption, max_sequence_length=length)
            shapes = [[(1, height // 2, width // 2)]]
            return unpacked(transformer(packed(z), embeddings, mask, sigma, shapes)[0])
        if name == "sd3":
            embeddings, _, pooled, _ = pipe.encode_prompt(
                caption, None, None, do_classifier_free_guidance=False, max_sequence_length=length
            )
            return transformer(z, embeddings, pooled, sigma * 1000)[0]
        instruction = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
        embeddings, mask, _, _ = pipe.encode_prompt(
            caption, False, max_sequence_length=length, complex_human_instruction=instruction
        )
        return transformer(z, embeddings, sigma * 1000, encoder_attention_mask=mask)[0]

    return latents, predict


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_that_of_a_script_written_for_the_family(tmp_path, options, folders, data, trainers, name):
    """Of a row whose latents and embeddings come from the cache; noise and level are the same."""
    given = ["--max_steps", "1", "--num_samples", "0", "--weighting_scheme", "cosmap", "--per_device_train_batch_size", "1"]
    recipe.main([*options(name), *given, "--learning_rate", "0", "--output_dir", str(tmp_path)])
    (trainer,) = trainers
    row, seed = trainer.train_dataset[0], torch.Generator().manual_seed(5)
    with torch.no_grad():
        ours = trainer.objective(partial(trainer.denoise, trainer.model.eval(), row["conditions"]), row["latents"], seed)
        pipe = diffusers.DiffusionPipeline.from_pretrained(folders[name])
        size = (64, 64) if name == "sana" else (32, 32)
        image = Image.open(Path(data, "0.png")).resize(size, Image.Resampling.LANCZOS)
        pixels = torch.tensor(np.asarray(image) / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
        latents, predict = by_script(name, pipe, pixels, f"{CAPTIONS[0]} 0")
        seed.manual_seed(5)
        noise = torch.randn(row["latents"].shape, generator=seed)
        if name in ("flux", "qwen"):
            noise = pipe._unpack_latents(noise, latents.shape[2] * 2, latents.shape[3] * 2, 2).reshape(latents.shape)
        shift = {"sana": 3.0, "sd3": 3.0}.get(name, 1.0)  # (where it does not depend on the size)
        number = int(torch.rand(1, generator=seed) * 1000)
        sigma = torch.tensor([1 - number / 1000])
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        error = predict((1 - sigma) * latents + sigma * noise, sigma) - (noise - latents)
    weight = 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2))
    torch.testing.assert_close(ours, weight[0] * error.square().mean(), rtol=1e-4, atol=0)


# ---- what is cached, and in which order it trains


def test_the_cache_is_filled_once_and_goes_on_where_it_was_left(tmp_path, options, monkeypatch):
    given = [*options("sd3"), "--max_steps", "1", "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path)]
    recipe.main(given)
    files = {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    assert len(files) == 7 + 4 + 1  # images, samples, and what the pipeline does
    gone = next(file for file in files if "latents" in read_keys(file))
    before = read(gone)
    gone.unlink()
    encoded = []
    encode = WatchedPipeline.encode
    monkeypatch.setattr(WatchedPipeline, "encode", lambda *args: encoded.append(1) or encode(*args))
    recipe.main(given)
    assert encoded == [1] and all(file.read_bytes() == content for file, content in files.items() if file != gone)
    torch.testing.assert_close(read(gone), before)  # (prompts are encoded beside others: not bit for bit)
    monkeypatch.setattr(WatchedPipeline, "__init__", None)
    recipe.main(given)


def read_keys(file: Path) -> list[str]:
    return list(found) if file.suffix == ".safetensors" and isinstance(found := read(file), dict) else []


def test_captions_of_any_length_and_none_go_into_one_batch(tmp_path, options, trainers):
    """Of a model whose embeddings are as long as their caption: all are padded to the longest, by the pipeline, masked."""
    recipe.main([*options("qwen"), *STEPS, "--num_samples", "0", "--output_dir", str(tmp_path)])
    rows = [trainers[0].train_dataset[number] for number in (0, 3, -2, 6)]  # (one without its caption)
    sizes = [row["conditions"]["encoder_hidden_states_mask"].sum().item() for row in rows]
    assert sizes[0] == sizes[1] == sizes[3] > sizes[2]
    batch = trainers[0].train_dataset.collate(rows[:2])
    assert batch["conditions"]["img_shapes"] == [[(1, 8, 8)]] * 2 and len(batch["latents"]) == 2


def test_batches_are_of_one_bucket_and_an_epoch_has_every_row(tmp_path, options, trainers):
    recipe.main([*options("sd3"), "--max_steps", "1", "--num_samples", "0", "--output_dir", str(tmp_path), *STEPS[-2:]])
    images = trainers[0].train_dataset
    assert {row.size for row in images.rows} == {(32, 32), (24, 40), (40, 24)}
    sampler = BucketSampler(images, 2, 0.5, seed=0)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    first, second, again = epochs
    assert first == again != second and len(first) == len(second) == len(sampler) == 8
    for order in (first, second):
        numbers = [number if number >= 0 else -1 - number for number in order]
        assert set(numbers) == set(range(7)) and min(order) < 0 <= max(order)
        for pair in zip(numbers[::2], numbers[1::2]):
            assert len({images.rows[number].size for number in pair}) == 1


@pytest.mark.parametrize("resolution", [512, 1024])
def test_buckets_have_about_as_many_pixels_and_no_shape_is_far(resolution):
    sizes = bucket_sizes(resolution, 64, buckets=True)
    assert (resolution, resolution) in sizes and bucket_sizes(resolution, 64, buckets=False) == [(resolution, resolution)]
    assert all(0.8 * resolution**2 < height * width <= resolution**2 for height, width in sizes)
    assert all(height % 64 == 0 == width % 64 and (width, height) in sizes for height, width in sizes)
    assert min(height / width for height, width in sizes) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("name", "listed"), [("lumina", False), ("zimage", True)])
def test_pipelines_that_tell_time_backwards_and_take_lists_are_understood(tmp_path, folders, options, trainers, name, listed):
    """Noise is taken away by the negative of the output; rows of a list may be of any length."""
    given = ["--max_steps", "3", "--num_samples", "1", "--resolution", "64", "--bucket_step", "32", "--caption_dropout", "0.3"]
    recipe.main([*options(name), *given, "--stream", "--output_dir", str(tmp_path)])
    (trainer,) = trainers
    habits = trainer.train_dataset.cache.habits
    assert (habits.time_scale, habits.time_offset, habits.output) == (pytest.approx(-1e-3), 1.0, "negative")
    assert habits.listed == listed
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders[name])
    pipe.set_progress_bar_config(disable=True)
    call = samples_of(trainer)[0]._calls[0][0]
    stock = pipe(**call, generator=torch.Generator().manual_seed(0)).images[0]
    assert (np.asarray(stock) == np.asarray(trainer.images_at_start[0][0])).all()
    row = trainer.train_dataset[0]
    noisy, time = torch.randn(row["latents"].shape), torch.tensor([250.0])
    with torch.no_grad():
        made = habits.run(trainer.model.eval(), noisy, time, row["conditions"])
        name = "cap_feats" if listed else "encoder_hidden_states"
        given = [*row["conditions"][name]] if listed else row["conditions"][name]
        hidden = [noisy[0][:, None]] if listed else noisy
        mask = () if listed else (row["conditions"]["encoder_attention_mask"],)
        expected = trainer.transformer(hidden, torch.tensor([0.75]), given, *mask, return_dict=False)[0]
    torch.testing.assert_close(made, -(expected[0][:, 0][None] if listed else expected), rtol=1e-4, atol=1e-4)


# ---- what cannot work

BAD_INPUTS = {
    "no model": (["--data", "{data}"], "required: --model"),
    "no such model": (["--model", "no/where", "--data", "{data}"], "model='no/where' must be a folder or hub id"),
    "no pipeline": (["--model", "{data}", "--data", "{data}"], "it has no model_index.json"),
    "a U-Net": (["--model", "{unet}", "--data", "{data}"], "is a StableDiffusionPipeline, whose denoiser is a U-Net"),
    "no transformer": (["--model", "{bare}", "--data", "{data}"], "is a FluxPipeline without a transformer"),
    "code of others": (["--model", "{foreign}", "--data", "{data}"], "not 'MyPipeline': code of others is not run"),
    "no such data": (["--model", "{flux}", "--data", "no/where"], "no/where"),
    "no captions": (["--model", "{flux}", "--data", "{plain}"], "caption_column='text' must be a column of data="),
    "a caption missing": (["--model", "{flux}", "--data", "{holes}"], "caption_column='text' is empty in row 1"),
    "captions for classes": (["--model", "{dit}", "--data", "{data}"], "must have numbers of classes, not 'a red cat 0'"),
    "classes for captions": (
        ["--model", "{flux}", "--data", "{data}", "--caption_column", "label"], "must have texts, not 0: the pipeline takes",
    ),
    "adapters of DiT": (["--model", "{dit}", "--data", "{data}", "--lora"], "DiTPipeline loads no adapters"),
    "no such layers": (["--model", "{flux}", "--lora", "--lora_layers", "nothing", "{cached}"], "nothing"),
    "an odd size": (
        ["--model", "{dit}", "--data", "{data}", "--caption_column", "label", "--resolution", "64"], "draws [4, 8, 8]"
    ),
    "another model's cache": (["--model", "{sd3}", "{cached}"], "was made with another model"),
    "another cache": (["--model", "{flux}", "{cached}", "--embedded_guidance", "1"], "embedded_guidance=3.5, not 1.0"),
    "min-SNR of flow": (["--model", "{flux}", "{cached}", "--snr_gamma", "5"], "snr_gamma=5.0 must not be set"),
    "unknown weighting": (["--model", "{flux}", "--data", "{data}", "--weighting_scheme", "big"], "must be one of none"),
    "dtype": (["--model", "{flux}", "--data", "{data}", "--dtype", "float16"], "dtype='float16' must be"),
    "kept without streaming": (["--model", "{flux}", "--data", "{data}", "--keep", "2"], "keep='2' needs stream"),
    "unknown option": (["--model", "{flux}", "--data", "{data}", "--steps", "3"], "--steps"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory, folders, data, options) -> dict[str, str]:
    """Folders that are not what they should be; and a cache of Flux's."""
    output = str(tmp_path_factory.mktemp("flux"))
    recipe.main([*options("flux"), "--max_steps", "1", "--num_samples", "0", "--output_dir", output])
    root = tmp_path_factory.mktemp("bad")
    indices = {
        "unet": {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]},
        "bare": {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]},
        "foreign": {"_class_name": "MyPipeline"} | {
            part: ["diffusers", "X"] for part in ("transformer", "vae", "scheduler")
        },
    }  # fmt: skip
    for name, index in indices.items():
        (root / name).mkdir()
        (root / name / "model_index.json").write_text(json.dumps(index))
    rows = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(["a cat", " "])]
    for name, lines in (("plain", [{"file_name": row["file_name"], "size": 1} for row in rows]), ("holes", rows)):
        (root / name).mkdir()
        for number in (0, 1):
            shutil.copy(Path(data, f"{number}.png"), root / name)
        (root / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folders | {name: str(root / name) for name in (*indices, "plain", "holes")} | {"data": data}


@pytest.mark.parametrize(("given", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_one_line_and_a_failure(tmp_path, bad, options, capsys, given, message):
    if "{cached}" in given:
        given = [*options("flux")[2:], *(each for each in given if each != "{cached}")]
    given = [each.format(**bad) for each in given]
    with pytest.raises(SystemExit) as stop:
        recipe.main([*TRAINING, *given, "--num_samples", "0", "--output_dir", str(tmp_path)])
    printed = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert stop.value.code not in (0, None)
    assert printed.startswith("finetune_image_model.py: error: ") and len(printed.splitlines()) == 1
    assert message in printed


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


def test_the_command_finds_the_recipe():
    assert train_verb.find_recipes()["finetune-image-model"] == recipe.__file__
