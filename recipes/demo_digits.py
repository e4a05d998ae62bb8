"""Train scikit-learn's digits block by block and end to end, reload the models, and compare: minutes on two CPU cores.

    python recipes/demo_digits.py --output_dir outputs/demo

The trainings are the recipe `train_image_classification.py`, started by `accelerate launch`; what they print goes
to log files in the output folder. The models are then loaded in a new process, as anyone would load them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

RECIPES = Path(__file__).resolve().parent
CONFIG = RECIPES / "configs" / "digits.yaml"
TRAIN_IMAGES = 1437  # of 1797

#: Folders of the models.
BLOCKS, PAPER, END_TO_END, ONE_BLOCK = "diffusionblocks", "diffusionblocks_paper", "end_to_end", "end_to_end_one_block"


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


# ---- training, each in a process of its own


def run_options() -> dict[str, list[str]]:
    """Folder of a model -> the recipe's options beyond those of the YAML file."""
    import yaml

    options = yaml.safe_load(CONFIG.read_text())
    layers = int(options["config_overrides"].split("num_hidden_layers=")[1].split(",")[0])
    shallow = f"num_hidden_layers={layers // options['num_blocks']}"
    overrides = options["config_overrides"].replace(f"num_hidden_layers={layers}", shallow)
    return {
        BLOCKS: [],
        PAPER: ["--preset", "paper"],
        END_TO_END: ["--end_to_end"],
        ONE_BLOCK: ["--end_to_end", "--config_overrides", overrides],
    }


def train(folder: Path, name: str, options: list[str]) -> float:
    """`accelerate launch` of the recipe, until it ends; returns seconds."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        # All that accelerate would otherwise choose, with a warning.
        "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--num_cpu_threads_per_process", "1", "--quiet",  # one thread each: two runs share the machine
        str(RECIPES / "train_image_classification.py"), "--config", str(CONFIG), *options,
        "--train_file", str(folder / "train.parquet"), "--validation_file", str(folder / "test.parquet"),
        "--output_dir", str(folder / name),
    ]  # fmt: skip
    with (folder / f"{name}.log").open("w") as log:
        return run(command, folder / f"{name}.log", stdout=log, stderr=log)


def run(command: list[str], log_file: Path, **streams) -> float:
    """Run a command until it ends; returns seconds. If it fails, show the end of its log and stop."""
    start = time.perf_counter()
    # Nothing here needs the hub, and the data set cache belongs with the demo's other files.
    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(log_file.parent / "cache"), "OMP_NUM_THREADS": "1"}
    if subprocess.run(command, env=os.environ | settings, **streams).returncode:
        tail = "\n".join(log_file.read_text().splitlines()[-20:])
        sys.exit(f"{tail}\ndemo_digits.py: error: {' '.join(command)}\nfailed; the end of {log_file} is above")
    return time.perf_counter() - start


# ---- the report, in a new process


def report(folder: Path) -> None:
    """Load the models from their folders, print the table, draw the pictures."""
    import torch
    from datasets import load_dataset
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
    from transformers.utils import logging

    import hf_diffusionblocks  # noqa: F401  registers the Auto classes
    from hf_diffusionblocks.recipes.plots import plot_noise_partition, plot_walk

    logging.set_verbosity_error()
    test = load_dataset("parquet", data_files=str(folder / "test.parquet"), split="train")
    images, labels = list(test["image"]), torch.tensor(test["label"])
    processor = AutoImageProcessor.from_pretrained(folder / BLOCKS)
    pixel_values = processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    models = {name: AutoModelForImageClassification.from_pretrained(folder / name) for name in run_options()}

    blocks, paper = models[BLOCKS], models[PAPER]
    with torch.no_grad():
        logits = {name: model(pixel_values).logits for name, model in models.items()}
    generator = torch.Generator().manual_seed(0)
    walked = paper.predict(pixel_values, num_inference_steps=paper.config.num_blocks, generator=generator)
    accuracy = {name: percent(values, labels) for name, values in (logits | {PAPER: walked.logits}).items()}

    training, parts = blocks.config.training_report, ("activations saved for backward", "gradients")
    memory = {name: [models[name].config.training_report["memory"][part] for part in parts] for name in (BLOCKS, PAPER)}
    for name in (END_TO_END, ONE_BLOCK):
        batch = slice(training["batch_size"])
        memory[name] = step_memory(models[name], pixel_values[batch], labels[batch])
    print_table(models, accuracy, memory, training, len(images))

    classify = pipeline("image-classification", model=str(folder / BLOCKS))
    answers = [answer[0] for answer in classify(images, top_k=1, batch_size=60)]
    same = sum(blocks.config.label2id[a["label"]] == int(k) for a, k in zip(answers, logits[BLOCKS].argmax(-1)))
    print(f"\nReloaded, pipeline('image-classification') agrees with model(x).logits on {same}/{len(images)} images.")

    plot_noise_partition(paper.noise_schedule, folder / "noise_partition.png")
    # From the image that leaves the first block most in doubt to one of little doubt: there a walk has work to do.
    order = walked.trajectory[:, 0].amax(-1).argsort()
    chosen = [int(order[int(share * len(order))]) for share in (0, 0.02, 0.05, 0.1, 0.2)]
    walk = paper.predict(pixel_values[chosen], num_inference_steps=2 * paper.config.num_blocks)
    plot_walk([images[i] for i in chosen], labels[chosen], walk, paper.config.id2label, folder / "walk.png")


def percent(logits, labels) -> float:
    return 100 * float((logits.argmax(-1) == labels).float().mean())


def step_memory(model, pixel_values, labels) -> tuple[int, int]:
    """Bytes of saved activations and of gradients in a training step of a plain model."""
    from hf_diffusionblocks.memory.activations import SavedActivations, gradient_bytes

    model.train()
    with SavedActivations(model.parameters()) as saved:
        loss = model(pixel_values=pixel_values, labels=labels).loss
    loss.backward()
    return saved.bytes, gradient_bytes(model.parameters())


def print_table(models: dict, accuracy: dict, memory: dict, training: dict, num_images: int) -> None:
    num_blocks, layers = models[BLOCKS].config.num_blocks, models[BLOCKS].config.num_hidden_layers
    rows = {
        END_TO_END: f"end to end, {layers} layers",
        ONE_BLOCK: f"end to end, {layers // num_blocks} layers (the depth of one block)",
        BLOCKS: f"DiffusionBlocks, {num_blocks} blocks of {layers // num_blocks} layers",
        PAPER: f"  the paper's, by a walk of {num_blocks} steps from noise",
    }
    print(f"\n{'':46}{'test':>9}  {'memory of a training step':>34}")
    print(f"{'':46}{'accuracy':>9}  {'activations':>17}{'gradients':>17}")
    for name, title in rows.items():
        cells = [
            f"{size / 2**20:.2f} MiB ({size / whole:4.0%})" for size, whole in zip(memory[name], memory[END_TO_END])
        ] if name in memory else []  # fmt: skip
        print(f"{title:46}{accuracy[name]:>7.1f} %  {''.join(f'{cell:>17}' for cell in cells)}".rstrip())
    print(
        f"\n{training['updates_per_block'][0]} updates of {training['batch_size']} images for every block and for the "
        f"plain models; {num_images} test images,\nso a point is chance. Images this small hardly need depth: the "
        "memory is the point here."
    )


def what_next(folder: Path) -> str:
    python = Path(os.path.relpath(sys.executable))  # of this environment, as one would type it
    command = python.with_name("diffusionblocks")
    return f"""
Pictures
  {folder / 'noise_partition.png'}: how the noise is cut into blocks
  {folder / 'walk.png'}: predictions that sharpen along a walk from noise to a label

Try next
  {command} inspect {folder / BLOCKS}
      what each block holds, and in which file
  {command} estimate --model {folder / END_TO_END} --num-blocks 3 --batch-size 32
      what other ways to train this model would hold in memory
  {python} recipes/train_image_classification.py --help
      the same on images of your own; finetune.py, beside it, tunes a pretrained text model
  README.md: the quick start in Python, and when (not) to use this"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the data, models, logs and pictures")
    parser.add_argument("--report", action="store_true", help="only report on models that have been trained")
    options = parser.parse_args()
    folder = options.output_dir
    if options.report:
        report(folder)
        return
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    print(f"Digits written to {folder} ({time.perf_counter() - start:.0f} s). Training four models, two at a time:")
    with ThreadPoolExecutor(max_workers=2) as pool:
        runs = {pool.submit(train, folder, name, extra): name for name, extra in run_options().items()}
        for done in as_completed(runs):
            print(f"  {runs[done]} ({done.result():.0f} s)", flush=True)
    with (folder / "report.log").open("w") as log:
        command = [sys.executable, __file__, "--output_dir", str(folder), "--report"]
        run(command, folder / "report.log", stderr=log)
    print(f"Total: {time.perf_counter() - start:.0f} s")
    print(what_next(folder))


if __name__ == "__main__":
    main()
