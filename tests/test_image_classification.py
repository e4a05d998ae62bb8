"""The model: which parameters and layers a block uses, what its logits may know, and what evaluation returns."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import randomized
from saved_activations import SavedActivations
from transformers import AutoModelForImageClassification, ViTConfig

import hf_diffusionblocks as db
from hf_diffusionblocks.diffusion.randomness import noise_of_rows

BLOCKS = [0, 1]


def count_layer_runs(model) -> Counter:
    """Count how often each layer's attention runs, from now on."""
    runs = Counter()
    for index, layer in enumerate(model.backbone.vit.layers):
        layer.attention.register_forward_hook(lambda *_, index=index: runs.update([index]))
    return runs


def entered_layer_2(model) -> list[torch.Tensor]:
    """What enters the second block's first layer, from now on."""
    entered = []
    model.backbone.vit.layers[2].layernorm_before.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    return entered


# ---- training one block


@pytest.mark.parametrize("block_index", BLOCKS)
def test_layers_of_inactive_blocks_are_not_run(model, batch, block_index):
    runs = count_layer_runs(model)
    model.train()(**batch, block_index=block_index)
    first = 0 if model.formulation.passes_on else block_index
    assert runs == {i: 1 for k in range(first, block_index + 1) for i in model.block_layers(k)}


def stored_bytes(plain_config, layers_per_block, block_index, batch, formulation) -> int:
    """What a training step of one block keeps for its backward pass."""
    config = ViTConfig(**{**plain_config.to_dict(), "num_hidden_layers": sum(layers_per_block)})
    model = db.convert(config, num_blocks=2, layers_per_block=layers_per_block, **formulation).train()
    with SavedActivations(model.parameters()) as saved:
        model(**batch, block_index=block_index)
    return saved.bytes


def test_activations_are_stored_for_the_active_block_only(plain_config, batch, formulation):
    """To the byte: three layers in the other block store what one does, three in its own store more."""

    def stored(layers_per_block, block_index):
        return stored_bytes(plain_config, layers_per_block, block_index, batch, formulation)

    assert stored([1, 1], 0) == stored([1, 3], 0) < stored([3, 1], 0)
    assert stored([1, 1], 1) == stored([3, 1], 1) < stored([1, 3], 1)


@pytest.mark.parametrize("block_index", BLOCKS)
def test_a_step_draws_a_sigma_of_its_block_and_noise_for_every_row(plain_model, batch, block_index):
    """The same loss as from the draws made by hand, in this order, from the same generator."""
    model = randomized(db.convert(plain_model, num_blocks=2, preset="paper"))
    generator = torch.Generator().manual_seed(3)
    sigma = model.draw_levels(block_index, (6,), None, generator)
    noise = torch.randn(6, 32, generator=generator)
    assert sigma.unique().numel() == noise.unique(dim=0).shape[0] == 6
    model.eval()
    by_hand = model(**batch, block_index=block_index, sigma=sigma, noise=noise).loss
    assert torch.equal(model(**batch, block_index=block_index, generator=generator.manual_seed(3)).loss, by_hand)


def test_overlap_defaults_to_the_task_s(plain_config):
    assert db.convert(plain_config, 2, preset="paper").noise_schedule.overlap == 0.05
    assert db.convert(plain_config, 2, overlap=0.0, preset="paper").noise_schedule.overlap == 0.0


@pytest.mark.parametrize("shared", ["common", "per_block"])
def test_targets_are_saved_but_not_trained(plain_config, shared):
    targets = db.convert(plain_config, 2, shared=shared, preset="paper").label_embeddings
    assert not list(targets.parameters()) and list(targets.state_dict()) == ["table"]


# ---- labels, as the plain model takes them


@pytest.mark.parametrize("labels", ["some without", "shares of classes"])
def test_one_recommended_block_has_the_cross_entropy_of_any_labels(plain_model, batch, labels):
    model = db.convert(plain_model, num_blocks=1)
    given = {"some without": batch["labels"].clone(), "shares of classes": torch.rand(6, 5).softmax(-1)}[labels]
    if labels == "some without":
        given[:2] = -100
    expected = torch.nn.functional.cross_entropy(plain_model(batch["pixel_values"]).logits, given)
    assert torch.allclose(model(batch["pixel_values"], labels=given, block_index=0).loss, expected)
    assert torch.allclose(model.eval()(batch["pixel_values"], labels=given).loss, expected)


def test_the_paper_s_target_of_shares_is_the_mean_of_the_classes(plain_model, batch):
    model = randomized(db.convert(plain_model, num_blocks=2, preset="paper"))
    shares = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    entered, sigma = entered_layer_2(model), torch.full((6,), 0.3)
    out = model(batch["pixel_values"], labels=shares, block_index=1, sigma=sigma, noise=torch.zeros(6, 32))
    z, c_in = shares @ model.label_embeddings.vectors(), (0.3**2 + 0.25) ** -0.5
    assert torch.allclose(entered[0][:, -1], c_in * z + model.noisy_labels[0].position[0], atol=1e-5)
    assert torch.allclose(out.loss, torch.nn.functional.cross_entropy(out.logits, shares))


def test_the_paper_s_loss_is_of_images_that_have_a_label(plain_model, batch):
    model = randomized(db.convert(plain_model, num_blocks=2, preset="paper"))
    noise = {"sigma": torch.full((6,), 0.3), "noise": torch.zeros(6, 32), "block_index": 1}
    some = batch["labels"].clone()
    some[:2] = -100
    expected = torch.nn.functional.cross_entropy(model(**batch, **noise).logits[2:], some[2:])
    assert torch.allclose(model(batch["pixel_values"], labels=some, **noise).loss, expected)


# ---- what logits know


def test_what_evaluation_logits_are(model, batch):
    """Each formulation's documented definition, from its parts."""
    model.eval()
    with torch.no_grad():
        logits = model(pixel_values=batch["pixel_values"]).logits
        expected = model.predict(batch["pixel_values"]).logits
        if model.config.preset == "recommended":
            assert torch.equal(expected, model.block_logits(batch["pixel_values"])[:, -1])
            expected = model.backbone(batch["pixel_values"]).logits
    assert torch.equal(logits, expected)


# ---- the walk


@torch.no_grad()
def test_a_walk_asks_the_network_that_was_trained(plain_model, batch):
    """At every level, of the z that it has come to: what it is told is what a training step would compute of that z."""
    model = randomized(db.convert(plain_model, num_blocks=2, p_mean=1.0, preset="paper")).eval()
    vectors, sigmas = model.label_embeddings.vectors(), model.noise_schedule.inference_sigmas(4).tolist()
    z = sigmas[0] * noise_of_rows(6, 32, model.config.inference_seed, None, torch.device("cpu"))
    out = model.predict(batch["pixel_values"], num_inference_steps=4)
    for step, (level, following) in enumerate(zip(sigmas, sigmas[1:])):
        draws = {"sigma": torch.full((6,), level), "noise": (z - vectors[batch["labels"]]) / level}
        probabilities = model(**batch, block_index=step // 2, **draws).logits.softmax(-1)
        torch.testing.assert_close(out.trajectory[:, step], probabilities, rtol=1e-3, atol=1e-4)
        z += (following - level) / level * (z - probabilities @ vectors)


def test_walk_with_one_step_a_block_runs_no_layer_in_vain(model, batch):
    runs = count_layer_runs(model)
    model.predict(batch["pixel_values"])
    assert runs == dict.fromkeys(range(4), 1)


def test_a_generator_a_row_draws_a_walk_s_noise(plain_model, batch):
    model = db.convert(plain_model, num_blocks=2, preset="paper")

    def of(rows: slice, generators: list) -> torch.Tensor:
        return model.predict(batch["pixel_values"][rows], generator=generators).logits

    seeded = [[torch.Generator().manual_seed(k) for k in range(6)] for _ in range(2)]
    torch.testing.assert_close(of(slice(2, 4), seeded[0][2:4]), of(slice(6), seeded[1])[2:4])
    with pytest.raises(TypeError, match="generator=3 must be a torch.Generator"):
        of(slice(6), 3)


def test_a_recommended_model_s_trajectory_is_its_blocks_in_turn(plain_model, batch):
    model = db.convert(plain_model, num_blocks=2, local_head_layers=1)
    out = model.predict(batch["pixel_values"])
    assert torch.equal(out.trajectory, model.block_logits(batch["pixel_values"]).softmax(-1)) and out.sigmas is None
    for name, value in (("num_inference_steps", 3), ("generator", torch.Generator())):
        with pytest.raises(ValueError, match=f"{name} must be None with preset='recommended'"):
            model.predict(batch["pixel_values"], **{name: value})


def test_walk_runs_without_dropout_in_training_mode(plain_config, batch):
    plain_config.hidden_dropout_prob = 0.5
    model = randomized(db.convert(plain_config, 2, preset="paper")).train()
    assert torch.equal(*(model.predict(batch["pixel_values"]).logits for _ in range(2)))
    assert model.training and model.backbone.vit.layers[0].dropout.training


def test_walk_returns_its_trajectory(plain_model, batch):
    out = db.convert(plain_model, 2, preset="paper").eval().predict(batch["pixel_values"], num_inference_steps=5)
    assert out.trajectory.shape == (6, 5, 5) and out.sigmas.shape == (6,)
    assert torch.allclose(out.trajectory.sum(-1), torch.ones(6, 5))
    assert torch.equal(out.trajectory[:, -1], out.probabilities)
    assert torch.equal(out.probabilities, out.logits.softmax(-1))


def test_walk_steps_default_to_the_config_and_then_to_the_blocks(plain_config, batch):
    for fields, steps in (({}, 2), ({"num_inference_steps": 3}, 3)):
        model = db.convert(plain_config, num_blocks=2, preset="paper", **fields).eval()
        assert model.predict(batch["pixel_values"]).trajectory.shape[1] == steps
    with pytest.raises(ValueError, match="num_inference_steps=0 must be a whole number from 1"):
        model.predict(batch["pixel_values"], num_inference_steps=0)


def test_a_generator_gives_every_row_its_own_noise(plain_config, batch):
    model = randomized(db.convert(plain_config, 2, p_mean=1.0, preset="paper")).eval()
    same = batch["pixel_values"][:1].expand(6, -1, -1, -1)
    keyed = model.predict(same, 4).logits
    drawn, again = (model.predict(same, 4, generator=torch.Generator().manual_seed(0)).logits for _ in range(2))
    assert torch.allclose(keyed, keyed[:1].expand_as(keyed), atol=1e-5)
    assert not torch.allclose(drawn, drawn[:1].expand_as(drawn), atol=1e-3)
    assert torch.equal(drawn, again)


# ---- use like any other model


def test_new_label_set_on_loading(plain_config, batch, tmp_path):
    db.convert(plain_config, num_blocks=2, preset="paper").save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert model(pixel_values=batch["pixel_values"]).logits.shape == (6, 3)


def test_attention_implementation_reaches_the_layers(model, batch):
    model.eval()
    with torch.no_grad():
        sdpa = model(pixel_values=batch["pixel_values"]).logits
        model.set_attn_implementation("eager")
        assert model.backbone.config._attn_implementation == "eager"
        assert torch.allclose(model(pixel_values=batch["pixel_values"]).logits, sdpa, atol=1e-4)


def test_unusual_image_size(plain_config, batch):
    model = db.convert(ViTConfig(**{**plain_config.to_dict(), "image_size": 16}), num_blocks=2, preset="paper").eval()
    with pytest.raises(ValueError, match="image size"):
        model(pixel_values=batch["pixel_values"])
    assert model(pixel_values=batch["pixel_values"], interpolate_pos_encoding=True).logits.shape == (6, 5)
