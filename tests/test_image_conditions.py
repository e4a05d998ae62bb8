"""What the recipe of image models finds out of a pipeline, and keeps: losses beside scripts, the cache, buckets."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from image_recipe_runs import CAPTIONS, FAMILIES, STEPS, captioned, folders, options, samples_of, trainers
from PIL import Image
from torch.utils.data import DataLoader

from hf_diffusionblocks.recipes import finetune_image_model as recipe
from hf_diffusionblocks.recipes.image_cache import BucketSampler, bucket_sizes, read
from hf_diffusionblocks.recipes.image_pipelines import WatchedPipeline

pytestmark = pytest.mark.usefixtures("own_cache")


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
def test_the_loss_is_that_of_a_script_written_for_the_family(tmp_path, options, folders, captioned, trainers, name):
    """Of a row whose latents and embeddings come from the cache; noise and level are the same."""
    given = ["--max_steps", "1", "--num_samples", "0", "--weighting_scheme", "cosmap", "--per_device_train_batch_size", "1"]
    recipe.main([*options(name), *given, "--learning_rate", "0", "--output_dir", str(tmp_path)])
    (trainer,) = trainers
    row, seed = trainer.train_dataset[0], torch.Generator().manual_seed(5)
    with torch.no_grad():
        ours = trainer.objective(partial(trainer.denoise, trainer.model.eval(), row["conditions"]), row["latents"], seed)
        pipe = diffusers.DiffusionPipeline.from_pretrained(folders[name])
        size = (64, 64) if name == "sana" else (32, 32)
        image = Image.open(Path(captioned, "0.png")).resize(size, Image.Resampling.LANCZOS)
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

    for processes in (1, 2):  # a run that goes on within an epoch has the order of that epoch
        loader = DataLoader(images, 2, sampler=BucketSampler(images, 2, 0.5, seed=0))
        loader = prepare_data_loader(loader, num_processes=processes, process_index=0)
        loader.set_epoch(1)
        whole = list(loader.batch_sampler)
        images.set_epoch(0)
        resumed = skip_first_batches(loader, 1)
        resumed.set_epoch(1)
        assert list(resumed.batch_sampler) == whole[1:]


@pytest.mark.parametrize("resolution", [512, 1024])
def test_buckets_have_about_as_many_pixels_and_no_shape_is_far(resolution):
    sizes = bucket_sizes(resolution, 64, buckets=True)
    assert (resolution, resolution) in sizes and bucket_sizes(resolution, 64, buckets=False) == [(resolution, resolution)]
    assert all(0.8 * resolution**2 < height * width <= resolution**2 for height, width in sizes)
    assert all(height % 64 == 0 == width % 64 and (width, height) in sizes for height, width in sizes)
    assert min(height / width for height, width in sizes) == pytest.approx(0.5, abs=0.1)
