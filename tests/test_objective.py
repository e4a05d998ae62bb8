"""objective='final': a block is trained on the whole model's loss, through the later blocks, which stay."""

from __future__ import annotations

import copy

import pytest
import torch
from process_scenarios import GPT2, LLAMA, VIT, made, rows, trainer_of
from torch.nn import functional as F

from hf_diffusionblocks.memory.ledger import StepMemory
from hf_diffusionblocks.memory.activations import SavedActivations

RECOMMENDED = {"num_blocks": 4, "denoiser": "factorized", "context": "carried", "prior_fraction": 1.0}
SOURCES = {"gpt2": GPT2, "llama": LLAMA, "vit": VIT}


@pytest.fixture(params=SOURCES)
def source(request):
    return SOURCES[request.param]


def batch_of(source) -> dict[str, torch.Tensor]:
    return rows(source)[:4]


def plain_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the stock model inside, end to end."""
    logits = model.backbone(**{name: value for name, value in batch.items() if name != "labels"}).logits
    labels = batch["labels"]
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("block", range(4))
def test_gradients_are_those_of_end_to_end_training(source, block):
    """Of the active block. (Tied embeddings and the head differ: the input side is without gradient.)"""
    model, batch = made(source, RECOMMENDED).train(), batch_of(source)
    expected = torch.autograd.grad(plain_loss(model, batch), model.block_parameters(block))
    nothing_seen = torch.full((4,), 1e9)
    loss = model(**batch, block_index=block, loss_block=3, sigma=nothing_seen).loss
    torch.testing.assert_close(loss, plain_loss(model, batch))
    for actual, wanted in zip(torch.autograd.grad(loss, model.block_parameters(block)), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-7)


def test_only_the_active_block_and_shared_parameters_have_gradients(source, tmp_path):
    model = made(source, RECOMMENDED)
    trainer = trainer_of(model, source, tmp_path, {"max_steps": 8, "objective": "final", "weight_decay": 0.1})
    before, moved = copy.deepcopy(model.state_dict()), []
    step = trainer.training_step

    def watched(*args, **kwargs):
        loss = step(*args, **kwargs)
        owners = {model.block_of_parameter(name) for name, p in model.named_parameters() if p.grad is not None}
        moved.append(owners)
        assert owners == {None, trainer.active_block}
        return loss

    trainer.training_step = watched
    trainer.train()
    assert {owner for owners in moved for owner in owners} == {None, 0, 1, 2, 3}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if p.grad is not None)


def activations(model, loss) -> tuple[int, int]:
    """Bytes that a forward pass keeps, and the most that are kept until the backward pass has ended."""
    with SavedActivations(model.parameters()) as saved:
        kept = loss()
    del kept
    with StepMemory(model, torch.optim.AdamW(model.parameters())) as memory:
        loss().backward()
    return saved.bytes, memory.ledger().parts.activations


def test_later_blocks_keep_what_enters_them_and_one_at_a_time_its_activations(source):
    model, batch = made(source, RECOMMENDED).train(), batch_of(source)
    own, own_most = activations(model, lambda: model(**batch, block_index=0).loss)
    kept, most = activations(model, lambda: model(**batch, block_index=0, loss_block=3).loss)
    entering = entering_bytes(model, batch)
    assert kept == own + 3 * entering
    assert most <= 2 * own_most + 3 * entering
    assert activations(model, lambda: plain_loss(model, batch))[1] > 3 * own_most  # where all layers keep theirs


def test_and_one_layer_at_a_time_if_layers_are_checkpointed(source):
    model, batch = made(source, {**RECOMMENDED, "num_blocks": 2}).train(), batch_of(source)
    model.activation_checkpointing_enable()
    _, own_most = activations(model, lambda: model(**batch, block_index=0).loss)
    _, most = activations(model, lambda: model(**batch, block_index=0, loss_block=1).loss)
    assert most == own_most + 2 * entering_bytes(model, batch)  # of the later block and its second layer


def entering_bytes(model, batch) -> int:
    """Of the hidden states that enter a block."""
    return model.entering(model.blocks[1], model.clean_input(batch)).nbytes


@pytest.mark.parametrize("block, loss_block", [(1, 0), (0, 4)])
def test_a_loss_is_read_from_this_block_or_a_later_one(block, loss_block):
    model = made(GPT2, RECOMMENDED)
    with pytest.raises(ValueError, match=f"loss_block={loss_block} with block_index={block} must be this or a later block of 4"):
        model(**batch_of(GPT2), block_index=block, loss_block=loss_block)


def test_it_lowers_the_loss_of_the_whole_model(source, tmp_path):
    model = made(source, RECOMMENDED)
    trainer = trainer_of(
        model, source, tmp_path, {"max_steps": 40, "objective": "final", "learning_rate": 3e-3}, batch=16
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.05


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_that_of_the_active_block_alone(checkpointing):
    source = copy.deepcopy(GPT2)
    source.resid_pdrop = 0.5
    model, batch = made(source, RECOMMENDED).train(), batch_of(GPT2)
    if checkpointing:
        model.activation_checkpointing_enable()

    def spread(**kwargs) -> float:
        hidden = {model(**batch, **kwargs).loss.item() for _ in range(5)}
        return max(hidden) - min(hidden)

    assert spread(block_index=0, loss_block=3) > 0
    with torch.no_grad():
        for module in model.backbone.transformer.h[0].modules():
            module.p = 0.0  # dropout of block 0 off: nothing random is left
    assert spread(block_index=0, loss_block=3) == 0
    # So it is where later blocks run again, in the backward pass: the gradient is that of a model without dropout.
    gradients = []
    for dropout in (0.5, 0.0):
        for layer in (1, 2, 3):
            for module in model.backbone.transformer.h[layer].modules():
                module.p = dropout
        model(**batch, block_index=0, loss_block=3, sigma=torch.full((4,), 1e9)).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.block_parameters(0)])
        model.zero_grad()
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(
    "fields, arguments, resident, message",
    [
        ({}, {}, None, r"objective='final' needs .*; this model is joint, independent"),
        ({"denoiser": "factorized"}, {}, None, "objective='final' needs denoiser='factorized' and context='carried'"),
        (
            {"denoiser": "factorized", "context": "carried"}, {"train_blocks": [0], "train_shared": False}, [0],
            r"objective='final' with train_blocks=\[0\] needs the later blocks \[1\]",
        ),
    ],
)  # fmt: skip
def test_what_it_needs_is_said(fields, arguments, resident, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(made(GPT2, fields, resident), GPT2, tmp_path, {"objective": "final", **arguments})
