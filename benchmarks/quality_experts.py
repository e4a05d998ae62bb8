"""Experts by noise level of a pretrained diffusion transformer: adapters and whole copies, on Fashion-MNIST.

    python benchmarks/quality_experts.py --data ../shared/data/fashion_mnist --output outputs/quality_experts

A DiT of 4 layers, patch 7, width 64, is trained with EDM's loss on the classes 0 to 4, and tuned to 5,000 images of the classes
5 to 9: by one adapter (LoRA) or as a whole, or by three experts, each of a range of noise of equal probability. An expert is a
block as deep as the pretrained model, with ends of its own, so the package's own sampler runs the right one. Seed 0 trains a row
at each of its rates; the rate with the least loss on 2,000 other training images is measured, on all test images of these
classes, and taken by the other seeds. The pretrained model is one for all seeds. Runs are cached in the output folder one by one.
The figures below are of seed 0; of copies the means of seeds 2, 3 and 4 (`--seeds 0 2 3 4`), whose losses differ by at most
0.0012. (Stored are seeds 0 and 1 of one machine, and 2 to 4 of another, where the classifier that distances are measured by is
another one: 394, 424, 315 and 315 there. Losses agree to 0.0003.)

At equal compute experts have the higher loss: three copies with U/3 updates each 0.358 and one copy with U 0.337, three with U
each 0.311 and one with 3 U 0.299, and so have adapters (0.364 and 0.347, 0.344 and 0.327) and fresh models (0.441 and 0.376, 0.338
and 0.302). At equal updates of each, three times the compute, three copies win over one (0.311 against 0.337, a Frechet distance of
285 against 373), and three adapters hardly over one of as many parameters (0.344 against 0.347). Only where noise is highest do
three copies beat one of equal compute (0.240 against 0.244 in the highest quarter, of 3 U in all), and nothing has converged: three
times the updates of one copy lower its loss by 11 %.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from cached_runs import file_of, parser_of, report, results_of, table_of
from copied_blocks import copy_to_every_block
from generation_metrics import frechet_distance, held_out_losses, in_batches, precision_and_recall, trained_classifier
from peft import LoraConfig, PeftModel, get_peft_model
from quality_generation import load_data
from torch import nn
from transformers import get_cosine_schedule_with_warmup, set_seed
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.backbones.dit import DiTConfig
from hf_diffusionblocks.diffusion.schedule import NoiseSchedule

LAYERS, EXPERTS, RANK, BATCH, SIGMA_DATA = 4, 3, 8, 64, 0.7
STEPS, SAMPLES = 30, 2000
FIRST_NEW_CLASS, TUNING_IMAGES, VALIDATION_IMAGES = 5, 5000, 2000
PRETRAINING_UPDATES, PRETRAINING_RATE = 3000, 2e-3
#: Rates tried: two of them, or one, where all updates are 3 U. Fresh models take one, that of quality_generation.
ADAPTER_RATES, COPY_RATES, FRESH_RATES = (5e-3, 1e-2, 2e-2), (4e-3, 8e-3, 1.6e-2), (4e-3,)


@dataclass(frozen=True)
class Row:
    """Experts, the updates of each as a share of U, the rates tried, and what is trained.

    Args:
        rank: of an adapter; None trains the whole model.
        fresh: whether it starts from fresh weights, not from the pretrained model's.
    """

    experts: int
    share: float
    rates: tuple[float, ...]
    rank: int | None = None
    fresh: bool = False


ROWS: dict[str, Row] = {
    "before tuning": Row(1, 0, (0.0,)),
    "one adapter of rank 8, U": Row(1, 1, ADAPTER_RATES, RANK),
    "one adapter of rank 24, U": Row(1, 1, ADAPTER_RATES, EXPERTS * RANK),
    "three adapters of rank 8, U/3 each": Row(EXPERTS, 1 / 3, ADAPTER_RATES, RANK),
    "three adapters of rank 8, U each": Row(EXPERTS, 1, ADAPTER_RATES[:2], RANK),
    "one copy, U": Row(1, 1, COPY_RATES),
    "one copy, 3 U": Row(1, 3, COPY_RATES[:2]),
    "three copies, U/3 each": Row(EXPERTS, 1 / 3, COPY_RATES),
    "three copies, U each": Row(EXPERTS, 1, COPY_RATES[:2]),
    "one adapter of rank 24, 3 U": Row(1, 3, ADAPTER_RATES[1:2], EXPERTS * RANK),
    "one from scratch, 2 U": Row(1, 2, FRESH_RATES, fresh=True),
    "one from scratch, 6 U": Row(1, 6, FRESH_RATES, fresh=True),
    "three from scratch, 2/3 U each": Row(EXPERTS, 2 / 3, FRESH_RATES, fresh=True),
    "three from scratch, 2 U each": Row(EXPERTS, 2, FRESH_RATES, fresh=True),
}


# ---- models


def fresh_model(experts: int):
    """Each block is an expert as deep as the plain model."""
    config = DiTConfig(
        num_layers=LAYERS * experts, num_attention_heads=4, attention_head_dim=16, in_channels=1, sample_size=28,
        patch_size=7, num_embeds_ada_norm=10,
    )  # fmt: skip
    return db.convert(config, num_blocks=experts, preset="paper", sigma_data=SIGMA_DATA, shared="per_block")


def copies_of(pretrained, experts: int):
    """As many experts, each equal to the pretrained model."""
    model = fresh_model(experts)
    copy_to_every_block(pretrained, model, LAYERS)
    return model


def with_adapters(model, rank: int) -> PeftModel:
    """LoRA of all matrices of the layers, with those of AdaLN and the tables of classes; all else is frozen."""
    targets = [
        name for name, module in model.named_modules()
        if ".transformer_blocks." in name and isinstance(module, (nn.Linear, nn.Embedding))
    ]  # fmt: skip
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))


def check_experts(pretrained) -> None:
    """Equal experts are the pretrained model bit for bit, and a level is denoised by the expert of its range alone.

    Raises:
        AssertionError: they are not.
    """
    model = copies_of(pretrained, EXPERTS).eval()
    assert not list(model.shared_parameters()), "experts share parameters"
    labels = torch.arange(10)
    for grid in ("equal", "karras"):
        images = [each.predict(labels, num_inference_steps=12, grid=grid).images for each in (pretrained, model)]
        assert torch.equal(*images), f"equal experts draw other images than one model, with grid={grid!r}"
    z = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    levels = NoiseSchedule(1).quantile((torch.arange(12) + 0.5) / 12)  # ascending: four a range
    for expert in range(EXPERTS):
        changed = copies_of(pretrained, EXPERTS).eval()
        with torch.no_grad():
            for parameter in changed.block_parameters(expert):
                parameter.mul_(1.5)
        for number, level in enumerate(levels):
            is_its_own = number // 4 == EXPERTS - 1 - expert  # (block 0 has the most noise)
            same = torch.equal(changed.denoise(z, level, labels), pretrained.denoise(z, level, labels))
            assert same != is_its_own, f"expert {expert} and level {level:.3f}: own {is_its_own}, unchanged {same}"


# ---- training


def train(model, block: int, images: torch.Tensor, labels: torch.Tensor, updates: int, rate: float) -> None:
    """One expert: others have no gradients, so the optimizer leaves them alone."""
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, rate, weight_decay=0.01, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, updates // 20, updates)
    model.train()
    rows = torch.empty(0, dtype=torch.long)
    for _ in range(updates):
        if len(rows) < BATCH:
            rows = torch.randperm(len(images))
        batch, rows = rows[:BATCH], rows[BATCH:]
        model(images[batch], labels[batch], block_index=block).loss.backward()
        nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def tuned(row: Row, rate: float, seed: int, updates: int, pretrained, data: Data):
    """The model, adapters merged, and the number of its trained parameters."""
    set_seed(seed)
    model = fresh_model(row.experts) if row.fresh else copies_of(pretrained, row.experts)
    adapted = None if row.rank is None else with_adapters(model, row.rank)
    start = {parameter: parameter.clone() for parameter in model.parameters() if not parameter.requires_grad}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    for block in range(row.experts):
        train(model, block, *data.tuning, round(row.share * updates), rate)
    assert all(torch.equal(parameter, before) for parameter, before in start.items()), "what adapters adapt has moved"
    return (model if adapted is None else adapted.merge_and_unload()), trained


# ---- data and measures


class Data:
    """Fashion-MNIST's parts; images `[N, 1, 28, 28]` in [-1, 1], and labels `[N]`."""

    def __init__(self, file: Path):
        self.whole: dict[str, tuple[torch.Tensor, torch.Tensor]] = torch.load(file)

    def _part(self, split: str, new: bool, rows: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self.whole[split]
        chosen = ((labels >= FIRST_NEW_CLASS) == new).nonzero().squeeze(1)[rows]
        return images[chosen], labels[chosen]

    @cached_property
    def pretraining(self):
        return self._part("train", new=False)

    @cached_property
    def tuning(self):
        return self._part("train", new=True, rows=slice(TUNING_IMAGES))

    @cached_property
    def validation(self):
        return self._part("train", new=True, rows=slice(TUNING_IMAGES, TUNING_IMAGES + VALIDATION_IMAGES))

    @cached_property
    def test(self):
        return self._part("test", new=True)


@torch.no_grad()
def measured(model, data: Data, classifier) -> dict[str, float]:
    """Held-out loss, also by quarter, and how close samples are to the test images."""
    losses = held_out_losses(model.denoise, *data.test, SIGMA_DATA)
    classes = FIRST_NEW_CLASS + torch.arange(SAMPLES) % (10 - FIRST_NEW_CLASS)
    made = torch.cat([
        model.predict(
            part, num_inference_steps=STEPS, grid="karras", generator=torch.Generator().manual_seed(number)
        ).images.clamp(-1, 1)
        for number, part in enumerate(classes.split(250))
    ])  # fmt: skip
    real, features = (features_of(classifier, images) for images in (data.test[0], made))
    precision, recall = precision_and_recall(features, real[:SAMPLES])
    asked = (in_batches(classifier, made).argmax(1) == classes).float().mean().item()
    return {
        "loss": statistics.mean(losses), **{f"loss {quarter}": loss for quarter, loss in enumerate(losses)},
        "frechet": frechet_distance(features, real), "precision": precision, "recall": recall, "class": asked,
    }  # fmt: skip


def features_of(classifier, images: torch.Tensor):
    return in_batches(classifier.features, images).double().numpy()


# ---- runs


def trained_at(rate: float, name: str, seed: int, settings: dict, data: Data, folder: Path) -> dict:
    """What came of one rate; the model is kept in the folder."""
    file = folder / "rate.json"
    if not file.is_file():
        start = time.process_time()
        pretrained = db.DiffusionBlocksForImageGeneration.from_pretrained(settings["pretrained"]).eval()
        model, trained = tuned(ROWS[name], rate, seed, settings["updates"], pretrained, data)
        seconds = time.process_time() - start
        model.save_pretrained(folder)
        validation = statistics.mean(held_out_losses(model.denoise, *data.validation, SIGMA_DATA))
        file.write_text(json.dumps({"validation": validation, "parameters": trained, "seconds": seconds}))
        print(f"  {name}, seed {seed}, rate {rate:g}: validation {validation:.4f}, {seconds:.0f} s", flush=True)
    return json.loads(file.read_text())


def run(job: tuple) -> None:
    """All rates of a row with seed 0, its best with other seeds, and measures of the best."""
    name, seed, settings, file = job
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    data, row = Data(settings["data"]), ROWS[name]
    rates = row.rates
    if seed:
        first = file_of(file.parent, ROWS, name, settings["updates"])
        rates = (json.loads(first.read_text())["rate"],)
    folders = {rate: file.with_suffix("") / f"rate{rate:g}" for rate in rates}
    tried = {rate: trained_at(rate, name, seed, settings, data, folder) for rate, folder in folders.items()}
    rate = min(tried, key=lambda each: tried[each]["validation"])
    model = db.DiffusionBlocksForImageGeneration.from_pretrained(folders[rate]).eval()
    result = {
        "rate": rate, **tried[rate], "rates": {f"{each:g}": found["validation"] for each, found in tried.items()},
        **measured(model, data, trained_classifier(data.whole, settings["classifier"])),
    }  # fmt: skip
    file.write_text(json.dumps({"row": name, "seed": seed, "updates": settings["updates"], **result}))
    print(f"{name}, seed {seed}: " + ", ".join(f"{key} {value}" for key, value in result.items()), flush=True)


# ---- the table

COLUMNS = (
    "", "seeds", "rate", "trained parameters", "held-out loss", "by quarter of the noise, lowest first", "Frechet",
    "precision, recall", "asked class", "CPU seconds",
)  # fmt: skip


def table(results: list[dict], floor: float) -> str:
    """Markdown; mean and standard deviation over seeds."""
    lines = [
        f"Fashion-MNIST, classes 5 to 9; U = {results[0]['updates']} updates of {BATCH} images; {SAMPLES} samples of {STEPS} "
        f"Euler steps on the Karras grid. The Frechet distance of as many training images is {floor:.1f}.",
        "",
    ]
    return "\n".join(lines + table_of(COLUMNS, ROWS, results, _cells))


def _cells(name: str, runs: list[dict]) -> list[str]:
    def cell(key: str, digits: int, spread: bool = True) -> str:
        values = [run[key] for run in runs]
        deviation = f" ± {statistics.stdev(values):.{digits}f}" if spread and len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{deviation}"

    return [
        name,
        str(len(runs)),
        f"{runs[0]['rate']:g}",
        f"{runs[0]['parameters'] / 1000:.0f}k" if ROWS[name].share else "",
        cell("loss", 4),
        " ".join(cell(f"loss {quarter}", 3, spread=False) for quarter in range(4)),
        cell("frechet", 0),
        ", ".join(cell(key, 2, spread=False) for key in ("precision", "recall")),
        f"{100 * statistics.mean(run['class'] for run in runs):.0f} %",
        cell("seconds", 0, spread=False) if ROWS[name].share else "",
    ]


def main() -> None:
    parser = parser_of(__doc__, ROWS, "Fashion-MNIST's train.parquet and test.parquet", "the cached runs, models and the table")
    parser.add_argument("--updates", type=int, default=450, help="U, of one model that is tuned")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {
        "updates": options.updates, "data": options.output / "data.pt", "classifier": options.output / "classifier.pt",
        "pretrained": options.output / "pretrained",
    }  # fmt: skip
    if not settings["data"].is_file():
        torch.save(load_data(options.data), settings["data"])
    data = Data(settings["data"])
    classifier = trained_classifier(data.whole, settings["classifier"])
    if not settings["pretrained"].is_dir():
        set_seed(0)
        model = fresh_model(1)
        train(model, 0, *data.pretraining, PRETRAINING_UPDATES, PRETRAINING_RATE)
        model.save_pretrained(settings["pretrained"])
    check_experts(db.DiffusionBlocksForImageGeneration.from_pretrained(settings["pretrained"]).eval())
    results = results_of(run, ROWS, options.rows, options.seeds, settings, options.output, options.processes)
    floor = frechet_distance(*(features_of(classifier, images) for images in (data.tuning[0][:SAMPLES], data.test[0])))
    report(results, table(results, floor), options.updates, options.output)


if __name__ == "__main__":
    main()
