"""Tiny pipelines of diffusers, built from its own classes with random weights; nothing is read from anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WIDTH = 32  #: of prompt embeddings
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PAD, START, END = 256, 257, 258
VOCABULARY = 260


def tokenizer(length: int) -> PreTrainedTokenizerFast:
    """A token a byte, and an end."""
    vocabulary = {each: index for index, each in enumerate(BYTES)} | {"<pad>": PAD, "<s>": START, "</s>": END}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=length
    )


def clip(kind: type = transformers.CLIPTextModel) -> transformers.PreTrainedModel:
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY,
        projection_dim=16, max_position_embeddings=77, bos_token_id=START, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    return kind(config)


def t5() -> transformers.PreTrainedModel:
    config = transformers.T5Config(
        d_model=WIDTH, d_ff=32, d_kv=8, num_heads=2, num_layers=2, vocab_size=VOCABULARY, pad_token_id=PAD, eos_token_id=END
    )
    return transformers.T5EncoderModel(config)


def kl(halvings: int = 1, **fields: float) -> diffusers.AutoencoderKL:
    """Of four channels."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * (halvings + 1), down_block_types=("DownEncoderBlock2D",) * (halvings + 1),
        up_block_types=("UpDecoderBlock2D",) * (halvings + 1), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        sample_size=16, **fields,
    )  # fmt: skip


def gemma() -> transformers.PreTrainedModel:
    config = transformers.Gemma2Config(
        hidden_size=WIDTH, head_dim=16, intermediate_size=32, num_attention_heads=1, num_key_value_heads=1,
        num_hidden_layers=1, vocab_size=VOCABULARY, attn_implementation="eager",
    )  # fmt: skip
    return transformers.Gemma2Model(config)


def flux() -> diffusers.DiffusionPipeline:
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=kl(shift_factor=0.0609, scaling_factor=1.5035), text_encoder=clip(), tokenizer=tokenizer(77), text_encoder_2=t5(),
        tokenizer_2=tokenizer(512),
        transformer=diffusers.FluxTransformer2DModel(
            **HEADS, in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=WIDTH, pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8), guidance_embeds=True,
        ),
    )  # fmt: skip


def sd3() -> diffusers.DiffusionPipeline:
    encoders = {f"text_encoder{number}": clip(transformers.CLIPTextModelWithProjection) for number in ("", "_2")}
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=kl(shift_factor=0.0609, scaling_factor=1.5305),
        **encoders, text_encoder_3=t5(), tokenizer=tokenizer(77), tokenizer_2=tokenizer(77), tokenizer_3=tokenizer(512),
        transformer=diffusers.SD3Transformer2DModel(
            **HEADS, sample_size=8, in_channels=4, out_channels=4, num_layers=3, joint_attention_dim=WIDTH,
            caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=16,
        ),
    )  # fmt: skip


def qwen() -> diffusers.DiffusionPipeline:
    sizes = {"hidden_size": 32, "intermediate_size": 32}
    rope = {"mrope_section": [2, 2, 4], "rope_type": "default", "type": "default"}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **sizes, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
            "rope_scaling": rope, "rope_theta": 1e6,
        },
        vision_config={**sizes, "depth": 1, "num_heads": 2, "out_hidden_size": 32},
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.0, 2.0],
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer=tokenizer(1024),
        transformer=diffusers.QwenImageTransformer2DModel(
            **HEADS, in_channels=16, out_channels=4, num_layers=3, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8)
        ),
    )  # fmt: skip


def sana() -> diffusers.DiffusionPipeline:
    parts = {}
    for part in ("encoder", "decoder"):
        parts |= {
            f"{part}_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), f"{part}_block_out_channels": (8, 8, 8),
            f"{part}_qkv_multiscales": ((), (), (5,)), f"{part}_layers_per_block": (1, 1, 1),
        }  # fmt: skip
    return diffusers.SanaPipeline(
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=2, **parts, downsample_block_type="conv",
            upsample_block_type="interpolate", scaling_factor=0.41407,
        ),
        text_encoder=gemma(), tokenizer=tokenizer(300),
        transformer=diffusers.SanaTransformer2DModel(
            **HEADS, in_channels=4, out_channels=4, num_layers=3, num_cross_attention_heads=2, cross_attention_head_dim=16,
            cross_attention_dim=32, caption_channels=WIDTH, sample_size=32,
        ),
    )  # fmt: skip


def dit() -> diffusers.DiffusionPipeline:
    return diffusers.DiTPipeline(
        scheduler=diffusers.DDIMScheduler(), vae=kl(),
        transformer=diffusers.DiTTransformer2DModel(
            **HEADS, sample_size=8, in_channels=4, out_channels=8, num_layers=3, num_embeds_ada_norm=1000, norm_num_groups=4
        ),
    )  # fmt: skip


def lumina() -> diffusers.DiffusionPipeline:
    """Its transformer is told the time backwards, and its output is turned round."""
    return diffusers.Lumina2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=kl(3, shift_factor=0.1, scaling_factor=0.3),
        text_encoder=gemma(), tokenizer=tokenizer(256),
        transformer=diffusers.Lumina2Transformer2DModel(
            hidden_size=32, num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=2, sample_size=8,
            in_channels=4, multiple_of=16, cap_feat_dim=WIDTH, axes_dim_rope=(4, 4, 8), axes_lens=(300, 32, 32),
        ),
    )  # fmt: skip


def zimage() -> diffusers.DiffusionPipeline:
    """Its transformer takes a list of latents and a list of embeddings of any length."""
    config = transformers.Qwen3Config(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, vocab_size=VOCABULARY,
    )  # fmt: skip
    reads = tokenizer(512)
    reads.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=kl(shift_factor=0.1, scaling_factor=0.3),
        text_encoder=transformers.Qwen3Model(config), tokenizer=reads,
        transformer=diffusers.ZImageTransformer2DModel(
            dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, in_channels=4, cap_feat_dim=WIDTH,
            axes_dims=[4, 4, 8], axes_lens=[600, 32, 32],
        ),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {
    "flux": flux, "sd3": sd3, "qwen": qwen, "sana": sana, "dit": dit, "lumina": lumina, "zimage": zimage,
}  # fmt: skip


def save_pipeline(name: str, folder: Path) -> str:
    """A pipeline with every parameter of its transformer random (some start at zero); the folder it is in."""
    torch.manual_seed(0)
    made = PIPELINES[name]()
    with torch.no_grad():
        for parameter in made.transformer.parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(folder)
    return str(folder)
