"""`estimate_memory`: the ledger of a training step that is only followed, without memory for its tensors."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration import USER_FIELDS, DiffusionBlocksConfig, check_known
from ..conversion import convert
from ..whole_numbers import check_whole
from .costs import Costs, Operations
from .formulas import FSDP, costs_of_fsdp, ledgers_by_formula
from .ledger import Ledger
from .scenarios import followed_stream, ledger_of, ledgers_of
from .stock import matrices_of_layers
from .table import UNITS, as_table, bytes_as_text, ledger_table, parse_bytes, table_unit
from .ways import (
    CHECKPOINTING, END_TO_END, Way, Workload, formulations_for, ways_of_blocks, ways_of_stock_models, ways_of_streams
)  # fmt: skip

DTYPES = {
    "fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip
BANDWIDTH = "25GB/s"  #: of PCIe 4.0 with 16 lanes, from pinned memory


@dataclass(frozen=True)
class MemoryEstimate:
    """What the ways to train a model would hold; printed, a table.

    Args:
        workload: what is trained on what.
        ledgers: of each way, its largest step.
        costs: of each way that keeps weights in host memory, what that costs.
        bandwidth: bytes a second that are copied.
        tflops: what the device computes, in 10^12 operations a second; or None.
        budget: bytes that are to suffice, or None.
        fitting: with a budget, of each way the smallest B that fits; None where none does. (B=1 for stock models.)
    """

    workload: Workload
    ledgers: dict[str, Ledger]
    costs: dict[str, Costs] = field(compare=False)
    bandwidth: int
    tflops: float | None = None
    budget: int | None = None
    fitting: dict[str, int | None] | None = None

    def __str__(self) -> str:
        fits = {}
        if self.fitting is not None:
            fits[f"fits {bytes_as_text(self.budget)}"] = {name: _fits(blocks) for name, blocks in self.fitting.items()}
        lines = [self._title, "", ledger_table(self.ledgers, fits), "", as_table(self._costs), ""]
        if self.workload.stock.task_name == "text-generation":
            lines.append("Streamed, large logits are computed in parts; other rows of the stock model hold all, as it does.")
        lines.append("Seconds: copies of a micro-batch, one after the other; AdamW's step on this host, by a probe.")
        return "\n".join(lines)

    @property
    def _title(self) -> str:
        workload = self.workload
        size = (
            f"{workload.batch_size} images"
            if workload.sequence_length is None
            else (f"{workload.batch_size} x {workload.sequence_length} tokens")
        )
        layers, blocks = workload.stock.num_layers, workload.num_blocks
        return ", ".join([
            workload.config.model_type, *([f"{layers} layers"] if layers else []), *([f"B={blocks}"] if blocks else []),
            size, str(workload.dtype).removeprefix("torch."), *(["computing in bfloat16"] if workload.bf16 else []),
            "AdamW", workload.device,
        ])  # fmt: skip

    @property
    def _costs(self) -> list[list[str]]:
        """Rows of what host memory costs, the heading first."""
        unit, decimals = table_unit(self.ledgers)
        seconds = [f"copying, s ({self.bandwidth / 1e9:g} GB/s)", "AdamW on the host, s"]
        rows = [[unit, "copied to the device, and back", *seconds]]
        for name, each in self.costs.items():
            copied = ", ".join(f"{size / UNITS[unit]:,.{decimals}f}" for size in (each.to_device, each.to_host))
            stepping = each.stepping(self.workload.dtype)
            rows.append([name, copied, _seconds(each.copying(self.bandwidth)), _seconds(stepping)])
        if self.tflops is not None:
            rows[0].append(f"copies hidden from batch size ({self.tflops:g} TFLOPS)")
            for row, each in zip(rows[1:], self.costs.values()):
                row.append(f"{each.hidden_from(self.bandwidth, self.tflops, self.workload.batch_size):,}")
        return rows


def estimate_memory(
    model_or_config: PreTrainedModel | PreTrainedConfig,
    num_blocks: int | None = None,
    batch_size: int = 1,
    sequence_length: int | None = None,
    dtype: torch.dtype | str | None = None,
    budget: int | str | None = None,
    ema: bool = False,
    task: str | None = None,
    device: str | None = None,
    *,
    bf16: bool = False,
    keep: int | str = 0,
    bandwidth: int | str = BANDWIDTH,
    tflops: float | None = None,
    **config_fields,
) -> MemoryEstimate:
    """What a training step would hold, on the device and in host memory: end to end, checkpointed, with LoRA (if peft is
    installed), with its layers streamed, and, of an architecture that can be cut, block by block.

    The real step runs on tensors that have sizes and no memory, under the same [`StepMemory`] that measures it: what it says
    is what would be measured on a CPU, but for the rows that blocks read out, which are as many as on `device`. (On a GPU,
    attention with dropout takes less: other kernels.) Rows "by formula" are counted: see `memory/formulas.py`.

    Args:
        model_or_config: stock, of a causal language model or an image classifier, or DiffusionBlocks. Weights are not read.
        num_blocks: B, where it can be cut; None is the DiffusionBlocks model's, or what `convert` takes.
        batch_size: rows of a step.
        sequence_length: tokens a row; text only.
        dtype: of parameters, and so of gradients, optimizer state and activations, as when a model is loaded in it (not
            autocast). None is the model's, and float32 for a config.
        budget: bytes on the device, or a number with a unit ("24GiB"): also say what fits, and the smallest B that does.
        ema: with averages of the trained weights (`ema_decay`), where layers are not streamed.
        task: what the model is for, as in `pipeline(task)`; None is the DiffusionBlocks model's own, or the architecture's
            usual one.
        device: the kind that trains, "cuda" or "cpu": an accelerator reads out more rows at a time. None is this machine's
            accelerator, if it has one.
        bf16: with autocast to bfloat16, as the Trainer's `bf16=True`, over parameters in float32.
        keep: of streamed layers, those that stay on the device, as in `stream_layers`: a number, or "20GiB".
        bandwidth: of copies between host and device, bytes a second or as in "25GB/s".
        tflops: what the device reaches, in 10^12 operations a second: also give the batch size from which on computing takes
            as long as the copies, and hides them.
        config_fields: of [`DiffusionBlocksConfig`]; without any, and for a plain model, the recommended formulation and
            the paper's.

    Raises:
        ValueError: a field is out of range, or the model is of none of these kinds; names the field.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if dtype is None:
        dtype = getattr(model_or_config, "dtype", None) if isinstance(model_or_config, PreTrainedModel) else None
    if isinstance(config, DiffusionBlocksConfig):
        task = config.task if task is None else task
        num_blocks = num_blocks or config.num_blocks
        of_model = {name: getattr(config, name) for name in USER_FIELDS if name != "num_blocks"}
        config_fields, config = of_model | config_fields, config.source_config
    workload = Workload(
        config, num_blocks, batch_size, sequence_length, _dtype(dtype, bf16), task, ema, _kind_of_device(device), bf16, keep
    )
    workload, formulations = _checked(workload, config_fields)
    if tflops is not None and not (isinstance(tflops, (int, float)) and tflops > 0):
        raise ValueError(f"tflops={tflops!r} must be a number above 0")
    rate = parse_bytes(bandwidth.removesuffix("/s") if isinstance(bandwidth, str) else bandwidth, "bandwidth")
    limit = None if budget is None else parse_bytes(budget)
    ways = ways_of_blocks(workload.task, formulations) if formulations else []
    ledgers, costs = _of_stock_model(workload)
    ledgers |= {way.name: _followed(way, workload) for way in _shown(ways, "in blocks")}
    fitting = None
    if limit is not None:
        fitting = {name: 1 if ledger.total <= limit else None for name, ledger in ledgers.items()}
        searched = _shown(ways, "what fits")
        fitting |= {way.name: smallest_number_of_blocks(way, workload, limit) for way in searched}
    return MemoryEstimate(workload, ledgers, costs, rate, tflops, limit, fitting)


def _of_stock_model(workload: Workload) -> tuple[dict[str, Ledger], dict[str, Costs]]:
    """Ledgers of the ways that need no blocks, and costs of those of them that keep weights in host memory."""
    with torch.device("meta"):
        adapts = bool(matrices_of_layers(workload.stock.make()))  # adapters are for matrices
    # (First, since it checks `keep`.)
    streams, others = ([way for way in of if adapts or not way.lora] for of in (ways_of_streams(), ways_of_stock_models()))
    streamed = {way.name: followed_stream(way, workload, _fake_mode()) for way in _shown(streams, "streamed")}
    ledgers, operations = {}, Operations()
    for way in _shown(others, END_TO_END):
        ledgers[way.name] = _followed(way, workload, operations if way.name == CHECKPOINTING else None)
    ledgers |= ledgers_by_formula(workload, ledgers)
    costs = {FSDP: costs_of_fsdp(workload, operations.total)} | {name: cost for name, (_, cost) in streamed.items()}
    return ledgers | {name: ledger for name, (ledger, _) in streamed.items()}, costs


def _checked(workload: Workload, config_fields: Mapping) -> tuple[Workload, dict[str, dict]]:
    """The workload with its defaults, and the formulations that blocks are estimated in.

    Raises:
        ValueError: a field is out of range; names it.
    """
    config, stock = workload.config, workload.stock
    for name, value in {"batch_size": workload.batch_size, "sequence_length": workload.sequence_length}.items():
        if name == "sequence_length" and not stock.takes_sequence_length:
            if value is not None:
                raise ValueError(
                    f"sequence_length={value!r} must be None for task {stock.task_name!r}: the config says the size of its "
                    "inputs"
                )
        else:
            check_whole(name, value, 2 if name == "sequence_length" else 1)
    longest = getattr(config, "max_position_embeddings", None)
    if stock.takes_sequence_length and longest and workload.sequence_length > longest:
        raise ValueError(f"sequence_length={workload.sequence_length} must be at most max_position_embeddings={longest}")
    if stock.task is None:
        if workload.num_blocks is not None or config_fields:
            convert(config, workload.num_blocks, workload.task_name, **config_fields)  # says what cannot be cut
        return workload, {}
    check_known(config_fields)
    fields = {"task": stock.task_name, "num_blocks": workload.num_blocks, **config_fields}
    checked = DiffusionBlocksConfig(source_config=config, **fields)
    formulations = formulations_for(stock.task, config)
    if config_fields:
        formulations = {checked.preset: {**config_fields, "preset": checked.preset}}
    return replace(workload, num_blocks=checked.num_blocks), formulations


def _dtype(dtype: torch.dtype | str | None, bf16: bool) -> torch.dtype:
    if isinstance(dtype, str) or dtype is None:
        if (dtype or "fp32") not in DTYPES:
            raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype or "fp32"]
    if bf16 and dtype != torch.float32:
        given = str(dtype).removeprefix("torch.")
        raise ValueError(f"bf16=True is autocast, over parameters in float32: dtype={given!r} is not")
    return dtype


def _kind_of_device(device: str | None) -> str:
    if device is None:
        here = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if here is None else here.type
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device={device!r} must be a kind of device that PyTorch knows: "cuda", "cpu", ...') from error


def _fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def _followed(way: Way, workload: Workload, operations: Operations | None = None) -> Ledger:
    return ledger_of(way, workload, _fake_mode(), operations)


def _shown(ways: list[Way], what: str) -> Iterable[Way]:
    """With a bar of progress, on a terminal: of a large model they take a minute or two."""
    return tqdm(ways, f"estimating steps, {what}", disable=None, leave=False)


def smallest_number_of_blocks(way: Way, workload: Workload, budget: int) -> int | None:
    """The smallest B, of those that cut evenly or nearly so, with which a way fits a budget; None: no B does.

    More blocks never hold more, since the largest has no more layers.
    """
    architecture = workload.stock.architecture
    layers = architecture.num_layers(workload.config)
    if "num_blocks" in architecture.fixed_fields:
        layers = architecture.fixed_fields["num_blocks"]  # no other cut is possible
    numbers = sorted({-(-layers // size) for size in range(1, layers + 1)})  # the smallest for each size of the largest
    way = replace(way, fields={**way.fields, "layers_per_block": None})

    def fits(num_blocks: int) -> bool:
        ledgers = ledgers_of(way, replace(workload, num_blocks=num_blocks), _fake_mode())
        return all(ledger.total <= budget for ledger in ledgers)

    *fewer, most = numbers
    # (The most blocks first: where they do not fit, one quick step says so.)
    return numbers[bisect_left(fewer, True, key=fits)] if fits(most) else None


def _fits(num_blocks: int | None) -> str:
    if num_blocks is None:
        return "no"
    return "yes" if num_blocks == 1 else f"B >= {num_blocks}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2g}"
