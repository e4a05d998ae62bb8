"""What an image pipeline of diffusers does with its transformer, found by watching it: no table of families.

The pipeline's own `__call__` runs for two steps around stand-ins. One for the transformer notes what it is called with: these
are its conditions (embeddings of the prompt, places of tokens, guidance and so on). One for the scheduler sees what the
pipeline makes of levels and outputs. What reaches the VAE says how latents of the VAE become those of the transformer. What
comes out is checked; a pipeline that does anything else is refused by name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import nn

from hf_diffusionblocks.recipes.image_folders import read_index, taken, transformer_class
from hf_diffusionblocks.recipes.image_latents import PROBES, LatentMap, probes_like

#: How a pipeline turns the transformer's output into what its scheduler is given.
OUTPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda output: output,
    "negative": lambda output: -output,
    "first half": lambda output: output.chunk(2, dim=1)[0],  # (the other half is a learned variance)
}
#: What transformers call latents and timestep.
NAMES = (("hidden_states", "timestep"), ("x", "t"))


class _Seen(Exception):
    """Ends a pipeline's call when all has been seen."""


@dataclass(frozen=True)
class Habits:
    """What a pipeline does whatever the prompt and the size.

    Args:
        names: what the transformer calls latents and timestep, one of `NAMES`.
        listed: latents are a list of rows, each as a video of one frame, and so is the output.
        time_scale, time_offset: the transformer's timestep is the scheduler's, times the one, plus the other.
        output: a name of `OUTPUTS`.
        per_row: conditions of which each row has its own; the others are common to all.
    """

    names: tuple[str, str]
    listed: bool
    time_scale: float
    time_offset: float
    output: str
    per_row: tuple[str, ...]

    def run(
        self, transformer: Callable[..., Any], latents: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, Any]
    ) -> torch.Tensor:
        """What a transformer makes of noisy latents, as the pipeline's scheduler would be given it.

        Args:
            timestep: the scheduler's, `[N]`.
            conditions: of N rows.
        """
        hidden = rows_of(latents) if self.listed else latents
        timestep = timestep * self.time_scale + self.time_offset
        output = transformer(**{self.names[0]: hidden, self.names[1]: timestep}, **conditions)
        return OUTPUTS[self.output](from_rows(output) if self.listed else output)


class Call(NamedTuple):
    """What was seen of a call."""

    passed: _Pass  #: what the transformer was called with, the last time
    timesteps: list[tuple[float, float]]  #: the scheduler's, the transformer's
    output: str | None  #: a name of `OUTPUTS`
    sample: torch.Tensor  #: latents, as the scheduler has them
    chosen: torch.Tensor  #: those that it was made to give
    decoded: torch.Tensor  #: those that the VAE is given


class WatchedPipeline:
    """A pipeline without its transformer, whose calls are watched.

    Args:
        folder: of a saved pipeline.
        dtype: of all but the VAE, which is float32: its encoder overflows in less, and places are told by its latents.
        device: where its parts run.

    Raises:
        ValueError: it has no transformer to train, or does something that is not known.
        OSError: it cannot be read.
    """

    def __init__(self, folder: str, dtype: torch.dtype, device: torch.device):
        index = read_index(folder)
        self.name, self._device = index["_class_name"], device
        kind = transformer_class(index)
        where = {"device": property(lambda self: device), "dtype": property(lambda self: dtype)}
        config = kind.load_config(folder, subfolder="transformer")
        with torch.device("meta"):
            self._transformer = type(kind.__name__, (kind,), {"__module__": kind.__module__, **where}).from_config(config)
        self.pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder, transformer=self._transformer, use_safetensors=True, dtype={"vae": torch.float32, "default": dtype}
        )
        self.pipe.set_progress_bar_config(disable=True)
        self._takes_now = inspect.signature(self.pipe.__call__).parameters
        self.takes = taken(index)
        self._unguided = 1.0  # a guidance_scale without effect
        self.pipe.scheduler = _watched_scheduler(self.pipe.scheduler)
        channels = config.get("in_channels"), config.get("out_channels")
        self._learned_variance = channels[1] is not None and channels[1] == 2 * channels[0]
        self.pipe.vae.requires_grad_(False).to(device)

    @property
    def encoders(self) -> list[nn.Module]:
        """Its text encoders."""
        others = (self._transformer, self.pipe.vae)
        return [each for each in self.pipe.components.values() if isinstance(each, nn.Module) and each not in others]

    def length(self, drawn: str | int) -> int:
        """Tokens of a prompt, by the tokenizer that makes most of it."""
        tokenizers = [each for each in self.pipe.components.values() if isinstance(each, transformers.PreTrainedTokenizerBase)]
        return max((len(each(str(drawn)).input_ids) for each in tokenizers), default=0)

    def options(self, size: tuple[int, int], guidance_scale: float, max_length: int | None) -> dict[str, Any]:
        """Arguments of its call, but for what is drawn: guided by nothing but what the transformer itself is told.

        Args:
            guidance_scale: what a transformer is told that was distilled from a guided one.
        """
        takes = self._takes_now
        default = takes["guidance_scale"].default if "guidance_scale" in takes else None
        told = None if default is None else self._unguided
        if self._transformer.config.get("guidance_embeds"):
            told = guidance_scale
        given = {
            "height": size[0], "width": size[1], "guidance_scale": told, "true_cfg_scale": 1.0, "num_inference_steps": 2,
            "use_resolution_binning": False,  # (sizes are what they are)
            "generator": torch.Generator(self._device).manual_seed(0),
            "max_sequence_length": max_length,
        }  # fmt: skip
        return {name: value for name, value in given.items() if name in takes and value is not None}

    @torch.no_grad()
    def encodings(self, call: dict[str, Any]) -> list[Any]:
        """What `encode_prompt` returns in a call of the pipeline, in turn; of classes, nothing."""
        returned = []

        def forward(*args, **kwargs):
            raise _Seen

        def encode_prompt(*args, **kwargs):
            returned.append(type(self.pipe).encode_prompt(self.pipe, *args, **kwargs))
            return returned[-1]

        if hasattr(self.pipe, "encode_prompt"):
            with replaced(self._transformer, "forward", forward), replaced(self.pipe, "encode_prompt", encode_prompt):
                try:
                    self.pipe(**call)
                except _Seen:
                    pass
        return returned

    @torch.no_grad()
    def watch(self, drawn: Sequence[str | int], options: dict[str, Any]) -> Call:
        """Call the pipeline, and say what was seen.

        Args:
            drawn: prompts, or classes; a row each.

        Raises:
            ValueError: it does what is not known.
        """
        passed, outputs = [], []
        signature = inspect.signature(type(self._transformer).forward)

        def forward(*args, **kwargs):
            call = dict(signature.bind(self._transformer, *args, **kwargs).arguments)
            call.pop("self")
            call |= call.pop("kwargs", {})
            names = next((names for names in NAMES if set(names) <= set(call)), None)
            if names is None:
                raise ValueError(f"{self.name} calls its transformer without latents and timestep: it is not supported")
            hidden, timestep = (call.pop(name) for name in names)
            passed.append(_Pass(names, hidden, timestep, call))
            outputs.append(self._output_like(passed[-1].latents, seed=len(outputs)))
            output = rows_of(outputs[-1]) if isinstance(hidden, list) else outputs[-1]
            return (output,) if call.get("return_dict") is False else Transformer2DModelOutput(output)

        decoded = []

        def decode(latents, *args, **kwargs):
            decoded.append(latents)
            raise _Seen

        scheduler = self.pipe.scheduler
        scheduler.seen.clear()
        with replaced(self._transformer, "forward", forward), replaced(self.pipe.vae, "decode", decode):
            try:
                self.pipe(**{self.takes: list(drawn)}, **options)
            except _Seen:
                pass
            except (AttributeError, LookupError) as error:
                raise ValueError(f"{self.name} is not supported: {type(error).__name__}: {error}") from error
        if passed and len(passed[0].latents) == 2 * len(drawn) and options.get("guidance_scale") == 1.0:
            self._unguided = 0.0  # (Z-Image counts from there)
            return self.watch(drawn, options | {"guidance_scale": self._unguided})
        if len(scheduler.seen) != 2 or len(passed) != 2 or not decoded:
            raise ValueError(f"{self.name} does not step from a scheduler to a VAE: it is not supported")
        return self._told(passed, outputs, scheduler.seen, decoded[0])

    def _output_like(self, latents: torch.Tensor, seed: int) -> torch.Tensor:
        channels = latents.shape[1] * (1 + self._learned_variance)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(len(latents), channels, *latents.shape[2:], generator=generator).to(latents)

    def _told(self, passed: list[_Pass], outputs: list, steps: list[_Step], decoded: torch.Tensor) -> Call:
        """Raises ValueError if levels, latents or outputs are not what we take them for."""
        for each, step in zip(passed, steps):
            if not torch.equal(each.latents, step.sample.to(each.latents)):
                raise ValueError(f"{self.name} gives its transformer more than noisy latents: it is not supported")
        found = [
            name for name, made in OUTPUTS.items()
            if torch.equal(made(outputs[0]).to(steps[0].output), steps[0].output)
        ]  # fmt: skip
        if not found:
            raise ValueError(f"{self.name} makes something else of the transformer's output: it is not supported")
        times = [(step.timestep, float(each.timestep.flatten()[0])) for each, step in zip(passed, steps)]
        last = passed[-1]._replace(conditions=passed[-1].conditions | {"return_dict": False})
        return Call(last, times, found[0], steps[0].sample, steps[-1].given, decoded)

    def habits(self, drawn: Sequence[str | int], options: dict[str, Any]) -> Habits:
        """What it does at any time, from calls of several rows and of two.

        Args:
            drawn: `PROBES` rows, two of them different.
        """
        calls = self.watch(drawn, options), self.watch(drawn[-2:], options)
        (t1, passed1), (t0, passed0) = calls[0].timesteps
        scale = (passed1 - passed0) / (t1 - t0)
        passed = calls[0].passed
        per_row = [
            name for name in passed.conditions
            if all(_rows(call.passed.conditions[name]) == rows for call, rows in zip(calls, (PROBES, 2)))
        ]  # fmt: skip
        listed = isinstance(passed.hidden, list)
        return Habits(passed.names, listed, scale, passed0 - scale * t0, calls[0].output, tuple(per_row))

    def latent_map(self, call: Call) -> LatentMap:
        """From a call of `PROBES` rows."""
        try:
            return LatentMap(call.sample[:1], call.decoded.cpu(), call.chosen[-1].cpu())
        except ValueError as error:
            raise ValueError(f"{self.name} is not supported: {error}") from None

    @torch.no_grad()
    def encode(self, images: torch.Tensor, latent_map: LatentMap) -> torch.Tensor:
        """Pixels `[N, 3, H, W]` in [-1, 1] -> latents of the transformer: the mean of what the VAE gives.

        Raises:
            ValueError: the pipeline draws images of another size.
        """
        if len(latent_map.vae_shape) == 4:  # a VAE of videos: one frame
            images = images.unsqueeze(2)
        encoded = self.pipe.vae.encode(images.to(self._device))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        if latents.shape[1:] != latent_map.vae_shape:
            raise ValueError(
                f"resolution: images of {images.shape[-2]} x {images.shape[-1]} are latents of {list(latents.shape[1:])}, and "
                f"{self.name} draws {list(latent_map.vae_shape)}"
            )
        return latent_map(latents)


def split_rows(conditions: dict[str, Any], per_row: Sequence[str], num_rows: int) -> list[dict[str, Any]]:
    """The conditions of each row.

    Raises:
        ValueError: one that was common to all rows is not any more.
    """
    for name, value in conditions.items():
        if name in per_row and value is not None and _rows(value) != num_rows:
            raise ValueError(f"the condition {name!r} has not a part for each of {num_rows} rows: it is not supported")
    return [
        {name: value[row : row + 1] if name in per_row and value is not None else value for name, value in conditions.items()}
        for row in range(num_rows)
    ]


def join_rows(rows: Sequence[dict[str, Any]], per_row: Sequence[str]) -> dict[str, Any]:
    """Conditions of several rows, which are alike."""
    joined = dict(rows[0])
    for name in per_row:
        first = joined[name]
        if isinstance(first, torch.Tensor):
            joined[name] = torch.cat([row[name] for row in rows])
        elif first is not None:
            joined[name] = type(first)(each for row in rows for each in row[name])
    return joined


def _rows(value: Any) -> int | None:
    return len(value) if isinstance(value, (list, tuple)) or (isinstance(value, torch.Tensor) and value.dim()) else None


def rows_of(latents: torch.Tensor) -> list[torch.Tensor]:
    """`[N, C, H, W]` -> N of `[C, 1, H, W]`."""
    return list(latents.unsqueeze(2))


def from_rows(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Back from [`rows_of`]."""
    return torch.stack(list(rows)).squeeze(2)


class _Pass(NamedTuple):
    """Of a transformer."""

    names: tuple[str, str]
    hidden: torch.Tensor | list[torch.Tensor]
    timestep: torch.Tensor
    conditions: dict[str, Any]  #: beside these

    @property
    def latents(self) -> torch.Tensor:
        return from_rows(self.hidden) if isinstance(self.hidden, list) else self.hidden


class _Step(NamedTuple):
    """Of a scheduler."""

    output: torch.Tensor
    timestep: float
    sample: torch.Tensor
    given: torch.Tensor


def _watched_scheduler(scheduler):
    """The same scheduler, at the noisiest timestep and at none, that notes what it is given, and gives probes."""
    kind = type(scheduler)

    @functools.wraps(kind.set_timesteps)  # (pipelines ask what it takes)
    def set_timesteps(self, *args, **kwargs) -> None:
        kind.set_timesteps(self, *args, **kwargs)
        self.timesteps = torch.tensor([self.config.num_train_timesteps, 0]).to(self.timesteps)

    @functools.wraps(kind.step)
    def step(self, model_output, timestep, sample, *args, return_dict: bool = True, **kwargs):
        rows = probes_like(sample)
        given = rows if len(sample) == PROBES else rows[:1].expand(len(sample), *rows.shape[1:])
        self.seen.append(_Step(model_output, float(timestep), sample, given))
        return SchedulerOutput(given) if return_dict else (given,)

    made = type(kind.__name__, (kind,), {"__module__": kind.__module__, "set_timesteps": set_timesteps, "step": step})
    watched = made.from_config(scheduler.config)
    watched.seen = []
    return watched


@contextmanager
def replaced(owner: Any, name: str, by: Callable) -> Iterator[None]:
    """While this runs, a method of an instance is another."""
    setattr(owner, name, by)
    try:
        yield
    finally:
        delattr(owner, name)
