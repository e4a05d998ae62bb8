"""A DiffusionBlocks model whose layers are streamed trains, answers and saves as it does where all of it is on the device."""

from __future__ import annotations

import pytest
import torch
from conftest import randomized
from families import CASES, grid, reloaded, same, seeded, trainer_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2LMHeadModel

import hf_diffusionblocks as db

#: Blocks of their own: in one architecture of text, and where the paper's images are of it.
everywhere = pytest.mark.parametrize(
    **grid(lambda case: case.trained and (not case.is_own or case.config.model_type in ("llama", "dit-transformer-2d")))
)
CARRIED = CASES["gpt2, recommended"]
#: Operations that make a copy of a weight, or look at where it is.
COPIES = {"aten::_to_copy", "aten::clone", "aten::copy_"}


class ComputedOnHost(TorchDispatchMode):
    """Notes what computes with weights of units in host memory."""

    def __init__(self, stream: db.LayerStream):
        super().__init__()
        self._storages = {parameter.untyped_storage().data_ptr() for parameter in stream.host_parameters}
        self.found: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in function._schema.returns)
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if not is_view and name not in COPIES and any(self._is_weight(each) for each in tensors):
            self.found.add(name)
        return result

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in self._storages


@everywhere
def test_it_trains_to_the_same_bit(case, tmp_path):
    """Dropout on, in several formulations of every family."""
    case, ends, losses = case.with_dropout(0.1), [], []
    for streamed in (False, True):
        model = case.model()
        stream = db.stream_layers(model, "cpu") if streamed else None
        trainer = trainer_of(model, case, tmp_path / str(streamed), gradient_accumulation_steps=2, max_grad_norm=0.5)
        trainer.train()
        ends.append(model.state_dict())
        losses.append(trainer.evaluate()["eval_loss"])
    assert same(*ends) and losses[0] == losses[1]
    assert not same(ends[0], case.model().state_dict())
    moving = sum(parameter.nbytes for parameter in stream.host_parameters)
    assert moving > 0.8 * sum(parameter.nbytes for parameter in model.parameters())
    assert stream.copied["to_device"] > moving and stream.copied["to_host"] > 0


@everywhere
def test_nothing_computes_with_weights_that_are_in_host_memory(case):
    """In training, in evaluation, and where a walk or a bound calls blocks by itself."""
    model = case.model()
    stream = db.stream_layers(model, "cpu")
    rows = case.rows()
    labels = {} if "labels" not in rows else {"labels": rows["labels"]}
    with ComputedOnHost(stream) as watch:
        for block in [*case.blocks] * 2:
            model.train()(**rows, block_index=block, generator=seeded()).loss.backward()
        with torch.no_grad():
            model.eval()(**rows)
            if hasattr(model, "predict"):
                model.predict(**case.inputs() if case.has_known_targets else {"num_images": 2, "num_inference_steps": 3})
            if hasattr(model, "block_logits"):
                model.block_logits(**case.inputs())
            if hasattr(model, "likelihood_terms") and labels:
                model.likelihood_terms(rows, 2, seeded())
            if hasattr(model, "infill"):
                model.generate(rows["input_ids"][:, :4], max_new_tokens=3)
            elif hasattr(model, "generate") and model.can_generate():
                model.generate(rows["input_ids"][:, :4], max_new_tokens=3, do_sample=False)
    assert watch.found == set()
    assert stream.peak_units <= 3  # (two, and what reads out, where that is of two parts)


@pytest.mark.parametrize("name", ["dit", "llama, classes, paper"])
def test_several_threads_use_it(name, in_threads):
    """Of models that call their layers part by part."""
    case, model = CASES[name], CASES[name].model().eval()
    rows = [
        {"class_labels": [k]} if name == "dit" else {key: of[k : k + 1] for key, of in case.inputs().items()} for k in (0, 1)
    ]

    def use(row: dict) -> list:
        found = model.predict(**row, num_inference_steps=5)
        return (found.images if name == "dit" else found.logits).tolist()

    expected = [use(row) for row in rows] * 4
    db.stream_layers(model, "cpu")
    assert in_threads(use, rows * 4) == expected


def test_it_is_saved_and_made_plain_from_host_memory(tmp_path):
    model, rows = CARRIED.model().eval(), CARRIED.inputs()
    expected = model(**rows).logits
    with db.stream_layers(model, "cpu"):
        assert torch.equal(model(**rows).logits, expected)
        model.save_pretrained(tmp_path)
        plain = model.to_plain()
        assert type(plain) is GPT2LMHeadModel and torch.equal(plain.eval()(**rows).logits, expected)
    assert torch.equal(reloaded(model, tmp_path)(**rows).logits, expected)
    assert torch.equal(model(**rows).logits, expected)


@pytest.mark.parametrize("schedule", ["random", "together"])
def test_a_streamed_run_resumes_bit_equal(schedule, tmp_path):
    arguments = {"max_steps": 6, "block_schedule": schedule, "save_strategy": "steps", "save_steps": 4, "ema_decay": 0.9}
    models = [CARRIED.model(), randomized(CARRIED.model())]
    for model, resume in zip(models, (None, str(tmp_path / "checkpoint-4"))):
        db.stream_layers(model, "cpu")
        trainer = trainer_of(model, CARRIED, tmp_path, **arguments)
        trainer.train(resume_from_checkpoint=resume)
    assert same(*(model.state_dict() for model in models))
