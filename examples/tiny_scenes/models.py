"""The parts of the Tiny Scenes pipeline, sized so that it fits into a package and runs on a CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the weights that ship with the package: ``pipeline``, ``probe`` and ``gspn2``."""

VAE_DOWNSCALE = 8
TEXT_WIDTH = 192


def build_vae(resolution: int = 256) -> AutoencoderKL:
    """Autoencoder of 1.4 M parameters: images ``[n, 3, h, w]``, latents ``[n, 4, h/8, w/8]``."""
    return AutoencoderKL(
        block_out_channels=(32, 48, 64, 80),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
        force_upcast=False,
        sample_size=resolution,
    )


def build_text_encoder(tokenizer: PreTrainedTokenizerBase) -> CLIPTextModel:
    """Text encoder of 2 M parameters for the tokenizer's vocabulary and length."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=TEXT_WIDTH // 32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(resolution: int = 256) -> UNet2DConditionModel:
    """Denoiser of 7.4 M parameters with self-attention at all three resolutions.

    One residual block per level and few channels in it: convolutions that reach less far leave the
    long-range structure of a scene to attention.
    """
    return UNet2DConditionModel(
        sample_size=resolution // VAE_DOWNSCALE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(96, 96, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        transformer_layers_per_block=(1, 2, 1),
        attention_head_dim=(3, 3, 4),  # the number of heads, in spite of its name: 32 channels each
        cross_attention_dim=TEXT_WIDTH,
        time_embedding_dim=192,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise levels, stretched so that the last one is pure noise."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # without effect in trailing spacing; other values make pipelines warn
    )


def assemble_pipeline(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: PreTrainedTokenizerBase,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of these parts, without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_half(pipeline: StableDiffusionPipeline, folder: str | Path) -> None:
    """Save a float16 copy as safetensors; the pipeline itself keeps its dtype and device."""
    parts = dict(pipeline.components)
    for name in ("vae", "text_encoder", "unet"):
        half = copy.deepcopy(parts[name]).cpu().half()
        parts[name] = half.to(memory_format=torch.contiguous_format)
    saved = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    saved.save_pretrained(folder, safe_serialization=True)
