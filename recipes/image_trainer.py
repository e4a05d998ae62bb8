"""The stock Trainer for a transformer of diffusers: the loss of its scheduler, its files, averages, and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate.utils import send_to_device
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3, compute_snr
from diffusers.utils import make_image_grid
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_diffusionblocks.diffusion.randomness import keyed_generators
from hf_diffusionblocks.recipes.image_cache import BucketSampler, CachedImages
from hf_diffusionblocks.recipes.image_folders import encoder_names
from hf_diffusionblocks.recipes.image_pipelines import replaced
from hf_diffusionblocks.training.averages import WeightAverages
from hf_diffusionblocks.training.checkpoints import AtomicCheckpoints

#: Of flow matching, by diffusers' training utilities.
WEIGHTINGS = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
LORA_FILE = "pytorch_lora_weights.safetensors"  #: where `load_lora_weights` looks


class Denoiser(nn.Module):
    """A transformer as the Trainer has it: without its config, which reports would take for one of Transformers'."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(self, **inputs) -> torch.Tensor | list[torch.Tensor]:
        return self.transformer(**inputs)[0]

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """As the Trainer asks for it."""
        self.transformer.enable_gradient_checkpointing()

    gradient_checkpointing_enable = activation_checkpointing_enable  #: its name before Transformers 5.23


class Objective:
    """What a model learns, as its scheduler says: flow matching, or to tell noise, v or the image.

    Args:
        scheduler: its config, with the name of its class.
        loss: `weighting_scheme` and so on.

    Raises:
        ValueError: the scheduler's kind of noise is not known, or a weighting is of the other kind.
    """

    def __init__(self, scheduler: dict[str, Any], loss):
        self._loss = loss
        name, prediction = scheduler["_class_name"], scheduler.get("prediction_type", "epsilon")
        self._is_flow = name.startswith("FlowMatch") or prediction == "flow_prediction"
        if self._is_flow:
            if loss.snr_gamma is not None:
                raise ValueError(f"snr_gamma={loss.snr_gamma} must not be set: {name} is flow matching (weighting_scheme)")
            self._scheduler = FlowMatchEulerDiscreteScheduler(
                scheduler.get("num_train_timesteps", 1000), shift=scheduler.get("shift", scheduler.get("flow_shift", 1.0)),
                use_dynamic_shifting=scheduler.get("use_dynamic_shifting", False),
            )  # fmt: skip
            return
        if "beta_schedule" not in scheduler or prediction not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"the scheduler {name} with prediction_type={prediction!r} is not supported")
        if loss.weighting_scheme != "none":
            given = f"weighting_scheme={loss.weighting_scheme!r}"
            raise ValueError(f"{given} must be none: {name} is no flow matching (snr_gamma)")
        self._scheduler, self._prediction = DDPMScheduler.from_config(scheduler), prediction

    def __call__(
        self, denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], latents: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """The mean loss of rows, at levels and with noise that the generator draws.

        Args:
            denoise: from noisy latents and the scheduler's timesteps `[N]` to what the scheduler is given.
            latents: clean ones, `[N, ...]`, float32.
        """
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        draw = self._flow if self._is_flow else self._diffusion
        noisy, target, times, weights = draw(latents, noise, generator)
        losses = (denoise(noisy, times).float() - target).square().flatten(1).mean(1)
        return (weights.to(losses) * losses).mean()

    def _flow(self, latents: torch.Tensor, noise: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        loss, schedule = self._loss, self._scheduler
        drawn = compute_density_for_timestep_sampling(
            loss.weighting_scheme, len(latents), loss.logit_mean, loss.logit_std, loss.mode_scale, generator=generator
        )
        index = (drawn * len(schedule.timesteps)).long().clamp(max=len(schedule.timesteps) - 1)
        times, sigmas = (each[index].to(latents.device) for each in (schedule.timesteps, schedule.sigmas))
        level = sigmas.view(-1, *[1] * (latents.dim() - 1))
        weights = compute_loss_weighting_for_sd3(loss.weighting_scheme, sigmas)
        return (1 - level) * latents + level * noise, noise - latents, times, weights

    def _diffusion(self, latents: torch.Tensor, noise: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        schedule, gamma = self._scheduler, self._loss.snr_gamma
        times = torch.randint(schedule.config.num_train_timesteps, (len(latents),), generator=generator).to(latents.device)
        target = {"epsilon": noise, "sample": latents}.get(self._prediction)
        if target is None:
            target = schedule.get_velocity(latents, noise, times)
        weights = torch.ones(len(latents))
        if gamma is not None:  # https://huggingface.co/papers/2303.09556, equation 5
            snr = compute_snr(schedule, times)
            weights = snr.clamp(max=gamma) / {"epsilon": snr, "sample": 1, "v_prediction": snr + 1}[self._prediction]
        return schedule.add_noise(latents, noise, times), target, times, weights


class ImageTrainer(AtomicCheckpoints):
    """The stock Trainer with the loss of an [`Objective`], whose files are diffusers' own.

    Noise is a function of seed, optimizer step, micro-batch and process: the same in a run that was killed and resumed.

    Args:
        transformer: whole, or with adapters of diffusers' own `add_adapter`.
        dtype: of latents that it is given.
        pipeline_class: whose `save_lora_weights` writes adapters.
        ema_decay: of averages of what trains; None: there are none.
    """

    def __init__(
        self, transformer: nn.Module, dtype: torch.dtype, args: TrainingArguments, images: CachedImages, objective: Objective,
        pipeline_class: type[diffusers.DiffusionPipeline], caption_dropout: float,
    ):  # fmt: skip
        self.objective, self.dtype = objective, dtype
        self._pipeline_class, self._caption_dropout = pipeline_class, caption_dropout
        self._micro_batch = -1, 0  # of which step the last one was, and its number there
        super().__init__(Denoiser(transformer), args, train_dataset=images, data_collator=images.collate)
        self.model_accepts_loss_kwargs = False  # the loss is a mean: over accumulated micro-batches, too
        self.averages = None if args.ema_decay is None else WeightAverages(self)
        if self.averages:
            self.add_callback(self.averages)

    @property
    def transformer(self) -> nn.Module:
        return self.model.transformer

    @property
    def has_adapters(self) -> bool:
        return _has_adapters(self.transformer)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Have the model hold the averages of its weights, and then its own again; without averages, nothing changes."""
        return self.averages.in_model() if self.averages else nullcontext()

    def train(self, *args, **kwargs):
        if self.averages:
            self.averages.follow([each for each in self.model.parameters() if each.requires_grad])
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, train_dataset=None) -> BucketSampler:
        # (The Trainer's own sampler knows no rows that must not be in one batch.)
        return BucketSampler(self.train_dataset, self._train_batch_size, self._caption_dropout, self.args.seed)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        step, micro_batch = self._micro_batch
        micro_batch = micro_batch + 1 if step == self.state.global_step else 0
        self._micro_batch = self.state.global_step, micro_batch
        key = self.args.seed, self.state.global_step, micro_batch
        (generator,) = keyed_generators(key, [self.args.process_index])
        loss = self.objective(partial(self.denoise, model, inputs["conditions"]), inputs["latents"], generator)
        return (loss, {}) if return_outputs else loss

    def denoise(
        self, model: Callable[..., Any], conditions: dict[str, Any], noisy: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:
        """As an [`Objective`] wants it, with conditions of rows."""
        return self.train_dataset.cache.habits.run(model, noisy.to(self.dtype), times, conditions)

    # ---- files

    def create_model_card(self, *args, **kwargs) -> None:
        """None: the stock one, which `push_to_hub` writes, needs the config of a model of Transformers."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The Trainer's own would write all weights, and under names that diffusers does not read.
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        with nullcontext() if self.writes_checkpoint else self.averaged_weights():
            if self.has_adapters:
                config = self.transformer.peft_config["default"].to_dict()
                self._pipeline_class.save_lora_weights(
                    folder, transformer_lora_layers=get_peft_model_state_dict(self.transformer),
                    # (a set, which has another order in each process)
                    transformer_lora_adapter_metadata=config | {"target_modules": sorted(config["target_modules"])},
                )  # fmt: skip
            else:
                self.transformer.save_pretrained(folder / "transformer")
        if self.averages and self.writes_checkpoint:
            self.averages.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        for file in _weight_files(resume_from_checkpoint, self.has_adapters):
            state = load_file(file)
            if self.has_adapters:
                state = {_own_name(name): tensor for name, tensor in state.items()}
            self.transformer.load_state_dict(state, strict=False)
        if self.averages:
            self.averages.load(resume_from_checkpoint)


def check_checkpoint(folder: str | Path, transformer: nn.Module) -> None:
    """Raises ValueError if a checkpoint is not of what is trained of a transformer."""
    wanted = {name for name, each in transformer.named_parameters() if each.requires_grad}
    has_adapters, found = _has_adapters(transformer), set()
    for file in _weight_files(folder, has_adapters):
        with safe_open(file, framework="pt") as opened:
            found |= {_own_name(name) if has_adapters else name for name in opened.keys()}
    if differ := sorted(wanted ^ found if has_adapters else wanted - found):
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} is not of what this run trains: it "
            f"{'lacks' if differ[0] in wanted else 'has'} {differ[0]}"
        )


def _has_adapters(transformer: nn.Module) -> bool:
    return bool(getattr(transformer, "peft_config", None))


def _weight_files(folder: str | Path, of_adapters: bool) -> list[Path]:
    return sorted(Path(folder).glob(LORA_FILE if of_adapters else "transformer/*.safetensors"))


def _own_name(name: str) -> str:
    """Of an adapter's parameter, as the transformer has it: files leave the name of the adapter out."""
    return name.removeprefix("transformer.").removesuffix(".weight") + ".default.weight"


class Samples(TrainerCallback):
    """A grid of images every n optimizer steps, and at the end, drawn by the stock pipeline from the same noise each time.

    Args:
        trainer: whose transformer draws, with its averages, if it keeps any.
        folder: of the pipeline.
        calls: arguments of the pipeline's call for each image.
        encodings: what `encode_prompt` returns in each call, so that no text encoder has to be there.
        every_n_steps: 0: at the end alone.
    """

    def __init__(
        self, trainer: ImageTrainer, folder: str, calls: Sequence[dict[str, Any]], encodings: Sequence[list],
        every_n_steps: int,
    ):  # fmt: skip
        self._trainer, self._folder, self._every_n_steps = trainer, folder, every_n_steps
        self._calls = list(zip(calls, encodings, strict=True))
        self._pipeline: diffusers.DiffusionPipeline | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if self._every_n_steps and state.global_step % self._every_n_steps == 0 and state.global_step < state.max_steps:
            self._draw(f"step-{state.global_step:08d}.png")

    def on_train_end(self, args, state, control, **kwargs):
        self._draw("final.png")

    def _draw(self, name: str) -> None:
        trainer = self._trainer
        if not trainer.is_world_process_zero():
            return
        with trainer.averaged_weights(), trainer.compute_loss_context_manager():
            images = self.images()
        folder = Path(trainer.args.output_dir, "samples")
        folder.mkdir(parents=True, exist_ok=True)
        columns = -(-len(images) // int(len(images) ** 0.5))
        images += [images[0].copy().point(lambda value: 0)] * (-len(images) % columns)
        make_image_grid(images, len(images) // columns, columns).save(folder / name)

    @torch.no_grad()
    def images(self) -> list:
        """One for each call."""
        trainer, transformer = self._trainer, self._trainer.transformer
        device, was_training = trainer.args.device, transformer.training
        if self._pipeline is None:
            self._pipeline = diffusers.DiffusionPipeline.from_pretrained(
                self._folder, transformer=transformer, use_safetensors=True, dtype=trainer.dtype,
                **dict.fromkeys(encoder_names(self._folder)),
            )  # fmt: skip
            self._pipeline.set_progress_bar_config(disable=True)
        transformer.eval()
        self._pipeline.vae.to(device)
        try:
            return [self._image(call, send_to_device(encodings, device), device) for call, encodings in self._calls]
        finally:
            transformer.train(was_training)
            self._pipeline.vae.to("cpu")

    def _image(self, call: dict[str, Any], encodings: list, device: torch.device):
        returned = iter(encodings)
        generator = torch.Generator(device).manual_seed(0)
        with replaced(self._pipeline, "encode_prompt", lambda *args, **kwargs: next(returned)):
            return self._pipeline(**call, generator=generator).images[0]
