"""The model card: a function of the model's config and parameters alone, so that it can be written at every save."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from string import Template

import yaml
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration import USER_FIELDS
from ..tasks import TASKS

logger = logging.get_logger(__name__)

CARD = "README.md"
#: Of a saved model; the card shows it.
SAMPLES = "samples/final.png"
#: A card with one of these may be replaced; any other was written or edited by a person.
GENERATED_BY = ("Written by hf-diffusionblocks with every save", "This model card has been automatically generated")

USE = """\
import hf_diffusionblocks  # pip install hf-diffusionblocks; registers the Auto classes
from transformers import {auto_class}, pipeline

model = {auto_class}.from_pretrained({name})
{lines}"""
#: What the table of blocks says.
THE_CUT = ("num_blocks", "layers_per_block")


def write(model: PreTrainedModel, folder: Path, keep_from: Path) -> bool:
    """Write the card to `folder`, unless a person wrote or edited the one in `keep_from`; whether it was written. Nothing about
    a card fails the save of a model."""
    existing = keep_from / CARD
    try:
        if existing.exists() and not any(mark in existing.read_text("utf-8") for mark in GENERATED_BY):
            return False
    except (OSError, UnicodeDecodeError) as error:
        logger.warning(f"{existing} cannot be read, and is left as it is: the model is saved without a card ({error})")
        return False
    replace(model, folder, keep_from)
    return True


def replace(model: PreTrainedModel, folder: Path, home: Path) -> None:
    """Write the card to `folder`, whatever is there; aside first, so that a failure leaves the old one whole.

    Args:
        home: where the saved model is, or will be.
    """
    aside = folder / f".{CARD}"
    try:
        aside.write_text(render(model, home), "utf-8")
        os.replace(aside, folder / CARD)
    finally:
        aside.unlink(missing_ok=True)


def render(model: PreTrainedModel, home: Path) -> str:
    """The card's text; the name of the saved model's folder is the title, and the name it is loaded by."""
    config, name = model.config, home.resolve().name
    fields = [field for field in USER_FIELDS if field not in THE_CUT and getattr(config, field) is not None]
    report = config.training_report or {}
    template = Template(files("hf_diffusionblocks.model_cards").joinpath("template.md").read_text())
    plain = f"{type(model.backbone).__name__}, {config.num_hidden_layers} layers"
    source = f"a {plain}"
    if config.base_model:
        source = f"[{config.base_model}](https://huggingface.co/{config.base_model}) ({plain})"
    return template.substitute(
        title=name,
        task=TASKS[model.task].pipeline_tag or model.task,
        use_code=_use_code(model, name),
        base_model_yaml=yaml.safe_dump({"base_model": config.base_model}) if config.base_model else "",
        datasets_yaml=yaml.safe_dump({"datasets": [report["dataset"]]}) if report.get("dataset") else "",
        source=source,
        num_blocks=config.num_blocks,
        trained_as="each as a denoiser of its own range of noise" if model.noise_schedule else "each on a loss of its own",
        block_table=_block_table(model),
        formulation_rows="\n".join(f"| {field} | {getattr(config, field)} |" for field in fields),
        evaluation_sentence=TASKS[config.task].evaluation[config.preset],
        training_section=_training_section(report) + (f"\n\n![Samples]({SAMPLES})" if (home / SAMPLES).is_file() else ""),
    )


def _use_code(model: PreTrainedModel, name: str) -> str:
    task = TASKS[model.task]
    quoted = json.dumps(name, ensure_ascii=False)  # (a name may hold quotes)
    return USE.format(auto_class=task.auto_class.__name__, name=quoted, lines=task.usage.format(name=quoted))


def _block_table(model: PreTrainedModel) -> str:
    """What each block has, and what they share; a column of noise levels where there is noise."""
    schedule, rows = model.noise_schedule, [["block", "layers", "parameters"], ["---"] * 3]
    for k in range(model.num_blocks):
        layers, count = model.block_layers(k), "not loaded"
        if k in model.resident_blocks:
            count = f"{sum(p.numel() for p in model.block_parameters(k)):,}"
        rows.append([str(k), f"{layers[0]}-{layers[-1]}", count])
    rows.append(["shared", "", f"{sum(p.numel() for p in model.shared_parameters()):,}"])
    if schedule is not None:
        levels = ["({:.4g}, {:.4g}]".format(*schedule.interval(k)) for k in range(model.num_blocks)]
        for row, level in zip(rows, [schedule.level_name, "---", *levels, ""]):
            row.insert(2, level)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _training_section(report: dict) -> str:
    if not report:
        return "Not trained since its conversion."
    lines = [f"- {label}: {report[key]}" for key, label in _REPORT_LABELS.items() if report.get(key) is not None]
    if results := report.get("results"):
        lines += ["", "| result | value |", "|---|---|"]
        shown = {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in results.items()}
        lines += [f"| {key} | {value} |" for key, value in shown.items()]
    if memory := report.get("memory"):
        lines += ["", "Memory measured in training, in the second step of each block, or its only one (the largest):", ""]
        lines += ["| part | bytes |", "|---|---|"]
        lines += [f"| {part} | {size:,} |" for part, size in memory.items()]
    return "\n".join(lines)


_REPORT_LABELS = {
    "dataset": "data",
    "train_examples": "training examples",
    "steps": "optimizer steps",
    "updates_per_block": "updates of each block",
    "block_schedule": "block schedule",
    "batch_size": "batch size",
    "learning_rate": "learning rate",
    "ema_decay": "weights are exponential moving averages, of decay",
    "seed": "seed",
}
