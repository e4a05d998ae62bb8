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

#: How a pipeline turns the transformer's output into what its scheduler is given.
OUTPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda output: output,
    "negative": lambda output: -output,
    "first half": lambda output: output.chunk(2, dim=1)[0],  # (the other half is a learned variance)
}
PROBES = 5  #: rows of latents that tell how the VAE's become the transformer's: see `LatentMap`


class _Seen(Exception):
    """Ends a pipeline's call when all has been seen."""


@dataclass(frozen=True)
class Habits:
    """What a pipeline does whatever the prompt and the size.

    Args:
        time_scale, time_offset: the transformer's `timestep` is the scheduler's, times the one, plus the other.
        output: a name of `OUTPUTS`.
        per_row: conditions of which each row has its own; the others are common to all.
    """

    time_scale: float
    time_offset: float
    output: str
    per_row: tuple[str, ...]


class LatentMap:
    """How latents of the VAE become those of the transformer, at one size: in another order (packed into tokens), scaled
    and shifted.

    Args:
        like: latents that the transformer is given, `[1, ...]`.
        probes: what the VAE was given for rows of zeros, of ones, of the two digits of each place's number, and of noise.
        noise: that row.

    Raises:
        ValueError: it is another map.
    """

    def __init__(self, like: torch.Tensor, probes: torch.Tensor, noise: torch.Tensor):
        zero, one, high, low, noisy = probes.double()
        base = digits_of(like)
        self.shape = tuple(like.shape[1:])
        self.vae_shape = tuple(probes.shape[1:])
        self._shift, self._scale = zero, one - zero
        places = [((digit - zero) / self._scale * base).round().nan_to_num(-1).long() for digit in (high, low)]
        self._place = (places[0] * base + places[1]).flatten()
        if sorted(self._place.tolist()) != list(range(like[0].numel())):
            raise ValueError("its latents are not those of the VAE in another order, scaled and shifted")
        if not torch.allclose(self(noisy[None].float())[0], noise, atol=1e-3, rtol=1e-3):
            raise ValueError("its latents do not come back from the VAE's")

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Of the VAE `[N, *vae_shape]` -> of the transformer `[N, *shape]`, float32."""
        scaled = ((latents.double().cpu() - self._shift) / self._scale).flatten(1)
        placed = torch.empty_like(scaled)
        placed[:, self._place] = scaled
        return placed.reshape(-1, *self.shape).float()


def digits_of(like: torch.Tensor) -> int:
    """The base in which two digits count the numbers of a row."""
    return int(like[0].numel() ** 0.5) + 1


def probes_like(sample: torch.Tensor) -> torch.Tensor:
    """Latents of `PROBES` rows that tell where each number goes, shaped as those of a pipeline."""
    like = sample[:1].float()
    number, base = torch.arange(like.numel()), digits_of(like)
    rows = [0 * number, 1 + 0 * number, (number // base) / base, (number % base) / base]
    noise = torch.randn(like.numel(), generator=torch.Generator().manual_seed(0))
    return torch.stack([*(row.float() for row in rows), noise]).reshape(PROBES, *like.shape[1:]).to(sample.device)


class Call(NamedTuple):
    """What was seen of a call."""

    conditions: dict[str, Any]  #: what the transformer is called with, beside latents and timestep
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
        self.pipe.scheduler = _watched_scheduler(self.pipe.scheduler)
        channels = config.get("in_channels"), config.get("out_channels")
        self._learned_variance = channels[1] is not None and channels[1] == 2 * channels[0]
        self.pipe.vae.requires_grad_(False).to(device)

    @property
    def encoders(self) -> list[nn.Module]:
        """Its text encoders."""
        others = (self._transformer, self.pipe.vae)
        return [each for each in self.pipe.components.values() if isinstance(each, nn.Module) and each not in others]

    @property
    def takes_size(self) -> bool:
        """Whether it can be told height and width."""
        return "height" in self._takes_now

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
        told = guidance_scale if self._transformer.config.get("guidance_embeds") else None if default is None else 1.0
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
            hidden = call.pop("hidden_states", None)
            if not isinstance(hidden, torch.Tensor) or "timestep" not in call:
                raise ValueError(f"{self.name} calls its transformer without hidden_states and timestep: it is not supported")
            passed.append((hidden, call.pop("timestep"), call))
            generator = torch.Generator().manual_seed(len(outputs))
            shape = (hidden.shape[0], hidden.shape[1] * (1 + self._learned_variance), *hidden.shape[2:])
            outputs.append(torch.randn(shape, generator=generator).to(hidden))
            return (outputs[-1],) if call.get("return_dict") is False else Transformer2DModelOutput(outputs[-1])

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
        if len(scheduler.seen) != 2 or len(passed) != 2 or not decoded:
            raise ValueError(f"{self.name} does not step from a scheduler to a VAE: it is not supported")
        return self._told(passed, outputs, scheduler.seen, decoded[0])

    def _told(self, passed: list, outputs: list, steps: list, decoded: torch.Tensor) -> Call:
        """Raises ValueError if levels, latents or outputs are not what we take them for."""
        for (hidden, _, _), step in zip(passed, steps):
            if hidden.shape != step.sample.shape or not torch.equal(hidden, step.sample.to(hidden)):
                raise ValueError(f"{self.name} gives its transformer more than noisy latents: it is not supported")
        found = [
            name for name, made in OUTPUTS.items()
            if torch.equal(made(outputs[0]).to(steps[0].output), steps[0].output)
        ]  # fmt: skip
        if not found:
            raise ValueError(f"{self.name} makes something else of the transformer's output: it is not supported")
        times = [(step.timestep, float(timestep.flatten()[0])) for (_, timestep, _), step in zip(passed, steps)]
        return Call(passed[-1][2] | {"return_dict": False}, times, found[0], steps[0].sample, steps[-1].given, decoded)

    def habits(self, drawn: Sequence[str | int], options: dict[str, Any]) -> Habits:
        """What it does at any time, from calls of several rows and of two.

        Args:
            drawn: `PROBES` rows, two of them different.
        """
        calls = self.watch(drawn, options), self.watch(drawn[-2:], options)
        (t1, passed1), (t0, passed0) = calls[0].timesteps
        scale = (passed1 - passed0) / (t1 - t0)
        per_row = [
            name for name in calls[0].conditions
            if all(_rows(call.conditions[name]) == rows for call, rows in zip(calls, (PROBES, 2)))
        ]  # fmt: skip
        return Habits(scale, passed0 - scale * t0, calls[0].output, tuple(per_row))

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


class _Step(NamedTuple):
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
