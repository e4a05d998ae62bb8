"""Streamed models under the trainers that users have: the same weights as without streaming, bit by bit."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from streaming_models import (
    LENGTH, MODELS, VOCABULARY, assert_same, backward, gradients, llama, pair, text, tokens, weights, with_checkpointing,
)  # fmt: skip
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_diffusionblocks as db
from hf_diffusionblocks.streaming import loss as streamed_loss

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.1)


def arguments(folder, **given) -> TrainingArguments:
    common = {
        "max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0,
        "weight_decay": 0.1, "learning_rate": 1e-2, "gradient_checkpointing": True, "report_to": "none", "use_cpu": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False}, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**common, **given})


def trained(folder, streamed: bool, model=None, trainer_class=Trainer, callbacks=None, stream=None, **given):
    """A trainer that has trained."""
    set_seed(0)
    model = llama() if model is None else model
    if streamed:
        db.stream_layers(model, device="cpu", **(stream or {}))
    trainer = trainer_class(model, arguments(folder, **given), train_dataset=text(), eval_dataset=text(8), callbacks=callbacks)
    trainer.train()
    return trainer


def assert_same_training(folder, **how) -> None:
    outcomes = []
    for streamed in (False, True):
        given = {name: value() if name == "model" else value for name, value in how.items()}
        outcomes.append(weights(trained(folder, streamed, **given).model))
    assert_same(*outcomes)


def adapted(config: LoraConfig = LORA):
    set_seed(1)
    return get_peft_model(llama(), config)


class OwnLoss(Trainer):
    """Of logits, with a penalty on parameters."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"]).logits
        logits, labels = logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        return loss + 1e-3 * sum(p.square().sum() for p in self.model.parameters())


class MasksGradients(TrainerCallback):
    """Half of each gradient is left out; and a layer is frozen on the way."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.view(-1)[::2] = 0
        if state.global_step == 2:
            model.model.layers[1].requires_grad_(False)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"bf16": True},
        {"model": MODELS["llama, tied"], "bf16": True},
        {"model": adapted},
        {"model": adapted, "bf16": True},
        {"model": lambda: adapted(replace(LORA, use_dora=True)), "bf16": True},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"trainer_class": OwnLoss},
        {"callbacks": [MasksGradients()]},
        {"optim": "adafactor"},
        {"label_smoothing_factor": 0.1},
    ],
    ids=[
        "plain",
        "bf16",
        "tied, bf16",
        "lora",
        "lora, bf16",
        "dora, bf16",
        "reentrant",
        "own loss",
        "masked",
        "adafactor",
        "label smoothing",
    ],
)
def test_the_stock_trainer_trains_the_same(how, tmp_path):
    assert_same_training(tmp_path, **how)


def test_adapters_added_after_streaming_train_the_same(tmp_path):
    stock = trained(tmp_path, False, model=adapted())
    set_seed(1)
    model = llama()
    db.stream_layers(model, device="cpu")
    later = trained(tmp_path, False, model=get_peft_model(model, LORA))
    assert_same(weights(stock.model), weights(later.model))


@pytest.mark.parametrize("num_items", [None, torch.tensor(0)], ids=["of the batch", "of the step"])
def test_where_no_label_counts_logits_in_parts_have_the_stock_gradients(num_items, monkeypatch):
    monkeypatch.setattr(streamed_loss, "PART_BYTES", 256)
    stock, model = pair("llama")
    db.stream_layers(model, device="cpu")
    for each in (stock, model):
        backward(each, {**tokens(), "labels": torch.full((2, LENGTH), -100), "num_items_in_batch": num_items})
    assert_same(gradients(stock), gradients(model))
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_a_loss_in_parts_takes_no_autocast_from_who_calls_backward():
    """Whose dtype a GPU's own thread does not know."""
    found = []
    for autocast in (False, True):
        hidden, weight = torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(1, -2, 20).reshape(5, 4)
        hidden.requires_grad_(), weight.requires_grad_()
        loss = streamed_loss.CrossEntropyInParts.apply(hidden, weight, None, torch.tensor([0, 4, 2]), -100)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss.backward()
        found.append({"hidden": hidden.grad, "weight": weight.grad})
    assert_same(*found)


def test_what_logits_in_parts_cannot_give_is_an_error(monkeypatch):
    monkeypatch.setattr(streamed_loss, "PART_BYTES", 256)
    model = llama().train()
    db.stream_layers(model, device="cpu")
    outputs = model(**tokens())
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(outputs.loss, list(model.parameters()), create_graph=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(**tokens()).loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="logits of 'lm_head' are computed when they are looked at"):
        outputs.logits.argmax(-1)


def test_a_backward_hook_of_the_head_is_called(monkeypatch):
    monkeypatch.setattr(streamed_loss, "PART_BYTES", 256)
    model = llama().train()
    db.stream_layers(model, device="cpu")
    seen = []
    model.lm_head.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    backward(model, tokens())
    assert seen == [(2, LENGTH, VOCABULARY)]


def test_a_label_out_of_the_vocabulary_is_an_error_where_logits_come_in_parts(monkeypatch):
    monkeypatch.setattr(streamed_loss, "PART_BYTES", 256)
    model = llama().train()
    db.stream_layers(model, device="cpu")
    for label in (-1, VOCABULARY):
        with pytest.raises(RuntimeError, match=f"index {label} is out of bounds"):
            model(**{**tokens(), "labels": torch.full((2, LENGTH), label)})


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_steps_on_the_device_are_those_on_the_host(optim, tmp_path):
    host = trained(tmp_path, True, optim=optim)
    device = trained(tmp_path, True, optim=optim, stream={"optimizer_device": "device"})
    assert_same(weights(host.model), weights(device.model))
    assert {p for p, state in device.optimizer.state.items() if state} <= set(device.model.parameters())


def test_an_optimizer_that_looks_at_all_parameters_is_refused_on_the_device():
    model = llama()
    db.stream_layers(model, device="cpu", optimizer_device="device")

    class Other(torch.optim.Optimizer):
        def step(self):
            raise AssertionError

    class Counts(torch.optim.SGD):  # each unit's part of a step would be one
        def step(self, closure=None):
            raise AssertionError

    class AsItsBase(torch.optim.SGD):
        pass

    backward(model.train(), tokens())
    for optimizer in (Other(model.parameters(), {}), Counts(model.parameters())):
        with pytest.raises(ValueError, match=f"with {type(optimizer).__name__} must be one of SGD"):
            optimizer.step()
    AsItsBase(model.parameters()).step()
    with pytest.raises(ValueError, match="optimizer_device='cpu' must be"):
        db.stream_layers(llama(), optimizer_device="cpu")


def test_a_step_on_the_device_that_fails_loses_no_state(monkeypatch):
    """Where the device is out of memory, say."""
    model = llama().train()
    db.stream_layers(model, device="cpu", optimizer_device="device")
    optimizer = torch.optim.AdamW(model.parameters())
    backward(model, tokens())
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.optim.AdamW.step, "__wrapped__", fails)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    found = optimizer.state_dict()
    assert found["state"].keys() == before["state"].keys()
    for number, state in before["state"].items():
        assert all(torch.equal(value, found["state"][number][name]) for name, value in state.items())


def test_hooks_of_steps_on_the_device():
    model = llama().train()
    db.stream_layers(model, device="cpu", optimizer_device="device")
    optimizer, steps = torch.optim.SGD(model.parameters(), 0.1), []
    optimizer.register_step_post_hook(lambda *_: steps.append(len(optimizer.param_groups[0]["params"])))
    backward(model, tokens())
    optimizer.step()
    assert steps == [len(list(model.parameters()))]
    optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="takes no step_pre_hook"):
        optimizer.step()


def test_a_run_killed_and_resumed_is_the_uninterrupted_one(tmp_path):
    """A checkpoint of a stock run is resumed streamed, and one of a streamed run as a stock model."""
    whole = trained(tmp_path / "whole", False, max_steps=4, save_strategy="steps", save_steps=2)
    for streamed in (True, False):
        set_seed(0)
        model = llama()
        if streamed:
            db.stream_layers(model, device="cpu")
        folder = tmp_path / ("whole" if streamed else "streamed")
        args = arguments(tmp_path / "streamed", max_steps=4, save_strategy="steps", save_steps=2)
        trainer = Trainer(model, args, train_dataset=text())
        if streamed:
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
            trainer.save_model(str(tmp_path / "saved"))
            assert_same(weights(llama().from_pretrained(tmp_path / "saved")), weights(whole.model))
        else:
            trained(tmp_path / "streamed", True, max_steps=4, save_strategy="steps", save_steps=2)
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert_same(weights(trainer.model), weights(whole.model))


def test_the_best_model_is_loaded_and_evaluated(tmp_path):
    how = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    how |= {"load_best_model_at_end": True, "learning_rate": 0.5, "metric_for_best_model": "loss"}
    stock = trained(tmp_path / "stock", False, **how)
    streamed = trained(tmp_path / "streamed", True, **how)
    assert_same(weights(stock.model), weights(streamed.model))
    assert stock.evaluate()["eval_loss"] == streamed.evaluate()["eval_loss"]
    assert (stock.predict(text(4)).predictions[0] == streamed.predict(text(4)).predictions[0]).all()


def test_a_loop_of_one_s_own_with_accelerate():
    outcomes = []
    for streamed in (False, True):
        set_seed(0)
        AcceleratorState._reset_state(reset_partial_state=True)  # (of another precision)
        model = with_checkpointing(llama())
        if streamed:
            db.stream_layers(model, device="cpu")
        accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2))
        for step in range(4):
            with accelerator.accumulate(model):
                loss = model.train()(**tokens(seed=step)).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        outcomes.append(weights(accelerator.unwrap_model(model, keep_fp32_wrapper=False)))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert_same(*outcomes)


# ---- TRL


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(2, 96)} | {"<pad>": 0, "<eos>": 1, "<unk>": 96}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _words(rows: int, length: int, seed: int) -> list[str]:
    numbers = torch.randint(2, 96, (rows, length), generator=torch.Generator().manual_seed(seed))
    return [" ".join(f"w{n}" for n in row) for row in numbers.tolist()]


def _trl(kind: str, folder, streamed: bool, lora: bool) -> dict[str, torch.Tensor]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    set_seed(0)
    model, more = llama(), {}
    if streamed:
        db.stream_layers(model, device="cpu")
    names = {"sft": ["text"], "dpo": ["prompt", "chosen", "rejected"], "grpo": ["prompt"]}[kind]
    data = Dataset.from_dict({name: _words(20, 5 + 3 * i, i) for i, name in enumerate(names)})
    if kind == "dpo" and not lora:
        more["ref_model"] = llama()
        if streamed:
            db.stream_layers(more["ref_model"], device="cpu")
    kinds = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}
    config, trainer_class = kinds[kind]
    own = {"max_length": 32}
    if kind == "grpo":  # which samples in each step
        own = {"num_generations": 2, "max_completion_length": 6}
        more["reward_funcs"] = lambda completions, **_: [float(len({*each.split()})) for each in completions]
    args = config(**{**arguments(folder, max_steps=3).to_dict(), "bf16": False, **own})
    peft = {"peft_config": copy.deepcopy(LORA)} if lora else {}
    trainer = trainer_class(model, args=args, train_dataset=data, processing_class=_tokenizer(), **peft, **more)
    trainer.train()
    if streamed:
        assert trainer.model.get_base_model()._stream.peak_units == 2 if lora else model._stream.peak_units == 2
    return weights(trainer.model)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_trl_trains_the_same(kind, lora, tmp_path):
    assert_same(*(_trl(kind, tmp_path, streamed, lora) for streamed in (False, True)))
