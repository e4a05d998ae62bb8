"""What cannot be streamed, said before anything moves."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.cache_utils import Cache

from .lending import LentUnit, StreamedModel


def check_model(model: nn.Module) -> None:
    """
    Raises:
        TypeError: it is no module.
        ValueError: it cannot be streamed; says why, and what may be done.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__} must be a torch.nn.Module: a PreTrainedModel or a diffusers model")
    if any(isinstance(module, (StreamedModel, LentUnit)) for module in model.modules()):
        raise ValueError(f"model={type(model).__name__} is streamed already: call stop() of its stream before")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"model={type(model).__name__} must be streamed before it is wrapped: give its .module")
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1 or "disk" in devices:
        raise ValueError(
            f"model={type(model).__name__} is dispatched by device_map to {len(devices)} places: load it without device_map"
        )
    for name, parameter in model.named_parameters():
        check_parameter(name, parameter)
    if not any(True for _ in model.parameters()):
        raise ValueError(f"model={type(model).__name__} has no parameters")


def check_parameter(name: str, parameter: nn.Parameter) -> None:
    """
    Raises:
        ValueError: it has no memory, or is divided over processes.
    """
    if parameter.is_meta:
        raise ValueError(f"{name} is on the meta device, and has no values: load the model without it")
    if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
        by = "DeepSpeed" if hasattr(parameter, "ds_id") else "FSDP"
        raise ValueError(f"{name} is divided over processes by {by}, which has an offload of its own: use one of both")


def check_device(device: torch.device | str | int | None) -> torch.device:
    """The device where layers run; None is the accelerator, or the CPU where there is none.

    Raises:
        ValueError: there is no such device.
    """
    here = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        device = "cpu" if here is None else torch.device(here.type, torch.accelerator.current_device_index())
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        found = 'only "cpu"' if here is None else f'"cpu" and "{here.type}"'
        raise ValueError(f"device={device!r} must be one that is there: {found}") from error
    if device.type == "meta":
        raise ValueError('device="meta" computes nothing: give one that does')
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    return device


def check_processes(device: torch.device) -> None:
    """To be called where a model trains.

    Raises:
        ValueError: it does so in one of several processes on accelerators.
    """
    if device.type != "cpu" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"{dist.get_world_size()} processes on {device.type} cannot train a streamed model: parameters in host memory are "
            "not averaged there; use one process, or FSDP2 with CPUOffloadPolicy"
        )


def check_cache(model: nn.Module, given: dict) -> None:
    """To be called with what a model is given that trains with activation checkpointing.

    Raises:
        ValueError: there are keys and values of earlier tokens, which Transformers' layers drop then, unless they only read them.
    """
    cache = given.get("cache", given.get("past_key_values"))  # (by the name that Transformers has, and had)
    if not isinstance(cache, Cache) or not cache.get_seq_length():
        return
    if not any(getattr(module, "_can_checkpoint_with_cache", False) for module in model.modules()):
        raise ValueError(
            "past_key_values cannot be given to a streamed model that trains (prefix tuning does): layers that run again in the "
            "backward pass take no cache; take prompt tuning or LoRA"
        )
