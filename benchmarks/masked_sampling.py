"""What the models of benchmarks/quality_masked.py write, how fast, and a picture of one text as it is unmasked.

    python benchmarks/masked_sampling.py --data ../shared/data/gutenberg --results outputs/quality_masked --output docs
    python benchmarks/masked_sampling.py ... --seconds  # on an idle machine, before

Texts of 128 characters from nothing but masks, in T steps, by `infill(remasking="random")`, temperature 1. They are read by
a judge, an autoregressive Llama of 6 layers that is trained here on the same works: bits a character, which held-out text
has, too. Repetition is cheap to a judge, so the entropy of 4-grams stands beside it, of as many held-out characters as
well. Seconds are paired: rows take turns, fastest of several. Writes `masked_sampling.md` to the results, and
`masked_unmasking.png` to the output folder.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path

import matplotlib
import torch
from cached_runs import file_of
from characters import characters, decode
from gutenberg import config_for
from quality_masked import LENGTH, MASK, ROWS, WIDTH
from quality_text import ChunkedTrainer, Sequences
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainingArguments, set_seed

import hf_diffusionblocks as db

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

STEPS = (8, 16, 32, 64, 128)
SAMPLED = ("end to end, 6 layers", "end to end, 2 layers", "B=3 of 2 layers (paper)", "B=3 of 6 layers")
DRAWN = "B=3 of 2 layers (paper)"


def judge(folder: Path, train_set: Sequences, updates: int) -> LlamaForCausalLM:
    """Trained once, and kept."""
    kept = folder / "judge"
    if not kept.is_dir():
        set_seed(0)
        model = AutoModelForCausalLM.from_config(config_for("llama", 6, WIDTH, MASK, LENGTH))
        args = TrainingArguments(
            str(folder), max_steps=updates, per_device_train_batch_size=16, learning_rate=2e-3, weight_decay=0.1,
            adam_beta2=0.95, lr_scheduler_type="cosine", warmup_steps=0.05, use_cpu=True, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        ChunkedTrainer(model=model, args=args, train_dataset=train_set).train()
        model.save_pretrained(kept)
    return LlamaForCausalLM.from_pretrained(kept).eval()


@torch.no_grad()
def bits(judge: LlamaForCausalLM, texts: torch.Tensor) -> float:
    """A character, of all but the first of each text."""
    losses = [
        F.cross_entropy(judge(part).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        for part in texts.split(32)
    ]
    return sum(losses) / texts[:, 1:].numel() / math.log(2)


def entropy(texts: torch.Tensor, n: int = 4) -> float:
    """Of their n-grams, in bits."""
    counts = Counter(tuple(gram) for text in texts.tolist() for gram in zip(*(text[k:] for k in range(n))))
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def written(model, num_texts: int, steps: int, remasking: str = "random") -> torch.Tensor:
    """`[N, 128]`."""
    parts = []
    for number in range(0, num_texts, 32):
        masks = torch.full((min(32, num_texts - number), LENGTH), MASK)
        generator = torch.Generator().manual_seed(number)
        parts.append(model.infill(masks, num_inference_steps=steps, remasking=remasking, generator=generator))
    return torch.cat(parts)


def seconds_a_token(models: dict, repeats: int = 3) -> dict[str, dict[int, float]]:
    """Of a batch of 16 texts, the fastest; rows take turns."""
    found = {row: dict.fromkeys(STEPS, math.inf) for row in models}
    for steps in STEPS:
        for _ in range(repeats):
            for row, model in models.items():
                start = time.perf_counter()
                model.infill(torch.full((16, LENGTH), MASK), num_inference_steps=steps)
                found[row][steps] = min(found[row][steps], (time.perf_counter() - start) / (16 * LENGTH))
    return found


def table(models: dict, reader: LlamaForCausalLM, held_out: torch.Tensor, seconds: dict) -> str:
    """Markdown: a row a model, a column a number of steps: bits, entropy, and microseconds a character."""
    lines = [
        f"Held-out text: {bits(reader, held_out):.2f} bits a character by the judge, {entropy(held_out):.2f} bits of "
        "entropy of its 4-grams. Cells: bits by the judge, entropy; microseconds a character.",
        "",
        f"| | {' | '.join(f'T={steps}' for steps in STEPS)} |",
        "|---" * (len(STEPS) + 1) + "|",
    ]
    for row, model in models.items():
        for remasking in ("random", "low_confidence"):
            cells = []
            for steps in STEPS:
                texts = written(model, len(held_out), steps, remasking)
                cells.append(f"{bits(reader, texts):.2f}, {entropy(texts):.2f}")
                if remasking == "random" and row in seconds:
                    cells[-1] += f"; {1e6 * seconds[row][str(steps)]:.0f}"
            lines.append(f"| {row}{'' if remasking == 'random' else ', the surest first'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_unmasking(model, file: Path, steps: int = 32, shown: tuple[int, ...] = (4, 8, 16, 24, 32)) -> None:
    """One text after some of its steps; characters in the colour of the block that revealed them."""
    masks, generator = torch.full((1, LENGTH), MASK), torch.Generator().manual_seed(7)
    told = model.infill(masks, num_inference_steps=steps, generator=generator, return_dict_in_generate=True)
    text, revealed, blocks = decode(told.sequences[0]), told.steps[0].tolist(), told.blocks[0].tolist()
    colours, width = plt.get_cmap("tab10"), 64
    lines = LENGTH // width
    figure, axis = plt.subplots(figsize=(11, 0.36 * len(shown) * (lines + 0.6) + 0.5))
    axis.set_xlim(0, width + 9)
    axis.set_ylim(len(shown) * (lines + 0.6), -1)
    axis.axis("off")
    for k in range(model.num_blocks):
        axis.text(9 + 12 * k, -0.4, f"block {k}", color=colours(k), fontsize=10, fontweight="bold")
    for number, step in enumerate(shown):
        top = number * (lines + 0.6) + 0.5
        axis.text(0, top, f"step {step}", fontsize=9, color="#66727e", va="center")
        for place, character in enumerate(text):
            is_there = revealed[place] < step
            axis.text(
                9 + place % width, top + place // width, character if is_there else "·", family="monospace", fontsize=10,
                ha="center", va="center", color=colours(blocks[place]) if is_there else "#c3ccd4",
            )  # fmt: skip
    figure.tight_layout(pad=0.3)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and validation.parquet")
    parser.add_argument("--results", type=Path, required=True, help="folder of benchmarks/quality_masked.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of the picture")
    parser.add_argument("--updates", type=int, default=3000, help="of the models")
    parser.add_argument("--judge_updates", type=int, default=1500)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--seconds", action="store_true", help="measure the seconds instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folders = {row: file_of(options.results, ROWS, row, options.updates).with_suffix("") for row in SAMPLED}
    models = {row: db.DiffusionBlocksForMaskedLM.from_pretrained(folder).eval() for row, folder in folders.items()}
    seconds_file = options.results / "sampling-seconds.json"
    if options.seconds:
        seconds_file.write_text(json.dumps(seconds_a_token(models)))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    draw_unmasking(models[DRAWN], options.output / "masked_unmasking.png")
    data = {split: tokens.long() for split, tokens in torch.load(characters(options.data, options.results)).items()}
    reader = judge(options.results, Sequences(data["train"], LENGTH), options.judge_updates)
    held_out = Sequences(data["validation"], LENGTH).tokens
    held_out = held_out[:: len(held_out) // options.texts][: options.texts]
    seconds = json.loads(seconds_file.read_text()) if seconds_file.is_file() else {}
    result = table(models, reader, held_out, seconds)
    (options.results / "masked_sampling.md").write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
