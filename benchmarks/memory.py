"""What a training step holds in memory, counted in bytes: end to end beside the ways to train block by block.

    python benchmarks/memory.py

GPT-2 small at real size (fresh weights), AdamW, the readout in chunks everywhere. Counted on a real step: parameters and
saved buffers, gradients, AdamW's state, and what autograd keeps for the backward pass, each storage once. "Logits" is
one chunk of them and its gradient. Of the blocks, the largest step. Temporary tensors are not counted.
"""

from __future__ import annotations

import argparse
from dataclasses import astuple, dataclass, fields

import torch
from gutenberg import plain_loss
from transformers import GPT2Config, GPT2LMHeadModel

import hf_diffusionblocks as db
from hf_diffusionblocks.losses import rows_per_chunk
from hf_diffusionblocks.memory import SavedActivations, gradient_bytes, optimizer_state_bytes
from hf_diffusionblocks.training.jobs import only_training

RECOMMENDED = {"denoiser": "factorized", "context": "carried", "prior_fraction": 1.0}


@dataclass
class Ledger:
    """Bytes of a step."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def measure(model: torch.nn.Module, loss_of_step, tokens: torch.Tensor) -> Ledger:
    """One step of what asks for gradients."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    with SavedActivations(model.parameters()) as saved:
        loss = loss_of_step()
    loss.backward()
    gradients = gradient_bytes(model.parameters())
    optimizer.step()
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    rows, vocab_size = tokens[:, 1:].numel(), model.config.vocab_size
    logits = 2 * rows_per_chunk(rows, vocab_size) * vocab_size * 4
    return Ledger(sum(held.values()), gradients, optimizer_state_bytes(optimizer), saved.bytes, logits)


def end_to_end(config: GPT2Config, tokens: torch.Tensor, checkpointing: bool = False) -> Ledger:
    model = GPT2LMHeadModel(config)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return measure(model, lambda: plain_loss(model, tokens), tokens)


def job(
    config: GPT2Config, tokens: torch.Tensor, options: argparse.Namespace, block: int, train_shared: bool, cached: bool,
    **formulation,
) -> Ledger:  # fmt: skip
    """A job that trains one block; carried context from its cached input, or around the earlier blocks."""
    carried = formulation.get("context") == "carried"
    resident = list(range(block + 1)) if carried and not cached else [block]
    model = db.convert(config, options.num_blocks, resident_blocks=resident, **formulation)
    entering = torch.randn(*tokens.shape, config.hidden_size) if carried and cached and block else None
    with only_training(model, [block], train_shared):
        return measure(
            model, lambda: model(tokens, labels=tokens, block_index=block, block_input=entering).loss, tokens
        )


def all_blocks(config: GPT2Config, tokens: torch.Tensor, num_blocks: int, **formulation) -> Ledger:
    """One run that trains all blocks in turn: the state of all stays."""
    model = db.convert(config, num_blocks, **formulation).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ledgers = []
    for block in range(num_blocks):
        optimizer.zero_grad()
        with SavedActivations(model.parameters()) as saved:
            loss = model(tokens, labels=tokens, block_index=block).loss
        loss.backward()
        ledgers.append((gradient_bytes(model.parameters()), saved.bytes))
        optimizer.step()
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    gradients, activations = (max(column) for column in zip(*ledgers))
    logits = 2 * rows_per_chunk(tokens[:, 1:].numel(), config.vocab_size) * config.vocab_size * 4
    return Ledger(sum(held.values()), gradients, optimizer_state_bytes(optimizer), activations, logits)


def rows(config: GPT2Config, tokens: torch.Tensor, options: argparse.Namespace):
    """Name and ledger of each way, one model at a time."""

    def largest(**arguments) -> Ledger:
        jobs = (job(config, tokens, options, block, **arguments) for block in range(options.num_blocks))
        return max(jobs, key=lambda ledger: ledger.total)

    own, common = {"shared": "per_block"}, {"shared": "common"}
    yield "end to end", end_to_end(config, tokens)
    yield "end to end, checkpointing", end_to_end(config, tokens, checkpointing=True)
    yield "all blocks in one run, recommended", all_blocks(config, tokens, options.num_blocks, **RECOMMENDED)
    yield "job, recommended, own embeddings and head, cached", largest(
        train_shared=True, cached=True, **RECOMMENDED, **own
    )
    yield "job, recommended, shared parameters frozen, cached", largest(
        train_shared=False, cached=True, **RECOMMENDED, **common
    )
    yield "job, recommended, shared parameters frozen, around the earlier blocks", largest(
        train_shared=False, cached=False, **RECOMMENDED, **common
    )
    yield "job, joint (paper), own embeddings and head", largest(train_shared=True, cached=False, **own)
    yield "job, joint (paper), shared parameters frozen", largest(train_shared=False, cached=False, **common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--num_blocks", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = GPT2Config(n_layer=options.layers, n_embd=options.width, n_head=options.width // 64)
    tokens = torch.randint(config.vocab_size, (options.batch_size, options.length))
    print(
        f"GPT-2, {options.layers} layers, width {options.width}, {config.vocab_size} tokens, B={options.num_blocks}, "
        f"{options.batch_size} x {options.length} tokens, float32; MiB\n"
    )
    print(f"| | {' | '.join(field.name for field in fields(Ledger))} | total | over end to end |")
    print("|---" * (len(fields(Ledger)) + 3) + "|")
    base = None
    for name, ledger in rows(config, tokens, options):
        base = base or ledger.total
        cells = [f"{size / 2**20:,.0f}" for size in (*astuple(ledger), ledger.total)]
        print(f"| {name} | {' | '.join(cells)} | {ledger.total / base:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
