"""`estimate_memory`: the ledger of a training step that is only followed, without memory for its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from ..backbones.base import backbone_for
from ..configuration import USER_FIELDS, DiffusionBlocksConfig, check_known
from ..tasks import Task, task_of
from ..whole_numbers import check_whole
from .ledger import Ledger, Parts
from .scenarios import ledger_of, traffic_of
from .traffic import Traffic
from .ways import Way, Workload, formulations_for, ways_to_train

DTYPES = {
    "fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip
UNITS = {"": 1} | {f"{prefix}iB": 2 ** (10 * k) for k, prefix in enumerate("KMGT", 1)}
UNITS |= {f"{prefix}B": 10 ** (3 * k) for k, prefix in enumerate("KMGT", 1)}
#: What a table's first row has to hold at least, and the unit and decimals then: small parts of it (a hundredth) show.
SCALES = ((10 * 2**30, "GiB", 1), (1000 * 2**20, "MiB", 0), (100 * 2**20, "MiB", 1), (0, "KiB", 0))


@dataclass(frozen=True)
class MemoryEstimate:
    """What the ways to train a model would hold; printed, a table.

    Args:
        workload: what is trained on what.
        ledgers: of each way, its largest step.
        traffic: of each way that keeps blocks in host memory, what is copied while every block moves once.
        budget: bytes that are to suffice, or None.
        fitting: with a budget, of each way the smallest B that fits; None where none does. (B=1 for plain models.)
    """

    workload: Workload
    ledgers: dict[str, Ledger]
    traffic: dict[str, Traffic]
    budget: int | None = None
    fitting: dict[str, int | None] | None = None

    def __str__(self) -> str:
        config, workload = self.workload.config, self.workload
        size = f"{workload.batch_size} images" if workload.sequence_length is None else (
            f"{workload.batch_size} x {workload.sequence_length} tokens"
        )
        title = (
            f"{config.model_type}, {backbone_for(config).num_layers(config)} layers, B={workload.num_blocks}, {size}, "
            f"{str(workload.dtype).removeprefix('torch.')}, AdamW, {workload.device}"
        )
        unit, decimals = table_unit(self.ledgers)
        copied = {name: "" for name in self.ledgers} | {
            name: f"{each.to_device / UNITS[unit]:,.{decimals}f}, {each.to_host / UNITS[unit]:,.{decimals}f}"
            for name, each in self.traffic.items()
        }
        columns = {"copied to the device, and back": copied} if self.traffic else {}
        if self.fitting is not None:
            columns[f"fits {_bytes(self.budget)}"] = {name: _fits(blocks) for name, blocks in self.fitting.items()}
        return f"{title}\n\n{ledger_table(self.ledgers, columns)}"


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
    **config_fields,
) -> MemoryEstimate:
    """What a training step would hold: end to end, checkpointed, with LoRA (if peft is installed), and block by block.

    The real step runs on tensors that have sizes and no memory, under the same [`StepMemory`] that measures it: what it
    says is what would be measured on a CPU, but for the rows that are read out, which are as many as on `device`. (On a
    GPU, attention with dropout takes less: other kernels.) Text is read out in chunks in all ways.

    Args:
        model_or_config: plain or DiffusionBlocks; a model's weights are not looked at.
        num_blocks: B; None is the DiffusionBlocks model's, or as [`convert`] has it.
        batch_size: rows of a step.
        sequence_length: tokens a row; text only.
        dtype: of parameters, and so of gradients, optimizer state and activations, as when a model is loaded in it (not
            autocast). None is the model's, and float32 for a config.
        budget: bytes, or a number with a unit ("24GiB"): also find the smallest B that fits.
        ema: with averages of the trained weights (`ema_decay`).
        task: what the model is for, as in `pipeline(task)`; None is the DiffusionBlocks model's own, or the architecture's
            usual one.
        device: the kind that trains, "cuda" or "cpu": an accelerator reads out more rows at a time. None is this machine's
            accelerator, if it has one.
        config_fields: of [`DiffusionBlocksConfig`]; without any, and for a plain model, the recommended formulation and
            the paper's.

    Raises:
        ValueError: a field is out of range, or the architecture is not supported; names the field.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if dtype is None:
        dtype = getattr(model_or_config, "dtype", None) if isinstance(model_or_config, PreTrainedModel) else None
    if isinstance(config, DiffusionBlocksConfig):
        task = config.task if task is None else task
        num_blocks = num_blocks or config.num_blocks
        # (Both objectives are among the ways to train.)
        others = ("num_blocks", "sigma_data", "objective")
        of_model = {name: getattr(config, name) for name in USER_FIELDS if name not in others}
        config_fields, config = of_model | config_fields, config.source_config
    task = task_of(config, task)
    architecture = backbone_for(config)
    formulations = formulations_for(task, architecture)
    num_blocks = architecture.fixed_fields.get("num_blocks", 4) if num_blocks is None else num_blocks
    if config_fields:
        check_known(config_fields)
        checked = DiffusionBlocksConfig(source_config=config, task=task.name, num_blocks=num_blocks, **config_fields)
        formulations = {checked.formulation: config_fields}
    workload = _workload(config, task, num_blocks, batch_size, sequence_length, dtype, ema, _kind_of_device(device))
    limit = None if budget is None else parse_bytes(budget)
    ways = ways_to_train(formulations)
    ledgers = {way.name: _followed(way, workload) for way in ways}
    crossing = {way.name: traffic_of(way, workload) for way in ways if way.offload}
    fitting = None
    if limit is not None:
        fitting = {way.name: smallest_number_of_blocks(way, workload, limit) for way in ways if way.fields}
        plain = {way.name: ledgers[way.name].total <= limit for way in ways if not way.fields}
        fitting = {name: 1 if fits else None for name, fits in plain.items()} | fitting
    return MemoryEstimate(workload, ledgers, crossing, limit, fitting)


def _workload(
    config: PreTrainedConfig, task: Task, num_blocks: int, batch_size, sequence_length, dtype, ema: bool, device: str
) -> Workload:
    text = task.takes_sequence_length
    DiffusionBlocksConfig(source_config=config, task=task.name, num_blocks=num_blocks)  # complains of num_blocks
    for name, value in {"batch_size": batch_size, "sequence_length": sequence_length}.items():
        if name == "sequence_length" and not text:
            if value is not None:
                raise ValueError(f"sequence_length={value!r} must be None for task {task.name!r}: the config says the size of its inputs")
        else:
            check_whole(name, value, 2 if name == "sequence_length" else 1)
    longest = getattr(config, "max_position_embeddings", None)
    if text and longest and sequence_length > longest:
        raise ValueError(f"sequence_length={sequence_length} must be at most max_position_embeddings={longest}")
    if isinstance(dtype, str) or dtype is None:
        if (dtype or "fp32") not in DTYPES:
            raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype or "fp32"]
    return Workload(config, num_blocks, batch_size, sequence_length, dtype, task.name, ema, device)


def _kind_of_device(device: str | None) -> str:
    if device is None:
        here = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if here is None else here.type
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device={device!r} must be a kind of device that PyTorch knows: "cuda", "cpu", ...') from error


def parse_bytes(size: int | str) -> int:
    """Bytes of "24GiB", "500 MB" or a number.

    Raises:
        ValueError: it is no size above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    found = float(match[1]) * UNITS[match[2]] if match and match[2] in UNITS else 0
    if found < 1:
        units = ", ".join(filter(None, UNITS))
        raise ValueError(f"budget={size!r} must be a number of bytes, or one with a unit: {units}")
    return int(found)


def _followed(way: Way, workload: Workload) -> Ledger:
    return ledger_of(way, workload, FakeTensorMode(allow_non_fake_inputs=True))


def smallest_number_of_blocks(way: Way, workload: Workload, budget: int) -> int | None:
    """The smallest B, of those that cut evenly or nearly so, with which a way fits a budget; None: no B does.

    More blocks never hold more, since the largest has no more layers.
    """
    architecture = backbone_for(workload.config)
    layers = architecture.num_layers(workload.config)
    if "num_blocks" in architecture.fixed_fields:
        layers = architecture.fixed_fields["num_blocks"]  # no other cut is possible
    numbers = sorted({-(-layers // size) for size in range(1, layers + 1)})  # the smallest for each size of the largest
    way = replace(way, fields={**way.fields, "layers_per_block": None})
    low, high = 0, len(numbers)
    while low < high:
        middle = (low + high) // 2
        if _followed(way, replace(workload, num_blocks=numbers[middle])).total <= budget:
            high = middle
        else:
            low = middle + 1
    return numbers[low] if low < len(numbers) else None


def _fits(num_blocks: int | None) -> str:
    if num_blocks is None:
        return "no"
    return "yes" if num_blocks == 1 else f"B >= {num_blocks}"


def _bytes(size: int) -> str:
    unit = max((unit for unit in UNITS if unit.endswith("iB") and size % UNITS[unit] == 0), key=UNITS.get, default="")
    return f"{size // UNITS[unit]} {unit or 'bytes'}"


def table_unit(ledgers: Mapping[str, Ledger]) -> tuple[str, int]:
    """Unit and decimals of a table, by its first row."""
    base = next(iter(ledgers.values())).total
    return next((unit, decimals) for least, unit, decimals in SCALES if base >= least)


def ledger_table(ledgers: Mapping[str, Ledger], columns: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown: each way's parts at their largest, their sum, and the peak; both also over the first's (end to end).
    Averages are left out where there are none.

    Args:
        columns: more of them: heading -> way -> cell.
    """
    base = next(iter(ledgers.values()))
    unit, decimals = table_unit(ledgers)
    without = {"rest"} if any(ledger.parts.averages for ledger in ledgers.values()) else {"rest", "averages"}
    parts = [field.name for field in fields(Parts) if field.name not in without]
    header = [unit, *parts, "sum", "over end to end", "peak", "over end to end", *columns]
    rows = [header]
    for name, ledger in ledgers.items():
        sizes = [asdict(ledger.parts)[part] for part in parts]
        summed, peak = ledger.parts.total, ledger.total
        *sizes, summed_size, peak_size = (f"{size / UNITS[unit]:,.{decimals}f}" for size in (*sizes, summed, peak))
        cells = [*sizes, summed_size, f"{summed / base.parts.total:.2f}x", peak_size, f"{peak / base.total:.2f}x"]
        rows.append([name, *cells, *(column[name] for column in columns.values())])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [" | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join(f"| {line} |" for line in (lines[0], " | ".join("-" * width for width in widths), *lines[1:]))
