"""The diffusers pipeline of image models: what it saves, makes, refuses, and has on the device."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomized
from diffusers import AutoencoderKL, ImagePipelineOutput

import hf_diffusionblocks as db
from hf_diffusionblocks.backbones.dit import DiTConfig
from hf_diffusionblocks.models.image_generation import pipeline

LAYERS, B, T = 6, 3, 6
NAMES = {0: "cat", 1: "dog, hound", 2: "owl"}


def made(channels: int = 1) -> db.DiffusionBlocksForImageGeneration:
    config = DiTConfig(
        num_layers=LAYERS, num_attention_heads=2, attention_head_dim=8, in_channels=channels, sample_size=8, patch_size=4,
        num_embeds_ada_norm=len(NAMES), id2label=NAMES, label2id={name: number for number, name in NAMES.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    return randomized(db.convert(config, B, preset="paper")).eval()


def made_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    one = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [8]}
    return AutoencoderKL(norm_num_groups=4, latent_channels=4, scaling_factor=0.5, shift_factor=0.25, **one).eval()


def quiet(model, vae=None) -> db.DiffusionBlocksImagePipeline:
    pipe = db.DiffusionBlocksImagePipeline(model, vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["pixels", "latents"])
def pipe(request):
    return quiet(made()) if request.param == "pixels" else quiet(made(4), made_vae())


@pytest.fixture
def gray():
    return quiet(made())


def layer_calls(model) -> list[tuple[int, int]]:
    """Filled with (layer, rows) as layers run."""
    seen: list[tuple[int, int]] = []
    for number, layer in enumerate(model.backbone.transformer_blocks):
        layer.register_forward_hook(lambda _, inputs, __, number=number: seen.append((number, len(inputs[0]))))
    return seen


# ---- sampling


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_step_runs_the_layers_of_one_block(gray, sampler, guidance_scale):
    model = gray.transformer
    seen = layer_calls(model)
    gray([0, 1], T, guidance_scale, sampler=sampler)
    levels = model.inference_sigmas(T)
    second = [levels[[step, step + 1]] for step in range(T - 1)]  # Heun's: at the next level, by the block that owns that
    evaluated = levels[:T] if sampler == "euler" else torch.cat([*second, levels[T - 1 : T]])
    blocks = model.noise_schedule.block_of(evaluated).tolist()
    assert blocks == sorted(blocks)  # so that a block's layers come and go together
    layers = [layer for k in blocks for layer in model.block_layers(k)]
    assert seen == [(layer, 4 if guidance_scale > 1 else 2) for layer in layers]
    assert len(layers) == len(evaluated) * LAYERS // B and set(layers) == set(range(LAYERS))


def test_an_image_is_a_function_of_its_noise_and_class(gray):
    def images(labels, **noise):
        return gray(labels, T, output_type="latent", **noise).images

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = images(["cat", "hound"], generator=generators(1, 2))
    assert torch.allclose(images(1, generator=generators(2)), both[1:], atol=1e-5)
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=own) for own in generators(1, 2)])
    assert torch.equal(images(torch.tensor([0, 1]), latents=noise), both)
    assert torch.equal(images([0, 1]), images([0, 1])) and not torch.equal(images([0, 1]), both)
    assert torch.equal(images([0, 1], num_images=2), images(["cat", "cat", "dog, hound", "dog"]))
    assert images(None, num_images=3).shape == (3, 1, 8, 8)


def test_output_types(pipe):
    channels, size = (1, 8) if pipe.vae is None else (3, 8)
    latents = pipe([0, 2], T, output_type="latent").images
    assert torch.equal(latents, pipe.transformer.predict([0, 2], num_inference_steps=T).images)
    shown = latents
    if pipe.vae is not None:
        with torch.no_grad():
            shown = pipe.vae.decode(latents / 0.5 + 0.25).sample
    tensors = pipe([0, 2], T, output_type="pt").images
    assert torch.equal(tensors, (shown / 2 + 0.5).clamp(0, 1)) and tensors.shape == (2, channels, size, size)
    assert tensors.unique().numel() > 50
    arrays = pipe([0, 2], T, output_type="np").images
    assert np.array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    (pictures,) = pipe([0, 2], T, return_dict=False)
    assert [picture.mode for picture in pictures] == ["L" if channels == 1 else "RGB"] * 2
    assert np.array_equal(np.array(pictures[0]), (arrays[0] * 255).round().astype("uint8").squeeze())
    assert isinstance(pipe([0], 1), ImagePipelineOutput)


def test_a_callback_sees_each_step_and_may_change_the_latents(gray):
    seen = []

    def callback(pipeline, step, sigma, given):
        seen.append((pipeline is gray, step, float(sigma), given["latents"].shape))
        return {"latents": torch.zeros_like(given["latents"])} if step == T - 1 else {}

    images = gray([0, 1], T, output_type="latent", callback_on_step_end=callback).images
    sigmas = gray.transformer.inference_sigmas(T)
    assert seen == [(True, step, float(sigmas[step]), (2, 1, 8, 8)) for step in range(T)]
    assert not images.any()


def test_a_callback_may_return_nothing(gray):
    watched = gray([0], 2, output_type="latent", callback_on_step_end=lambda *given: None).images
    assert torch.equal(watched, gray([0], 2, output_type="latent").images)


def test_an_interrupt_ends_sampling_after_its_step(gray):
    """As in diffusers' pipelines; the next call starts anew."""
    steps = []

    def interrupt(pipeline, step, sigma, given):
        steps.append(step)
        pipeline._interrupt = step == 1
        return {"latents": given["latents"] * 0 + step}

    assert (gray([0], T, output_type="latent", callback_on_step_end=interrupt).images == 1).all()
    assert steps == [0, 1] and gray.interrupt
    assert not (gray([0], T, output_type="latent").images == 1).any()


def test_classes_may_be_numpys(gray):
    expected = gray([2, 0], 2, output_type="latent").images
    for labels in (np.array([2, 0]), [np.int64(2), np.int32(0)], np.array(["owl", "cat"])):
        assert torch.equal(gray(labels, 2, output_type="latent").images, expected)
    assert torch.equal(gray(np.int64(2), 2, output_type="latent").images, gray([2], 2, output_type="latent").images)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"class_labels": [3, 4]}, "class_labels=[3, 4] must lie in 0..2, or be 3"),
        ({"class_labels": ["cat", "cow"]}, "class label 'cow' must be one of 'cat', 'dog', 'hound', 'owl', 'dog, hound'"),
        ({"output_type": "png"}, "output_type='png' must be one of 'pil', 'np', 'pt', 'latent'"),
        ({"class_labels": [True]}, "class_labels=[True] must be whole numbers"),
        ({"latents": torch.zeros(1, 2, 8, 8)}, "noise of [1, 2, 8, 8] must be [1, 1, 8, 8]"),
        ({"callback_on_step_end_tensor_inputs": ["z"]}, "_tensor_inputs=['z'] must be ['latents'] or []"),
    ],
)
def test_what_is_wrong_is_named_before_any_layer_runs(gray, arguments, named):
    seen = layer_calls(gray.transformer)
    with pytest.raises(ValueError, match=re.escape(named)):
        gray(**{"class_labels": [0], **arguments})
    assert not seen


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_images_per_prompt": 2}, "num_images_per_prompt=2 is no argument of this pipeline: give num_images"),
        ({"eta": 0.0}, "eta=0.0 is no argument of this pipeline: give one of class_labels, num_inference_steps, "),
        ({"callback_on_step_end": 3}, "callback_on_step_end=3 must be a function"),
        ({"callback_on_step_end": lambda *given: 3}, "callback_on_step_end returned a int, and must return a dict or None"),
    ],
)
def test_what_the_pipeline_does_not_take_is_named(gray, arguments, named):
    with pytest.raises(TypeError, match=re.escape(named)):
        gray([0], T, **arguments)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_latents_are_no_images(output_type):
    with pytest.raises(ValueError, match=f"output_type='{output_type}' must be 'latent', or the pipeline have a vae"):
        quiet(made(4))([0], output_type=output_type)
    with pytest.raises(ValueError, match="vae has latent_channels=4, not the model's 1"):
        quiet(made(), made_vae())


# ---- folders


def test_a_pipeline_on_the_hub_is_downloaded_whole(gray, tmp_path, monkeypatch):
    """diffusers' own download refuses a component whose module is neither its own nor in the repository."""
    gray.save_pretrained(tmp_path)
    asked = {}
    monkeypatch.setattr(pipeline, "snapshot_download", lambda name, **how: asked.update(how, name=name) or str(tmp_path))
    loaded = db.DiffusionBlocksImagePipeline.from_pretrained("some/owls", revision="v2")
    assert (asked["name"], asked["revision"]) == ("some/owls", "v2") and "allow_patterns" not in asked
    assert torch.equal(loaded([0], 2, output_type="pt").images, gray([0], 2, output_type="pt").images)


# ---- memory


def test_sampling_in_the_memory_of_a_layer_or_two(pipe):
    """ "The device" is the CPU: a copy is a copy."""
    expected = pipe([0, 1], T, 2.0, sampler="heun", output_type="pt").images
    with db.stream_layers(pipe.transformer, "cpu") as stream:
        assert torch.equal(pipe.to("cpu")([0, 1], T, 2.0, sampler="heun", output_type="pt").images, expected)
        assert stream.peak_units == 2
    assert torch.equal(pipe([0, 1], T, 2.0, sampler="heun", output_type="pt").images, expected)


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_of_whole_components_is_refused(gray, method):
    with pytest.raises(NotImplementedError, match=r"use stream_layers\(pipe.transformer\)"):
        getattr(gray, method)()


def test_the_documentation_s_snippets_run(tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parents[1] / "docs" / "image_generation.md").read_text()
    monkeypatch.chdir(tmp_path)
    made().save_pretrained("digits-dit")
    names = {"device": "cpu"}
    for code in re.findall(r"```python\n(.*?)```", page[page.index("## Sampling") :], re.DOTALL):
        exec(code, names)
    assert Path("owls.png").is_file()
