"""Masked diffusion of text from a causal checkpoint, on characters of novels: what of the checkpoint helps, and how.

    python benchmarks/masked_from_causal.py --data ../shared/data/gutenberg --output outputs/masked_from_causal

A Llama of 6 layers, width 96, learns next characters for 2,000 updates. Its weights then learn to fill in masks, beside
fresh ones, for 1,000 updates of 16 x 128 characters. Rows differ in three things:

- head: a causal model reads token i + 1 where token i stands. "shifted" keeps this, so a masked token is read out one
  position before it; "in place" reads it where it stands, as BERT does.
- attention: tokens see those after them from the first update ("at once"), or a share of them that grows over the first
  half of the updates ("grown").
- experts by share of masks: three copies of the checkpoint, or three LoRA adapters over it, each for a third of the
  shares, beside one copy and one adapter of as many parameters; at equal updates in all, and of each. Their heads read
  in place.

At equal compute one model wins: three copies with a third of the updates have 3.148 bits and one 2.897, three with all updates
2.817 and one with three times the updates 2.692; three adapters 3.243 and 2.917, one 3.015 with the updates of one. (Stored rows
of "machine" 1 and 2 are each compared with a base of their own, 2.894 and 2.897.)

Measured as in quality_masked.py: the bound in bits a character on held-out works, with the same masks for all rows.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from cached_runs import parser_of, report, results_of
from characters import ALPHABET, characters
from gutenberg import config_for
from peft import LoraConfig, inject_adapter_in_model
from quality_masked import BATCH, LENGTH, WIDTH, bits_by_quarter, train
from quality_text import ChunkedTrainer, Sequences
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.diffusion.masking import MaskingSchedule

LAYERS, EXPERTS, RANK = 6, 3, 8
CAUSAL_UPDATES, UPDATES = 2000, 1000


@dataclass(frozen=True)
class Row:
    """How the masked model starts, and learns.

    Args:
        causal: from the checkpoint; else fresh.
        shifted: the head reads the position before.
        grown: attention opens over the first half of the updates.
        rate: of learning.
        num_blocks: into which its layers are cut.
        updates: of each model.
        experts: models, each for its share of masks.
        rank: of LoRA adapters; 0 trains everything.
    """

    causal: bool = True
    shifted: bool = False
    grown: bool = False
    rate: float = 2e-3
    num_blocks: int = 1
    updates: int = UPDATES
    experts: int = 1
    rank: int = 0


BASE = "causal, in place, at once, 2e-3"
ROWS: dict[str, Row] = {
    "fresh, in place": Row(causal=False),
    BASE: Row(),
    "causal, shifted, at once, 2e-3": Row(shifted=True),
    "causal, in place, at once, 1e-3": Row(rate=1e-3),
    "causal, shifted, at once, 1e-3": Row(shifted=True, rate=1e-3),
    "fresh, shifted": Row(causal=False, shifted=True),
    "causal, in place, grown, 2e-3": Row(grown=True),
    "causal, shifted, grown, 2e-3": Row(shifted=True, grown=True),
    "causal, in place, cut into three blocks": Row(num_blocks=3),
    "three copies, a third of the updates each": Row(updates=UPDATES // 3, experts=EXPERTS),
    "fresh, in place, 3,000 updates": Row(causal=False, updates=CAUSAL_UPDATES + UPDATES),
    "one adapter, rank 24": Row(rate=5e-3, rank=EXPERTS * RANK),
    "three adapters, rank 8, a third of the updates each": Row(rate=5e-3, updates=UPDATES // 3, experts=EXPERTS, rank=RANK),
    "three copies, all updates each": Row(experts=EXPERTS),
    "three adapters, rank 8, all updates each": Row(rate=5e-3, experts=EXPERTS, rank=RANK),
    "one copy, 3,000 updates": Row(updates=EXPERTS * UPDATES),
}  # fmt: skip


def arguments(folder: Path, updates: int, rate: float, seed: int) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=updates, per_device_train_batch_size=BATCH, learning_rate=rate, weight_decay=0.1,
        adam_beta2=0.95, lr_scheduler_type="cosine", warmup_steps=0.05, use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, seed=seed,
    )  # fmt: skip


class AdapterTrainer(Trainer):
    """Of a model of one block with adapters in it, which the Trainer of blocks refuses."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs, block_index=0).loss


def causal_model(folder: Path, train_set: Sequences, seed: int) -> LlamaForCausalLM:
    """Trained once a seed, and kept."""
    kept = folder / f"causal-seed{seed}"
    if not kept.is_dir():
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(config_for("llama", LAYERS, WIDTH, len(ALPHABET), LENGTH))
        ChunkedTrainer(model=model, args=arguments(folder, CAUSAL_UPDATES, 2e-3, seed), train_dataset=train_set).train()
        model.save_pretrained(kept)
    return LlamaForCausalLM.from_pretrained(kept)


def masked_model(row: Row, folder: Path, train_set: Sequences, seed: int) -> nn.Module:
    """Before it has learned."""
    source = causal_model(folder, train_set, seed) if row.causal else None
    set_seed(seed)
    source = config_for("llama", LAYERS, WIDTH, len(ALPHABET), LENGTH) if source is None else source
    model = db.convert(source, num_blocks=row.num_blocks, task="fill-mask", preset="paper").train()
    model.read = _Read(model, row)
    if row.rank:
        _add_adapter(model, row.rank)
    return model


def _add_adapter(model: nn.Module, rank: int) -> None:
    """LoRA on all matrices of the layers; the row of MASK learns, too, as all of the embedding does."""
    matrices = [name for name, module in model.named_modules() if ".layers." in name and isinstance(module, nn.Linear)]
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=matrices), model)
    model.backbone.get_input_embeddings().weight.requires_grad_(True)


class _Read:
    """What the head reads, in the way of a row; stands in for the model's own `read`."""

    def __init__(self, model: nn.Module, row: Row):
        self.model, self.row, self.passes = model, row, 0

    def __call__(self, block, text) -> torch.Tensor:
        inputs = self.model.stock_inputs(text._asdict())
        if self.row.grown and self.model.training:
            self.passes += 1
            inputs["attention_mask"] = self._grown(text.input_ids.shape[1])
        hidden = block.run_stock(inputs).read
        return torch.cat([hidden[:, :1], hidden[:, :-1]], 1) if self.row.shifted else hidden

    def _grown(self, length: int) -> torch.Tensor:
        """Who sees whom: all before, and a share of those after."""
        share = min(1.0, self.passes / (self.row.updates / 2))
        return (torch.ones(length, length).tril().bool() | (torch.rand(length, length) < share))[None, None]


class Experts(nn.Module):
    """Models of one block each, of which the share of masks in a text says which answers it."""

    def __init__(self, models: list[nn.Module]):
        super().__init__()
        self.models, self.schedule = nn.ModuleList(models), MaskingSchedule(len(models))
        self.mask_token_id, self.device = models[0].mask_token_id, torch.device("cpu")

    def answers(self, text):
        owners = self.schedule.block_of(text.holds(self.mask_token_id).sum(1), text.attended.sum(1))
        for k in owners.unique().tolist():
            rows = (owners == k).nonzero()[:, 0]
            model = self.models[k]
            yield model, rows, model.read(model.blocks[0], text.rows(rows))

    def sums_of_rows(self, model, hidden, labels, masked):
        return model.sums_of_rows(model.blocks[0], hidden, labels, masked)


def own_share(model: nn.Module, number: int, experts: int) -> None:
    """Have a model of one block train on an expert's share of masks, in its part of the bound."""
    schedule = MaskingSchedule(experts, overlap=0.1)

    def counts(block_index, tokens, maskable, overlap=0.0):
        return schedule.counts(number, tokens, maskable, overlap)

    model.noise_schedule.counts = counts


def trained(row: Row, seed: int, train_set: Sequences, settings: dict) -> nn.Module:
    folder, models = Path(settings["output"]), []
    for number in range(row.experts):
        model = masked_model(row, folder, train_set, seed)
        if row.experts > 1:
            own_share(model, number, row.experts)
        if row.rank:
            args = arguments(folder, row.updates, row.rate, seed + 100 * number)
            AdapterTrainer(model=model, args=args, train_dataset=train_set).train()
        else:
            train(model, row.updates, seed + 100 * number, train_set, {**settings, "learning_rate": row.rate})
        models.append(model.eval())
    return Experts(models) if row.experts > 1 else models[0]


def run(job: tuple) -> None:
    row, seed, settings, file = job
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    data = {split: tokens.long() for split, tokens in torch.load(settings["characters"]).items()}
    train_set = Sequences(data["train"], LENGTH)
    if ROWS[row].causal:
        causal_model(Path(settings["output"]), train_set, seed)  # (before the clock starts)
    start = time.process_time()
    model = trained(ROWS[row], seed, train_set, settings)
    seconds = time.process_time() - start
    held_out = Sequences(data["validation"], LENGTH).tokens
    bits = bits_by_quarter(model, held_out[:: len(held_out) // settings["texts"]][: settings["texts"]])
    result = {"bits": bits.mean().item(), "by quarter": bits.mean(0).tolist(), "seconds": seconds}
    of_texts = [round(value, 4) for value in bits.mean(1).tolist()]
    file.write_text(json.dumps({"row": row, "seed": seed, "updates": UPDATES, **result, "of texts": of_texts}))
    print(f"{row}, seed {seed}: {result}", flush=True)


def compared(results: list[dict]) -> list[dict]:
    """Runs with what they have over `BASE` of the same seed, in bits, and the standard error of that over texts, in place of
    each text's bits."""
    base = {result["seed"]: torch.tensor(result["of texts"]) for result in results if result["row"] == BASE}
    made = []
    for result in results:
        of_texts, over = torch.tensor(result["of texts"]), None
        if result["seed"] in base:
            differences = of_texts - base[result["seed"]]
            over = [round(each.item(), 4) for each in (differences.mean(), differences.std() / len(differences) ** 0.5)]
        made.append({**{key: value for key, value in result.items() if key != "of texts"}, "over the row in bold": over})
    return made


def table(results: list[dict]) -> str:
    """Markdown."""
    lines = [
        "|  | seed | bits a character | over the row in bold | by quarter of the masked share, least first | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        is_base, over = result["row"] == BASE, result["over the row in bold"]
        name = f"**{result['row']}**" if is_base else result["row"]
        quarters = " ".join(f"{each:.2f}" for each in result["by quarter"])
        difference = f"{over[0]:+.3f} ± {over[1]:.3f}" if over and not is_base else ""
        cells = [name, result["seed"], f"{result['bits']:.3f}", difference, quarters, f"{result['seconds']:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__, ROWS, "train.parquet and validation.parquet", "the cached runs, the causal model, the table")
    parser.add_argument("--texts", type=int, default=1024, help="of the held-out works, to measure on")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {
        "updates": UPDATES, "texts": options.texts, "output": str(options.output),
        "characters": characters(options.data, options.output),
    }  # fmt: skip
    results = results_of(run, ROWS, options.rows, options.seeds, settings, options.output, options.processes)
    report(compared(results), table(compared(results)), UPDATES, options.output)


if __name__ == "__main__":
    main()
