"""DeepSpeed's ZeRO-3 with parameters and optimizer in host memory, in one process: what streamed layers are measured beside."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def process_group() -> Iterator[None]:
    """Of this process alone. (Trainers that come after would see it.)"""
    os.environ["LOCAL_RANK"] = "0"  # (DeepSpeed asks for it)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        del os.environ["LOCAL_RANK"]


def zero3_with_offload(model: nn.Module, pinned: bool, **settings: Any) -> tuple[nn.Module, Callable[[], None]]:
    """What runs a model, and its optimizer's step. It keeps float32 masters in host memory, and compiles its AdamW at first.

    Args:
        pinned: whether that memory is.
        settings: of DeepSpeed's config, beside these.
    """
    import deepspeed

    to_host = {"device": "cpu", "pin_memory": pinned}
    settings |= {
        "train_micro_batch_size_per_gpu": 1,  # (what a batch has is not looked at)
        "zero_optimization": {"stage": 3, "offload_param": to_host, "offload_optimizer": to_host},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
    }
    engine = deepspeed.initialize(model=model, config=settings)[0]
    return engine, engine.step
