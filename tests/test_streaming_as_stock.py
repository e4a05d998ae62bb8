"""A streamed model is a stock model to all others, or refused; and the doors for it that libraries leave open."""

from __future__ import annotations

import copy
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from streaming_models import model  # noqa: F401
from streaming_models import assert_same, backward, gradients, llama, pair, tokens, weights, with_checkpointing
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.streaming import checks
from hf_diffusionblocks.streaming.lending import LentUnit


# ---- a stock model to all others


def test_it_is_the_stock_model_by_class_names_and_files(model, tmp_path):
    stock = copy.deepcopy(model)
    db.stream_layers(model, device="cpu")
    assert isinstance(model, type(stock)) and type(model).__name__ == "LlamaForCausalLM"
    assert list(dict(model.named_parameters())) == list(dict(stock.named_parameters()))
    assert_same(dict(model.state_dict()), dict(stock.state_dict()))
    model.save_pretrained(tmp_path)
    for kind in (AutoModelForCausalLM, type(model)):
        again = kind.from_pretrained(tmp_path)
        assert type(again) is type(stock)
        assert_same(weights(again), weights(stock))


def test_generates_as_the_stock_model_with_a_cache(model):
    prompt = tokens()["input_ids"][:, :4]
    expected = model.eval().generate(prompt, max_new_tokens=6, do_sample=False)
    stream = db.stream_layers(model, device="cpu")
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), expected)
    assert stream.peak_units == 2


def test_generates_in_training_mode_too():
    model = llama(attention_dropout=0.0).train()
    prompt = tokens()["input_ids"][:, :4]
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    db.stream_layers(model, device="cpu")
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), expected)
    assert model.is_activation_checkpointing


def test_several_threads_use_a_model(model, in_threads):
    batches = [tokens(seed=seed) for seed in range(3)]
    with torch.no_grad():
        expected = [model.eval()(**batch).loss for batch in batches]
    db.stream_layers(model, device="cpu")
    losses = in_threads(lambda batch: [model(**batch).loss for _ in range(20)], batches)
    assert losses == [[loss] * 20 for loss in expected]


def test_a_head_that_is_parametrized_later(model):
    stock = copy.deepcopy(model)
    db.stream_layers(model, device="cpu")
    for each in (with_checkpointing(stock), model):
        nn.utils.parametrizations.weight_norm(each.lm_head)
        backward(each, tokens())
    assert_same(gradients(model), gradients(stock))


def test_a_vocabulary_that_grows_and_adapters_added_later_are_streamed(model):
    stream = db.stream_layers(model, device="cpu")
    model.resize_token_embeddings(120)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    stock = copy.deepcopy(adapted)
    backward(adapted, tokens())
    assert stock.base_model.model.lm_head.modules_to_save["default"].weight.shape == (120, 32)
    assert any("lm_head.modules_to_save" in name for name in stream.units) and "model.embed_tokens" in stream.units
    assert adapted.base_model.model.lm_head.modules_to_save["default"].weight.grad is not None


def test_a_copy_trains_apart(model):
    db.stream_layers(model, device="cpu")
    other = copy.deepcopy(model)
    backward(other, tokens())
    assert all(each is None for each in gradients(model).values())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    stock, _ = pair("llama")
    backward(model, tokens())
    backward(stock, tokens())
    assert_same(gradients(model), gradients(stock))


def test_to_moves_dtypes_and_leaves_units_in_host_memory(model):
    db.stream_layers(model, device="cpu")
    assert model.to(torch.float64).lm_head.weight.dtype == torch.float64
    model.float()
    model.model.layers[0].to("meta")  # any other device that there is
    assert {p.device.type for p in model.model.layers[0].parameters()} == {"cpu"}


def test_stop_gives_the_stock_model_back():
    stock, model = pair("llama")
    model_class, layer_class = type(model), type(model.model.layers[0])
    with db.stream_layers(model, device="cpu"):
        assert type(model) is not model_class
        assert model.is_activation_checkpointing
    assert type(model) is model_class and type(model.model.layers[0]) is layer_class
    assert not model.is_activation_checkpointing
    backward(with_checkpointing(model), tokens())
    backward(stock, tokens())
    assert_same(gradients(model), gradients(stock))


@pytest.mark.parametrize("of", ["", "model.layers.0"])  # as Accelerate does; as diffusers' casts and offloads
def test_a_model_whose_forward_was_set_runs_when_its_stream_has_stopped(of, model):
    with db.stream_layers(model, device="cpu"):
        module = model.get_submodule(of)
        module.forward = MethodType(module.forward.__func__, module)
        expected = backward(model, tokens())
    assert backward(model, tokens()) == expected


def test_a_stream_stops_after_its_model_was_merged(model):
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    stream = db.stream_layers(adapted, device="cpu")
    adapted = adapted.merge_and_unload()  # as peft shows it: its wrapper goes
    gc.collect()
    stream.stop()
    assert adapted is model
    assert type(model).__mro__[1].__name__ == "LlamaPreTrainedModel"
    assert not any(isinstance(module, LentUnit) for module in model.modules()) and not model.is_activation_checkpointing


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_error_in_the_middle_leaves_parameters_where_they_were(error, model):
    parameters = dict(model.named_parameters())
    stream = db.stream_layers(model, device="cpu")

    def fail(*_):
        raise error

    hook = model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(type(error)):
        backward(model, tokens())
    hook.remove()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    stock, _ = pair("llama")
    assert backward(model, tokens()) == backward(stock, tokens())
    assert not stream.computing


# ---- refused


def dispatched(model):
    model.hf_device_map = {"model": 0, "lm_head": "disk"}
    return model


@pytest.mark.parametrize(
    "make, arguments, message",
    [
        (lambda model: model, {"device": "nowhere"}, "device='nowhere' must be one that is there"),
        (lambda model: model, {"device": "meta"}, 'device="meta" computes nothing'),
        (lambda model: model, {"keep": -1}, "keep=-1 must be a number of layers from 0 to 4"),
        (lambda model: model, {"keep": "much"}, "keep='much' must be"),
        (lambda model: model, {"layers": ["model.layers.9"]}, "'model.layers.9' must be the path of a module"),
        (lambda model: model, {"layers": []}, "must name at least one layer"),
        (lambda model: model, {"layers": ["model.layers.1", "model.layers.1.mlp"]}, "is inside of 'model.layers.1'"),
        (lambda model: model.to("meta"), {}, "embed_tokens.weight is on the meta device"),
        (lambda model: nn.DataParallel(model), {}, "must be streamed before it is wrapped"),
        (lambda model: nn.Linear(2, 2), {}, "Linear has no layers that can be found"),
        (dispatched, {}, "dispatched by device_map to 2 places"),
    ],
)
def test_what_cannot_be_streamed_is_named(make, arguments, message, model):
    with pytest.raises(ValueError, match=message.replace('"', ".")):
        db.stream_layers(make(model), **{"device": "cpu", **arguments})
    if isinstance(make(llama()), type(model)):
        assert type(model).__mro__[1].__name__ != "StreamedModel"  # nothing has begun


def test_a_streamed_model_is_not_streamed_twice(model):
    db.stream_layers(model, device="cpu")
    with pytest.raises(ValueError, match="is streamed already: call stop"):
        db.stream_layers(model, device="cpu")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_it_says_that_nothing_is_saved(model, caplog):
    logging.get_logger("hf_diffusionblocks").propagate = True
    db.stream_layers(model, "cpu").stop()
    assert not caplog.text  # asked for
    db.stream_layers(model)
    assert "no accelerator is there" in caplog.text


def test_float16_autocast_is_refused(model):
    db.stream_layers(model, device="cpu")
    forward = model.forward
    in_float16 = torch.autocast("cpu", torch.float16)(forward)
    model.forward = MethodType(lambda self, **given: in_float16(**given), model)  # as Accelerate
    with pytest.raises(ValueError, match="fp16=True cannot be streamed"):
        model(**tokens())


def test_keys_and_values_of_earlier_tokens_are_refused_in_training(model):
    adapted = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    db.stream_layers(adapted, device="cpu")
    with pytest.raises(ValueError, match="past_key_values cannot be given"):
        adapted(**tokens())
    adapted.eval()(**tokens())


def test_several_processes_on_accelerators_are_refused(monkeypatch):
    monkeypatch.setattr(checks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(checks.dist, "get_world_size", lambda: 2)
    checks.check_processes(torch.device("cpu"))
    with pytest.raises(ValueError, match="2 processes on cuda cannot train a streamed model"):
        checks.check_processes(torch.device("cuda"))


# ---- doors that libraries leave open


def test_layers_checkpoint_the_forward_of_a_subclass():
    calls = []

    class Layer(GradientCheckpointingLayer):
        def forward(self, hidden):
            return hidden

    class Inner(Layer):
        def forward(self, hidden):
            calls.append("inner")
            return super().forward(hidden)

    layer = Inner().train()
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = lambda function, *args: function(*args) + function(*args)
    layer(torch.ones(1))
    assert calls == ["inner", "inner"]


def test_autograd_tells_which_hooks_there_are():
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    pack, unpack = (lambda tensor: tensor), (lambda tensor: tensor)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) == (pack, unpack)
