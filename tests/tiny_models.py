"""Pipelines and models of a few thousand weights, built from configurations: nothing downloads."""

from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from gspn2_diffusers.block import GSPN2Block

TEXT_WIDTH = 32


def tiny_sd_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline for 32x32 images (8x8 latents), with random weights."""
    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        unet=tiny_unet(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_unet(**changes) -> UNet2DConditionModel:
    """A UNet in the layout of SD 1.x with self-attention at two resolutions; `changes` to its
    configuration."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "cross_attention_dim": TEXT_WIDTH,
    }
    return UNet2DConditionModel(**config | changes).eval()


def tiny_vae() -> AutoencoderKL:
    """A VAE with 4 pixels per latent pixel."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=32,
    ).eval()


def tiny_text_encoder() -> CLIPTextModel:
    """A text encoder for `tiny_tokenizer`."""
    vocabulary = tiny_tokenizer().get_vocab()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    return CLIPTextModel(config).eval()


def tiny_tokenizer() -> CLIPTokenizer:
    """A tokenizer that spells in the letters a to z."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def tiny_sdxl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """The layout of SDXL: linear projections, levels without attention, deeper transformers, two
    text encoders. 4 pixels per latent pixel."""
    torch.manual_seed(seed)
    second = tiny_text_encoder().config.to_dict() | {"projection_dim": TEXT_WIDTH}
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**second)).eval(),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_unet(
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
            cross_attention_dim=2 * TEXT_WIDTH,
        ),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pixart_pipeline(seed: int = 0) -> PixArtSigmaPipeline:
    """The layout of PixArt Sigma; no text encoder, call it with `prompt_embeds`."""
    torch.manual_seed(seed)
    pipe = PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny_vae(),
        transformer=tiny_pixart(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


TINY_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "attention_bias": True,
}


def tiny_pixart() -> PixArtTransformer2DModel:
    """PixArt with patches of 2 x 2 latent pixels."""
    return PixArtTransformer2DModel(
        **TINY_TRANSFORMER,
        cross_attention_dim=32,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    ).eval()


def tiny_dit() -> DiTTransformer2DModel:
    """Class-conditional DiT with patches of 2 x 2 latent pixels."""
    return DiTTransformer2DModel(**TINY_TRANSFORMER, num_embeds_ada_norm=10).eval()


def tiny_denoiser(family: str) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A denoiser and a function that runs it on a random latent of (batch, height, width)."""
    torch.manual_seed(0)
    if family == "unet":
        model = tiny_unet()
        conditions = {"encoder_hidden_states": torch.randn(1, 5, TEXT_WIDTH)}
    elif family == "sdxl":
        model = tiny_sdxl_pipeline().unet
        added = {"text_embeds": torch.randn(1, TEXT_WIDTH), "time_ids": torch.randn(1, 6)}
        conditions = {
            "encoder_hidden_states": torch.randn(1, 5, 2 * TEXT_WIDTH),
            "added_cond_kwargs": added,
        }
    elif family == "pixart":
        model = tiny_pixart()
        conditions = {
            "encoder_hidden_states": torch.randn(1, 5, TEXT_WIDTH),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
    else:
        model = tiny_dit()
        conditions = {"class_labels": torch.tensor([3])}

    def run(
        model: nn.Module,
        batch: int = 1,
        height: int = 8,
        width: int = 8,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        generator = torch.Generator().manual_seed(height * width)
        sample = torch.randn(batch, 4, height, width, generator=generator)

        def fit(value):
            if isinstance(value, dict):
                return {key: fit(inner) for key, inner in value.items()}
            if not isinstance(value, Tensor):
                return value
            value = value.expand(batch, *value.shape[1:])
            return value.to(dtype) if value.is_floating_point() else value

        timestep = torch.full((batch,), 7)
        return model(sample.to(dtype), timestep=timestep, **fit(conditions)).sample

    return model, run


def awaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give fresh GSPN-2 blocks random gates, as if trained: new ones start by adding nothing."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, GSPN2Block):
            for parameter in module.to_params.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(0.3 * noise.to(parameter.dtype))
    return model
