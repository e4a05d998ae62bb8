"""What every family does in every formulation: the library's, and one that only the tests have, to show what a new one has
to bring (its estimate is a point, and its stock model is no `PreTrainedModel`).

What it takes training to see is in test_families_training.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import randomized
from families import CASES, RESNET, SWIN, estimate_of, grid, grid_of_blocks, labelled, reloaded, same, seeded, watching
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

import hf_diffusionblocks as db
from hf_diffusionblocks.tasks import TASKS

everywhere = pytest.mark.parametrize(**grid())
with_known_targets = pytest.mark.parametrize(**grid(lambda case: case.has_known_targets))
with_noisy_targets = pytest.mark.parametrize(**grid(lambda case: case.has_known_targets and not case.is_local))
of_each_block = pytest.mark.parametrize(**grid_of_blocks())
of_each_block_with_noisy_targets = pytest.mark.parametrize(
    **grid_of_blocks(lambda case: case.has_known_targets and not case.is_local)
)
of_each_block_with_known_targets = pytest.mark.parametrize(**grid_of_blocks(lambda case: case.has_known_targets))


# ---- the cut


@everywhere
def test_parameters_of_blocks_and_shared_ones_are_disjoint_and_complete(case):
    model = case.model()
    parts = [model.shared_parameters(), *(model.block_parameters(k) for k in case.blocks)]
    found = [id(parameter) for part in parts for parameter in part]
    assert sorted(found) == sorted(map(id, model.parameters())) and all(parts[1:])
    assert bool(parts[0]) is not case.is_own


@of_each_block
def test_every_parameter_of_the_active_block_and_no_other_has_a_gradient(case, block_index):
    model = case.model().train()
    model(**case.rows(), block_index=block_index, generator=seeded()).loss.backward()
    for name, parameter in model.named_parameters():
        owner = model.block_of_parameter(name)
        if owner == block_index:
            assert parameter.grad is not None and parameter.grad.any(), name
        elif owner is not None:
            assert parameter.grad is None, name


@pytest.mark.parametrize(**grid(lambda case: case.is_own and case.last_block))
def test_a_block_starts_from_its_own_embeddings_and_ends_in_its_own_head(case):
    """Moving another block's parameters changes nothing."""
    model, batch = case.model().eval(), case.rows()
    before = model(**batch, block_index=0, generator=seeded()).loss
    with torch.no_grad():
        for parameter in model.block_parameters(1):
            parameter += 1
    assert torch.equal(model(**batch, block_index=0, generator=seeded()).loss, before)


@pytest.mark.parametrize(**grid(lambda case: case.is_local and case.config not in (RESNET, SWIN)))
@torch.no_grad()
def test_own_parts_of_a_converted_model_start_as_the_model_s(case):
    plain, inputs = case.plain(), case.inputs()
    own, common = (db.convert(plain, 2, **{**case.fields, "shared": shared}) for shared in ("per_block", "common"))
    assert torch.equal(own.block_logits(**inputs), common.block_logits(**inputs))


# ---- refused


@everywhere
def test_a_block_that_does_not_exist_is_refused(case):
    model = case.model()
    beyond = len(case.blocks)
    with pytest.raises(ValueError, match=rf"block_index={beyond} must lie in 0\.\.{case.last_block}"):
        model.block_parameters(beyond)
    with pytest.raises(ValueError, match=rf"block_index={beyond} must lie in 0\.\.{case.last_block}"):
        model(**case.rows(), block_index=beyond)


@everywhere
def test_training_without_a_block_is_refused(case):
    with pytest.raises(ValueError, match="block_index=None in training"):
        case.model().train()(**case.rows())


@with_known_targets
def test_a_block_without_labels_is_refused(case):
    with pytest.raises(ValueError, match="labels=None with block_index=0"):
        case.model()(**case.inputs(), block_index=0)


@pytest.mark.parametrize(**grid(lambda case: case.has_known_targets))
@pytest.mark.parametrize("name", ["sigma", "noise", "generator", "block_input"])
def test_what_a_block_trains_on_is_refused_without_one(case, name):
    given = seeded() if name == "generator" else torch.ones(4)
    with pytest.raises(ValueError, match=f"{name} must not be given without block_index"):
        case.model().eval()(**case.inputs(), **{name: given})


@pytest.mark.parametrize(**grid(lambda case: case.has_known_targets and not case.is_local))
def test_a_block_that_starts_from_embeddings_takes_no_other_input(case):
    with pytest.raises(ValueError, match="block_input must not be given with preset='paper'"):
        case.model()(**case.rows(), block_index=0, block_input=torch.ones(4, 2, 2))


# ---- training one block


WITH_DROPOUT = ("vit", "gpt2", "bert")


@pytest.mark.parametrize(**grid_of_blocks(lambda case: case.is_local and case.config.model_type in WITH_DROPOUT))
def test_carried_context_is_that_of_the_earlier_blocks_without_dropout(case, block_index):
    """And every part gets its own mode back."""
    model, batch = case.with_dropout(0.5).model().train(), case.rows()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]

    def entering():
        with watching(model.layers[2 * block_index]) as entered:
            model(**batch, block_index=block_index, generator=seeded())
        return entered[0]

    found = entering()
    assert [module.training for module in model.modules()] == modes
    model.eval()
    # Block 0 has no earlier block: there the embedding's own dropout acts.
    assert torch.equal(found, entering()) is (block_index == 1)


@pytest.mark.parametrize(**grid(lambda case: case.fields.get("local_head_layers")))
def test_the_next_block_does_not_see_a_local_head(case):
    """It reads what it does in a model of the same weights without heads."""
    model, without, batch, inputs = case.model(), case.model(local_head_layers=0), case.rows(), case.inputs()
    without.load_state_dict(model.state_dict(), strict=False)

    def entering_second_block(each) -> list[torch.Tensor]:
        with watching(each.layers[2]) as entered:
            each(**batch, block_index=1)
        return entered

    (found,), (expected,) = entering_second_block(model), entering_second_block(without)
    assert torch.equal(found, expected)
    assert torch.equal(model.eval()(**inputs).logits, without.eval()(**inputs).logits)
    own, other = (each(**batch, block_index=0).loss for each in (model, without))
    assert not torch.allclose(own, other)  # positive control: its own block's readout does


@pytest.mark.parametrize(**grid(lambda case: not case.is_local))
def test_draws_come_from_the_generator_alone(case):
    model, batch, state = case.model().eval(), case.rows(), torch.get_rng_state()
    losses = [model(**batch, block_index=case.last_block, generator=seeded(seed)).loss for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(**grid(lambda case: case.is_local))
def test_blocks_of_the_recommended_formulation_have_no_noise(case):
    model, batch, state = case.model().eval(), case.rows(), torch.get_rng_state()
    assert model.noise_schedule is None
    losses = [model(**batch, block_index=case.last_block, generator=seeded(seed)).loss for seed in (3, 4)]
    assert losses[0] == losses[1] and torch.equal(torch.get_rng_state(), state)
    for name in ("sigma", "noise"):
        with pytest.raises(ValueError, match=f"{name} must be None with preset='recommended'"):
            model(**batch, block_index=0, **{name: torch.ones(4)})


@pytest.mark.parametrize(**grid(lambda case: case.task.name != "fill-mask" and not case.is_local))
@pytest.mark.parametrize("generator", [seeded, lambda: None], ids=["a generator", "the global one"])
def test_every_row_has_noise_of_its_own(case, generator):
    """Of equal rows at one level, no two have the same estimate."""
    model = case.model().eval()
    batch = {name: tensor[:1].expand(4, *tensor.shape[1:]) for name, tensor in case.rows().items()}
    kwargs = {"return_logits": True, "sigma": torch.full((4,), 0.3), "generator": generator()}
    rows = estimate_of(model(**batch, block_index=case.last_block, **kwargs)).flatten(1)
    assert all(not torch.allclose(rows[i], rows[j], atol=1e-3) for i in range(4) for j in range(i))


@with_noisy_targets
def test_targets_have_norm_one(case):
    model = case.model()
    vectors = model.label_embeddings.vectors() if hasattr(model, "label_embeddings") else model.target_vectors()
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(vectors)))


@of_each_block_with_known_targets
def test_the_loss_is_the_mean_cross_entropy_of_labelled_logits(case, block_index):
    batch = case.rows()
    if batch["labels"].dim() == 2:
        batch["labels"] = batch["labels"].clone()
        batch["labels"][0, 2:6] = -100
    out = case.model().train()(**batch, block_index=block_index, return_logits=True, generator=seeded())
    expected = F.cross_entropy(out.logits.flatten(0, -2), labelled(batch["labels"]).flatten())
    assert torch.allclose(out.loss, expected, atol=1e-5)


@with_known_targets
@pytest.mark.parametrize("block_index", [0, None])
def test_a_loss_over_num_items_is_the_sum_divided_by_them(case, block_index):
    model, batch = case.model().eval(), case.rows()
    draws = [{} if block_index is None else {"generator": seeded()} for _ in range(2)]
    mean = model(**batch, block_index=block_index, **draws[0]).loss
    part = model(**batch, block_index=block_index, num_items_in_batch=100, **draws[1]).loss
    assert torch.allclose(part * 100, mean * labelled(batch["labels"]).numel())


@pytest.mark.parametrize(**grid(lambda case: case.config is not RESNET))
def test_gradient_checkpointing_changes_nothing(case):
    """But how often a layer runs: once more, in the backward pass."""
    model, batch = case.model().train(), case.rows()
    gradients, counts = [], []
    for options in (None, {"use_reentrant": False}, {"preserve_rng_state": True}):
        if options:
            model.activation_checkpointing_enable(options)
        model.zero_grad()
        with watching(model.blocks[case.last_block].layers[-1]) as entered:
            model(**batch, block_index=case.last_block, generator=seeded()).loss.backward()
        counts.append(len(entered))
        gradients.append([parameter.grad for parameter in model.block_parameters(case.last_block)])
    assert all(map(torch.equal, *gradients[:2])) and all(map(torch.equal, *gradients[1:]))
    assert counts[2] == counts[1] > counts[0] > 0  # (of the paper's text, clean tokens enter the last one for their keys alone)


def test_gradient_checkpointing_is_refused_where_the_stock_model_has_none():
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        CASES["resnet, own"].model().gradient_checkpointing_enable()


@pytest.mark.parametrize(**grid(lambda case: case.gives_logits and case.config is not RESNET))
def test_bfloat16_is_as_close_to_float32_as_it_rounds(case):
    """Loss, gradients and priors, with the same weights and noise: bfloat16 rounds by up to 0.4 % at every step. (Batch norms of
    four numbers make more of it.)"""
    half, found = case.model().to(torch.bfloat16).train(), []
    for model in (half, copy.deepcopy(half).float()):
        rows = case.rows()
        batch = {name: each.to(model.dtype) if each.is_floating_point() else each for name, each in rows.items()}
        loss = model(**batch, block_index=case.last_block, generator=seeded()).loss
        loss.backward()
        gradients = [parameter.grad for parameter in model.block_parameters(case.last_block)]
        assert {gradient.dtype for gradient in gradients} == {model.dtype}
        with torch.no_grad():
            prior = None
            if case.has_known_targets:
                inputs = {name: batch[name] for name in case.inputs()}
                prior = model.eval().block_logits(**inputs).float().log_softmax(-1)
                assert model(**batch).loss.isfinite()  # of a walk, decided by single tokens
        found.append((loss.item(), torch.cat([gradient.float().flatten() for gradient in gradients]), prior))
    (loss, gradient, prior), (exact_loss, exact_gradient, exact_prior) = found
    assert loss == pytest.approx(exact_loss, abs=0.02)
    assert 0.002 < (gradient - exact_gradient).norm() / exact_gradient.norm() < 0.05
    if prior is not None:
        assert 0.002 < (prior - exact_prior).abs().max() < 0.2


# ---- what logits know


@of_each_block_with_noisy_targets
def test_training_logits_see_the_target_through_z(case, block_index):
    """Positive control: the label's only way in is z, and it is open; to the logits of that label alone."""
    model, batch = case.model().eval(), case.rows()
    labels = batch["labels"].clone()
    changed = labels[:, 4] if labels.dim() == 2 else labels[2:3]
    changed.copy_((changed + 1) % 5)
    moved = labelled(labels) != labelled(batch["labels"])
    call = {"block_index": block_index, "return_logits": True, "sigma": torch.full((4,), 0.3)}
    first, second = (
        model(**{**batch, "labels": given}, **call, generator=seeded()).logits for given in (batch["labels"], labels)
    )
    assert moved.any() and all(not torch.allclose(*pair) for pair in zip(first[moved], second[moved]))
    assert torch.equal(first[~moved], second[~moved])


@with_known_targets
@torch.no_grad()
def test_evaluation_logits_do_not_depend_on_the_labels(case):
    model, batch = case.model().eval(), case.rows()
    first = model(**batch)
    second = model(**{**batch, "labels": (batch["labels"] + 1) % 5})
    assert torch.equal(first.logits, second.logits) and torch.equal(first.logits, model(**case.inputs()).logits)
    assert first.loss != second.loss


@with_known_targets
@pytest.mark.parametrize("return_logits", [None, False])
@torch.no_grad()
def test_evaluation_loss_is_the_cross_entropy_of_label_free_logits(case, return_logits):
    model, batch = case.model().eval(), case.rows()
    logits = model(**case.inputs()).logits
    logits = logits[:, :-1] if logits.dim() == 3 else logits
    expected = F.cross_entropy(logits.flatten(0, -2), labelled(batch["labels"]).flatten())
    found = model(**batch, return_logits=return_logits).loss
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(model(**batch, return_logits=return_logits, return_dict=False)[0], found)


@pytest.mark.parametrize(**grid(lambda case: case.gives_logits))
@torch.no_grad()
def test_evaluation_repeats_and_no_row_depends_on_others(case):
    """And leaves the global generator alone."""
    model, inputs, state = case.model().eval(), case.inputs(), torch.get_rng_state()
    whole, again = (model(**inputs).logits for _ in range(2))
    assert torch.equal(whole, again) and torch.equal(torch.get_rng_state(), state)
    rows = [{name: tensor[k : k + 1] for name, tensor in inputs.items()} for k in range(4)]
    assert torch.allclose(whole, torch.cat([model(**row).logits for row in rows]), atol=1e-5)


# ---- the plain model


@pytest.mark.parametrize(**grid(lambda case: case.is_local))
def test_one_recommended_block_trains_as_the_plain_model(case):
    """B=1 is end-to-end training: the same loss and gradients."""
    plain, batch = case.plain(), case.rows()
    fields = {**case.fields, "shared": "common", "local_head_layers": 0}
    model = db.convert(plain, num_blocks=1, **fields).train()
    loss = model(**batch, block_index=0).loss
    plain_loss = plain.train()(**batch).loss
    assert loss.item() == pytest.approx(plain_loss.item(), abs=1e-5)
    loss.backward()
    plain_loss.backward()
    for own, other in zip(model.backbone.parameters(), plain.parameters()):
        assert torch.allclose(own.grad, other.grad, atol=1e-5)


@pytest.mark.parametrize(**grid(lambda case: case.is_local))
@pytest.mark.parametrize("layers_per_block", [None, [1, 3], [3, 1]], ids=str)
@torch.no_grad()
def test_the_recommended_formulation_is_lossless(case, layers_per_block):
    """There and, moved, back again."""
    plain, inputs = case.plain(), case.inputs()
    model = db.convert(plain, 2, layers_per_block=layers_per_block, **case.fields)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    back = randomized(model).to_plain()
    assert type(back) is type(plain) and not back.training
    assert torch.equal(back(**inputs).logits, model(**inputs).logits)
    assert not torch.equal(back(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize(**grid(lambda case: not case.is_local and case.task.name != "fill-mask"))
def test_what_no_plain_model_computes_has_none(case):
    model = case.model()
    with pytest.raises(ValueError, match=rf"to_plain\(\) cannot be had with preset='{model.config.preset}'"):
        model.to_plain()


# ---- saved


@everywhere
@torch.no_grad()
def test_a_reloaded_model_is_the_same(case, tmp_path):
    model, batch = case.model().eval(), case.rows()
    model.save_pretrained(tmp_path)
    again = reloaded(model, tmp_path)
    assert type(again) is type(model) and again.config.task == model.task
    assert torch.equal(again(**batch).loss, model(**batch).loss)
    if "logits" in (outputs := model(**batch)):
        assert torch.equal(again(**batch).logits, outputs.logits)
    for k in case.blocks:
        kept = db.load_block_state_dict(tmp_path, k)
        assert kept and all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in kept.items())
    assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(**grid(lambda case: case.trained and not case.is_own))
@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForImageClassification])
def test_an_auto_class_of_another_task_names_the_saved_one(case, auto_class, tmp_path):
    model = case.model()
    model.save_pretrained(tmp_path)
    if auto_class is TASKS[model.task].auto_class:
        assert auto_class.from_pretrained(tmp_path).task == model.task
        return
    with pytest.raises(ValueError, match=f"this model is for task '{model.task}'"):
        auto_class.from_pretrained(tmp_path)


def test_the_grid_has_every_family_and_formulation():
    assert {task.name for task in TASKS.values()} == {case.task.name for case in CASES.values()}
    for field in ("preset", "shared"):
        assert len({getattr(case.model().config, field) for case in CASES.values() if case.trained}) == 2
