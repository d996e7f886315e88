"""The parts of the Tiny Scenes pipelines, sized to fit into a package and to run on a CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the weights: two pipelines, ``pipeline`` (a UNet) and ``pixart``, their GSPN-2 weights,
and the ``probe``."""

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


def build_t5_encoder(tokenizer: PreTrainedTokenizerBase) -> T5EncoderModel:
    """Text encoder of 2 M parameters for the tokenizer's vocabulary.

    It knows relative positions only, so captions may be padded to any length: with the attention
    mask the padding has no effect. No dropout, because no caption is seen often.
    """
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=4 * TEXT_WIDTH,
            num_layers=4,
            num_heads=TEXT_WIDTH // 32,
            dropout_rate=0.0,
            feed_forward_proj="relu",
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
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


def build_pixart(resolution: int = 256) -> PixArtTransformer2DModel:
    """Denoiser of 7.0 M parameters: 11 transformer blocks on patches of 2 x 2 latent pixels.

    It predicts no variance, and is not told the size of the picture, which only models for 1024
    pixels are.
    """
    model = PixArtTransformer2DModel(
        sample_size=resolution // VAE_DOWNSCALE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=11,
        num_attention_heads=6,
        attention_head_dim=32,
        cross_attention_dim=192,
        caption_channels=TEXT_WIDTH,
        attention_bias=True,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    _initialise_pixart(model)
    return model


def _initialise_pixart(model: PixArtTransformer2DModel) -> None:
    """Start as DiT's authors do, which diffusers leaves out: the first prediction is zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.flatten(1))
    embedder = model.adaln_single.emb.timestep_embedder
    for layer in (embedder.linear_1, embedder.linear_2, model.adaln_single.linear):
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(model.proj_out.weight)


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


def assemble_pixart_pipeline(
    vae: AutoencoderKL,
    text_encoder: T5EncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    transformer: PixArtTransformer2DModel,
) -> PixArtSigmaPipeline:
    """A PixArt-Sigma pipeline of these parts.

    Call it with ``use_resolution_binning=False`` for other sizes than the transformer's own, or it
    draws the nearest of its fixed sizes and resizes the picture.
    """
    return PixArtSigmaPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=build_scheduler(),
    )


def save_half(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """Save a float16 copy as safetensors; the pipeline itself keeps its dtype and device."""
    saved = copy.deepcopy(pipeline)
    for part in saved.components.values():
        if isinstance(part, nn.Module):
            part.cpu().half().to(memory_format=torch.contiguous_format)
    saved.save_pretrained(folder, safe_serialization=True)
