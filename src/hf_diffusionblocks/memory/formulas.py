"""Ways to train that are not followed tensor by tensor, but counted: each by the formula in its docstring.

They start from the ledger of a way that is followed, and change what differs. Their rows are marked "by formula".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from .costs import Costs
from .ledger import Ledger, Parts
from .stock import layer_paths, matrices_of_layers
from .ways import CHECKPOINTING, LORA, Workload

BY_FORMULA = " (by formula)"
EIGHT_BIT = f"{CHECKPOINTING}, 8-bit AdamW{BY_FORMULA}"
FSDP = f"FSDP2 with CPU offload, checkpointing{BY_FORMULA}"
QLORA = f"Q{LORA}, checkpointing{BY_FORMULA}"
#: bitsandbytes: elements that share a scale in float32, of 8-bit moments; smaller tensors have moments in float32.
STATE_BLOCK, LEAST_IN_8_BIT = 256, 4096
#: NF4 with double quantisation: half a byte a weight, a scale of one byte for 64, one of 4 bytes for 256 of those.
BYTES_IN_4_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)


def ledgers_by_formula(workload: Workload, followed: Mapping[str, Ledger]) -> dict[str, Ledger]:
    """Name -> ledger, of those ways.

    Args:
        followed: those of [`ways_of_stock_models`].
    """
    with torch.device("meta"):
        model = workload.stock.make().to(workload.dtype)
    found = {EIGHT_BIT: eight_bit_adamw(followed[CHECKPOINTING], model)}
    found[FSDP] = fsdp_offload(followed[CHECKPOINTING], model, workload)
    adapted = followed.get(f"{LORA}, checkpointing")
    if adapted is not None:
        found[QLORA] = qlora(adapted, [matrix.weight for matrix in matrices_of_layers(model).values()], workload)
    return found


def eight_bit_adamw(checkpointed: Ledger, model: nn.Module) -> Ledger:
    """bitsandbytes' AdamW in 8 bits (`optim="adamw_bnb_8bit"`), with checkpointing.

    Of a matrix of n weights, two moments of one byte each, and 4 bytes for every 256 of them: `2n + 2 * 4 * n / 256`. Of
    tensors below 4,096 elements, and of embeddings, for which the Trainer asks for it, both moments are in float32: `8n`.
    """
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    state = 0
    for parameter in model.parameters():
        size = parameter.numel()
        full = size < LEAST_IN_8_BIT or parameter in embeddings
        state += 8 * size if full else 2 * size + 8 * -(-size // STATE_BLOCK)
    return _changed(checkpointed, optimizer=state)


def qlora(adapted: Ledger, matrices: Sequence[nn.Parameter], workload: Workload) -> Ledger:
    """LoRA on a base in 4 bits (NF4, double quantisation), with checkpointing.

    Matrices of layers take 0.516 bytes a weight; embeddings, head and norms stay in `dtype`. While a matrix is used it is
    there once more in what it computes in: the largest one's bytes are added to what is temporary.
    """
    saved = sum(round(weight.nbytes - BYTES_IN_4_BIT * weight.numel()) for weight in matrices)
    itemsize = 2 if workload.bf16 else workload.dtype.itemsize
    ledger = _changed(adapted, blocks=adapted.parts.blocks - saved)
    used = itemsize * max(weight.numel() for weight in matrices)
    return replace(ledger, peak=replace(ledger.peak, rest=ledger.peak.rest + used))


def fsdp_offload(checkpointed: Ledger, model: nn.Module, workload: Workload) -> Ledger:
    """PyTorch's FSDP2 in one process: each layer, embedding and head wrapped with `CPUOffloadPolicy`, and checkpointing.

    In one process nothing is fetched ahead. As a unit's backward pass ends, its gradients are copied into one buffer, and
    that into another, from which they go to the host; the first stays until the next unit's. So, with U the bytes of a unit
    in what it computes in, the device holds the most of

    - at the head: its weights and gradient, `2 U(head)`, logits, and what is kept to enter layers;
    - at the last layer: its weights and gradients and the head's buffers, `2 U(layer) + 2 U(head)`, and activations;

    and small parts that are no unit. Temporary tensors are left out, so a little more is held in fact. Host:
    parameters, gradients, two moments.
    """
    itemsize = 2 if workload.bf16 else workload.dtype.itemsize
    layers = layer_paths(model)
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if name.startswith(layers):
            path = next(path for path in layers if name.startswith(path))
            number = name.removeprefix(path).split(".")[0] if len(layers) == 1 else ""
            sizes[path + number] = sizes.get(path + number, 0) + itemsize * parameter.numel()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    of_head = 0 if head is None else itemsize * head.weight.numel()
    of_layer = max(sizes.values(), default=0)
    parts = checkpointed.parts
    at_head = Parts(shared=of_head, gradients=of_head, activations=parts.activations, logits=parts.logits)
    at_layer = Parts(blocks=of_layer, gradients=of_layer + 2 * of_head, activations=parts.activations)
    peak = max(at_head, at_layer, key=lambda each: each.total)
    largest = Parts(
        shared=of_head, blocks=of_layer, gradients=max(of_head, of_layer + 2 * of_head), activations=parts.activations,
        logits=parts.logits,
    )  # fmt: skip
    return Ledger(largest, peak, host=4 * sum(parameter.nbytes for parameter in model.parameters()))


def costs_of_fsdp(workload: Workload, operations: int) -> Costs:
    """What FSDP2 copies in a micro-batch, in the parameters' dtype: weights twice, for both passes, and gradients back.

    Args:
        operations: of floating point, of the followed way with checkpointing.
    """
    with torch.device("meta"):
        model = workload.stock.make()
    trained = sum(parameter.numel() for parameter in model.parameters())
    size = trained * workload.dtype.itemsize
    return Costs(2 * size, size, trained, operations)


def _changed(ledger: Ledger, **sizes: int) -> Ledger:
    """A ledger with some parts, there all the time, of other sizes."""
    return replace(ledger, parts=replace(ledger.parts, **sizes), peak=replace(ledger.peak, **sizes))
