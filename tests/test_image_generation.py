"""Image generation: EDM's mathematics around a DiT, and which block has to do with what."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from families import CASES, DIT

import hf_diffusionblocks as db
from hf_diffusionblocks.diffusion.gaussian import edm_loss_weight, precondition
from hf_diffusionblocks.diffusion.samplers import flow_on
from hf_diffusionblocks.diffusion.schedule import NoiseSchedule

COMMON, OWN = CASES["dit"], CASES["dit, own"]
LABELS = torch.tensor([0, 1, 2, 4])


@pytest.fixture
def stock() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(**DIT.stock_fields()).eval()


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def at(values: torch.Tensor) -> torch.Tensor:
    """`[N]` beside images."""
    return values[:, None, None, None]


def levels_of(model, block_index: int) -> torch.Tensor:
    return model.evaluation_levels(block_index, 4)["sigma"]


# ---- the denoiser


@torch.no_grad()
def test_one_block_is_the_stock_model_inside_edm_preconditioning(stock):
    model = db.convert(stock, num_blocks=1, sigma_data=0.7)
    z, sigma = images(), torch.tensor([0.01, 0.5, 3.0, 70.0])
    c = precondition(sigma, 0.7)
    expected = at(c.skip) * z + at(c.out) * stock(at(c.input) * z, 1000 * c.noise, LABELS).sample
    assert torch.equal(model.denoise(z, sigma, LABELS), expected)


@torch.no_grad()
def test_a_learned_variance_is_left_out(stock):
    both = DiTTransformer2DModel(**{**DIT.stock_fields(), "out_channels": 4}).eval()
    weights = stock.state_dict()
    for name in ("weight", "bias"):  # the channels of a pixel lie side by side
        whole = weights[f"proj_out_2.{name}"].unflatten(0, (16, 2))
        weights[f"proj_out_2.{name}"] = torch.cat([whole, torch.randn_like(whole)], 1).flatten(0, 1)
    both.load_state_dict(weights)
    one, other = db.convert(stock, num_blocks=2), db.convert(both, num_blocks=2)
    assert torch.allclose(one.denoise(images(), 1.0, LABELS), other.denoise(images(), 1.0, LABELS), atol=1e-6)


def test_a_fresh_model_starts_as_the_best_linear_denoiser():
    """adaLN-Zero: the network's output is 0, so that D = c_skip z; and every layer is the identity."""
    model = db.convert(DIT, num_blocks=2, shared="per_block")
    sigma = torch.tensor([0.01, 0.5, 3.0, 70.0])
    assert torch.equal(model.denoise(images(), sigma, LABELS), at(precondition(sigma, 0.5).skip) * images())
    hidden = torch.randn(4, 4, 16)
    conditions = {"timestep": sigma, "class_labels": LABELS}
    assert all(torch.equal(model.blocks[k].run(hidden, [None] * 2, **conditions), hidden) for k in (0, 1))


@torch.no_grad()
def test_a_block_that_is_loaded_alone_knows_where_its_patches_are(tmp_path):
    """Positions are a buffer that no file has; and there is no file of what blocks share."""
    whole, alone = (CASES["dit, own"].model(resident_blocks=resident) for resident in (None, [1]))
    whole.save_pretrained(tmp_path)
    name = "block_embeddings.0.pos_embed.pos_embed"
    for model in (alone, type(whole).from_pretrained(tmp_path, resident_blocks=[1])):
        assert torch.equal(model.get_buffer(name), whole.get_buffer(name))


def test_rows_of_mixed_levels_go_to_their_blocks():
    model = COMMON.model().eval()
    sigma = torch.stack([levels_of(model, k)[k] for k in (1, 0)]).repeat(2)
    one_by_one = [model.denoise(images()[k : k + 1], sigma[k], LABELS[k : k + 1]) for k in range(4)]
    assert torch.allclose(model.denoise(images(), sigma, LABELS), torch.cat(one_by_one), atol=1e-6)
    assert model.noise_schedule.block_of(sigma).tolist() == [1, 0, 1, 0]


@torch.no_grad()
def test_no_parameter_of_a_block_has_an_effect_at_another_blocks_levels():
    """The stock output modulation takes its condition from layer 0, whichever block runs: here it must not."""
    model = OWN.model().eval()
    owners = {name: model.block_of_parameter(name) for name, _ in model.named_parameters()}
    assert set(owners.values()) == {0, 1}
    before = [model.denoise(images(), levels_of(model, k), LABELS) for k in (0, 1)]
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter += torch.randn_like(parameter)
        after = [model.denoise(images(), levels_of(model, k), LABELS) for k in (0, 1)]
        own, other = owners[name], 1 - owners[name]
        assert torch.equal(after[other], before[other]), name
        no_effect = ".k.bias" in name or name.endswith("to_k.bias")  # (a bias of keys moves all scores alike)
        assert no_effect or not torch.equal(after[own], before[own]), name
        parameter.copy_(kept)


# ---- training


def test_the_loss_weights_every_image_by_its_own_level():
    model, sigma, noise = COMMON.model().train(), torch.tensor([0.05, 0.5, 5.0, 50.0]), images(1)
    model.config.label_dropout = 0.0
    found = model(images(), LABELS, block_index=1, sigma=sigma, noise=noise)
    errors = (found.estimate - images()).square().mean((1, 2, 3))
    expected = torch.stack([edm_loss_weight(s, 0.5) * error for s, error in zip(sigma, errors)]).mean()
    assert torch.allclose(found.loss, expected)
    as_tuple = model(images(), LABELS, block_index=1, sigma=sigma, noise=noise, return_dict=False)
    assert torch.equal(as_tuple[0], found.loss)
    z, block = images() + at(sigma) * noise, model.blocks[1]
    assert torch.allclose(found.estimate, model.formulation.estimate(block, z, sigma, LABELS), atol=1e-6)


def test_labels_are_dropped_once_for_all_layers_and_only_in_training():
    model, none = COMMON.model().train(), torch.full((4,), DIT.num_embeds_ada_norm)
    draws = {"block_index": 0, "sigma": torch.full((4,), 20.0), "noise": images(1)}
    model.config.label_dropout = 1.0
    assert torch.equal(model(images(), LABELS, **draws).loss, model(images(), none, **draws).loss)
    dropped, kept = model(images(), LABELS, **draws).loss, model.eval()(images(), LABELS, **draws).loss
    assert not torch.equal(dropped, kept)
    model.config.label_dropout = 0.5
    rows = [torch.Generator().manual_seed(k) for k in range(4)]
    estimate = model.train()(images(), LABELS, **draws, generator=rows).estimate
    hidden, seen = (model.eval()(images(), labels, **draws).estimate for labels in (none, LABELS))
    of_none, of_class = ((estimate - other).abs().amax((1, 2, 3)) < 1e-6 for other in (hidden, seen))
    assert bool((of_none ^ of_class).all()) and 0 < int(of_none.sum()) < 4  # whole rows, some of them


@torch.no_grad()
def test_evaluation_denoises_each_image_once_by_every_block():
    model, calls = COMMON.model().eval(), []
    for index, layer in enumerate(model.backbone.transformer_blocks):
        layer.register_forward_pre_hook(lambda layer, args, index=index: calls.append((index, len(args[0]))))
    found, again = (model(images(), LABELS) for _ in range(2))
    assert calls == 2 * [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert torch.equal(found.block_losses, again.block_losses) and torch.equal(found.loss, found.block_losses.mean())
    for k in (0, 1):
        low, high = model.noise_schedule.interval(k)
        assert bool(((levels_of(model, k) >= low) & (levels_of(model, k) <= high)).all())


# ---- sampling


@pytest.mark.parametrize("order", [1, 2])
def test_the_samplers_converge_at_their_order(order):
    """To the exact flow of Gaussian data, N(0, s^2): z falls with sqrt(s^2 + sigma^2)."""
    scale, z0, errors = 0.7, torch.tensor([40.0], dtype=torch.float64), []
    for steps in (64, 128, 256):
        sigmas, z = NoiseSchedule(3).inference_sigmas(steps, "karras").tolist(), z0
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
            z = flow_on(lambda z, sigma: scale**2 / (scale**2 + sigma**2) * z, z, sigma, sigma_next, order)
        exact = z0 * math.hypot(scale, sigmas[-1]) / math.hypot(scale, sigmas[0])
        errors.append((z - exact).abs().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.1)


@torch.no_grad()
def test_predict_is_the_flow_by_the_block_that_owns_each_level():
    model, scale = COMMON.model(num_blocks=4).eval(), 2.0
    sigmas = model.noise_schedule.inference_sigmas(4).tolist()
    found = model.predict(LABELS, num_inference_steps=4, guidance_scale=scale, generator=torch.Generator().manual_seed(3))
    z = sigmas[0] * torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    none = torch.full((4,), DIT.num_embeds_ada_norm)
    for k, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:])):  # T = B: a step a block, first block first
        block, level = model.blocks[k], torch.full((4,), sigma)
        of_class, of_none = (model.formulation.estimate(block, z.float(), level, labels) for labels in (LABELS, none))
        estimate = of_none + scale * (of_class - of_none)
        z = z + (sigma_next - sigma) * (z - estimate.double()) / sigma
    assert torch.allclose(found.images, z.float(), atol=1e-4) and found.sigmas.tolist() == sigmas


def test_guidance_of_at_most_one_is_none_and_the_class_stays():
    """As in diffusers; `D(none) + scale * (D(class) - D(none))` would forget the class at 0."""
    model = COMMON.model().eval()
    plain = model.denoise(images(), 1.0, LABELS)
    for scale in (0, 0.5, 1):
        assert torch.equal(model.denoise(images(), 1.0, LABELS, scale), plain)
    assert not torch.allclose(model.denoise(images(), 1.0, LABELS, 1.5), plain)


@pytest.mark.parametrize("labels", [np.array([1, 2]), [np.int64(1), np.int64(2)], torch.tensor([1, 2], dtype=torch.uint8)])
def test_labels_are_whole_numbers_of_any_kind(labels):
    model = COMMON.model().eval()
    expected = model.predict([1, 2], num_inference_steps=1).images
    assert torch.equal(model.predict(labels, num_inference_steps=np.int64(1)).images, expected)
    assert torch.allclose(model.predict(np.int64(1), num_inference_steps=1).images, expected[:1], atol=1e-5)


def test_noise_is_an_images_own_whatever_it_is_made_with():
    model = COMMON.model().eval()
    many, few = model.predict([1, 2, 3], num_inference_steps=3).images, model.predict([1, 2], num_inference_steps=3).images
    assert torch.allclose(many[:2], few, atol=1e-5) and not torch.allclose(many[0], many[1])
    seeds = [torch.Generator().manual_seed(k) for k in (5, 6)]
    assert not torch.allclose(model.predict([1, 2], num_inference_steps=3, generator=seeds).images, few)
    assert model.predict(num_images=2, num_inference_steps=1).images.shape == (2, 2, 8, 8)


# ---- where weights come from


def test_weights_come_from_models_folders_and_pipelines_folders(stock, tmp_path):
    stock.save_pretrained(tmp_path / "transformer")
    for model in (
        db.convert(stock, 2),
        db.convert(tmp_path / "transformer", 2),
        db.convert(tmp_path, 2, subfolder="transformer", resident_blocks=[1]),
    ):
        assert model.config.source_config.stock_fields() == DIT.stock_fields() and len(model.config.id2label) == 5
        state = model.state_dict()
        names = [name for name in stock.state_dict() if f"backbone.{name}" in state]
        assert len(names) == len(state) and all(torch.equal(state[f"backbone.{n}"], stock.state_dict()[n]) for n in names)
    assert stock.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob > 0  # the source is as it was


# ---- what cannot be


def test_other_models_of_diffusers_are_refused(tmp_path):
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained(tmp_path)
    for source in (unet, tmp_path):
        with pytest.raises(
            ValueError, match="UNet2DModel cannot be cut into blocks, and must be .*DiTTransformer2DModel.*U-Net"
        ):
            db.convert(source, 2)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"class_labels": [7]}, r"class_labels=\[7\] must lie in 0..4, or be 5"),
        ({"sampler": "ddim"}, "sampler='ddim' must be one of 'euler', 'heun'"),
        ({"grid": "linear"}, "grid='linear' must be one of 'equal', 'karras'"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be a whole number from 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5 must be a whole number from 1"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0 must be a finite number from 0"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan must be a finite number from 0"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 must be at most 1 for images of no class"),
        ({"num_images": 0}, "num_images=0 must be a whole number from 1"),
        ({"class_labels": [1, 2], "num_images": 3}, r"class_labels of \[2\] must be \[3\]"),
        ({"class_labels": []}, r"class_labels=\[\] must be whole numbers"),
        ({"class_labels": [1.5]}, r"class_labels=\[1.5\] must be whole numbers"),
        ({"class_labels": ["owl"]}, r"class_labels=\['owl'\] must be whole numbers"),
        ({"class_labels": [1, 2], "generator": [torch.Generator()]}, "1 generators must be 2, one a row"),
    ],
)
def test_bad_arguments_of_predict_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        COMMON.model().predict(**arguments)


def test_guidance_needs_a_model_that_has_learned_images_of_no_class():
    model = COMMON.model(label_dropout=0.0)
    for guided in (lambda: model.predict([1], guidance_scale=2.0), lambda: model.denoise(images(), 1.0, LABELS, 2.0)):
        with pytest.raises(ValueError, match="guidance_scale=2.0 must be at most 1: with label_dropout=0"):
            guided()
    model.predict([1], num_inference_steps=1, guidance_scale=1.0)


def test_a_generator_is_one_of_torch():
    with pytest.raises(TypeError, match="generator=0 must be a torch.Generator, or a list of them"):
        COMMON.model().predict([1], generator=0)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"pixel_values of \[4, 2, 8, 4\] must be \[N, 2, 8, 8\]"):
        COMMON.model().eval()(images()[..., :4], LABELS)
