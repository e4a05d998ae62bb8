"""Pins of what models compute: blocks, evaluation, walks, generation, the bound."""

from __future__ import annotations

from dataclasses import asdict

import torch
from digests import Pins, gradients, named_parameters
from grid import (
    FAMILIES, GRID, LENGTH, RECOMMENDED, ROWS, TEXT_FAMILIES, batch_of, converted, formulations_of, noise_of, padded_batch,
    plain_of, without_labels,
)  # fmt: skip

import hf_diffusionblocks as db

LEVELS = torch.tensor([0.1, 0.7, 4.0])
UNEVEN = {"layers_per_block": [1, 2, 1]}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pin_models(pins: Pins) -> None:
    for family in FAMILIES:
        for name, fields in formulations_of(family).items():
            pin_model(pins, f"{family}/{name}", family, fields)
    for family in ("gpt2", "vit"):
        for name in ("joint-edm-independent", "joint-posterior-carried-own", "factorized-carried-head"):
            if name in formulations_of(family):
                pin_model(pins, f"{family}/{name}-uneven", family, {**GRID[name], **UNEVEN}, num_blocks=3)
    pin_options(pins)
    pin_training_mode(pins)


def pin_model(pins: Pins, name: str, family: str, fields: dict, num_blocks: int = 2) -> None:
    model = converted(family, fields, num_blocks)
    pin_cut(pins, name, model)
    pin_schedule(pins, name, model)
    for block in range(model.config.num_blocks):
        pin_block(pins, f"{name}/block{block}", family, model, block)
    pin_evaluation(pins, name, family, model.eval())
    if family == "vit":
        for sampler in ("euler", "ancestral"):
            pin_walks(pins, f"{name}/predict/{sampler}", converted(family, {**fields, "sampler": sampler}, num_blocks))
    else:
        pin_generation(pins, name, model)
        pin_bound(pins, name, model)


def pin_cut(pins: Pins, name: str, model) -> None:
    names = {id(parameter): key for key, parameter in named_parameters(model).items()}
    pins[f"{name}/shared parameters"] = sorted(names[id(p)] for p in model.shared_parameters())
    for block in range(model.config.num_blocks):
        pins[f"{name}/block{block}/layers"] = list(model.block_layers(block))
        pins[f"{name}/block{block}/parameters"] = sorted(names[id(p)] for p in model.block_parameters(block))


def pin_schedule(pins: Pins, name: str, model) -> None:
    schedule, blocks = model.noise_schedule, range(model.config.num_blocks)
    pins[f"{name}/schedule/boundaries"] = schedule.boundaries
    levels = torch.cat([torch.logspace(-2.6, 1.9, 64, dtype=torch.float64), schedule.boundaries])
    pins[f"{name}/schedule/block_of"] = schedule.block_of(levels)
    pins[f"{name}/schedule/sample"] = [schedule.sample(k, (64,), generator(k)) for k in blocks]
    pins[f"{name}/schedule/inference_sigmas"] = {steps: schedule.inference_sigmas(steps) for steps in (1, 2, 3, 6, 7)}


def pin_block(pins: Pins, name: str, family: str, model, block: int) -> None:
    """A training step at levels and noise that are given, with its gradients; and losses where they are drawn."""
    text, batch = family != "vit", batch_of(family)
    model.train()
    pins[f"{name}/logits"] = one_step(pins, name, model, {
        **batch, "block_index": block, "sigma": LEVELS, "noise": noise_of(family), **({"return_logits": True} if text else {}),
    }).logits  # fmt: skip

    def loss(**kwargs) -> torch.Tensor:
        with torch.no_grad():
            return model(**{**batch, "block_index": block, **kwargs}).loss

    pins[f"{name}/drawn loss"] = loss(generator=generator(6))
    pins[f"{name}/loss drawn for each row"] = loss(generator=[generator(seed) for seed in range(ROWS)])
    torch.manual_seed(7)
    pins[f"{name}/loss from the global generator"] = loss()
    pins[f"{name}/loss at sigma_max"] = loss(sigma=torch.full((ROWS,), 80.0), noise=noise_of(family))
    if text:
        pins[f"{name}/loss without logits"] = loss(sigma=LEVELS, noise=noise_of(family), return_logits=False)
        pins[f"{name}/padded loss"] = loss(**padded_batch(), sigma=LEVELS, noise=noise_of(family))
        if model.config.denoiser == "factorized":  # a level for each token
            levels = LEVELS[:, None] * torch.linspace(0.5, 20.0, LENGTH - 1)
            pins[f"{name}/loss at levels of tokens"] = loss(sigma=levels, noise=noise_of(family))


def one_step(pins: Pins, name: str, model, inputs: dict):
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    out.loss.backward()
    pins[f"{name}/loss"] = out.loss.item()
    pins[f"{name}/gradients"] = gradients(model)
    model.zero_grad(set_to_none=True)
    return out


@torch.no_grad()
def pin_evaluation(pins: Pins, name: str, family: str, model) -> None:
    batch = batch_of(family)
    out = model(**batch)
    pins[f"{name}/evaluation/logits"], pins[f"{name}/evaluation/loss"] = out.logits, out.loss.item()
    pins[f"{name}/evaluation/logits without labels"] = model(**without_labels(batch)).logits
    pins[f"{name}/prior_logits"] = model.prior_logits(**without_labels(batch))
    if family != "vit":
        pins[f"{name}/evaluation/loss without logits"] = model(**batch, return_logits=False).loss.item()
        out = model(**padded_batch())
        pins[f"{name}/evaluation/padded"] = {"loss": out.loss.item(), "logits": out.logits}
        prompt = without_labels(padded_batch())
        pins[f"{name}/prior_logits of padded"] = model.prior_logits(**prompt)
        pins[f"{name}/evaluation/last logits"] = model(**prompt, logits_to_keep=2).logits


def walk(out) -> dict:
    return {"logits": out.logits, "probabilities": out.probabilities, "trajectory": out.trajectory, "sigmas": out.sigmas}


def pin_walks(pins: Pins, name: str, model) -> None:
    images = batch_of("vit")["pixel_values"]
    pins[name] = walk(model.predict(images))
    for steps in (2, 5):
        pins[f"{name}/T={steps}/keyed"] = walk(model.predict(images, steps))
        pins[f"{name}/T={steps}/drawn"] = walk(model.predict(images, steps, generator=generator(8)))


def pin_generation(pins: Pins, name: str, model) -> None:
    prompt = {"input_ids": batch_of("gpt2")["input_ids"][:, :5]}
    padded = {name: value[:, :5] for name, value in without_labels(padded_batch()).items()}

    def generated(inputs: dict, **kwargs) -> list:
        torch.manual_seed(9)
        tokens = model.generate(**inputs, max_new_tokens=5, pad_token_id=0, **{"do_sample": False, **kwargs})
        return tokens.tolist()

    sampling = {"do_sample": True, "top_k": 0, "top_p": 0.9, "temperature": 0.8}
    pins[f"{name}/generate/greedy"] = generated(prompt)
    pins[f"{name}/generate/greedy without cache"] = generated(prompt, use_cache=False)
    pins[f"{name}/generate/padded"] = generated(padded)
    pins[f"{name}/generate/sampled"] = generated(prompt, **sampling)
    pins[f"{name}/generate/sampled without cache"] = generated(prompt, use_cache=False, **sampling)
    out = model.generate(
        **padded, max_new_tokens=4, pad_token_id=0, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    pins[f"{name}/generate/logits of padded"] = torch.stack(out.logits)


def pin_bound(pins: Pins, name: str, model) -> None:
    pins[f"{name}/nll_bound"] = asdict(db.nll_bound(model, [batch_of("gpt2"), padded_batch()], num_samples=4, seed=3))


OPTIONS = {
    "edm weight": ("joint-edm-independent", {"loss_weighting": "edm"}),
    "edm weight, factorized": ("factorized-carried", {"loss_weighting": "edm"}),
    "scale of the target": ("joint-edm-carried", {"sigma_data": "auto"}),
    "other noise": ("joint-posterior-independent", {"p_mean": 0.5, "p_std": 0.8, "sigma_max": 20.0, "overlap": 0.0}),
    "hard bridge": ("joint-posterior-carried", {"bridge": "hard"}),
    "ancestral": ("joint-posterior-carried", {"sampler": "ancestral", "inference_seed": 3}),
    "ancestral, edm": ("joint-edm-independent", {"sampler": "ancestral"}),
    "five steps": ("joint-posterior-carried", {"num_inference_steps": 5}),
    "one step": ("joint-edm-carried-own", {"num_inference_steps": 1}),
}


def pin_options(pins: Pins) -> None:
    """Fields that the grid leaves as they are; and the noise that is fitted."""
    for option, (formulation, changes) in OPTIONS.items():
        for family in ("llama", "vit"):
            pin_model(pins, f"{family}/{formulation}, {option}", family, {**GRID[formulation], **changes})
    for family in ("gpt2", "vit"):
        for formulation in ("joint-posterior-independent", "factorized-carried"):
            fields = {**GRID[formulation], "noise_distribution": "information"}
            model, name = converted(family, fields), f"{family}/{formulation}, fitted"
            batches = [batch_of(family)] * 2
            pins[f"{name}/curve"] = db.fit_noise_schedule(model, batches, num_levels=16, max_batches=2, seed=1)
            pins[f"{name}/noise_table"] = model.config.noise_table
            pin_schedule(pins, name, model)
            pin_block(pins, f"{name}/block1", family, model, 1)


def pin_training_mode(pins: Pins) -> None:
    """Dropout (of the active block alone, from the global generator), checkpointing, bfloat16."""
    for family in ("gpt2-dropout", "vit-dropout"):
        for formulation in ("joint-edm-independent", "joint-posterior-carried", "factorized-carried-head"):
            if formulation in formulations_of(family):
                pin_both_ways(pins, f"{family}/{formulation}", family, converted(family, GRID[formulation]))
    for family in (*TEXT_FAMILIES, "vit"):
        for formulation, fields in (("joint-edm-carried", GRID["joint-edm-carried"]), ("recommended", RECOMMENDED)):
            model = db.convert(plain_of(family), 2, None, None, **fields).to(torch.bfloat16).train()
            inputs = {**batch_of(family), "block_index": 1, "sigma": LEVELS, "noise": noise_of(family.split("-")[0])}
            torch.manual_seed(10)
            one_step(pins, f"{family}/{formulation}/bfloat16", model, inputs)
            with torch.no_grad():
                pins[f"{family}/{formulation}/bfloat16/evaluation"] = model.eval()(**batch_of(family)).logits


def pin_both_ways(pins: Pins, name: str, family: str, model) -> None:
    model.train()
    for way in ("kept", "checkpointed"):
        if way == "checkpointed":
            model.gradient_checkpointing_enable()
        for block in (0, 1):
            inputs = {**batch_of(family), "block_index": block, "sigma": LEVELS, "noise": noise_of(family)}
            torch.manual_seed(11)
            one_step(pins, f"{name}/{way}/block{block}", model, inputs)
