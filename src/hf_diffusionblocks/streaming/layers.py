"""Which modules of a model come and go: its units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

#: Of the parameters' bytes, what has to move at least; small parts beyond it stay on the device.
LEAST_SHARE = 0.95


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> layer: what the model checkpoints itself, and else the elements of its lists of modules; outermost ones."""
    found = dict(_outermost(model, ""))
    return {name: layer for name, layer in found.items() if _num_bytes(layer)}


def _outermost(module: nn.Module, path: str, listed: bool = False) -> Iterator[tuple[str, nn.Module]]:
    # A reversible layer (Reformer's) calls its parts by themselves in the backward pass: so these come and go.
    opened = isinstance(module, nn.ModuleList) or hasattr(module, "backward_pass")
    is_layer = listed and not opened and _is_called(module) and not _has_layers(module)
    if isinstance(module, GradientCheckpointingLayer) or is_layer:
        yield path, module
    else:
        for name, child in module.named_children():
            yield from _outermost(child, f"{path}.{name}" if path else name, opened)


def _is_called(module: nn.Module) -> bool:
    """Whether it is more than a place for others."""
    return type(module).forward is not nn.Module.forward


def _has_layers(module: nn.Module) -> bool:
    """Whether there are smaller layers inside: what the model checkpoints, or longer lists (as in stages of images)."""
    return any(isinstance(child, GradientCheckpointingLayer) for child in module.modules())


def named_layers(model: nn.Module, layers: Sequence[nn.Module | str]) -> dict[str, nn.Module]:
    """Path -> layer, of those that a caller names.

    Raises:
        ValueError: there is none of a path, one is not of the model, has no parameters, or is inside another.
    """
    paths = {module: path for path, module in model.named_modules()}
    found = {}
    for layer in layers:
        if isinstance(layer, str):
            try:
                layer = model.get_submodule(layer)
            except AttributeError:
                raise ValueError(f"layers: {layer!r} must be the path of a module of {type(model).__name__}") from None
        if layer is model or layer not in paths:
            raise ValueError(f"layers: {type(layer).__name__} must be a module inside of {type(model).__name__}")
        if not _num_bytes(layer):
            raise ValueError(f"layers: {paths[layer]!r} has no parameters, and must have some")
        found[paths[layer]] = layer
    for path in found:
        outer = next((other for other in found if path.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(f"layers: {path!r} is inside of {outer!r}: name one of them")
    if not found:
        raise ValueError("layers=[] must name at least one layer, or be None")
    return found


def find_rest(model: nn.Module, taken: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Path -> module, of the largest parts outside of what is taken: embedding, head and the like, until enough moves."""
    inside = {id(module) for layer in taken for module in layer.modules()}
    around = {id(module) for module in model.modules() if any(id(child) in inside for child in module.modules())} - inside
    parts = sorted(_with_own_parameters(model, "", inside, around), key=lambda part: -_num_bytes(part[1]))
    whole = _num_bytes(model)
    moving = {id(p): p.nbytes for layer in taken for p in layer.parameters()}
    found = {}
    for path, module in parts:
        is_tied = any(id(p) in moving for p in module.parameters())  # to what moves
        if sum(moving.values()) >= LEAST_SHARE * whole and module not in _tables(model) and not is_tied:
            continue
        found[path] = module
        moving |= {id(p): p.nbytes for p in module.parameters()}
    # What is tied to a part that moves moves, too: the tables of encoder and decoder are modules of their own.
    return {path: module for path, module in parts if path in found or any(id(p) in moving for p in module.parameters())}


def _with_own_parameters(module: nn.Module, path: str, inside: set[int], around: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in inside:
        return
    if path and id(module) not in around and any(p is not None for p in module._parameters.values()):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _with_own_parameters(child, f"{path}.{name}" if path else name, inside, around)


def _tables(model: nn.Module) -> list[nn.Module]:
    """Embedding and head, as the model names them."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name)())
        except (AttributeError, NotImplementedError):  # (no model of text)
            pass
    return [module for module in found if isinstance(module, nn.Module)]


def _num_bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def switch_checkpointing(model: nn.Module, on: bool) -> None:
    """Switch the activation checkpointing of a model of Transformers or diffusers, if it has any."""
    if not any(getattr(model, name, False) for name in ("supports_gradient_checkpointing", "_supports_gradient_checkpointing")):
        return
    name = "enable" if on else "disable"
    # Transformers called it gradient checkpointing before 5.23, as diffusers does.
    switches = (f"activation_checkpointing_{name}", f"gradient_checkpointing_{name}", f"{name}_gradient_checkpointing")
    switch = next(getattr(model, switch) for switch in switches if hasattr(model, switch))
    switch(*([{"use_reentrant": False}] if on and isinstance(model, PreTrainedModel) else []))
