"""Which architectures of Transformers can be cut into blocks: each tiny and random, a block a layer.

    python benchmarks/breadth_cut.py --output benchmarks/results/breadth_cut.json

`convert` compares logits and gradients with the stock model's, block by block, and refuses what differs. Here what it gives
out has the stock model's logits bit for bit, too, as it is, saved and loaded, and as a plain model again. With `--train`, as one
block it ends ten steps of the Trainer with the stock Trainer's weights (SGD, to a thousandth of what moved most, or twice as far
as the stock Trainer gets from itself where weights start a rounding apart), and generates what the stock model does.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch
from torch.nn import functional as F
from tiny_models import CannotBuild, names_of, seed, tiny_model
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.models.verification import check_cut
from hf_diffusionblocks.tasks import TASKS, backbone_for

#: Mapping of Transformers -> task, and how many of its architectures are to be cut.
MAPPINGS = {
    "causal-lm": ("text-generation", 175),
    "masked-lm": ("fill-mask", 45),
    "sequence-classification": ("text-classification", 115),
    "image-classification": ("image-classification", 37),
}
#: Stock classes that expect labels which are shifted before.
SHIFTED_BEFORE = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "trocr", "whisper",
    "xlm",
}  # fmt: skip
TOKENS = 8
MASK = 5  #: a token of each vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mapping", nargs="+", choices=[*MAPPINGS], default=[*MAPPINGS])
    parser.add_argument("--names", nargs="+", help="only these architectures")
    parser.add_argument("--train", action="store_true", help="also train each for ten steps")
    parser.add_argument("--output", type=Path, help="a JSON file of what was found")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    found = {}
    for mapping in arguments.mapping:
        found[mapping] = {}
        for name in names_of(mapping):
            if not arguments.names or name in arguments.names:
                found[mapping][name] = said = tried(mapping, name, arguments.train)
                print(mapping, name, said, flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def tried(mapping: str, name: str, trains: bool = False) -> str:
    """Says "cut", or what stands against it."""
    try:
        stock = tiny_model(mapping, name).eval()
    except CannotBuild as error:
        return f"not built: {error}"
    try:
        said = whole(stock, MAPPINGS[mapping][0])
        return trained(mapping, name) if trains and said == "cut" else said
    except Exception as error:  # (one model does not end the run)
        lines = str(error).strip().splitlines() or [""]
        return f"refused: {lines[0][:300]}" if isinstance(error, ValueError) else f"{type(error).__name__}: {lines[0][:300]}"


def whole(stock: PreTrainedModel, task: str) -> str:
    """What of a model that is cut differs from the stock one."""
    fields = {"mask_token_id": MASK} if task == "fill-mask" else {}
    num_layers = backbone_for(stock.config, task).num_layers(stock.config)
    model = db.convert(stock, num_layers, task, **fields)
    batch = TASKS[task].example(model.config.source_config, 2, TOKENS)
    if not check_cut(model, batch):
        return "not compared: the stock model does not run a plain batch"
    if task == "fill-mask":  # (each block is a model of its own: together they are compared in `check_cut` alone)
        return "cut"
    inputs = model.stock_inputs(batch)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = stock(**inputs).logits
        model.save_pretrained(folder)
        again = TASKS[task].auto_class.from_pretrained(folder)
        for each, what in ((model, "as it is"), (again, "saved and loaded"), (model.to_plain(), "as a plain model")):
            if not torch.equal(each(**inputs).logits, expected):
                return f"differs: logits {what}"
    return "cut"


def trained(mapping: str, name: str) -> str:
    """Says "cut", if it also trains, and generates, as the stock model does; or what differs."""
    stock, task = tiny_model(mapping, name), MAPPINGS[mapping][0]
    fields = {"mask_token_id": MASK} if task == "fill-mask" else {}
    model = db.convert(stock, 1, task, **fields)
    if task == "text-generation":
        prompt = torch.arange(20, 26)[None]
        ours, theirs = (each.eval().generate(prompt, max_new_tokens=6, do_sample=False) for each in (model, stock))
        if not torch.equal(ours, theirs):
            return "differs: what it generates"
    if task == "fill-mask":  # (which has a loss of its own)
        return "cut"
    rows = TASKS[task].example(stock.config, 20, TOKENS)
    if task == "text-generation":  # the first label, which nothing predicts, the stock Trainer counts in some models
        rows["labels"] = rows["labels"].clone()
        rows["labels"][:, 0] = -100
    of_stock = rows
    if task == "text-generation" and name in SHIFTED_BEFORE:
        of_stock = rows | {"labels": F.pad(rows["labels"][:, 1:], (0, 1), value=-100)}
    start = dict(tiny_model(mapping, name).named_parameters())
    twin = tiny_model(mapping, name)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += parameter.abs() * torch.randn_like(parameter) * torch.finfo(parameter.dtype).eps
    expected = ten_steps(Trainer, TrainingArguments, stock, of_stock)
    beside = ten_steps(Trainer, TrainingArguments, twin, of_stock)
    ten_steps(db.DiffusionBlocksTrainer, db.DiffusionBlocksTrainingArguments, model, rows)
    found = dict(model.to_plain().named_parameters())
    moved = farthest(start, expected)
    worst, of_twin = (farthest(each, expected) / moved for each in (found, beside))
    if worst <= max(1e-3, 2 * of_twin):
        return "cut"
    return f"differs: weights after ten steps, by {worst:.1e} of what moved most; those of a rounded start by {of_twin:.1e}"


def ten_steps(trainer_class: type, arguments_class: type, model: PreTrainedModel, rows: dict[str, torch.Tensor]):
    """The model's parameters after ten steps of a Trainer, by name."""
    data = [{key: tensor[row] for key, tensor in rows.items()} for row in range(20)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_class(
            output_dir=folder, per_device_train_batch_size=4, learning_rate=0.01, optim="sgd", max_grad_norm=0, report_to=[],
            use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no", max_steps=10,
            label_names=["labels"], remove_unused_columns=False,  # (a stock class may take labels by any name)
        )  # fmt: skip
        seed(0)
        trainer_class(model, arguments, train_dataset=data).train()
    return dict(model.named_parameters())


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two models' parameters."""
    return max(float((one[key] - parameter).abs().max()) for key, parameter in other.items() if parameter.numel())


def table(found: dict[str, dict[str, str]]) -> str:
    lines = ["| mapping | names | built | cut | aim |", "|---|---|---|---|---|"]
    for mapping, names in found.items():
        built = [said for said in names.values() if not said.startswith("not built")]
        lines.append(f"| {mapping} | {len(names)} | {len(built)} | {built.count('cut')} | {MAPPINGS[mapping][1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
