"""LoRA block by block: adapters of their own, trained alone, saved, loaded, merged."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel
from process_scenarios import GPT2, LLAMA, VIT, made, rows, trainer_of
from safetensors.torch import load_file, save_file

from hf_diffusionblocks import lora

CARRIED = {"denoiser": "factorized", "context": "carried", "prior_fraction": 1.0}
OWN = {"denoiser": "factorized", "shared": "per_block"}
CASES = {
    "gpt2": (GPT2, CARRIED), "llama": (LLAMA, CARRIED), "vit": (VIT, CARRIED), "gpt2-own": (GPT2, OWN), "vit-own": (VIT, OWN),
    "gpt2-head": (GPT2, {**CARRIED, "readout_layers": 1}), "vit-head": (VIT, {**CARRIED, "readout_layers": 1}),
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
    heads = {name for name in trained_names if name.startswith("readout_heads.0.")}
    assert bool(heads) is bool(model.config.readout_layers)  # they are fresh: to be trained whole


def test_a_step_moves_the_active_adapter_alone(case, tmp_path):
    model = adapted(case)
    trainer = trainer_of(model, case[0], tmp_path, {"max_steps": 4, "weight_decay": 0.1, "block_schedule": "random"})
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


@pytest.mark.parametrize("objective", ["local", "final"])
def test_adapters_train_alike_while_other_blocks_wait_in_host_memory(objective, tmp_path):
    config = LoraConfig(r=4, modules_to_save=["classifier"])
    kept, moved = (
        trained(
            CASES["vit"], tmp_path / where, adapted(CASES["vit"], config=config), objective=objective,
            offload_inactive_blocks=where,
        ).model
        for where in ("none", "cpu")
    )  # fmt: skip
    assert same(kept.state_dict(), moved.state_dict())
    merged = [lora.merge_and_unload(model).to_plain().state_dict() for model in (kept, moved)]
    assert same(*merged)


def test_adapters_are_saved_and_loaded(case, tmp_path):
    trainer = trained(case, tmp_path / "run")
    trainer.save_model(tmp_path / "saved")
    files = {path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*.safetensors")}
    assert files == {"block_0/adapter_model.safetensors", "block_1/adapter_model.safetensors"}
    again = lora.load_block_adapters(made(*case), tmp_path / "saved")
    assert same(again.state_dict(), trainer.model.state_dict())
    assert torch.equal(logits(again, case[0]), logits(trainer.model, case[0]))
    trainer.save_model(tmp_path / "saved")  # over the old one


def test_the_card_says_how_to_load_adapters(tmp_path, monkeypatch):
    source, fields = CASES["gpt2-head"]
    monkeypatch.chdir(tmp_path)
    made(source, fields).to_plain().save_pretrained("FOLDER_OF_THE_PRETRAINED_MODEL")
    trainer = trained(CASES["gpt2-head"], tmp_path / "run", objective="final")
    trainer.save_model("saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "- objective: final" in card and "block-local" not in card
    names: dict = {}
    exec(card.split("```python")[1].split("```")[0], names)
    assert torch.equal(logits(names["model"], source), logits(trainer.model, source))


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


def test_a_run_resumes_as_it_was_stopped(tmp_path):
    trained(CASES["gpt2"], tmp_path, block_schedule="random", save_strategy="steps", save_steps=3)
    trainer = trainer_of(adapted(CASES["gpt2"]), GPT2, tmp_path, {"max_steps": 6, "block_schedule": "together"})
    with pytest.raises(ValueError, match="block_schedule='together' must be 'random'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize(
    "saved, message", [(False, "has no adapters, and the model has them"), (True, "holds adapters, and the model has none")]
)
def test_a_run_resumes_from_its_own_kind(saved, message, tmp_path):
    models = [made(*CASES["gpt2"]), adapted(CASES["gpt2"])]
    trained(CASES["gpt2"], tmp_path, model=models[saved], save_strategy="steps", save_steps=3)
    trainer = trainer_of(models[not saved], GPT2, tmp_path, {"max_steps": 6})
    with pytest.raises(ValueError, match=f"checkpoint-3 {message}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_job_trains_around_the_finished_adapter_of_another(tmp_path):
    first = trained(CASES["gpt2"], tmp_path / "run", train_blocks=[0]).model
    first.save_pretrained(tmp_path / "job0")
    second = lora.load_block_adapters(made(*CASES["gpt2"]), tmp_path / "job0", blocks=[0])
    lora.add_block_adapters(second, CONFIG, blocks=[1])
    assert torch.equal(logits(second, GPT2), logits(first, GPT2))
    trained(CASES["gpt2"], tmp_path / "run", model=second, train_blocks=[1])
    of_first, of_second = first.state_dict(), second.state_dict()
    assert of_first.keys() == of_second.keys()
    for name, weight in of_second.items():
        moved = ".lora_" in name and ".block_1." in name
        assert torch.equal(weight, of_first[name]) is not moved


def test_a_job_around_the_earlier_blocks_trains_its_adapter(tmp_path):
    """Nothing that blocks share asks for a gradient: it cannot be moved by two jobs."""
    model = adapted(CASES["llama"])
    before = copy.deepcopy(model.state_dict())
    trained(CASES["llama"], tmp_path, model=model, train_blocks=[1])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(".block_1." in name for name in changed)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1.0}
    trainer = trained(CASES["gpt2"], tmp_path, load_best_model_at_end=True, **saving)
    best = lora.load_block_adapters(made(*CASES["gpt2"]), trainer.state.best_model_checkpoint)
    assert same(best.state_dict(), trainer.model.state_dict())


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_peft_alone_reads_the_adapters_into_the_plain_model(name, tmp_path):
    whole = {"gpt2": None, "llama": ["norm"], "vit": ["classifier"]}[name]  # (PEFT would take every layer's norms, too)
    model = adapted(CASES[name], config=LoraConfig(r=4, lora_alpha=8, modules_to_save=whole))
    plain = made(*CASES[name]).to_plain()
    trained(CASES[name], tmp_path, model=model, learning_rate=0.1).save_model(tmp_path / "saved")
    expected, names = logits(model, CASES[name][0]), ["block_1", "block_0"]
    assert not torch.allclose(logits(plain, CASES[name][0]), expected, atol=1e-3)
    both = PeftModel.from_pretrained(plain, tmp_path / "saved" / names[0], adapter_name=names[0])
    both.load_adapter(tmp_path / "saved" / names[1], adapter_name=names[1])
    merged = both.merge_and_unload(adapter_names=names)
    torch.testing.assert_close(logits(merged, CASES[name][0]), expected, rtol=1e-4, atol=1e-5)


def test_merged_adapters_give_the_same_logits(case, tmp_path):
    model = trained(case, tmp_path, learning_rate=0.1).model
    expected = logits(model, case[0])
    names = made(*case).state_dict().keys()
    merged = lora.merge_and_unload(model)
    assert merged.state_dict().keys() == names
    assert not torch.allclose(expected, logits(made(*case), case[0]), atol=1e-3)
    torch.testing.assert_close(logits(merged, case[0]), expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in merged.parameters())


@pytest.mark.usefixtures("late_copies")
def test_adapters_come_and_go_while_blocks_wait_in_host_memory(tmp_path):
    trained(CASES["gpt2"], tmp_path, learning_rate=0.1).save_model()
    expected = logits(lora.load_block_adapters(made(*CASES["gpt2"]), tmp_path), GPT2)
    model = made(*CASES["gpt2"])
    model.offload_blocks("cpu")
    assert not torch.allclose(logits(model, GPT2), expected, atol=1e-3)  # (which leaves a block on the device)
    lora.load_block_adapters(model, tmp_path)
    assert torch.equal(logits(model, GPT2), expected)
    merged = lora.merge_and_unload(model)
    torch.testing.assert_close(logits(merged, GPT2), expected, rtol=1e-4, atol=1e-5)
    assert merged.offload is not None


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_a_plain_model_is_left(name, tmp_path):
    model = trained(CASES[name], tmp_path, learning_rate=0.1).model
    with pytest.raises(ValueError, match=r"adapters \(block_0, block_1\): merge_and_unload first"):
        model.to_plain()
    expected = logits(model, CASES[name][0])
    torch.testing.assert_close(logits(lora.merge_and_unload(model).to_plain(), CASES[name][0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("objective", ["local", "final"])
def test_a_new_head_moves_in_the_last_block_s_steps(block, objective, tmp_path):
    model = adapted(CASES["vit"], config=LoraConfig(r=4, modules_to_save=["classifier"]))
    head = model.backbone.classifier.weight.clone()
    trained(CASES["vit"], tmp_path, model=model, train_blocks=[block], objective=objective)
    assert torch.equal(model.backbone.classifier.weight, head) is (block == 0)


def test_a_new_head_has_no_gradient_in_other_blocks_steps(tmp_path):
    """Though they are read out by it."""
    model = adapted(CASES["vit"], config=LoraConfig(r=4, modules_to_save=["classifier"]))
    trainer, seen = trainer_of(model, VIT, tmp_path, {"max_steps": 4, "block_schedule": "random"}), []
    step = trainer.training_step

    def watched(*args, **kwargs):
        loss = step(*args, **kwargs)
        owners = {model.block_of_parameter(name) for name, p in model.named_parameters() if p.grad is not None}
        seen.append((trainer.active_block, owners))
        return loss

    trainer.training_step = watched
    trainer.train()
    assert {block for block, _ in seen} == {0, 1}
    assert all(owners == {block} for block, owners in seen)
    head = model.backbone.classifier.modules_to_save["block_1"].weight
    assert head.requires_grad


def test_a_new_head_stays_on_the_device(tmp_path):
    model = adapted(CASES["vit"], config=LoraConfig(r=4, modules_to_save=["classifier"]))
    trainer_of(model, VIT, tmp_path, {"offload_inactive_blocks": "cpu"})
    away, _ = model.offload.away()
    head = set(model.backbone.classifier.modules_to_save["block_1"].parameters())
    assert not away & head and set(model.block_parameters(1)) - away == head


def test_a_new_head_is_saved_with_the_last_block_s_adapter(tmp_path):
    model = adapted(CASES["vit"], config=LoraConfig(r=4, modules_to_save=["classifier"]))
    head = model.backbone.classifier.weight.clone()
    trainer = trained(CASES["vit"], tmp_path / "run", model=model, objective="final")
    assert not torch.equal(model.backbone.classifier.weight, head)
    trainer.save_model(tmp_path / "saved")
    again = lora.load_block_adapters(made(VIT, CARRIED), tmp_path / "saved")
    assert same(again.state_dict(), model.state_dict())
    expected = logits(model, VIT)
    torch.testing.assert_close(logits(lora.merge_and_unload(model), VIT), expected, rtol=1e-4, atol=1e-5)


def test_all_linear_parts_are_those_of_a_block_s_layers():
    model = adapted(CASES["gpt2"], config=LoraConfig(r=4, target_modules="all-linear"))
    for name in (name for name, _ in model.named_parameters() if "lora_" in name):
        assert f".block_{model.block_of_parameter(name)}." in name and ".h." in name
    assert len(model.peft_config["block_0"].target_modules) == 4


def refused(**options):
    lora.add_block_adapters(made(GPT2, CARRIED), LoraConfig(**options))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lora.add_block_adapters(adapted(CASES["gpt2"]), CONFIG), "the model has adapters already: block_0"),
        (
            lambda: lora.add_block_adapters(made(GPT2, CARRIED), LoraConfig(layers_to_transform=[0])),
            r"layers_to_transform=\[0\] must be None",
        ),
        *(
            (partial(refused, **options), message)
            for options, message in (
                ({"target_modules": ".*c_attn"}, r"target_modules='\.\*c_attn' must be 'all-linear' or a list of a layer's"),
                ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] must be None"),
                ({"bias": "all"}, "bias='all' must be 'none'"),
                ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' must be True, False"),
            )
        ),
        (lambda: lora.merge_and_unload(made(GPT2, CARRIED)), "the model has no adapters"),
        (lambda: lora.add_block_adapters(made(GPT2, {}), CONFIG), "denoiser='joint' has no adapters for task 'text-gen"),
        (
            lambda: lora.add_block_adapters(made(GPT2, CARRIED, [0]), CONFIG, blocks=[1]),
            r"blocks=\[1\] must be loaded, and \[1\] are not: \[0\] are",
        ),
        (
            lambda: lora.add_block_adapters(made(GPT2, CARRIED), LoraConfig(modules_to_save=["ln_1"])),
            "modules_to_save: 'ln_1' is in every layer",
        ),
        (
            lambda: lora.add_block_adapters(made(GPT2, CARRIED), LoraConfig(target_modules=["q_proj", "c_fc"])),
            "target_modules: q_proj must be of a layer's attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj",
        ),
        (
            lambda: lora.add_block_adapters(made(GPT2, CARRIED), LoraConfig(modules_to_save=["classifier"])),
            "modules_to_save: the model has no 'classifier'",
        ),
        (
            lambda: lora.add_block_adapters(made(GPT2, CARRIED), LoraConfig(modules_to_save=["lm_head"])),
            "modules_to_save: 'lm_head' is tied to another weight",
        ),
        (
            lambda: lora.add_block_adapters(made(LLAMA, CARRIED), LoraConfig(lora_bias=True)),
            "lora_bias=True must be False: self_attn.q_proj, self_attn.v_proj have no bias",
        ),
        (
            lambda: lora.add_block_adapters(made(GPT2, CARRIED), LoraConfig(rank_pattern={"^transformer.h.1": 2})),
            r"rank_pattern: '\^transformer.h.1' must not begin with '\^'",
        ),
        (
            lambda: lora.add_block_adapters(made(GPT2, CARRIED), LoraConfig(exclude_modules="transformer.*")),
            r"exclude_modules='transformer.\*' must be a list of names",
        ),
    ],
    ids=[
        "twice", "layers", "a pattern", "tokens", "biases", "other weights", "none", "joint", "not loaded", "part of a layer",
        "no such target", "no such module", "tied", "no bias", "anchored", "a pattern of what is not",
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_adapter_that_does_not_fit_is_named(tmp_path):
    adapted(CASES["gpt2"]).save_pretrained(tmp_path)
    file = tmp_path / "block_1" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    for wrong in ({**weights, name: torch.zeros(3, 3)}, {k: v for k, v in weights.items() if k != name}):
        save_file(wrong, file)
        with pytest.raises(ValueError, match="block_1/adapter_model.safetensors does not fit the model"):
            lora.load_block_adapters(made(GPT2, CARRIED), tmp_path)


def test_adapters_of_other_blocks_are_refused(tmp_path):
    four = lora.add_block_adapters(made(GPT2, {**CARRIED, "num_blocks": 4}), CONFIG)
    four.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"block_0 is of the layers \[0\], and block 0 of num_blocks=2 has \[0, 1\]"):
        lora.load_block_adapters(made(GPT2, CARRIED), tmp_path)


def test_a_missing_adapter_is_named(tmp_path):
    with pytest.raises(OSError, match="block_0/adapter_model.safetensors is missing"):
        lora.load_block_adapters(made(GPT2, CARRIED), tmp_path)
