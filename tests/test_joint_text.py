"""The joint denoiser of text: two realisations of its noisy tokens, and the walk that asks them."""

from __future__ import annotations

import pytest
import torch
from families import WIDTH
from text_models import BLOCKS, LENGTH, block_logits, draw, ids, joint, layer_of, make, plain, text_config  # noqa: F401

from hf_diffusionblocks.models.causal_lm.streams import CleanKeys, Streams, Text, join


def noisy_through_all(model, block_index: int, ids, mask=None) -> list[torch.Tensor]:
    """What leaves a block on the noisy stream: clean pass then noisy pass, and one pass over [clean ; noisy]."""
    positions = torch.arange(LENGTH)[None] if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    kept = torch.arange(LENGTH)
    z = torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3))
    sigma = torch.tensor([0.1, 0.7, 4.0])
    block, outputs = model.blocks[block_index], []
    clean_modulations, noisy_modulations = block.clean_modulations(), block.modulations(sigma)
    for realisation in ("apart", "together"):
        streams = Streams(model, Text(ids, None, mask, positions), kept, CleanKeys())
        hidden = streams.enter(block)
        if realisation == "together":
            joined = [join(c, n, LENGTH, LENGTH) for c, n in zip(clean_modulations, noisy_modulations)]
            outputs.append(streams.run_together(block, hidden, z, torch.ones(1), joined))
        else:
            streams.run_clean(block, hidden, clean_modulations)
            outputs.append(streams.run_noisy(block, z, torch.ones(1), noisy_modulations))
    return outputs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("block_index", BLOCKS)
def test_passes_apart_equal_one_masked_pass_in_outputs_and_gradients(plain, ids, block_index, padding, attention):
    model = make(plain)
    model.set_attn_implementation(attention)
    mask = None
    if padding is not None:
        mask = torch.ones_like(ids)
        mask[1, slice(0, 4) if padding == "left" else slice(6, None)] = 0
    *fast, reference = noisy_through_all(model, block_index, ids, mask)
    real = slice(None) if mask is None else mask.bool()
    assert all(torch.allclose(output[real], reference[real], atol=1e-5) for output in fast)
    gradients = []
    for output in (reference, *fast):
        model.zero_grad()
        output[real].square().sum().backward(retain_graph=True)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        assert gradients[0].keys() == other.keys()
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, other[name], atol=1e-5 * gradient.abs().max() + 1e-6), name


def test_the_last_clean_layer_computes_keys_and_values_only(plain, ids):
    model = make(plain)
    tokens_seen = []
    for index in (2, 3):
        layer_of(model, index).get_submodule(model.architecture.mlp_name).register_forward_hook(
            lambda _, args, __, index=index: tokens_seen.append((index, args[0].shape[1]))
        )
    model(ids, labels=ids, block_index=1, **draw())
    assert tokens_seen == [(2, LENGTH - 1), (2, LENGTH - 1), (3, LENGTH - 1)]  # layer 3 runs for noisy tokens alone


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_cannot_mask_the_noisy_stream_is_refused(plain, attention):
    model = make(plain)
    with pytest.raises(ValueError, match=f"attn_implementation='{attention}' must be 'sdpa' or 'eager'"):
        model.set_attn_implementation(attention)


@pytest.mark.parametrize("block_index", BLOCKS)
def test_a_noisy_token_sees_no_other_noisy_token(plain, joint, ids, block_index):
    model = make(plain, **joint)
    noise = draw()["noise"]
    moved = noise.clone()
    moved[:, 3] += 1.0
    first, second = (block_logits(model, ids, block_index, noise=n) for n in (noise, moved))
    others = [p for p in range(LENGTH - 1) if p != 3]
    assert torch.equal(first[:, others], second[:, others])
    assert not torch.allclose(first[:, 3], second[:, 3])  # positive control: it sees itself


@torch.no_grad()
def test_a_walk_asks_the_network_that_was_trained(plain, joint, ids, monkeypatch):
    """At every level, of the z that the walk has come to: what it is told is what a training step would compute."""
    model, asked = make(plain, **joint), []
    read = model.formulation.logits
    monkeypatch.setattr(model.formulation, "logits", lambda *args: asked.append(args[:3]) or read(*args))
    model(ids)
    followed = Text(torch.cat([ids, ids[:, :1]], 1))  # one token more, so that the last one has a next
    for (block, hidden, z), level in zip(asked, model.noise_schedule.inference_sigmas(2)):
        sigma = torch.full((3, LENGTH), level.item())
        trained = model.formulation.run(block, followed, z.unflatten(0, (3, LENGTH)), sigma)
        torch.testing.assert_close(hidden, trained.flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert [block.index for block, *_ in asked] == BLOCKS
