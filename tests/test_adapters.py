"""Adapters of PEFT: in what is converted, around a model of blocks, and in it."""

from __future__ import annotations


import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from process_scenarios import GPT2
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_diffusionblocks as db

LORA = {"target_modules": ["c_attn"], "init_lora_weights": False}
IDS = torch.arange(8)[None]
MERGE_FIRST = r"has adapters \(PEFT\): merge them into their model first, by merge_and_unload\(\) of the PeftModel"


def inside(model: PreTrainedModel, config=None) -> PreTrainedModel:
    """The model inside a PeftModel, which has its adapters."""
    get_peft_model(model, config or LoraConfig(**LORA))
    return model


def added(model: PreTrainedModel) -> PreTrainedModel:
    model.add_adapter(LoraConfig(**LORA))
    return model


HOLDERS = {
    "PeftModel": lambda model: get_peft_model(model, LoraConfig(**LORA)),
    "inside": inside,
    "of another kind": lambda model: inside(model, IA3Config(target_modules=["c_attn"], feedforward_modules=[])),
    "a copy of a module": lambda model: inside(model, LoraConfig(target_modules=["c_proj"], modules_to_save=["ln_f"])),
    "add_adapter": added,
}


@pytest.fixture
def plain():
    return AutoModelForCausalLM.from_config(GPT2).eval()


@pytest.fixture
def blocks(plain, tmp_path):
    """A folder of a model of blocks."""
    db.convert(plain, 2).save_pretrained(tmp_path / "blocks")
    return tmp_path / "blocks"


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_source_with_adapters_is_refused(holder, plain):
    source = HOLDERS[holder](plain)
    with pytest.raises(ValueError, match=f"^source={type(source).__name__} {MERGE_FIRST}"):
        db.convert(source, 2)


@pytest.mark.parametrize("read", [db.convert, db.DiffusionBlocksForCausalLM.from_pretrained])
def test_a_folder_of_adapters_is_called_that(read, plain, tmp_path):
    get_peft_model(plain, LoraConfig(**LORA)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} has adapters alone: .*PeftModel.from_pretrained\(model, folder\)"):
        read(tmp_path)


@torch.no_grad()
def test_merged_adapters_are_converted(plain):
    merged = get_peft_model(plain, LoraConfig(**LORA)).merge_and_unload()
    assert torch.equal(db.convert(merged, 2)(IDS).logits, merged(IDS).logits)


@pytest.mark.parametrize("holder", ["PeftModel", "add_adapter"])
def test_the_trainer_refuses_adapters(holder, blocks, tmp_path):
    model = HOLDERS[holder](AutoModelForCausalLM.from_pretrained(blocks))
    args = db.DiffusionBlocksTrainingArguments(tmp_path, max_steps=1, report_to="none")
    with pytest.raises(ValueError, match=f"^model={type(model).__name__} has adapters .*stream_layers.. the plain model"):
        db.DiffusionBlocksTrainer(model=model, args=args)


@torch.no_grad()
def test_adapters_around_blocks_are_saved_loaded_and_merged(blocks, tmp_path):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(blocks), LoraConfig(**LORA)).eval()
    expected = adapted(IDS).logits
    adapted.save_pretrained(tmp_path / "adapters")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(blocks), tmp_path / "adapters").eval()
    assert torch.equal(again(IDS).logits, expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "adapters")(IDS).logits, expected)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for model in (merged, AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), merged.to_plain()):
        torch.testing.assert_close(model(IDS).logits, expected)


@pytest.mark.parametrize("preset", ["recommended", "paper"])
@torch.no_grad()
def test_a_merged_model_whose_blocks_tie_their_own_ends_is_loaded(preset, plain, tmp_path):
    """Blocks are alike in all of their linear layers, but for what modulates, and heads."""
    model = db.convert(plain, 2, preset=preset, shared="per_block").eval()
    lora = LoraConfig(target_modules="all-linear", exclude_modules=".*lm_head", init_lora_weights=False)
    merged = get_peft_model(model, lora).merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, merged(IDS).logits) and again.config.tie_word_embeddings
    assert torch.equal(again.block_logits(IDS), merged.block_logits(IDS))


def test_new_rows_of_the_vocabulary_are_saved_with_adapters(blocks, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(blocks)
    model.resize_token_embeddings(GPT2.vocab_size + 2)
    get_peft_model(model, LoraConfig(**LORA)).save_pretrained(tmp_path / "adapters")
    with safe_open(tmp_path / "adapters" / "adapter_model.safetensors", "pt") as weights:
        assert any(name.endswith("wte.weight") for name in weights.keys())


@torch.no_grad()
def test_added_adapters_are_saved_alone(blocks, plain, tmp_path):
    """The files of the stock model, which leave the weights that lie there as they are."""
    model = added(AutoModelForCausalLM.from_pretrained(blocks)).eval()
    model.save_pretrained(tmp_path / "adapters")
    added(plain).save_pretrained(tmp_path / "stock")
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {path.name for path in (tmp_path / "stock").iterdir()}
    again = AutoModelForCausalLM.from_pretrained(blocks)
    again.load_adapter(tmp_path / "adapters")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("way", ["save", "to_plain"])
def test_a_model_inside_a_peft_model_is_not_saved_under_its_names(way, blocks, tmp_path):
    model = inside(AutoModelForCausalLM.from_pretrained(blocks))
    with pytest.raises(ValueError, match=MERGE_FIRST):
        model.to_plain() if way == "to_plain" else model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_copied_embedding_has_its_gradient(blocks):
    """That of `modules_to_save`, from the block that owns it."""
    model = inside(AutoModelForCausalLM.from_pretrained(blocks), LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"]))
    model.train()(input_ids=IDS, labels=IDS, block_index=0).loss.backward()
    asking = {name for name, weight in model.named_parameters() if weight.requires_grad and "wte" in name}
    assert asking and all(model.get_parameter(name).grad.any() for name in asking)
