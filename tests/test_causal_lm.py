"""Text models: what a block computes and sees, the realisations of the joint denoiser, losses and the bound."""

from __future__ import annotations

import copy
import math
import weakref
from functools import partial

import pytest
import torch
from conftest import randomized
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

import hf_diffusionblocks as db
from hf_diffusionblocks.diffusion import objectives as losses
from hf_diffusionblocks.memory.activations import SavedActivations
from hf_diffusionblocks.models.causal_lm.streams import CleanKeys, Streams, join
from hf_diffusionblocks.models.causal_lm.text import Rows, Text
from hf_diffusionblocks.diffusion.gaussian import precondition
from hf_diffusionblocks.diffusion.randomness import PositionNoise

VOCAB, WIDTH, LENGTH = 48, 32, 10
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
LLAMA = dict(
    num_hidden_layers=4, hidden_size=WIDTH, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCAB, max_position_embeddings=32, **ENDS,
)  # fmt: skip
CONFIGS = {
    "gpt2": lambda: GPT2Config(
        n_layer=4, n_embd=WIDTH, n_head=4, vocab_size=VOCAB, n_positions=32, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0, **ENDS,
    ),
    "llama": lambda: LlamaConfig(**LLAMA),
    "qwen3": lambda: Qwen3Config(head_dim=8, **LLAMA),
}  # fmt: skip
JOINT = {
    "joint-edm-independent": {},
    "joint-posterior-carried": {"readout": "posterior", "context": "carried"},
    "joint-edm-carried-own": {"context": "carried", "shared": "per_block"},
    "joint-posterior-independent-own": {"readout": "posterior", "shared": "per_block"},
}
FACTORIZED = {
    "factorized-independent": {"denoiser": "factorized"},
    "factorized-independent-own": {"denoiser": "factorized", "shared": "per_block"},
    "factorized-carried": {"denoiser": "factorized", "context": "carried"},
    "factorized-carried-own": {"denoiser": "factorized", "context": "carried", "shared": "per_block"},
    "factorized-carried-head": {"denoiser": "factorized", "context": "carried", "readout_layers": 1},
}
TEXT_FORMULATIONS = {**JOINT, **FACTORIZED}
BLOCKS = [0, 1]


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def text_config(request):
    return request.param()


@pytest.fixture(params=TEXT_FORMULATIONS.values(), ids=TEXT_FORMULATIONS.keys())
def text_formulation(request) -> dict:
    return request.param


@pytest.fixture(params=JOINT.values(), ids=JOINT.keys())
def joint(request) -> dict:
    return request.param


@pytest.fixture(params=FACTORIZED.values(), ids=FACTORIZED.keys())
def factorized(request) -> dict:
    return request.param


@pytest.fixture
def plain(text_config):
    torch.manual_seed(0)
    return randomized(AutoModelForCausalLM.from_config(text_config)).eval()


def make(plain, **fields) -> db.DiffusionBlocksForCausalLM:
    """Converted to two blocks, every parameter (AdaLN included) away from its start."""
    return randomized(db.convert(plain, num_blocks=2, preset="paper", **fields)).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def draw(sigma: float = 0.3) -> dict[str, torch.Tensor]:
    """Fixed noise for the batch of `ids`."""
    noise = torch.randn(3, LENGTH - 1, WIDTH, generator=torch.Generator().manual_seed(2))
    return {"sigma": torch.full((3,), sigma), "noise": noise}


def layer_of(model, index: int):
    return model.backbone.get_submodule(model.architecture.layers_path)[index]


def block_logits(model, ids, block_index, labels=None, **kwargs) -> torch.Tensor:
    labels = ids if labels is None else labels
    with torch.no_grad():
        return model(ids, labels=labels, block_index=block_index, return_logits=True, **{**draw(), **kwargs}).logits


# ---- the cut


def test_parameters_of_blocks_and_shared_are_disjoint_and_complete(plain, text_formulation):
    model = make(plain, **text_formulation)
    parts = [model.shared_parameters(), *(model.block_parameters(k) for k in BLOCKS)]
    members = [id(p) for part in parts for p in part]
    assert len(members) == len(set(members)) and set(members) == {id(p) for p in model.parameters()}
    assert (not parts[0]) is (model.config.shared == "per_block")


@pytest.mark.parametrize("block_index", BLOCKS)
def test_every_parameter_of_the_active_block_and_no_other_gets_a_gradient(plain, text_formulation, ids, block_index):
    model = make(plain, **text_formulation).train()
    model(ids, labels=ids, block_index=block_index, **draw()).loss.backward()
    for name, parameter in model.named_parameters():
        owner = model.block_of_parameter(name)
        if owner == block_index:
            assert parameter.grad is not None and parameter.grad.any(), name
        elif owner is not None:
            assert parameter.grad is None, name


def test_a_block_starts_from_its_own_embeddings_and_ends_in_its_own_head(plain, ids):
    """Per block: moving another block's parameters changes nothing."""
    for context in ("independent", "carried"):
        model = make(plain, denoiser="factorized", context=context, shared="per_block")
        before = block_logits(model, ids, 0)
        with torch.no_grad():
            for parameter in model.block_parameters(1):
                parameter += 1
        assert torch.equal(block_logits(model, ids, 0), before)


def test_own_parts_of_a_converted_model_start_as_the_model_s(plain, ids):
    own = db.convert(plain, num_blocks=2, denoiser="factorized", shared="per_block")
    common = db.convert(plain, num_blocks=2, denoiser="factorized")
    for k in BLOCKS:
        assert torch.allclose(block_logits(own, ids, k), block_logits(common, ids, k), atol=1e-5)


# ---- conversion (test_lossless.py has more)


@torch.no_grad()
@pytest.mark.parametrize("readout", ["posterior", "edm"])
def test_a_joint_block_at_sigma_max_starts_as_the_plain_model_of_its_layers(plain, ids, readout):
    """AdaLN at its start: what a plain model of these layers says after the tokens so far and then a noisy one."""
    model = db.convert(plain, num_blocks=2, readout=readout).eval()
    prior = model.prior_logits(ids)
    c, positions = precondition(torch.tensor(80.0), model.sigma_data), torch.arange(1, LENGTH + 1)
    z = 80.0 * PositionNoise(positions, model.config.inference_seed).normal(WIDTH)
    embeds = plain.get_input_embeddings()(ids)
    layers_path = model.architecture.layers_path
    for k in BLOCKS:
        short = copy.deepcopy(plain)
        short.set_submodule(layers_path, plain.get_submodule(layers_path)[2 * k : 2 * k + 2])
        short.config.num_hidden_layers = 2
        for p in range(LENGTH):
            tokens = torch.cat([embeds[:, : p + 1], (c.input * z[p]).expand(3, 1, -1)], 1)
            hidden = short.base_model(inputs_embeds=tokens, use_cache=False).last_hidden_state[:, -1]
            if readout == "edm":  # EDM's estimate of the target, in units of sigma_data
                hidden = (c.skip * z[p] + c.out * hidden) / model.sigma_data
            torch.testing.assert_close(prior[:, k, p], short.lm_head(hidden), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(randomized(model).prior_logits(ids), prior, atol=0.1)  # AdaLN away from its start


def test_one_factorized_block_at_sigma_max_trains_as_the_plain_model(plain, ids):
    """B=1 and the target out of sight is end-to-end training: the same loss and gradients."""
    model = db.convert(plain, num_blocks=1, denoiser="factorized", context="carried", prior_fraction=1.0).train()
    loss, plain_loss = model(ids, labels=ids, block_index=0).loss, plain.train()(ids, labels=ids).loss
    assert loss.item() == pytest.approx(plain_loss.item(), abs=1e-5)
    loss.backward()
    plain_loss.backward()
    for own, other in zip(model.backbone.parameters(), plain.parameters()):
        assert torch.allclose(own.grad, other.grad, atol=1e-5)


# ---- three realisations of the joint denoiser


def noisy_through_all(model, block_index: int, ids, mask=None) -> list[torch.Tensor]:
    """What leaves a block on the noisy stream: clean pass then noisy pass, that one in groups, and one pass over
    [clean ; noisy]."""
    positions = torch.arange(LENGTH)[None] if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    kept = torch.arange(LENGTH)
    z = torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3))
    sigma = torch.tensor([0.1, 0.7, 4.0])
    block, outputs = model.blocks[block_index], []
    clean_modulations, noisy_modulations = block.clean_modulations(), block.modulations(sigma)
    for realisation in ("apart", "in groups", "together"):
        hidden = block.embed({"input_ids": ids, "position_ids": positions})
        streams = Streams(model, hidden, mask, positions, kept, CleanKeys())
        noisy = streams.embed_noisy(block, z)
        if realisation == "together":
            joined = [join(c, n, LENGTH, LENGTH) for c, n in zip(clean_modulations, noisy_modulations)]
            outputs.append(streams.run_together(block, hidden, noisy, joined)[1])
        else:
            streams.run_clean(block, hidden, clean_modulations, output=False)
            in_groups = partial(streams.run_noisy_in_groups, largest=4)
            run = in_groups if realisation == "in groups" else streams.run_noisy
            outputs.append(run(block, noisy, noisy_modulations))
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


@pytest.mark.parametrize("dropout, expected", [(0.0, "run_noisy"), (0.1, "run_noisy_in_groups")])
def test_noisy_tokens_train_in_groups_where_attention_keeps_scores(plain, ids, dropout, expected, monkeypatch):
    model = make(plain).train()
    setattr(model.backbone.config, model.architecture.attention_dropout_name, dropout)
    called = []
    for name in ("run_noisy", "run_noisy_in_groups"):
        run = getattr(Streams, name)
        monkeypatch.setattr(Streams, name, lambda *args, name=name, run=run: called.append(name) or run(*args))
    for training in (True, False):
        model.train(training)(ids, labels=ids, block_index=0)
    assert called == [expected, "run_noisy"]


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


# ---- leakage


@pytest.mark.parametrize("block_index", BLOCKS)
def test_a_token_s_logits_know_neither_its_clean_copy_nor_later_tokens(plain, text_formulation, ids, block_index):
    """z held fixed: other tokens from position 5 on leave the logits of tokens 1 to 5 as they are, bit for bit."""
    model = make(plain, **text_formulation)
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 7) % VOCAB
    first = block_logits(model, ids, block_index, labels=ids)
    second = block_logits(model, changed, block_index, labels=ids)  # labels, and so z, are the same
    assert torch.equal(first[:, :5], second[:, :5])
    assert not torch.equal(first[:, 5], second[:, 5])  # positive control: token 6 has token 5 for context


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


@pytest.mark.parametrize("block_index", BLOCKS)
def test_training_logits_see_the_target_through_z(plain, text_formulation, ids, block_index):
    """Positive control: the label's only way in is z, and it is open."""
    model = make(plain, **text_formulation)
    labels = ids.clone()
    labels[:, 4] = (labels[:, 4] + 1) % VOCAB
    first, second = (block_logits(model, ids, block_index, labels=given) for given in (ids, labels))
    assert not torch.allclose(first[:, 3], second[:, 3])
    others = [p for p in range(LENGTH - 1) if p != 3]
    assert torch.equal(first[:, others], second[:, others])


def test_evaluation_logits_do_not_know_later_tokens_or_labels(plain, text_formulation, ids):
    model = make(plain, **text_formulation)
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 7) % VOCAB
    with torch.no_grad():
        first, second = model(ids).logits, model(changed).logits
        labelled = model(ids, labels=changed).logits
    assert torch.allclose(first[:, :6], second[:, :6], atol=1e-6)
    assert not torch.allclose(first[:, 6], second[:, 6])
    assert torch.equal(first, labelled)


# ---- the draws of a step


def test_noisy_tokens_are_scaled_by_c_in_and_stand_at_the_target_s_position(ids):
    plain = randomized(AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()))
    model = make(plain)
    entered = []
    layer_of(model, 2).ln_1.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    fixed = draw(0.7)
    model(ids, labels=ids, block_index=1, **fixed)
    z = model.target_vectors()[ids[:, 1:]] + 0.7 * fixed["noise"]
    positions = model.backbone.transformer.wpe.weight[1:LENGTH]
    assert torch.allclose(entered[1], z * (0.7**2 + 0.25) ** -0.5 + positions, atol=1e-5)
    assert torch.equal(entered[0], model.backbone.transformer.wte(ids[:, :-1]) + model.backbone.transformer.wpe.weight[: LENGTH - 1])


def test_sigma_is_drawn_for_every_token_or_for_every_sequence_of_a_joint_model(plain, ids):
    def spread(**fields):
        return make(plain, p_mean=-0.5, **fields).levels(1, ids[:, 1:], None, torch.Generator().manual_seed(0))

    assert spread(denoiser="factorized").unique().numel() == 3 * (LENGTH - 1)
    assert [row.unique().numel() for row in spread()] == [1, 1, 1] and spread().unique().numel() == 3


def test_posterior_readout_adds_the_likelihood_of_z_below_sigma_max(plain, ids):
    model = make(plain, denoiser="factorized")
    prior = model.prior_logits(ids)[:, 1, :-1].log_softmax(-1)
    z = model.target_vectors()[ids[:, 1:]] + 0.3 * draw()["noise"]
    distance = (z[:, :, None] - model.target_vectors()).square().sum(-1)
    expected = (prior - distance / (2 * 0.3**2)).log_softmax(-1)
    assert torch.allclose(block_logits(model, ids, 1).log_softmax(-1), expected, atol=1e-3)
    assert torch.allclose(block_logits(model, ids, 1, **draw(80.0)).log_softmax(-1), prior, atol=1e-5)


def test_edm_readout_at_sigma_max_is_the_network_s_own_head(plain, ids):
    model = make(plain)
    sigma = model.levels(1, ids[:, 1:], torch.full((3,), 80.0), None)
    z = model.corrupt(ids[:, 1:], sigma, draw()["noise"], None)
    hidden = model.denoiser.run(model.active_blocks(1, None), Text(ids), z, sigma)
    network = model.architecture.read_out(model.backbone, hidden)
    c_skip_part = 0.25 / (80.0**2 + 0.25) * model.architecture.head(model.backbone, z) / 0.5
    assert torch.allclose(model.logits(1, Rows(hidden, z, sigma)), network + c_skip_part, atol=1e-3)


def test_targets_are_unit_vectors_of_the_embeddings_or_a_fixed_table(plain):
    common, own = make(plain), make(plain, shared="per_block")
    assert torch.allclose(common.target_vectors(), F.normalize(common.get_input_embeddings().weight, dim=-1))
    assert "target_embeddings.table" in own.state_dict() and not common.target_vectors().requires_grad
    before = own.target_vectors()
    with torch.no_grad():
        own.get_input_embeddings().weight += 1.0
    assert torch.equal(own.target_vectors(), before)


@pytest.mark.parametrize("size", [VOCAB + 5, VOCAB - 8])
def test_resized_embeddings_are_those_of_all_blocks_and_their_targets(plain, text_formulation, ids, size, tmp_path):
    ids = ids % (VOCAB - 8)
    model = make(plain, **text_formulation)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tables = ("wte.weight", "embed_tokens.weight", "lm_head.weight", "target_embeddings.table")
    assert model.resize_token_embeddings(size) is model.get_input_embeddings()
    after, kept = model.state_dict(), min(size, VOCAB)
    for name, tensor in before.items():
        if name.endswith(tables):
            assert len(after[name]) == size and torch.equal(after[name][:kept], tensor[:kept]), name
        else:
            assert torch.equal(after[name], tensor), name
    assert model.config.vocab_size == model.backbone.config.vocab_size == len(model.target_vectors()) == size
    if size > VOCAB:
        ids[:, 3] = VOCAB + torch.arange(3)
        if model.sharing.fixed_targets:  # drawn apart, since they are never trained
            similar = model.target_vectors()[VOCAB:] @ model.target_vectors().T
            assert (similar > 0.9).sum() == 5 and after["target_embeddings.table"][VOCAB:].std() < 2 * WIDTH**-0.5
    assert model(ids).logits.shape == (3, LENGTH, size)
    for k in BLOCKS:
        assert block_logits(model, ids, k).shape == (3, LENGTH - 1, size)
    model.train()(ids, labels=ids, block_index=1).loss.backward()
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("fields", [{"denoiser": "factorized"}, {}], ids=["factorized", "joint"])
def test_heads_tied_within_blocks_are_tied_when_resized(fields):
    model = db.convert(CONFIGS["gpt2"](), num_blocks=2, preset="paper", shared="per_block", **fields)
    assert model.config.tie_word_embeddings
    model.resize_token_embeddings(VOCAB + 5)
    first, second = model.backbone.transformer.wte, model.block_embeddings[0].transformer.wte
    assert model.block_readouts[0].lm_head.weight is first.weight and model.backbone.lm_head.weight is second.weight
    assert not torch.equal(first.weight, second.weight)


def test_embeddings_of_a_part_are_not_resized():
    part = db.convert(CONFIGS["gpt2"](), num_blocks=2, resident_blocks=[1], shared="per_block", denoiser="factorized")
    with pytest.raises(ValueError, match=r"resident_blocks=\[1\] must be all 2 to resize token embeddings"):
        part.resize_token_embeddings(VOCAB + 5)


# ---- losses


@pytest.mark.parametrize("block_index", BLOCKS)
def test_block_loss_is_the_mean_cross_entropy_of_labelled_tokens(plain, text_formulation, ids, block_index):
    model = make(plain, **text_formulation)
    labels = ids.clone()
    labels[0, 2:6] = -100
    out = model(ids, labels=labels, block_index=block_index, return_logits=True, **draw())
    expected = F.cross_entropy(out.logits.flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(out.loss, expected, atol=1e-5)


def test_a_loss_over_num_items_is_the_sum_divided_by_them(plain, text_formulation, ids):
    model = make(plain, **text_formulation)
    mean = model(ids, labels=ids, block_index=0, **draw()).loss
    part = model(ids, labels=ids, block_index=0, num_items_in_batch=100, **draw()).loss
    assert torch.allclose(part * 100, mean * 3 * (LENGTH - 1))


def test_a_batch_without_labels_has_no_loss_and_no_gradient(plain, text_formulation, ids):
    model = make(plain, **text_formulation).train()
    loss = model(ids, labels=torch.full_like(ids, -100), block_index=0, **draw()).loss
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("return_logits", [None, False])
def test_evaluation_loss_is_the_cross_entropy_of_label_free_logits(plain, text_formulation, ids, return_logits):
    model = make(plain, **text_formulation)
    with torch.no_grad():
        out = model(ids, labels=ids, return_logits=return_logits)
        expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(out.loss, expected, atol=1e-5)


def test_the_evaluation_loss_has_gradients(plain, text_formulation, ids):
    """The same with and without logits, and of no head that is not read."""
    model = make(plain, **text_formulation)
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(ids, labels=ids, return_logits=False).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * gradient.abs().max() + 1e-6), name


def test_independent_factorized_logits_are_the_mean_of_the_blocks_log_priors(plain, ids):
    model = make(plain, denoiser="factorized")
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, model.prior_logits(ids).log_softmax(-1).mean(1), atol=1e-5)


def chunks_of(rows_at_a_time, monkeypatch):
    monkeypatch.setattr(losses, "rows_per_chunk", lambda num_rows, num_logits: rows_at_a_time)


@pytest.mark.parametrize("rows_at_a_time", [1, 7, 1000])
def test_chunks_change_neither_loss_nor_gradients(plain, text_formulation, ids, rows_at_a_time, monkeypatch):
    model = make(plain, **text_formulation).train()
    results = []
    for rows in (27, rows_at_a_time):
        chunks_of(rows, monkeypatch)
        model.zero_grad()
        loss = model(ids, labels=ids, block_index=1, **draw()).loss
        (3 * loss).backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    for name, gradient in results[0][1].items():
        assert torch.allclose(gradient, results[1][1][name], atol=1e-5 * gradient.abs().max() + 1e-6), name


def test_no_more_than_a_chunk_of_logits_is_ever_held(monkeypatch):
    """By the bytes of what the readout makes, and of what is kept for the backward pass, whatever the vocabulary."""
    kept = []
    for vocab in (50, 5000):
        config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=vocab, n_positions=64, **ENDS)
        model = db.convert(config, num_blocks=2, denoiser="factorized").train()
        ids = torch.randint(vocab, (4, 64))
        sizes = []
        read = model.readout.logits
        monkeypatch.setattr(model.readout, "logits", lambda *args: sizes.append(read(*args).nbytes) or read(*args))
        with SavedActivations(model.parameters()) as saved:
            loss = model(ids, labels=ids, block_index=0).loss
        kept.append(saved.bytes)
        assert sum(sizes) == 4 * 63 * vocab * 4 and max(sizes) == sum(sizes) / 4
        loss.backward()
    assert kept[0] == kept[1]


@pytest.mark.parametrize("fields", [{}, {"sampler": "ancestral"}, {"bridge": "soft"}], ids=str)
@pytest.mark.parametrize("num_items", [None, 7])
def test_a_walk_is_scored_in_chunks(plain, joint, ids, fields, num_items, monkeypatch):
    """The same loss, of padded and partly labelled texts, a quarter of the logits at a time; each is gone by the next."""
    model = make(plain, **joint, **fields)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, :4], labels[1, :4], labels[0, 6:] = 0, -100, -100
    made, read = [], model.readout.in_walk

    def watched(*args):
        assert not [logits for logits, _ in made if logits() is not None]
        logits = read(*args)
        made.append((weakref.ref(logits), len(logits)))
        return logits

    def loss(**kwargs):
        with torch.no_grad():
            return model(ids, attention_mask=mask, labels=labels, num_items_in_batch=num_items, **kwargs).loss.item()

    expected = loss()
    monkeypatch.setattr(model.readout, "in_walk", watched)
    assert loss(return_logits=False) == pytest.approx(expected, rel=1e-6)
    assert [rows for _, rows in made] == [8, 8, 8, 6] * 2  # of 30, at both levels


def test_chunks_of_a_large_vocabulary_are_32_mib():
    assert losses.rows_per_chunk(100_000, 50_257) * 50_257 * 4 == pytest.approx(2**25, rel=0.01)


# ---- the bound


def constant_prior_model(denoiser: str) -> tuple[db.DiffusionBlocksForCausalLM, torch.Tensor]:
    """All blocks' prior is one distribution whatever the context and z; and that distribution's logarithm."""
    torch.manual_seed(0)
    model = db.convert(CONFIGS["gpt2"](), num_blocks=2, denoiser=denoiser, readout="posterior").eval()
    with torch.no_grad():
        norm = model.backbone.transformer.ln_f
        norm.weight.zero_()
        norm.bias.normal_(std=0.3)
        model.get_input_embeddings().weight.normal_()
        return model, (model.get_input_embeddings().weight @ norm.bias).log_softmax(-1)


@pytest.mark.parametrize("denoiser", ["factorized", "joint"])
def test_the_bound_of_a_prior_that_ignores_z_is_its_cross_entropy(denoiser):
    """METHOD's identity: for one prior shared by all blocks the bound is exact, to 3e-4 nats at sigma_max = 80."""
    model, prior = constant_prior_model(denoiser)
    ids = torch.multinomial(prior.exp(), 512 * 17, replacement=True, generator=torch.Generator().manual_seed(0)).view(512, 17)
    bound = db.nll_bound(model, [{"input_ids": part, "labels": part} for part in ids.split(64)], num_samples=48)
    cross_entropy = -prior[ids[:, 1:]].mean().item()
    assert bound.num_tokens == 512 * 16
    assert bound.standard_error < 0.03
    assert abs(bound.nats_per_token - cross_entropy) < 3 * bound.standard_error
    assert bound.nats_per_token == pytest.approx(bound.prior + bound.reconstruction + bound.diffusion)


def test_the_bound_scores_labelled_tokens_only(ids):
    model, _ = constant_prior_model("factorized")
    labels = ids.clone()
    labels[:, 5:] = -100
    assert db.nll_bound(model, [{"input_ids": ids, "labels": labels}]).num_tokens == 3 * 4
    with pytest.raises(ValueError, match="no labelled token"):
        db.nll_bound(model, [{"input_ids": ids, "labels": torch.full_like(ids, -100)}])


def test_bits_per_byte():
    """8 tokens of ln 2 nats that spell 16 bytes: half a bit a byte."""
    assert db.bits_per_byte(math.log(2), num_tokens=8, num_bytes=16) == pytest.approx(0.5)


# ---- information-uniform noise


def test_fitted_noise_has_its_mass_where_the_cross_entropy_rises(ids):
    model, _ = constant_prior_model("factorized")
    curve = db.fit_noise_schedule(model, [{"input_ids": ids, "labels": ids}])
    assert model.config.noise_distribution == "information" and model.noise_schedule.boundaries[0] == 0.002
    rise = (curve[:, 1].cummax(0).values - curve[0, 1]) / (curve[:, 1].max() - curve[0, 1])
    even = torch.linspace(0, 1, len(curve), dtype=torch.float64)
    assert torch.allclose(model.noise_schedule.cdf(curve[:, 0]), 0.95 * rise + 0.05 * even, atol=1e-9)
    middle = model.noise_schedule.boundaries[1].item()
    assert 0.1 < middle < 2.0  # 48 unit vectors in 32 dimensions blur there; the log-normal's median is 0.3


def test_fitted_noise_is_saved(ids, tmp_path):
    model, _ = constant_prior_model("factorized")
    db.fit_noise_schedule(model, [{"input_ids": ids, "labels": ids}])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.noise_schedule.boundaries, model.noise_schedule.boundaries)


def test_noise_that_cannot_be_fitted_is_refused(ids):
    fresh = db.convert(CONFIGS["llama"](), num_blocks=2, preset="paper")  # not tied: its head knows nothing of the targets
    with pytest.raises(ValueError, match="readout='edm' that has not learned to read z"):
        db.fit_noise_schedule(fresh, [{"input_ids": ids, "labels": ids}])
    with pytest.raises(ValueError, match="no batches"):
        db.fit_noise_schedule(fresh, [])


def test_training_on_noise_that_is_not_fitted_is_refused(plain, tmp_path):
    model = make(plain, noise_distribution="information")
    with pytest.raises(ValueError, match="call fit_noise_schedule"):
        db.DiffusionBlocksTrainer(model=model, args=db.DiffusionBlocksTrainingArguments(str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("measure", ["fit_noise_schedule", "nll_bound", "cache_block_inputs"])
def test_measuring_gives_every_part_its_own_mode_back(measure, ids, tmp_path):
    """A part that was put in evaluation mode stays there; also where measuring fails halfway."""
    model = make(AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()), denoiser="factorized", context="carried").train()
    layer_of(model, 0).eval()
    modes = [module.training for module in model.modules()]

    def run(tokens):
        rows = {"input_ids": tokens, "labels": tokens}
        if measure == "cache_block_inputs":
            return db.cache_block_inputs(model, Dataset.from_dict(rows), 1, tmp_path)
        return getattr(db, measure)(model, [rows])

    run(ids)
    assert [module.training for module in model.modules()] == modes
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(IndexError):
        run(ids + VOCAB)
    assert [module.training for module in model.modules()] == modes


# ---- everything the core gives


def test_round_trip(plain, text_formulation, ids, tmp_path):
    model = make(plain, **text_formulation)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is db.DiffusionBlocksForCausalLM
    assert torch.equal(again(ids).logits, model(ids).logits)
    for k in BLOCKS:
        loaded = db.load_block_state_dict(tmp_path, k)
        assert loaded and all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.items())


def test_gradient_checkpointing_changes_nothing(plain, text_formulation, ids):
    model = make(plain, **text_formulation).train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids, block_index=1, **draw()).loss.backward()
        gradients.append([p.grad for p in model.block_parameters(1)])
        model.gradient_checkpointing_enable()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_bfloat16_is_as_close_to_float32_as_it_rounds(plain, text_formulation, ids):
    """Loss, gradients and priors, with the same weights and noise: bfloat16 rounds by up to 0.4 % at every step."""
    half = make(plain.to(torch.bfloat16), **text_formulation).train()
    found = []
    for model in (half, copy.deepcopy(half).float()):
        loss = model(ids, labels=ids, block_index=1, **draw()).loss
        loss.backward()
        gradients = [parameter.grad for parameter in model.block_parameters(1)]
        assert {gradient.dtype for gradient in gradients} == {model.dtype}
        with torch.no_grad():
            prior = model.eval().prior_logits(ids).float().log_softmax(-1)
            assert model(ids, labels=ids).loss.isfinite()  # of a walk, decided by single tokens
        found.append((loss.item(), torch.cat([gradient.float().flatten() for gradient in gradients]), prior))
    (loss, gradient, prior), (exact_loss, exact_gradient, exact_prior) = found
    assert loss == pytest.approx(exact_loss, abs=0.02)
    assert 0.002 < (gradient - exact_gradient).norm() / exact_gradient.norm() < 0.05
    assert 0.002 < (prior - exact_prior).abs().max() < 0.2


def test_packed_sequences_do_not_see_each_other(plain, text_formulation, ids):
    """Restarting positions mark packed texts, as in the plain model."""
    model = make(plain, **text_formulation)
    positions = torch.cat([torch.arange(4), torch.arange(LENGTH - 4)])[None]
    changed = ids.clone()
    changed[:, :4] = (changed[:, :4] + 7) % VOCAB
    first, second = (
        block_logits(model, given, 1, labels=ids, position_ids=positions.expand(3, -1)) for given in (ids, changed)
    )
    assert torch.allclose(first[:, 4:], second[:, 4:], atol=1e-6)
    assert not torch.allclose(first[:, :3], second[:, :3])


def test_a_full_context_has_logits_for_the_token_after_it():
    plain = randomized(AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()))
    ids = torch.randint(VOCAB, (1, 32))
    assert make(plain)(ids).logits.shape == (1, 32, VOCAB)


def test_unsupported_configs_are_named(tmp_path):
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        db.convert(GPT2Config(n_layer=2, n_embd=32, n_head=4, add_cross_attention=True), num_blocks=2, preset="paper")
    windows = Qwen3Config(head_dim=8, use_sliding_window=True, max_window_layers=2, **LLAMA)
    with pytest.raises(ValueError, match="use_sliding_window=True with max_window_layers=2"):
        db.convert(windows, num_blocks=2, preset="paper")
    with pytest.raises(ValueError, match="readout_layers=1 must be 0 with denoiser='joint' for text"):
        db.convert(CONFIGS["llama"](), num_blocks=2, context="carried", readout_layers=1)


def test_training_moves_the_active_block_alone_and_resumes(plain, text_formulation, ids, tmp_path):
    """Four steps at once, and two steps, a checkpoint and two more: the same weights."""

    def trained(folder, **arguments):
        torch.manual_seed(0)
        model = make(plain, **text_formulation)
        args = db.DiffusionBlocksTrainingArguments(
            str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=2, report_to=[],
            use_cpu=True, disable_tqdm=True, save_strategy="steps", logging_strategy="no",
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)]
        trainer = db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=data)
        trainer.train(**arguments)
        return model.state_dict()

    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
