"""The plain model of recurrent depth: what Huginn is, what a cache holds, what a gradient runs through."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import randomized
from families import RECURRENT, three_texts
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from hf_diffusionblocks.recurrent_depth_llama import RecurrentDepthLlamaConfig, RecurrentDepthLlamaForCausalLM, modeling

NEW = 6
STEPS = [None, 1, 3, 7]


@pytest.fixture
def plain() -> RecurrentDepthLlamaForCausalLM:
    torch.manual_seed(0)
    model = randomized(AutoModelForCausalLM.from_config(copy.deepcopy(RECURRENT))).eval()
    model.generation_config.eos_token_id = None  # every generation has the length it is asked for
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return three_texts(8)


def by_hand(plain, ids, state, num_steps: int, without_gradient: int = 0) -> torch.Tensor:
    """Logits, from the whole layers and one explicit loop; gradients of the first runs of the core are cut off."""
    model, config = plain.model, plain.config
    position_ids = torch.arange(ids.shape[1])[None]
    attention = {"position_embeddings": model.rotary_emb(model.embed_tokens(ids), position_ids)}
    hidden = model.embed_tokens(ids)
    for layer in model.prelude:
        hidden = layer(hidden, **attention)
    for step in range(num_steps):
        entering = state @ model.adapter.weight[:, : config.hidden_size].T
        entering = entering + hidden @ model.adapter.weight[:, config.hidden_size :].T
        for layer in model.layers[: config.num_core_layers]:
            entering = layer(entering, **attention)
        state = entering.detach() if step < without_gradient else entering
    for layer in model.layers[config.num_core_layers :]:
        state = layer(state, **attention)
    return plain.lm_head(model.norm(state))


def test_a_saved_config_is_what_it_was(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == plain.config.to_diff_dict() | {"dtype": "float32"}


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("depth", [1, 2, 9])
def test_loss_and_truncated_gradients_are_those_of_a_loop_by_hand(plain, ids, num_steps, depth, monkeypatch):
    plain.config.backprop_depth = depth
    plain.train()
    state = torch.randn(*ids.shape, plain.config.hidden_size, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(torch, "randn_like", lambda embeds: state)
    found, gradients = [], []
    for logits in (
        plain(ids, num_steps=num_steps).logits,
        by_hand(plain, ids, plain.config.initial_state_std * state, num_steps, max(num_steps - depth, 0)),
    ):
        plain.zero_grad()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        found.append(loss.item())
        gradients.append({name: parameter.grad.clone() for name, parameter in plain.named_parameters()})
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name


def test_autocast_trains_what_ran_without_a_gradient_first(plain, ids):
    """It keeps what it casts: the core's first runs must not leave casts that pass no gradient on."""
    with torch.autocast("cpu", torch.bfloat16):
        plain.train()(ids, labels=ids, num_steps=5).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in plain.parameters())


def test_the_core_runs_as_often_in_training_as_huginn_s_law_says(plain, ids):
    """`1 + Poisson(rate)`, whose mean is `mean_recurrence + 1`; and in evaluation `mean_recurrence`."""
    torch.manual_seed(0)
    drawn = torch.tensor([modeling.draw_num_steps(8) for _ in range(4000)], dtype=torch.float64)
    assert drawn.min() == 1 and drawn.mean() == pytest.approx(9, abs=0.25)
    assert drawn.var() == pytest.approx(8 + 64 * (torch.tensor(0.25).exp().item() - 1), rel=0.1)  # of a mixture
    runs = []
    plain.model.layers[0].register_forward_hook(lambda *args: runs.append(0))
    plain(ids)
    assert len(runs) == plain.config.mean_recurrence
    lengths = set()
    for _ in range(8):
        runs.clear()
        plain.train()(ids)
        lengths.add(len(runs))
    assert len(lengths) > 1


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("search", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_cached_generation_is_uncached_generation(plain, ids, num_steps, search):
    options = {"max_new_tokens": NEW, "do_sample": False, "num_steps": num_steps, **search}
    cached = plain.generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(cached.sequences, plain.generate(ids, use_cache=False, **options))
    runs = plain.config.mean_recurrence if num_steps is None else num_steps
    assert len(cached.past_key_values.layers) == 2 + 2 * runs  # a prelude and a coda of one layer, a core of two


def test_logits_of_a_cached_token_are_those_of_the_whole_text(plain, ids):
    """Padded, too: noise is a token's position's, and the global generator is left alone."""
    state = torch.get_rng_state()
    whole, cache = plain(ids, num_steps=3).logits, DynamicCache()
    parts = [plain(part, past_key_values=cache, num_steps=3).logits for part in ids.split((5, 1, 2), dim=1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    assert not torch.allclose(plain(ids, num_steps=4).logits, whole, atol=1e-2)
    assert torch.equal(torch.get_rng_state(), state)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    shorter = plain(ids[:1, 2:]).logits
    assert torch.allclose(plain(ids[:1], attention_mask=mask).logits[:, 2:], shorter, atol=1e-5)
    padded = plain.generate(ids[:1], attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    alone = plain.generate(ids[:1, 2:], max_new_tokens=NEW, do_sample=False)
    assert torch.equal(padded[:, 8:], alone[:, 6:])


def test_sizes_given_as_a_model_is_loaded_are_its_depth(plain, tmp_path):
    """Though they are set one by one."""
    plain.save_pretrained(tmp_path)
    deeper = AutoModelForCausalLM.from_pretrained(tmp_path, num_core_layers=3, num_coda_layers=2, mean_recurrence=16)
    assert (len(deeper.model.layers), deeper.config.num_backprop_steps) == (5, 4)
    deeper.save_pretrained(tmp_path / "deeper")
    assert AutoConfig.from_pretrained(tmp_path / "deeper").num_hidden_layers == 6


def test_what_libraries_around_it_do(plain, ids):
    """PEFT names outputs that nobody asks for; a callback generates in training mode; labels need no cache."""
    adapted = get_peft_model(copy.deepcopy(plain), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert torch.allclose(adapted(input_ids=ids, labels=ids).logits, plain(ids).logits, atol=1e-5)
    with pytest.raises(ValueError, match="output_hidden_states=True must be False"):
        plain(ids, output_hidden_states=True)
    assert plain(ids, labels=ids).past_key_values is None
    options = {"max_new_tokens": 2, "do_sample": False, "cache_implementation": "dynamic"}
    assert plain.train().generate(ids, **options).shape[1] == ids.shape[1] + 2


def test_it_trains_with_the_stock_trainer(plain, ids, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        str(tmp_path), max_steps=12, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        gradient_checkpointing=True,
    )  # fmt: skip
    before = plain(ids, labels=ids).loss.item()
    Trainer(model=plain, args=args, train_dataset=rows).train()
    assert plain.eval()(ids, labels=ids).loss.item() < before - 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_core_layers": 0}, "num_core_layers=0 must be a whole number from 1"),
        ({"mean_recurrence": 0}, "mean_recurrence=0 must be a whole number from 1"),
        ({"backprop_depth": 0}, "backprop_depth=0 must be a whole number from 1"),
        ({"initial_state_std": -1.0}, "initial_state_std=-1.0 must be at least 0"),
        ({"num_hidden_layers": 12}, "num_hidden_layers=12 must be 8, the sum of"),
    ],
)
def test_a_bad_field_of_the_config_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        RecurrentDepthLlamaConfig(**fields)


def test_what_cannot_be_generated_is_refused(plain, ids):
    for cache, slots in ((plain(ids, num_steps=2).past_key_values, 6), (DynamicCache(config=plain.config), 4)):
        with pytest.raises(ValueError, match=f"past_key_values has {slots} slots and must have 8 for num_steps=3"):
            plain(ids[:, :1], past_key_values=cache, num_steps=3)
    with pytest.raises(ValueError, match="num_steps=0 must be a whole number from 1"):
        plain.generate(ids, num_steps=0)
    with pytest.raises(ValueError, match="cache_implementation='static' must be None or 'dynamic'"):
        plain.generate(ids, cache_implementation="static")
