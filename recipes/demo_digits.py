"""What this package is for, shown on scikit-learn's digits: two minutes on two CPU cores.

    python recipes/demo_digits.py --output_dir outputs/demo

1. A stock model, streamed: the same weights in the end, in a part of the device's memory.
2. Blocks that classify, each on a loss of its own.
3. Blocks that draw, each a denoiser of its own noise levels.

Plain models stand beside each, as deep as all blocks and as deep as one. Parts 2 and 3 are the recipes
`train_image_classification.py` and `train_image_generation.py`, started by `accelerate launch`; what they print goes to log
files in the output folder. The models are then loaded in a new process, as anyone would load them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECIPES = Path(__file__).resolve().parent
TRAIN_IMAGES = 1437  # of 1797
STREAMED_LAYERS, STREAMED_UPDATES = 24, 20
SAMPLING_STEPS = 30

#: Part -> recipe, its YAML file, and how the file's model calls the number of its layers
PARTS = {
    "classify": ("train_image_classification.py", "digits.yaml", "num_hidden_layers"),
    "draw": ("train_image_generation.py", "digits_dit.yaml", "num_layers"),
}
BLOCKS, DEEP, SHALLOW = "blocks", "end_to_end", "end_to_end_one_block"


def write_data(folder: Path) -> None:
    """`train.parquet` and `test.parquet`: PNG images and labels, split the same way every time."""
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars
    from PIL import Image as Picture
    from sklearn.datasets import load_digits

    disable_progress_bars()
    digits = load_digits()
    images = [Picture.fromarray(np.round(image * (255 / 16)).astype(np.uint8)) for image in digits.images]
    features = Features(image=Image(), label=ClassLabel(names=[str(digit) for digit in range(10)]))
    order = np.random.default_rng(0).permutation(len(images))
    for split, rows in (("train", order[:TRAIN_IMAGES]), ("test", order[TRAIN_IMAGES:])):
        data = {"image": [images[i] for i in rows], "label": digits.target[rows].tolist()}
        Dataset.from_dict(data, features=features).to_parquet(folder / f"{split}.parquet")


# ---- 1: streamed


def stream(folder: Path) -> None:
    """The stock Trainer on a ViT, and again with its layers streamed: weights in the end, and what a step holds."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rows = pixels_and_labels(folder / "train.parquet")
    stock, plain, seconds = stock_run(rows, folder / "stock", streamed=False)
    streamed, part, seconds_streamed = stock_run(rows, folder / "streamed", streamed=True)
    equal = sum(map(torch.equal, stock.parameters(), streamed.parameters()))
    print(f"""
1. A model that does not fit: a ViT of {STREAMED_LAYERS} layers, {STREAMED_UPDATES} updates by the stock Trainer

                             device, at the peak        host   CPU seconds
   stock, checkpointing    {megabytes(plain.total, plain.total)}{0:>7.1f} MiB{seconds:>14.1f}
   streamed                {megabytes(part.total, plain.total)}{part.host / 2**20:>7.1f} MiB{seconds_streamed:>14.1f}

   {equal} of {len(list(stock.parameters()))} weight tensors are equal, bit by bit.
   (Counted tensor by tensor. The device is this CPU: copies are real, and no GPU is needed.)""")


def stock_run(rows: list[dict], folder: Path, streamed: bool) -> tuple:
    """A fresh ViT after its training, the ledger of one more step, and CPU seconds of training."""
    from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

    import hf_diffusionblocks as db

    set_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, num_labels=10, num_hidden_layers=STREAMED_LAYERS, hidden_size=128,
        intermediate_size=512, num_attention_heads=4,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    if streamed:
        db.stream_layers(model, "cpu")
    args = TrainingArguments(
        folder, max_steps=STREAMED_UPDATES, per_device_train_batch_size=32, learning_rate=1e-3, optim="adamw_torch_fused",
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False}, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    inputs = trainer.data_collator(rows[: args.per_device_train_batch_size])
    with db.StepMemory(model, trainer.optimizer.optimizer) as memory:
        model.train()(**inputs).loss.backward()
    return model, memory.ledger(), seconds


def pixels_and_labels(file: Path) -> list[dict]:
    import numpy as np
    import torch
    from datasets import load_dataset

    data = load_dataset("parquet", data_files=str(file), split="train")
    return [
        {"pixel_values": torch.tensor(np.array(row["image"]) / 127.5 - 1, dtype=torch.float32)[None], "labels": row["label"]}
        for row in data
    ]


def megabytes(size: int, whole: int) -> str:
    return f"{size / 2**20:>10.1f} MiB ({size / whole:4.0%})"


# ---- 2 and 3: trained by recipes, each model in a process of its own


def run_options() -> dict[str, list[str]]:
    """Folder of a model, "part/name" -> the recipe's options beyond those of the YAML file."""
    import yaml

    options = {}
    for part, (_, file, layers) in PARTS.items():
        given = yaml.safe_load((RECIPES / "configs" / file).read_text())
        depth = int(given["config_overrides"].split(f"{layers}=")[1].split(",")[0])
        shallow = given["config_overrides"].replace(f"{layers}={depth}", f"{layers}={depth // given['num_blocks']}")
        options[f"{part}/{BLOCKS}"] = []
        options[f"{part}/{DEEP}"] = ["--end_to_end"]
        options[f"{part}/{SHALLOW}"] = ["--end_to_end", "--config_overrides", shallow]
    return options


def train(folder: Path, name: str, options: list[str]) -> None:
    """`accelerate launch` of the part's recipe, until it ends."""
    recipe, file, _ = PARTS[name.split("/")[0]]
    (folder / name).mkdir(parents=True, exist_ok=True)
    log_file = folder / f"{name.replace('/', '_')}.log"
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        # All that accelerate would otherwise choose, with a warning.
        "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--num_cpu_threads_per_process", "1", "--quiet",  # one thread each: two runs share the machine
        str(RECIPES / recipe), "--config", str(RECIPES / "configs" / file), *options, "--eval_strategy", "no",
        "--train_file", str(folder / "train.parquet"), "--validation_file", str(folder / "test.parquet"),
        "--output_dir", str(folder / name),
    ]  # fmt: skip
    with log_file.open("w") as log:
        run(command, log_file, stdout=log, stderr=log)


def run(command: list[str], log_file: Path, **streams) -> None:
    """Run a command until it ends. If it fails, show the end of its log and stop."""
    # Nothing here needs the hub, and the data set cache belongs with the demo's other files.
    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(log_file.parent / "cache"), "OMP_NUM_THREADS": "1"}
    if subprocess.run(command, env=os.environ | settings, **streams).returncode:
        tail = "\n".join(log_file.read_text().splitlines()[-20:])
        sys.exit(f"{tail}\ndemo_digits.py: error: {' '.join(command)}\nfailed; the end of {log_file} is above")


# ---- the report, in a new process


def report(folder: Path) -> None:
    """Load the models from their folders, print the tables, draw the pictures."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    classifiers = report_classifiers(folder)
    report_drawing(folder, classifiers[DEEP])


def report_classifiers(folder: Path) -> dict:
    """Part 2; returns the models by name."""
    import torch
    from transformers import AutoModelForImageClassification

    import hf_diffusionblocks  # noqa: F401  registers the Auto classes

    rows = pixels_and_labels(folder / "test.parquet")
    pixels = torch.stack([row["pixel_values"] for row in rows]).expand(-1, 3, -1, -1)
    labels = torch.tensor([row["labels"] for row in rows])
    models = {n: AutoModelForImageClassification.from_pretrained(folder / "classify" / n) for n in (DEEP, SHALLOW, BLOCKS)}
    with torch.no_grad():
        accuracy = {name: 100 * (model(pixels).logits.argmax(-1) == labels).float().mean() for name, model in models.items()}
    trained = models[BLOCKS].config.training_report
    batch = slice(trained["batch_size"])
    held = {name: plain_step(models[name], pixels[batch], labels[batch]) for name in (DEEP, SHALLOW)} | {
        BLOCKS: trained["memory"]["activations saved for backward"] + trained["memory"]["gradients"]
    }
    print(f"""
2. Blocks that classify: a fresh ViT, {trained["updates_per_block"][0]} updates of every layer

                                          test accuracy   activations and gradients of a step""")
    for name, title in titles(models[BLOCKS].config.num_hidden_layers, models[BLOCKS].config.num_blocks).items():
        print(f"   {title:39}{accuracy[name]:>11.1f} %{megabytes(held[name], held[DEEP]):>24}")
    print(f"""
   A point of accuracy is chance: {len(rows)} test images. Digits this small do not need depth: two layers do as well.
   `to_plain()` of the blocks is a stock {type(models[BLOCKS].to_plain()).__name__}.""")
    return models


def titles(layers: int, num_blocks: int) -> dict[str, str]:
    each = layers // num_blocks
    blocks = f"{num_blocks} blocks of {each} layers"
    return {DEEP: f"end to end, {layers} layers", SHALLOW: f"end to end, {each} layers", BLOCKS: blocks}


def plain_step(model, pixel_values, labels) -> int:
    """Bytes of saved activations and of gradients in a training step of a plain model."""
    import torch

    import hf_diffusionblocks as db

    model.train()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    parts = db.measure_memory(model, still, lambda: model(pixel_values=pixel_values, labels=labels).loss).parts
    model.eval()
    return parts.activations + parts.gradients


def report_drawing(folder: Path, classifier) -> None:
    """Part 3, whose drawings the plain classifier of part 2 reads."""
    import json

    import torch

    import hf_diffusionblocks as db
    from hf_diffusionblocks.recipes.plots import plot_noise_partition

    asked = list(range(10)) * 20
    found = {}
    for name in (DEEP, SHALLOW, BLOCKS):
        model = db.DiffusionBlocksForImageGeneration.from_pretrained(folder / "draw" / name)
        start = time.perf_counter()
        images = model.predict(asked, num_inference_steps=SAMPLING_STEPS).images
        seconds = time.perf_counter() - start
        with torch.no_grad():
            read = classifier(images.clamp(-1, 1).expand(-1, 3, -1, -1)).logits.argmax(-1)
        memory = model.config.training_report["memory"]
        found[name] = {
            "loss": json.loads((folder / "draw" / name / "eval_results.json").read_text())["eval_loss"], "seconds": seconds,
            "read": 100 * (read == torch.tensor(asked)).float().mean(),
            "bytes": memory["activations saved for backward"] + memory["gradients"],
        }  # fmt: skip
    print(f"""
3. Blocks that draw: a fresh DiT, {model.config.training_report["updates_per_block"][0]} updates of every layer

                             held-out loss   drawn as asked   seconds of {len(asked)} drawings   activations and gradients""")
    for name, title in titles(model.config.num_hidden_layers, model.config.num_blocks).items():
        row = found[name]
        print(
            f"   {title:26}{row['loss']:>13.3f}{row['read']:>15.0f} %{row['seconds']:>22.1f}"
            f"{megabytes(row['bytes'], found[DEEP]['bytes']):>30}"
        )
    print("""
   Each block denoises its own noise levels: a step of training, or of drawing, runs one block. Two plain layers cost as much.
   Drawn as asked: what the plain classifier of part 2 reads. One learning rate for all, one seed.""")
    plot_noise_partition(model.noise_schedule, folder / "noise_partition.png")


def what_next(folder: Path) -> str:
    python = Path(os.path.relpath(sys.executable))  # of this environment, as one would type it
    command = python.with_name("diffusionblocks")
    return f"""
Pictures
  {folder / "draw" / BLOCKS / "samples" / "final.png"}: drawn by blocks; beside it, by plain models
  {folder / "noise_partition.png"}: how the noise is cut into blocks

Try next
  {command} generate {folder / "draw" / BLOCKS} --class_labels 3 5 --output grid.png
  {command} estimate --model {folder / "classify" / DEEP} --num-blocks 3 --batch-size 32
  {python} recipes/finetune.py --help
  README.md: both doors, in three lines each, and when not to use them"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the data, models, logs and pictures")
    parser.add_argument("--only", choices=["stream", "report"], help="part 1 alone; or report on models that are there")
    options = parser.parse_args()
    folder = options.output_dir
    if options.only:
        {"stream": stream, "report": report}[options.only](folder)
        return
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)

    def in_new_process(part: str) -> None:
        with (folder / f"{part}.log").open("w") as log:
            run([sys.executable, __file__, "--output_dir", str(folder), "--only", part], folder / f"{part}.log", stderr=log)

    with ThreadPoolExecutor(max_workers=2) as pool:
        runs = [pool.submit(in_new_process, "stream"), *(pool.submit(train, folder, *each) for each in run_options().items())]
        for done in runs:
            done.result()
    in_new_process("report")
    print(f"\nTotal: {time.perf_counter() - start:.0f} s")
    print(what_next(folder))


if __name__ == "__main__":
    main()
