"""Text models: what a block computes and sees, and its losses. (What every family does is in test_families.py.)"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import randomized
from families import ENDS, PAPER_TEXT, TEXT_CONFIGS, TEXT_FORMULATIONS, VOCAB, WIDTH, draws_of_texts, three_texts
from peft import LoraConfig, get_peft_model
from saved_activations import SavedActivations
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config

import hf_diffusionblocks as db
from hf_diffusionblocks.diffusion import objectives as losses
from hf_diffusionblocks.diffusion.gaussian import precondition
from hf_diffusionblocks.diffusion.randomness import noise_of_positions
from hf_diffusionblocks.models.causal_lm.streams import CleanKeys, Streams, Text, join

LENGTH = 10
BLOCKS = [0, 1]


@pytest.fixture(params=TEXT_CONFIGS.values(), ids=TEXT_CONFIGS.keys())
def text_config(request):
    return copy.deepcopy(request.param)


@pytest.fixture(params=TEXT_FORMULATIONS.values(), ids=TEXT_FORMULATIONS.keys())
def text_formulation(request) -> dict:
    return request.param


@pytest.fixture(params=PAPER_TEXT.values(), ids=PAPER_TEXT.keys())
def joint(request) -> dict:
    return request.param


@pytest.fixture
def plain(text_config):
    torch.manual_seed(0)
    return randomized(AutoModelForCausalLM.from_config(text_config)).eval()


def make(plain, **fields) -> db.DiffusionBlocksForCausalLM:
    """Converted to two blocks, every parameter (AdaLN included) away from its start."""
    return randomized(db.convert(plain, **{"num_blocks": 2, "preset": "paper", **fields})).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return three_texts(LENGTH)


def draw_of(model) -> dict[str, torch.Tensor]:
    """A level and noise for the batch of `ids`, where there is noise."""
    return draws_of_texts(LENGTH) if model.noise_schedule else {}


def layer_of(model, index: int):
    return model.backbone.get_submodule(model.layers_path)[index]


def block_logits(model, ids, block_index, labels=None, **kwargs) -> torch.Tensor:
    labels = ids if labels is None else labels
    with torch.no_grad():
        return model(ids, labels=labels, block_index=block_index, return_logits=True, **{**draw_of(model), **kwargs}).logits


# ---- conversion (test_lossless.py has more)


@torch.no_grad()
def test_a_joint_block_at_sigma_max_starts_as_the_plain_model_of_its_layers(plain, ids):
    """AdaLN at its start: what a plain model of these layers says after the tokens so far and then a noisy one."""
    model = db.convert(plain, num_blocks=2, preset="paper").eval()
    prior = model.block_logits(ids)
    c, positions = precondition(torch.tensor(80.0), model.config.sigma_data), torch.arange(1, LENGTH + 1)
    z = 80.0 * noise_of_positions(positions, WIDTH, model.config.inference_seed)
    embeds = plain.get_input_embeddings()(ids)
    layers_path = model.layers_path
    for k in BLOCKS:
        short = copy.deepcopy(plain)
        short.set_submodule(layers_path, plain.get_submodule(layers_path)[2 * k : 2 * k + 2])
        short.config.num_hidden_layers = 2
        for p in range(LENGTH):
            tokens = torch.cat([embeds[:, : p + 1], (c.input * z[p]).expand(3, 1, -1)], 1)
            hidden = short.base_model(inputs_embeds=tokens, use_cache=False).last_hidden_state[:, -1]
            # EDM's estimate of the target, in units of sigma_data
            hidden = (c.skip * z[p] + c.out * hidden) / model.config.sigma_data
            torch.testing.assert_close(prior[:, k, p], short.lm_head(hidden), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(randomized(model).block_logits(ids), prior, atol=0.1)  # AdaLN away from its start


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


# ---- the draws of a step


def test_sigma_is_drawn_for_every_sequence(plain, ids):
    model, rows = make(plain, p_mean=-0.5), []
    run = model.formulation.run
    model.formulation.run = lambda *args: rows.append(args[-1]) or run(*args)
    model(ids, labels=ids, block_index=1)
    (sigma,) = rows
    assert [row.unique().numel() for row in sigma] == [1, 1, 1] and sigma.unique().numel() == 3


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
        if model.target_embeddings is not None:  # drawn apart, since they are never trained
            similar = model.target_vectors()[VOCAB:] @ model.target_vectors().T
            assert (similar > 0.9).sum() == 5 and after["target_embeddings.table"][VOCAB:].std() < 2 * WIDTH**-0.5
    assert model(ids).logits.shape == (3, LENGTH, size)
    for k in BLOCKS:
        assert block_logits(model, ids, k).shape == (3, LENGTH - 1, size)
    model.train()(ids, labels=ids, block_index=1).loss.backward()
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_heads_tied_within_blocks_are_tied_when_resized():
    model = db.convert(TEXT_CONFIGS["gpt2"], num_blocks=2, preset="paper", shared="per_block")
    assert model.config.tie_word_embeddings
    model.resize_token_embeddings(VOCAB + 5)
    first, second = model.backbone.transformer.wte, model.block_embeddings[0].transformer.wte
    assert model.block_readouts[0].lm_head.weight is first.weight and model.backbone.lm_head.weight is second.weight
    assert not torch.equal(first.weight, second.weight)


def test_embeddings_of_a_part_are_not_resized():
    part = db.convert(TEXT_CONFIGS["gpt2"], num_blocks=2, resident_blocks=[1], shared="per_block")
    with pytest.raises(ValueError, match=r"resident_blocks=\[1\] must be all 2 to resize token embeddings"):
        part.resize_token_embeddings(VOCAB + 5)


# ---- losses


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


def chunks_of(rows_at_a_time, monkeypatch):
    monkeypatch.setattr(losses, "rows_per_chunk", lambda num_rows, num_logits, device: rows_at_a_time)


@pytest.mark.parametrize("rows_at_a_time", [1, 7, 1000])
def test_chunks_change_neither_loss_nor_gradients(plain, text_formulation, ids, rows_at_a_time, monkeypatch):
    model = make(plain, **text_formulation).train()
    results = []
    for rows in (27, rows_at_a_time):
        chunks_of(rows, monkeypatch)
        model.zero_grad()
        loss = model(ids, labels=ids, block_index=1, **draw_of(model)).loss
        (3 * loss).backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    for name, gradient in results[0][1].items():
        assert torch.allclose(gradient, results[1][1][name], atol=1e-5 * gradient.abs().max() + 1e-6), name


def test_no_more_than_a_chunk_of_logits_is_ever_held(monkeypatch):
    """By the bytes of what the readout makes, and of what is kept for the backward pass, whatever the vocabulary."""
    kept = []
    for vocab in (500, 5000):
        config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=vocab, n_positions=64, **ENDS)
        model = db.convert(config, num_blocks=2).train()
        ids = torch.randint(vocab, (4, 64))
        sizes = []
        model.backbone.lm_head.register_forward_hook(lambda head, args, logits: sizes.append(logits.nbytes))
        with SavedActivations(model.parameters()) as saved:
            loss = model(ids, labels=ids, block_index=0).loss
        kept.append(saved.bytes)
        assert sum(sizes) == 4 * 63 * vocab * 4 and max(sizes) == sum(sizes) / 4
        loss.backward()
    assert kept[0] == kept[1]


@pytest.mark.parametrize("device, size", [("cpu", 2**25), ("cuda", 2**28)])
def test_chunks_of_a_large_vocabulary_are_so_large_on_a_device(device, size):
    assert losses.rows_per_chunk(100_000, 50_257, torch.device(device)) * 50_257 * 4 == pytest.approx(size, rel=0.01)


# ---- use as the plain model


def test_adapters_of_peft_s_own_class(plain, text_formulation, ids):
    model = make(plain, **text_formulation)
    given = {"input_ids": ids, "labels": ids, "block_index": 1, **draw_of(model)}
    with torch.no_grad():
        before, loss = model(ids).logits, model(**given).loss
    target = "c_attn" if plain.config.model_type == "gpt2" else "q_proj"
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=[target])).eval()
    with torch.no_grad():  # adapters start as nothing
        assert torch.equal(adapted(input_ids=ids, labels=ids).logits, before) and torch.equal(adapted(**given).loss, loss)
    adapted.train()(**given).loss.backward()
    gradients = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert gradients and all("lora_B" in name for name in gradients)


def test_output_embeddings_are_those_of_the_plain_model(plain):
    model, head = db.convert(plain, num_blocks=2), torch.nn.Linear(WIDTH, VOCAB, bias=False)
    assert model.get_output_embeddings() is model.backbone.lm_head
    model.set_output_embeddings(head)
    assert model.backbone.lm_head is head


# ---- everything the core gives


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


def test_an_explicit_mask_may_say_who_sees_whom(plain, text_formulation, ids):
    """`[N, 1, S, S]`, as stock models take it; here, what restarting positions say."""
    model = make(plain, **text_formulation)
    positions = torch.cat([torch.arange(4), torch.arange(LENGTH - 4)])
    text = torch.arange(LENGTH) >= 4
    visible = (text[:, None] == text) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    marked, masked = {"position_ids": positions.expand(3, -1)}, {"attention_mask": visible.expand(3, 1, -1, -1)}
    for outcome in (
        lambda **given: block_logits(model, ids, 1, labels=ids, **given),
        lambda **given: model(ids, use_cache=False, **given).logits,
        lambda **given: model.block_logits(ids, **given),
    ):
        torch.testing.assert_close(outcome(**marked, **masked), outcome(**marked), rtol=1e-4, atol=1e-5)


def test_a_full_context_has_logits_for_the_token_after_it():
    plain = randomized(AutoModelForCausalLM.from_config(TEXT_CONFIGS["gpt2"]))
    ids = torch.randint(VOCAB, (1, 32))
    assert make(plain)(ids).logits.shape == (1, 32, VOCAB)


# ---- two realisations of noisy tokens, and the walk that asks them


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
    model(ids, labels=ids, block_index=1, **draws_of_texts(LENGTH))
    assert tokens_seen == [(2, LENGTH - 1), (2, LENGTH - 1), (3, LENGTH - 1)]  # layer 3 runs for noisy tokens alone


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_cannot_mask_the_noisy_stream_is_refused(plain, attention):
    model = make(plain)
    with pytest.raises(ValueError, match=f"attn_implementation='{attention}' must be 'sdpa' or 'eager'"):
        model.set_attn_implementation(attention)


@pytest.mark.parametrize("block_index", BLOCKS)
def test_a_noisy_token_sees_no_other_noisy_token(plain, joint, ids, block_index):
    model = make(plain, **joint)
    noise = draws_of_texts(LENGTH)["noise"]
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
