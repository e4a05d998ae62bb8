"""Streamed layers: exact gradients, what is on the device at once, and changes of weights that are seen."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from streaming_models import model  # noqa: F401
from streaming_models import MODELS, assert_same, backward, gradients, llama, pair, tokens, with_checkpointing
from torch import nn

import hf_diffusionblocks as db


# ---- right


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_in_evaluation_mode_too(name):
    stock, model = (each.eval() for each in pair(name))
    stream, batch = db.stream_layers(model, device="cpu"), MODELS[name].batch()
    for _ in range(2):
        assert backward(model, batch) == backward(stock, batch)
    assert_same(gradients(model), gradients(stock))
    assert stream.peak_units == 2


def graphs() -> int:
    gc.collect()
    return sum(type(node).__name__ == "_ArriveBackward" for node in gc.get_objects())


def test_a_graph_through_which_nobody_goes_back_is_gone(model):
    """Of an evaluation with gradients, and of layers after those that a loss is made of."""
    db.stream_layers(model, device="cpu")
    before = graphs()
    model.eval()(**tokens())
    model.train()(**tokens(), output_hidden_states=True).hidden_states[1].sum().backward()
    assert graphs() == before


@pytest.mark.parametrize("trained", [True, False])
@torch.no_grad()
def test_what_is_lent_asks_for_gradients_as_the_parameter_does_also_where_none_are_made(trained):
    """PyTorch goes by it, in the way that it multiplies Mamba's tokens: the last bits are others else."""
    model, seen = llama().eval().requires_grad_(trained), []
    db.stream_layers(model, device="cpu")
    projection = model.model.layers[1].self_attn.q_proj
    projection.register_forward_pre_hook(lambda module, args: seen.append(module.weight.requires_grad))
    model(**tokens())
    with torch.inference_mode():
        model(**tokens())
    assert seen == [trained, trained]


@pytest.mark.parametrize("switched", ["reentrant", "off", "every other layer"])
def test_whatever_checkpointing_is_set_over_it(switched):
    stock, model = pair("llama")
    stream = db.stream_layers(model, device="cpu")
    for each in (stock, model):
        if switched == "off":
            each.activation_checkpointing_disable()
        else:
            kwargs = {"use_reentrant": switched == "reentrant"}
            each.activation_checkpointing_enable(kwargs, **({"every_n_layers": 2} if "every" in switched else {}))
        each.get_input_embeddings().register_forward_hook(lambda *given: given[2].requires_grad_())
        for _ in range(2):
            backward(each, tokens())
    assert_same(gradients(model), gradients(stock))
    assert stream.peak_units == 2


def test_what_is_copied_in_a_micro_batch(model):
    stream = db.stream_layers(model, device="cpu")
    for _ in range(2):
        backward(model, tokens())
    before = stream.copied
    backward(model, tokens())
    size = sum(p.nbytes for name in stream.units for p in model.get_submodule(name).parameters())
    head, embedding = model.lm_head.weight.nbytes, model.model.embed_tokens.weight.nbytes
    first, *_, last = (sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers)
    # Each layer forward and backward, but for the first and the last, which are there still; embedding and head once.
    assert stream.copied["to_device"] - before["to_device"] == 2 * size - head - embedding - first - last
    assert stream.copied["to_host"] - before["to_host"] == size


@pytest.mark.parametrize("frozen", ["all but the head", "first layers", "embedding"])
def test_frozen_parts_get_no_gradients(frozen):
    stock, model = pair("llama")
    for each in (stock, model):
        for name, parameter in each.named_parameters():
            stays = {"all but the head": "lm_head" not in name, "embedding": "embed" in name}
            parameter.requires_grad = not stays.get(frozen, ".layers.0" in name or ".layers.1" in name)
    db.stream_layers(model, device="cpu")
    for each in (stock, model):
        backward(each, tokens())
    assert_same(gradients(model), gradients(stock))


def test_bfloat16_copies_under_autocast_and_masters_in_float32():
    stock, model = pair("llama, tied")
    stream = db.stream_layers(model, device="cpu")
    for each in (stock, model):
        with torch.autocast("cpu", torch.bfloat16):
            backward(each, tokens())
    assert_same(gradients(model), gradients(stock))
    linear = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
    assert stream.copied["to_device"] < 2 * linear * 2 + 3 * model.lm_head.weight.nbytes  # half of them crossed


def test_a_model_in_bfloat16_stays_so(model):
    stock = with_checkpointing(copy.deepcopy(model).bfloat16())
    stream = db.stream_layers(model.bfloat16(), device="cpu")
    for each in (stock, model):
        backward(each, tokens())
    assert_same(gradients(model), gradients(stock))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert stream.copied["to_host"] == sum(
        model.get_submodule(n).get_parameter(p).nbytes
        for n in stream.units
        for p, _ in model.get_submodule(n).named_parameters()
    )


def test_a_weight_that_moves_between_forward_and_backward_is_an_error_as_in_a_stock_model(model):
    db.stream_layers(model, device="cpu")
    model.eval().activation_checkpointing_disable()
    loss = model(**tokens()).loss
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="'lm_head'.*modified by an inplace operation"):
        loss.backward()


def test_a_weight_that_is_replaced_between_forward_and_backward_is_an_error(model):
    db.stream_layers(model, device="cpu")
    loss = model.eval()(**tokens()).loss
    model.load_state_dict({name: each.clone() for name, each in model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="a weight of 'model.layers.3' that the backward pass needs was replaced"):
        loss.backward()


def test_a_weight_that_is_read_under_autocast_has_its_own_dtype(model):
    """As TRL's losses read the head's."""
    db.stream_layers(model, device="cpu")
    seen = []
    model.model.norm.register_forward_hook(lambda *_: seen.append(model.lm_head.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(**tokens())
    assert seen == [torch.float32]


def test_batch_norms_count_a_batch_once():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[2, 2], num_labels=2)
    stock = ResNetForImageClassification(config).train()
    model = copy.deepcopy(stock)
    db.stream_layers(model, device="cpu")
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    for each in (stock, model):
        for _ in range(2):
            backward(each, batch)
    assert_same(gradients(model), gradients(stock))
    assert_same(dict(model.named_buffers()), dict(stock.named_buffers()))


@pytest.mark.parametrize(
    "name, adapters",
    [
        ("llama", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),  # finds the embedding by two paths
        ("mixtral", LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"], init_lora_weights=False)),
    ],
    ids=["prompt tuning", "lora of experts"],
)
def test_adapters_that_do_more_than_stand_beside_weights(name, adapters):
    stock, model = (get_peft_model(each, copy.deepcopy(adapters)) for each in pair(name))
    model.load_state_dict(stock.state_dict())
    db.stream_layers(model, device="cpu")
    for each in (stock, model):
        for _ in range(2):
            backward(each, tokens())
    assert_same(gradients(model), gradients(stock))
    assert dict(model.named_buffers()).keys() == dict(stock.named_buffers()).keys()


def test_parts_that_a_model_calls_by_themselves_come_by_themselves():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(2, 8, 2, num_layers=3, sample_size=8, patch_size=2, num_embeds_ada_norm=10).eval()
    stock = copy.deepcopy(model)
    stock.enable_gradient_checkpointing()
    stream = db.stream_layers(model, device="cpu")
    batch = {"hidden_states": torch.randn(2, 2, 8, 8), "timestep": torch.tensor([3, 5]), "class_labels": torch.tensor([1, 2])}
    for each in (stock, model):
        for _ in range(2):
            each(**batch).sample.square().mean().backward()
    assert_same(gradients(model), gradients(stock))
    assert any(name.startswith("transformer_blocks.0.norm1.emb") for name in stream.units)


# ---- seen by the next forward


def changed_by_optimizer(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    backward(model, tokens())
    optimizer.step()


def changed_by_load_state_dict(model):
    model.load_state_dict({name: each + 1 for name, each in model.state_dict().items()})


def changed_by_data(model):
    for parameter in model.parameters():
        parameter.data.add_(1)


def changed_by_rows_of_data(model):
    """As new tokens get their embeddings."""
    model.get_input_embeddings().weight.data[tokens()["input_ids"][0, 0]] = 1
    model.model.layers[0].mlp.up_proj.weight.data[3] = 1


def changed_by_assignment(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)


@pytest.mark.parametrize(
    "change",
    [changed_by_optimizer, changed_by_load_state_dict, changed_by_data, changed_by_rows_of_data, changed_by_assignment],
)
@pytest.mark.parametrize("keep", [0, 4])
def test_a_change_of_weights_is_seen(change, keep, model):
    db.stream_layers(model, device="cpu", keep=keep)
    model.eval()
    for _ in range(2):  # (from then on the embedding is on its way when a pass ends)
        before = model(**tokens()).logits
    change(model)
    after = model(**tokens()).logits
    plain = llama()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(after, plain.eval()(**tokens()).logits)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("keep", [0, 4])
def test_adapters_merged_and_unmerged_are_seen(keep, model):
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    db.stream_layers(adapted, device="cpu", keep=keep)
    with torch.no_grad():
        with_adapter = adapted(**tokens()).logits
        adapted.merge_adapter()
        assert torch.allclose(adapted(**tokens()).logits, with_adapter, atol=1e-5)
        adapted.unmerge_adapter()
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(**tokens()).logits, with_adapter, atol=1e-3)


# ---- kept


def test_copies_of_an_evaluation_in_inference_mode_train(model):
    db.stream_layers(model, device="cpu", keep=2)
    with torch.inference_mode():
        model(**tokens())
    stock, _ = pair("llama")
    assert backward(model, tokens()) == backward(stock, tokens())
    assert_same(gradients(model), gradients(stock))


def test_layers_that_are_kept_do_not_move_again(model):
    size = sum(p.nbytes for p in model.model.layers[0].parameters())
    for keep, kept in ((2, 2), (f"{2.5 * size / 2**20} MiB", 2)):
        stream = db.stream_layers(model, device="cpu", keep=keep)
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        for _ in range(3):
            backward(model, tokens())
        assert stream.peak_units == 2 + kept
        before = stream.copied["to_device"]
        model(**tokens())
        others = (4 - kept) * size + model.lm_head.weight.nbytes  # (the embedding has come ahead)
        assert stream.copied["to_device"] - before == others
        stream.stop()
