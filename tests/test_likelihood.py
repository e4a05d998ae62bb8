"""The likelihood bound of text."""

from __future__ import annotations

import math

import pytest
import torch
from families import CASES, TEXT_CONFIGS, VOCAB
from test_causal_lm import ids, layer_of, make, plain, text_config  # noqa: F401
from transformers import AutoModelForCausalLM

import hf_diffusionblocks as db
from hf_diffusionblocks.presets import PRESETS


# ---- the bound


def constant_prior_model(preset: str) -> tuple[db.DiffusionBlocksForCausalLM, torch.Tensor]:
    """All blocks' prior is one distribution whatever the context; and that distribution's logarithm. The paper's denoisers
    are put in place of by the exact one of this prior."""
    torch.manual_seed(0)
    model = db.convert(TEXT_CONFIGS["gpt2"], num_blocks=2, preset=preset).eval()
    with torch.no_grad():
        norm = model.backbone.transformer.ln_f
        norm.weight.zero_()
        norm.bias.normal_(std=0.3)
        model.get_input_embeddings().weight.normal_()
        prior = (model.get_input_embeddings().weight @ norm.bias).log_softmax(-1)
    if preset == "paper":
        vectors = model.target_vectors()
        model.formulation.logits = lambda block, hidden, z, sigma: prior + z @ vectors.T / sigma[:, None] ** 2
    return model, prior


@pytest.mark.parametrize("preset", PRESETS)
def test_the_bound_of_exact_denoisers_is_the_cross_entropy(preset):
    """For one prior shared by all blocks the paper's bound is exact, to 3e-4 nats at sigma_max = 80; the recommended model's
    is its cross-entropy."""
    model, prior = constant_prior_model(preset)
    ids = torch.multinomial(prior.exp(), 512 * 17, replacement=True, generator=torch.Generator().manual_seed(0)).view(512, 17)
    bound = db.nll_bound(model, [{"input_ids": part, "labels": part} for part in ids.split(64)], num_samples=48)
    cross_entropy = -prior[ids[:, 1:]].mean().item()
    assert bound.num_tokens == 512 * 16
    assert bound.standard_error < 0.03
    assert abs(bound.nats_per_token - cross_entropy) < (3 * bound.standard_error if preset == "paper" else 1e-5)
    assert bound.nats_per_token == pytest.approx(bound.prior + bound.reconstruction + bound.diffusion)


@pytest.mark.parametrize("local_head_layers", [0, 1])
def test_a_recommended_model_s_bound_is_the_loss_of_its_evaluation(plain, ids, local_head_layers):
    """To rounding, however many samples: of padded and partly labelled texts."""
    model = make(plain, preset="recommended", local_head_layers=local_head_layers)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, :4], labels[1, :4], labels[0, 6:] = 0, -100, -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        expected = model(**batch).loss.item()
    for num_samples in (1, 5):
        bound = db.nll_bound(model, [batch], num_samples)
        assert bound.nats_per_token == pytest.approx(expected, rel=1e-6)
        assert (bound.prior, bound.diffusion) == (0, 0)


def test_the_bound_scores_labelled_tokens_only(ids):
    model, _ = constant_prior_model("recommended")
    labels = ids.clone()
    labels[:, 5:] = -100
    assert db.nll_bound(model, [{"input_ids": ids, "labels": labels}]).num_tokens == 3 * 4
    with pytest.raises(ValueError, match="no labelled token"):
        db.nll_bound(model, [{"input_ids": ids, "labels": torch.full_like(ids, -100)}])


def test_one_sequence_shows_no_standard_error(ids):
    """However many without a label stand beside it."""
    model, _ = constant_prior_model("recommended")
    labels = ids.clone()
    labels[1:] = -100
    bound = db.nll_bound(model, [{"input_ids": ids, "labels": labels}])
    assert bound.nats_per_token > 0 and math.isnan(bound.standard_error)


@pytest.mark.parametrize("num_samples", [0, 1.5, True])
def test_a_bound_without_samples_is_refused(num_samples):
    with pytest.raises(ValueError, match=f"num_samples={num_samples} must be a whole number from 1"):
        db.nll_bound(CASES["bert"].model(), [CASES["bert"].rows()], num_samples)


@pytest.mark.parametrize("name", ["bert", "gpt2, recommended"])
def test_batches_that_are_none_are_named(name):
    model, rows = CASES[name].model(), CASES[name].rows()
    lists = {column: values.tolist() for column, values in rows.items()}
    for batches, error, message in (
        ([{"input_ids": rows["input_ids"]}], ValueError, "dataloader gives batches of 'input_ids', and 'labels' must be among"),
        ([lists], TypeError, "dataloader gives 'input_ids' as a list, and must give tensors"),
        (rows, TypeError, "dataloader gives a str, and must give batches"),
        ([rows | {"labels": rows["labels"][:, 1:]}], ValueError, r"input_ids of \[4, 12\] and labels of \[4, 11\]"),
    ):
        with pytest.raises(error, match=message):
            db.nll_bound(model, batches)


@pytest.mark.parametrize("sizes", [{"num_tokens": 8, "num_bytes": 0}, {"num_tokens": 0, "num_bytes": 8}])
def test_no_bytes_have_no_bits(sizes):
    with pytest.raises(ValueError, match="=0 must be a whole number from 1"):
        db.bits_per_byte(1.0, **sizes)


def test_bits_per_byte():
    """8 tokens of ln 2 nats that spell 16 bytes: half a bit a byte."""
    assert db.bits_per_byte(math.log(2), num_tokens=8, num_bytes=16) == pytest.approx(0.5)


def test_measuring_gives_every_part_its_own_mode_back(ids):
    """A part that was put in evaluation mode stays there; also where measuring fails halfway."""
    model = make(AutoModelForCausalLM.from_config(TEXT_CONFIGS["gpt2"]), preset="recommended").train()
    layer_of(model, 0).eval()
    modes = [module.training for module in model.modules()]
    db.nll_bound(model, [{"input_ids": ids, "labels": ids}])
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(IndexError):
        db.nll_bound(model, [{"input_ids": ids + VOCAB, "labels": ids}])
    assert [module.training for module in model.modules()] == modes
