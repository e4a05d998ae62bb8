"""A pipeline of diffusers around the model: names of classes, a VAE, progress, callbacks, folders. It imports diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from huggingface_hub import snapshot_download

from ...diffusion.randomness import Generators
from ...extras import from_extra
from ...streaming import stream_of
from ...whole_numbers import whole
from .model import ClassLabels, DiffusionBlocksForImageGeneration, EndOfSampling

with from_extra("diffusers", "DiffusionBlocksImagePipeline", extra="diffusers"):
    from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
    from diffusers.image_processor import VaeImageProcessor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
#: What other pipelines of diffusers call by another name.
OTHER_NAMES = {"num_images_per_prompt": "num_images", "callback": "callback_on_step_end"}
#: Arguments of `snapshot_download` that `from_pretrained` takes.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class DiffusionBlocksImagePipeline(DiffusionPipeline):
    """Class-conditional images, sampled block by block: see [`DiffusionBlocksForImageGeneration.predict`].

    Args:
        transformer: the model, of images in [-1, 1] (one channel or three), or of a VAE's latents.
        vae: of the latents, which the model has seen as `(latents - shift_factor) * scaling_factor`.

    Raises:
        ValueError: the VAE's latents have another number of channels than the model.
    """

    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(self, transformer: DiffusionBlocksForImageGeneration, vae: AutoencoderKL | None = None):
        super().__init__()
        channels = transformer.config.source_config.in_channels
        if vae is not None and vae.config.latent_channels != channels:
            raise ValueError(f"vae has latent_channels={vae.config.latent_channels}, not the model's {channels}")
        self.register_modules(transformer=transformer, vae=vae)
        self.image_processor = VaeImageProcessor()

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """All files of a pipeline on the Hub. (diffusers' own takes our model for code that the repository lacks.)"""
        return snapshot_download(pretrained_model_name, **{name: kwargs.get(name) for name in HUB_ARGUMENTS})

    # ---- classes by name

    @property
    def labels(self) -> dict[str, int]:
        """Name -> class; where `config.label2id` has several names in one ("tench, Tinca tinca"), each of them, too."""
        names = self.transformer.config.label2id
        return {part.strip(): number for name, number in names.items() for part in name.split(",")} | names

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Classes of names.

        Raises:
            ValueError: there is no such name.
        """
        names, labels = [label] if isinstance(label, str) else label, self.labels
        for name in names:
            if name not in labels:
                some = ", ".join(map(repr, list(labels)[:10])) + (", ..." if len(labels) > 10 else "")
                raise ValueError(f"class label {name!r} must be one of {some} (all: `pipe.labels`)")
        return [labels[name] for name in names]

    # ---- memory

    def enable_model_cpu_offload(self, *args, **kwargs) -> None:
        """Refused: it brings a whole component to the device when its `forward` is called, and sampling calls blocks.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("use stream_layers(pipe.transformer), which has a layer or two on the device at a time")

    enable_sequential_cpu_offload = enable_model_cpu_offload

    # ---- images

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        num_images: int = 1,
        sampler: str = "euler",
        grid: str = "equal",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **unknown,
    ) -> ImagePipelineOutput | tuple:
        """Make images.

        Args:
            class_labels: classes, by number or name; None makes images of no class.
            num_images: of each class, one after another; N is their number for all classes.
            latents: the first noise, standard normal `[N, C, H, W]`; drawn when None.
            output_type: "pil"; "np", `[N, H, W, C]` in [0, 1]; "pt", `[N, C, H, W]` in [0, 1]; or "latent", what the model
                gives, as it is.
            return_dict: whether to return an `ImagePipelineOutput`, or a tuple of the images.
            callback_on_step_end: called after each step as `(pipeline, step, sigma, {"latents": z [N, C, H, W] float64})`;
                returns None, or a dict whose "latents" are gone on from. If it sets `pipeline._interrupt = True`, no
                further step is made, and the images are what there is.
            callback_on_step_end_tensor_inputs: what the dict that it gets holds.
            num_inference_steps, guidance_scale, generator, sampler, grid: of
                [`DiffusionBlocksForImageGeneration.predict`].

        Raises:
            ValueError, TypeError: before any work; names the argument, its value and what is allowed.
        """
        _refuse_unknown(unknown)
        num_images = whole("num_images", num_images, 1)
        self._check(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        classes = self._classes(class_labels, num_images)
        sigmas = self.transformer.inference_sigmas(num_inference_steps, grid)
        self._interrupt = False
        with self.progress_bar(total=len(sigmas) - 1) as progress:

            def on_step(step: int, z: torch.Tensor) -> torch.Tensor:
                progress.update()
                if callback_on_step_end is not None:
                    given = dict.fromkeys(callback_on_step_end_tensor_inputs, z)
                    z = _latents_of(callback_on_step_end(self, step, sigmas[step], given), z)
                if self._interrupt:
                    raise EndOfSampling(z)
                return z

            made = self.transformer.predict(
                classes, num_images if classes is None else len(classes), num_inference_steps, guidance_scale, sampler, grid,
                generator, latents, on_step,
            )  # fmt: skip
        images = made.images if self.vae is None or output_type == "latent" else self._decode(made.images)
        images = self.image_processor.postprocess(images, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked for no further step."""
        return self._interrupt

    def _check(self, output_type: str, callback: Callable | None, tensor_inputs: Sequence[str]) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} must be one of {', '.join(map(repr, OUTPUT_TYPES))}")
        channels = self.transformer.config.source_config.in_channels
        if output_type != "latent" and self.vae is None and channels not in (1, 3):
            raise ValueError(
                f"output_type={output_type!r} must be 'latent', or the pipeline have a vae: the model's {channels} "
                "channels are no image's"
            )
        if callback is not None and not callable(callback):
            raise TypeError(f"callback_on_step_end={callback!r} must be a function, or None")
        if not set(tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs={list(tensor_inputs)} must be ['latents'] or []")

    def _classes(self, class_labels, num_images: int) -> list[int] | None:
        """A number for each image."""
        if class_labels is None:
            return None
        if isinstance(class_labels, (torch.Tensor, np.ndarray, np.generic)):
            class_labels = class_labels.tolist()
        if not isinstance(class_labels, Sequence) or isinstance(class_labels, str):
            class_labels = [class_labels]
        numbers = [self.get_label_ids(label)[0] if isinstance(label, str) else label for label in class_labels]
        return [number for number in numbers for _ in range(num_images)]

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """`[N, C, H, W]` -> images `[N, 3, ...]` in about [-1, 1], where the latents are."""
        config, stream = self.vae.config, stream_of(self.transformer)
        if stream is not None:
            stream.let_go()  # the VAE takes the place of layers
        vae = self.vae.to(latents.device)
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        images = vae.decode(latents.to(vae.dtype)).sample
        if stream is not None:
            vae.to("cpu")
        return images


def _refuse_unknown(unknown: Mapping) -> None:
    for name, value in unknown.items():
        names = [name for name in inspect.signature(DiffusionBlocksImagePipeline.__call__).parameters if name != "self"]
        instead = OTHER_NAMES.get(name) or "one of " + ", ".join(names[:-1])
        raise TypeError(f"{name}={value!r} is no argument of this pipeline: give {instead}")


def _latents_of(returned: Mapping | None, z: torch.Tensor) -> torch.Tensor:
    """What a callback has made of z."""
    if returned is not None and not isinstance(returned, Mapping):
        raise TypeError(f"callback_on_step_end returned a {type(returned).__name__}, and must return a dict or None")
    return (returned or {}).get("latents", z)
