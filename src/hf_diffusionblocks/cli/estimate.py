"""`diffusionblocks estimate`: what a training step would hold in memory, before there is any."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..configuration import option
from ..conversion import read_config
from ..memory.estimate import BANDWIDTH, DTYPES, estimate_memory
from .arguments import BlocksArguments, config_fields, parse_verb


@dataclass
class EstimateArguments:
    model: str = field(
        metadata={"help": "Hub id or folder of a model, plain or DiffusionBlocks, or a config JSON file; no weights are read."}
    )
    task: str | None = option(None, "As in pipeline(task). Not given: the model's own, or the architecture's usual task.")
    batch_size: int = option(1, "Sequences or images of a training step.")
    sequence_length: int | None = option(None, "Tokens a sequence (text).")
    dtype: str = option(
        "fp32",
        "Of parameters, and so of gradients, optimizer state and activations, as when a model is loaded in it. "
        f"One of {', '.join(DTYPES)}.",
    )
    bf16: bool = option(False, "Computes in bfloat16 by autocast, over parameters in fp32, as the Trainer's --bf16.")
    keep: str = option("0", "Of streamed layers, those that stay on the device: a number, or memory, as in 20GiB.")
    bandwidth: str = option(BANDWIDTH, "Of copies between host and device, bytes a second.")
    tflops: float | None = option(
        None,
        "What the device reaches, in 10^12 operations a second: also the batch size from which on computing hides the copies.",
    )
    budget: str | None = option(
        None, "Bytes on the device, as in 24GiB: also what fits, and the smallest number of blocks that does."
    )
    device: str | None = option(
        None, "What trains, cuda or cpu: a GPU reads out more rows at a time. Not given: this machine's."
    )
    ema: bool = option(False, "With float32 averages of the trained weights (ema_decay).")


def run(args: list[str]) -> None:
    options, blocks = parse_verb(
        "estimate",
        [EstimateArguments, BlocksArguments],
        {},
        args,
        description="Print what a training step would hold, on the device and in host memory: end to end, checkpointed, with "
        "LoRA (if peft is installed), with its layers streamed, and, of an architecture that can be cut, block by block; "
        "without options of the formulation, the recommended one and the paper's. The real step is followed on tensors "
        "without memory.",
    )
    try:
        config = read_config(options.model)
    except OSError as error:  # "couldn't connect": for what?
        raise OSError(f"--model {options.model}: {error}") from error
    given = config_fields(blocks)
    print(
        estimate_memory(
            config, given.pop("num_blocks", None), options.batch_size, options.sequence_length, options.dtype, options.budget,
            options.ema, options.task, options.device, bf16=options.bf16,
            keep=int(options.keep) if options.keep.isdigit() else options.keep, bandwidth=options.bandwidth,
            tflops=options.tflops, **given,
        )
    )  # fmt: skip
