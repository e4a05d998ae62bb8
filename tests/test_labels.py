"""Labels as users have them: none that counts, of padding, shares of classes, several classes, by another name."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from families import CASES, grid, moved, trainer_of
from process_scenarios import VIT
from torch.nn import functional as F

import hf_diffusionblocks as db

TEXT, IMAGES = CASES["gpt2, recommended"], CASES["vit, recommended"]


# ---- nothing to learn


@pytest.mark.parametrize(**grid(lambda case: case.trained and "labels" in case.rows()))
def test_a_step_without_labels_moves_nothing(case, tmp_path):
    """All are -100, where truncation has cut every answer: no weight becomes NaN, and the log has a loss of 0."""
    model = case.model()
    before = copy.deepcopy(dict(model.named_parameters()))
    trainer = trainer_of(model, case, tmp_path)
    trainer.args.weight_decay = 0.0
    trainer.train_dataset = [{**row, "labels": torch.full_like(torch.tensor(row["labels"]), -100)} for row in case.dataset()]
    trainer.train()
    assert not moved(model, before)
    assert trainer.state.log_history[-1]["train_loss"] == 0


@pytest.mark.parametrize(**grid(lambda case: case.trained and "labels" in case.rows()))
def test_an_evaluation_without_labels_has_no_loss(case, tmp_path):
    """Not one of 0, which every later one would have to beat: nothing is measured, as in the plain model."""
    trainer = trainer_of(case.model(), case, tmp_path)
    rows = [{**row, "labels": torch.full_like(torch.tensor(row["labels"]), -100)} for row in case.dataset()]
    assert math.isnan(trainer.evaluate(rows)["eval_loss"])


@pytest.mark.parametrize("case", [CASES["bert"], CASES["llama, masked"]], ids=["bert", "llama"])
def test_padding_of_masked_text_is_not_counted_whatever_it_is_labelled(case, tmp_path):
    rows = case.rows(16)
    rows["attention_mask"] = torch.ones_like(rows["input_ids"])
    rows["attention_mask"][:, 6:] = 0
    found = []
    for of_padding in (-100, 3):
        labels = rows["labels"].masked_fill(rows["attention_mask"] == 0, of_padding)
        trainer = trainer_of(case.model(), case, tmp_path, updates_per_block=1)
        data = Dataset.from_dict({name: tensor.tolist() for name, tensor in {**rows, "labels": labels}.items()})
        trainer.train_dataset = trainer.eval_dataset = data
        found.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_shares_of_a_class_train_as_the_class_does(preset, tmp_path):
    """The Trainer counts every share, and an image counts once."""
    case, found = CASES[f"vit, {preset}"], []
    rows = case.rows(16)
    for labels in (rows["labels"], F.one_hot(rows["labels"], 5).float(), rows["labels"][:, None]):
        trainer = trainer_of(case.model(), case, tmp_path, updates_per_block=1, gradient_accumulation_steps=2, optim="sgd")
        trainer.train_dataset = trainer.eval_dataset = [
            {"pixel_values": image, "labels": label} for image, label in zip(rows["pixel_values"], labels)
        ]
        found.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("name", ["label", "labels"])
def test_classes_of_images_to_generate_may_be_called_labels(name, remove, tmp_path):
    case, found = CASES["dit"], []
    for called in ("class_labels", name):
        trainer = trainer_of(case.model(), case, tmp_path, updates_per_block=1, remove_unused_columns=remove)
        trainer.train_dataset = trainer.eval_dataset = case.dataset().rename_columns({"class_labels": called})
        found.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["gpt2, paper", "recurrent"])
def test_texts_of_one_token_are_refused_by_name(name):
    model = CASES[name].model()
    with pytest.raises(ValueError, match="labels of one token a text must be of at least 2"):
        model(torch.ones(2, 1, dtype=torch.long), labels=torch.ones(2, 1, dtype=torch.long), block_index=0)


def test_what_a_block_cannot_take_of_a_batch_is_named():
    ids = torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="shift_labels must not be given with block_index.*: leave it out of the batch"):
        TEXT.model()(ids, labels=ids, shift_labels=ids, block_index=0)
    with pytest.raises(ValueError, match="shift_labels must not be given with block_index.*: leave it out of the batch"):
        IMAGES.model()(**IMAGES.rows(), shift_labels=ids, block_index=0)


@pytest.mark.parametrize("labels", [torch.ones(2, 5), torch.ones(2), F.one_hot(torch.tensor([1, 2]), 5)], ids=str)
def test_several_classes_of_an_image_are_refused(labels):
    model = db.convert(VIT, 2)
    with pytest.raises(
        ValueError, match="labels of shape .* must be class numbers, .*or shares of the classes that add up to 1"
    ):
        model(torch.ones(2, 1, 8, 8), labels=labels, block_index=0)


def test_another_kind_of_problem_set_on_the_config_is_refused_as_in_convert(tmp_path):
    model = IMAGES.model()
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="problem_type='multi_label_classification' with num_labels=5 must be"):
        trainer_of(model, IMAGES, tmp_path).train()


@pytest.mark.parametrize("count, tokens", [("all", 64), ("non_padding", 64)])
def test_tokens_that_are_seen_are_counted_as_by_the_stock_trainer(count, tokens, tmp_path):
    """By masks that hide nothing, too: a pad token may be part of the text."""
    trainer = trainer_of(TEXT.model(), TEXT, tmp_path, max_steps=2, include_num_input_tokens_seen=count)
    row = {"input_ids": [3] * 8, "labels": [3] * 8, "attention_mask": [1] * 8}
    trainer.train_dataset, trainer.processing_class = [row] * 8, SimpleNamespace(pad_token_id=3)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == tokens
