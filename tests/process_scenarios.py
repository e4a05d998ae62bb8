"""What test_processes.py runs, in one process and under `accelerate launch` in several.

accelerate launch ... process_scenarios.py OUTPUT NAME...
accelerate launch ... process_scenarios.py OUTPUT --saving NAME
"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import GPT2Config, LlamaConfig, ResNetConfig, ViTConfig

import hf_diffusionblocks as db
from hf_diffusionblocks.backbones.dit import DiTConfig

torch.set_num_threads(1)
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # whose tiny models are those of tests, too

GPT2 = GPT2Config(
    n_layer=4, n_embd=32, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0,
    embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
VIT = ViTConfig(
    num_hidden_layers=4, hidden_size=32, intermediate_size=48, num_attention_heads=4, image_size=8, patch_size=4,
    num_channels=1, num_labels=5,
)  # fmt: skip
RESNET = ResNetConfig(
    num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5, image_size=8
)  # fmt: skip
DIT = DiTConfig(
    num_layers=4, num_attention_heads=2, attention_head_dim=8, in_channels=2, sample_size=8, patch_size=4,
    num_embeds_ada_norm=5,
)  # fmt: skip
LLAMA = LlamaConfig(
    num_hidden_layers=4, hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=64,
    max_position_embeddings=16,
)  # fmt: skip
INDEPENDENT = {"preset": "paper", "shared": "per_block"}
CARRIED = {"preset": "recommended", "local_head_layers": 0}
PLAIN_SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.5}  # AdamW makes signs of what is nearly nothing

#: Name -> source, fields of `convert`, training arguments
SCENARIOS: dict[str, tuple[object, dict, dict]] = {
    "data parallel, text": (GPT2, CARRIED, {**PLAIN_SGD, "ema_decay": 0.9, "block_schedule": "random"}),
    "data parallel, the paper's text": (GPT2, {}, PLAIN_SGD),
    "data parallel, images": (VIT, {}, PLAIN_SGD),
    "data parallel, image generation": (DIT, {}, PLAIN_SGD),
    "data parallel, accumulated": (GPT2, CARRIED, {**PLAIN_SGD, "gradient_accumulation_steps": 2}),
    "data parallel, together": (GPT2, CARRIED, {**PLAIN_SGD, "block_schedule": "together"}),
    "batch norms": (RESNET, CARRIED, {**PLAIN_SGD, "block_schedule": "random"}),
}  # fmt: skip
#: Those that are also stopped after 2 steps and resumed
RESUMED = ("data parallel, text", "data parallel, together", "batch norms")
STREAMED = ("plain", "bf16", "lora")
STEPS, BATCH, PROCESSES = 4, 2, 2


def rows(source) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    if source is VIT or source is RESNET:
        images = torch.randn(64, 1, 8, 8, generator=generator)
        return Dataset.from_dict({"pixel_values": images.tolist(), "labels": [k % 5 for k in range(64)]}).with_format("torch")
    if source is DIT:
        images = torch.randn(64, 2, 8, 8, generator=generator)
        classes = [k % 5 for k in range(64)]
        return Dataset.from_dict({"pixel_values": images.tolist(), "class_labels": classes}).with_format("torch")
    tokens = torch.randint(64, (64, 12), generator=generator)
    labels = tokens.masked_fill(torch.rand(64, 12, generator=generator) < 0.2, -100)
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()}).with_format("torch")


def made(source, fields: dict, resident_blocks=None):
    torch.manual_seed(0)
    return db.convert(source, resident_blocks=resident_blocks, **{"num_blocks": 2, "preset": "paper", **fields})


def arguments_of(folder: Path, arguments: dict, batch: int = BATCH) -> db.DiffusionBlocksTrainingArguments:
    arguments = {"max_steps": STEPS, "learning_rate": 1e-2, "save_strategy": "no", **arguments}
    return db.DiffusionBlocksTrainingArguments(
        str(folder), per_device_train_batch_size=batch, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1,
        dataloader_pin_memory=False, **arguments,
    )  # fmt: skip


def trainer_of(model, source, folder: Path, arguments: dict, batch: int = BATCH) -> db.DiffusionBlocksTrainer:
    args = arguments_of(folder, arguments, batch)
    return db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=rows(source), eval_dataset=rows(source))


#: Trainers that live as long as their process, as a script's does.
KEPT = []


def run(name: str, output: Path) -> None:
    source, fields, arguments = SCENARIOS[name]
    rank = int(os.environ["RANK"])
    model = made(source, fields)
    if rank > 0:
        with torch.no_grad():
            next(model.parameters()).add_(1.0)  # all are to start from rank 0's
    trainer = trainer_of(model, source, output / name, arguments)
    KEPT.append(trainer)
    trainer.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with trainer.averaged_weights():
        averages = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(
        {
            "state": state, "averages": averages, "loss": trainer.evaluate()["eval_loss"], "log": trainer.state.log_history,
        },
        output / f"{name}.{rank}.pt",
    )  # fmt: skip
    trainer.save_model()
    if name in RESUMED:
        saving = {**arguments, "save_strategy": "steps", "save_steps": 2}
        trainer_of(made(source, fields), source, output / f"{name}-saved", saving).train()
        again = trainer_of(made(source, fields), source, output / f"{name}-saved", saving)
        again.train(resume_from_checkpoint=str(output / f"{name}-saved" / "checkpoint-2"))
        torch.save(again.model.state_dict(), output / f"{name}.resumed.{rank}.pt")


def run_saving(name: str, output: Path) -> None:
    """Save at every step."""
    source, fields, arguments = SCENARIOS[name]
    saving = {**arguments, "save_strategy": "steps", "save_steps": 1}
    trainer_of(made(source, fields), source, output / f"{name}-killed", saving).train()


def run_streamed(name: str, output: Path) -> None:
    """As a stock model, and streamed."""
    from streaming_models import weights
    from test_streaming_training import adapted, trained

    for streamed in (False, True):
        model = {"model": adapted()} if name == "lora" else {}
        trainer = trained(output / "streamed", streamed, max_steps=3, bf16=name == "bf16", **model)
        kept = weights(trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False))
        torch.save(kept, output / f"{name}-{streamed}-{trainer.args.process_index}.pt")


def write_threads(path: Path) -> None:
    """Names of the threads that this process has, Python's or not."""
    names, tasks = [], Path("/proc/self/task")  # only Linux has it
    for task in tasks.iterdir() if tasks.is_dir() else ():
        with suppress(OSError):  # it has ended meanwhile
            names.append(task.joinpath("comm").read_text())
    path.write_text("".join(names))


@record  # the launcher then prints the traceback of a process that failed
def main(output: str, *names: str) -> None:
    # (Before Trainers register theirs: called after these.)
    atexit.register(write_threads, Path(output) / f"threads-{os.environ['RANK']}.txt")
    if names[0] == "--saving":
        run_saving(names[1], Path(output))
    else:
        for scenario in names:
            run(scenario, Path(output))
        for scenario in STREAMED:
            run_streamed(scenario, Path(output))
    dist.barrier()  # a process that ends while another still saves would close its connections


if __name__ == "__main__":
    main(*sys.argv[1:])
