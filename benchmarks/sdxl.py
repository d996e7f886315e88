"""Stable Diffusion XL with random weights, from its published configuration."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from models import build_sdxl_unet
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from gspn2_diffusers import GSPN2Adapter, GSPN2Config, apply_gspn2
from gspn2_diffusers.tiny_scenes.tokenizer import build_tokenizer


def build_sdxl_pipeline(
    device: torch.device, dtype: torch.dtype, config: GSPN2Config
) -> StableDiffusionXLPipeline:
    """All parts in their own sizes with random weights, patched with random blocks.

    Only the tokenizers are smaller: they know fewer words than the text encoders have room for.
    """
    torch.manual_seed(0)
    tokenizers = [_build_tokenizer() for _ in range(2)]
    with device:
        encoders = build_text_encoders()
        parts = {
            "unet": build_sdxl_unet(),
            "vae": build_sdxl_vae(),
            "text_encoder": encoders[0],
            "text_encoder_2": encoders[1],
        }
        parts = {name: part.to(dtype).eval() for name, part in parts.items()}
        put_random_blocks(parts["unet"], config)
    for part in parts.values():
        part.requires_grad_(False)
    return StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=_build_sdxl_scheduler(),
        feature_extractor=None,
        add_watermarker=False,
    )


def put_random_blocks(unet: UNet2DConditionModel, config: GSPN2Config) -> None:
    """Patch every layer with blocks that know the model's own size, and scale lam off it.

    Their gates are random: fresh ones multiply everything by zero.
    """
    adapter = GSPN2Adapter.for_model(unet, config, inherit=False)
    for block in adapter.blocks:
        nn.init.normal_(block.to_params.weight, std=0.02)
    apply_gspn2(unet, adapter)


def _build_tokenizer() -> CLIPTokenizer:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def _text_config(tokenizer: CLIPTokenizer, width: int, **options: object) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_attention_heads=width // 64,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def build_text_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """CLIP ViT-L/14 and OpenCLIP ViT-bigG/14, as far as they read texts."""
    tokenizer = _build_tokenizer()
    return _build_vit_l(tokenizer), _build_bigg(tokenizer)


def _build_vit_l(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    options = {"num_hidden_layers": 12, "hidden_act": "quick_gelu"}
    return CLIPTextModel(_text_config(tokenizer, 768, **options))


def _build_bigg(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    options = {"num_hidden_layers": 32, "hidden_act": "gelu"}
    return CLIPTextModelWithProjection(_text_config(tokenizer, 1280, **options))


def build_sdxl_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=1024,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def _build_sdxl_scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        interpolation_type="linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
