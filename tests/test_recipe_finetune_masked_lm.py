"""The recipe that tunes masked text on answers: what is masked and learned, from which models."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from recipe_runs import TEMPLATE, files, masked, model, prepared
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_diffusionblocks.backbones.stock_run import base_of
from hf_diffusionblocks.diffusion.objectives import IGNORED
from hf_diffusionblocks.recipes import finetune_masked_lm

pytestmark = pytest.mark.usefixtures("own_cache")
TRAINING = [
    "--updates_per_block", "3", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--max_length", "96",
    "--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no",
]  # fmt: skip
NAME, TEXT = next(iter(topics.items()))
ANSWER = TEXT.strip()[:10]  #: of the first row
END = "<|endoftext|>"


@pytest.fixture
def trainers(monkeypatch) -> list:
    return prepared(finetune_masked_lm, monkeypatch)


def tune(output_dir: Path, *options: str) -> dict[str, float]:
    return finetune_masked_lm.main([*TRAINING, *options, "--output_dir", str(output_dir)])


def spelled(tokenizer, row: dict, learned: bool) -> str:
    """The tokens that have a loss, or those that have none."""
    chosen = [token for token, label in zip(row["input_ids"], row["labels"]) if (label != IGNORED) == learned]
    return tokenizer.decode(chosen)


def test_each_answer_of_a_chat_is_an_example_after_all_that_was_said_before(tmp_path, files, model, trainers, capsys):
    tune(tmp_path, "--model", model, "--data", files["chats"])
    tokenizer, (first, second) = trainers[0].processing_class, trainers[0].train_dataset.select([0, 1])
    asked = f"<|user|>{NAME}<|end|><|assistant|>"
    assert spelled(tokenizer, first, learned=False) == asked
    assert spelled(tokenizer, first, learned=True) == f"{ANSWER[:8]}<|end|>{END}"
    asked += f"{ANSWER[:8]}<|end|><|user|>More<|end|><|assistant|>"
    assert spelled(tokenizer, second, learned=False) == asked
    assert spelled(tokenizer, second, learned=True) == f"{ANSWER[8:]}<|end|>{END}"
    assert f"\n{asked} -> " in capsys.readouterr().out  # a sample, when all is done


def test_prompts_with_completions_and_shorter_answers_go_on_with_ends(tmp_path, files, model, trainers):
    tune(tmp_path, "--model", model, "--data", files["prompts"])
    tokenizer, rows = trainers[0].processing_class, trainers[0].train_dataset
    assert spelled(tokenizer, rows[0], learned=False) == f"{NAME}: "
    assert spelled(tokenizer, rows[0], learned=True) == f"{ANSWER}{END}"
    short, *_, long = sorted(rows, key=lambda row: len(row["input_ids"]))
    size, batch = len(short["input_ids"]), trainers[0].data_collator([short, long])
    assert batch["input_ids"].shape == (2, len(long["input_ids"])) and size < len(long["input_ids"])
    assert (batch["input_ids"][0, size:] == tokenizer.eos_token_id).all()
    assert (batch["labels"][0, size:] == tokenizer.eos_token_id).all()


def test_prompts_are_never_masked_and_answers_are(tmp_path, files, model, trainers):
    """In all that the layers are shown; what is not masked is as it was."""
    shown = []
    tune(tmp_path, "--model", model, "--data", files["prompts"], "--num_blocks", "1", "--samples", "0")
    trained, rows = trainers[0].model.train(), trainers[0].train_dataset.select(range(4))
    batch = trainers[0].data_collator(list(rows))
    base = base_of(trained.backbone, trained.layers_path)
    hook = base.register_forward_pre_hook(lambda _, args, given: shown.append(given["input_ids"]), with_kwargs=True)
    for draw in range(20):
        trained(**batch, block_index=0, generator=torch.Generator().manual_seed(draw))
    hook.remove()
    shown = torch.stack([each for each in shown if each.shape == batch["input_ids"].shape])  # (the head is shown rows)
    masked, prompts = shown == trained.mask_token_id, batch["labels"] == IGNORED
    assert len(shown) == 20 and not masked[:, prompts].any() and masked[:, ~prompts].any(0).all()
    assert ((shown == batch["input_ids"]) | masked).all()


def test_the_end_is_learned_also_where_it_is_the_padding(tmp_path, files, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    tune(tmp_path, "--model", model, "--data", files["prompts"], "--weight_decay", "0")
    before = AutoModelForMaskedLM.from_pretrained(tmp_path).get_input_embeddings().weight
    tune(tmp_path / "on", "--model", str(tmp_path), "--data", files["prompts"], "--weight_decay", "0")
    after = AutoModelForMaskedLM.from_pretrained(tmp_path / "on").get_input_embeddings().weight
    assert not torch.equal(before[tokenizer.eos_token_id], after[tokenizer.eos_token_id])


def test_what_is_saved_loads_and_answers_prompts_of_several_lengths(tmp_path, files, masked):
    metrics = tune(tmp_path, "--model", masked, "--data", files["chats"], "--eval_data", files["chats"])
    made, tokenizer = AutoModelForMaskedLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert made.num_blocks == 2 and metrics["eval_loss"] > 0
    assert tokenizer.mask_token_id == made.mask_token_id and tokenizer.chat_template == TEMPLATE
    prompts = tokenizer(["A", "A longer prompt"], padding=True, padding_side="left", return_tensors="pt")
    answers = made.generate(
        prompts.input_ids, prompts.attention_mask, max_new_tokens=8, temperature=0, eos_token_id=tokenizer.eos_token_id,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert answers.shape == (2, prompts.input_ids.shape[1] + 8) and (answers != made.mask_token_id).all()


def test_what_is_too_long_is_left_out_and_said(tmp_path, files, model, trainers, caplog):
    with caplog.at_level("WARNING", "hf_diffusionblocks"):
        tune(tmp_path, "--model", model, "--data", files["prompts"], "--max_length", "32")
    left = len(trainers[0].train_dataset)
    assert 0 < left < 24 and f"{24 - left} of 24 answers of data are left out: longer than max_length=32" in caplog.text


def test_empty_prompts_are_trained_and_not_answered(tmp_path, files, model, capsys):
    """And the model is saved."""
    tune(tmp_path, "--model", model, "--data", files["unasked"])
    assert " -> " not in capsys.readouterr().out and AutoModelForMaskedLM.from_pretrained(tmp_path)
