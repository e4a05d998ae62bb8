"""LoRA block by block: adapters of their own, trained alone, saved, loaded, merged."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from process_scenarios import GPT2, LLAMA, VIT, made, rows, trainer_of

from hf_diffusionblocks import lora

CARRIED = {"denoiser": "factorized", "context": "carried", "prior_fraction": 1.0}
OWN = {"denoiser": "factorized", "shared": "per_block"}
CASES = {
    "gpt2": (GPT2, CARRIED), "llama": (LLAMA, CARRIED), "vit": (VIT, CARRIED), "gpt2-own": (GPT2, OWN), "vit-own": (VIT, OWN),
}  # fmt: skip
CONFIG = LoraConfig(r=4, lora_alpha=8)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def logits(model, source) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**{name: value for name, value in rows(source)[:4].items() if name != "labels"}).logits


def adapted(case, resident=None, config=CONFIG):
    source, fields = case
    return lora.add_block_adapters(made(source, fields, resident), config)


def trained(case, folder, model=None, **arguments):
    model = adapted(case) if model is None else model
    trainer = trainer_of(model, case[0], folder, {"max_steps": 6, "weight_decay": 0.1, **arguments})
    trainer.train()
    return trainer


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_adapters_start_as_nothing(case):
    source, fields = case
    assert torch.equal(logits(adapted(case), source), logits(made(source, fields), source))


def test_every_adapter_is_its_block_s(case):
    model = adapted(case)
    trained_names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert list(model.peft_config) == ["block_0", "block_1"]
    for name in trained_names:
        assert f".block_{model.block_of_parameter(name)}" in name


def test_a_step_moves_the_active_adapter_alone(case, tmp_path):
    model = adapted(case)
    trainer = trainer_of(model, case[0], tmp_path, {"max_steps": 4, "weight_decay": 0.1})
    before, moved = {}, []
    step, batches = trainer.training_step, trainer.get_batch_samples

    def noted(*args, **kwargs):
        if before:
            now = dict(model.named_parameters())
            moved.append((active[-1], {name for name in before if not torch.equal(before[name], now[name])}))
        before.update(copy.deepcopy(dict(model.named_parameters())))
        result = batches(*args, **kwargs)
        active.append(trainer.active_block)
        return result

    active: list[int] = []
    trainer.get_batch_samples = noted
    trainer.train()
    noted(iter([]), 0, None)
    assert step and {block for block, _ in moved} == {0, 1}
    for block, names in moved:
        assert names
        assert all(f".block_{block}" in name and model.block_of_parameter(name) == block for name in names)


@pytest.mark.parametrize("objective", ["local", "final"])
def test_objectives(objective, tmp_path):
    trainer = trained(CASES["llama"], tmp_path, max_steps=30, objective=objective, learning_rate=1e-2)
    before = made(*CASES["llama"])
    assert trainer.evaluate()["eval_loss"] < trainer_of(before, LLAMA, tmp_path, {}).evaluate()["eval_loss"]


def test_adapters_are_saved_and_loaded(case, tmp_path):
    trainer = trained(case, tmp_path / "run")
    trainer.save_model(tmp_path / "saved")
    files = {path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*.safetensors")}
    assert files == {"block_0/adapter_model.safetensors", "block_1/adapter_model.safetensors"}
    again = lora.load_block_adapters(made(*case), tmp_path / "saved")
    assert same(again.state_dict(), trainer.model.state_dict())
    assert torch.equal(logits(again, case[0]), logits(trainer.model, case[0]))
    trainer.save_model(tmp_path / "saved")  # over the old one


def test_one_block_s_adapter_is_loaded_alone(tmp_path):
    trainer = trained(CASES["gpt2-own"], tmp_path / "run")
    trainer.save_model(tmp_path / "saved")
    part = lora.load_block_adapters(made(GPT2, OWN, [1]), tmp_path / "saved")
    whole = trainer.model.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in part.state_dict().items())


def test_a_resumed_run_is_the_uninterrupted_one(case, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 3}
    whole = trained(case, tmp_path, **arguments)
    model = adapted(case)
    trainer = trainer_of(model, case[0], tmp_path, {"max_steps": 6, "weight_decay": 0.1, **arguments})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(model.state_dict(), whole.model.state_dict())


def test_a_job_trains_its_block_s_adapter(tmp_path):
    case = CASES["gpt2-own"]
    whole = trained(case, tmp_path / "whole", train_blocks=[1])
    part = trained(case, tmp_path / "part", model=adapted(case, [1]))
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in part.model.state_dict().items())


def test_merged_adapters_give_the_same_logits(case, tmp_path):
    model = trained(case, tmp_path, learning_rate=0.1).model
    expected = logits(model, case[0])
    names = made(*case).state_dict().keys()
    merged = lora.merge_and_unload(model)
    assert merged.state_dict().keys() == names
    assert not torch.allclose(expected, logits(made(*case), case[0]), atol=1e-3)
    torch.testing.assert_close(logits(merged, case[0]), expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in merged.parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_a_plain_model_is_left(name, tmp_path):
    model = trained(CASES[name], tmp_path, learning_rate=0.1).model
    with pytest.raises(ValueError, match=r"adapters \(block_0, block_1\): merge_and_unload first"):
        model.to_plain()
    expected = logits(model, CASES[name][0])
    torch.testing.assert_close(logits(lora.merge_and_unload(model).to_plain(), CASES[name][0]), expected, rtol=1e-4, atol=1e-5)


def test_a_new_head_is_trained_whole(tmp_path):
    """modules_to_save: of all blocks, and with the last block's adapter."""
    model = adapted(CASES["vit"], config=LoraConfig(r=4, modules_to_save=["classifier"]))
    head = model.backbone.classifier.weight.clone()
    trainer = trained(CASES["vit"], tmp_path / "run", model=model, objective="final")
    assert not torch.equal(model.backbone.classifier.weight, head)
    trainer.save_model(tmp_path / "saved")
    again = lora.load_block_adapters(made(VIT, CARRIED), tmp_path / "saved")
    assert same(again.state_dict(), model.state_dict())
    expected = logits(model, VIT)
    torch.testing.assert_close(logits(lora.merge_and_unload(model), VIT), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lora.add_block_adapters(adapted(CASES["gpt2"]), CONFIG), "the model has adapters already: block_0"),
        (
            lambda: lora.add_block_adapters(made(GPT2, CARRIED), LoraConfig(layers_to_transform=[0])),
            r"layers_to_transform=\[0\] must be None",
        ),
        (lambda: lora.merge_and_unload(made(GPT2, CARRIED)), "the model has no adapters"),
    ],
    ids=["twice", "layers", "none"],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_adapter_is_named(tmp_path):
    with pytest.raises(OSError, match="block_0/adapter_model.safetensors is missing"):
        lora.load_block_adapters(made(GPT2, CARRIED), tmp_path)
