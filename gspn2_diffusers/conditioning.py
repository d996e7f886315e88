"""What a denoiser is told besides the noisy latents, for every family, and how it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

from .families import find_denoiser
from .sites import pixels_per_latent

Rows = dict[str, Tensor]


def encode_prompts(pipe: DiffusionPipeline, captions: Sequence[str]) -> Rows:
    """What the denoiser is told of these captions: columns of first dimension n.

    Captions of a pipeline of classes (DiT) are class labels or class numbers.
    """
    return _encoder_of(find_denoiser(pipe))(pipe, list(captions))


def encode_unconditional(pipe: DiffusionPipeline) -> Rows:
    """The same for no caption, as the pipeline itself does it under guidance; one row."""
    denoiser = find_denoiser(pipe)
    if isinstance(denoiser, DiTTransformer2DModel):
        return {"class_labels": torch.tensor([denoiser.config.num_embeds_ada_norm])}
    rows = _encoder_of(denoiser)(pipe, [""])
    if getattr(pipe.config, "force_zeros_for_empty_prompt", False):
        rows = {name: torch.zeros_like(column) for name, column in rows.items()}
    return rows


def denoiser_inputs(denoiser: nn.Module, rows: Mapping[str, Tensor]) -> dict:
    """Keyword arguments of the denoiser's forward pass, besides sample and timestep.

    Args:
        rows: columns of `encode_prompts` and ``sizes`` ``[n, 6]``: original height and width, top
            and left of the crop, height and width of the image in pixels.
    """
    if isinstance(denoiser, DiTTransformer2DModel):
        return {"class_labels": rows["class_labels"]}
    dtype = _dtype(denoiser)
    inputs = {"encoder_hidden_states": rows["prompt_embeds"].to(dtype)}
    if isinstance(denoiser, PixArtTransformer2DModel):
        inputs["encoder_attention_mask"] = rows["prompt_mask"]
        size = {"resolution": None, "aspect_ratio": None}
        if denoiser.use_additional_conditions:
            target = rows["sizes"][:, 4:].to(dtype)
            size = {"resolution": target, "aspect_ratio": target[:, :1] / target[:, 1:]}
        inputs["added_cond_kwargs"] = size
    elif denoiser.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": rows["pooled_embeds"].to(dtype),
            "time_ids": rows["sizes"].to(dtype),
        }
    return inputs


def predict(denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, inputs: dict) -> Tensor:
    """The denoiser's answer ``[n, c, h, w]``, without the variances that some learn beside it."""
    noisy = noisy.to(_dtype(denoiser))
    answer = denoiser(noisy, timestep=timesteps, **inputs, return_dict=False)[0]
    return answer[:, : noisy.shape[1]]


def native_resolution(pipe: DiffusionPipeline) -> int:
    """Side of the square image, in pixels, that the denoiser is made for."""
    return native_side(find_denoiser(pipe), pixels_per_latent(pipe.vae.config))


def size_step(pipe: DiffusionPipeline) -> int:
    """What the sides of an image, in pixels, must be multiples of."""
    return side_step(find_denoiser(pipe), pixels_per_latent(pipe.vae.config))


def native_side(denoiser: nn.Module, scale: int) -> int:
    """`native_resolution` of a denoiser whose latent pixels are `scale` pixels wide."""
    return denoiser.config.sample_size * scale


def side_step(denoiser: nn.Module, scale: int) -> int:
    """`size_step` of a denoiser whose latent pixels are `scale` pixels wide."""
    levels = len(denoiser.config.get("block_out_channels", [1]))
    return scale * (denoiser.config.get("patch_size") or 2 ** (levels - 1))


def class_numbers(pipe: DiffusionPipeline, captions: Sequence[str]) -> list[int]:
    """Class numbers of captions that are class numbers or labels of a DiT pipeline.

    Raises:
        ValueError: a caption is neither.
    """
    labels = getattr(pipe, "labels", None) or {}
    numbers = []
    for caption in captions:
        text = caption.strip()
        if not text.isdecimal() and text not in labels:
            raise ValueError(f"expected a class number or a label of the pipeline, got {text!r}")
        numbers.append(int(text) if text.isdecimal() else labels[text])
    return numbers


@contextmanager
def safe_dtype(vae: nn.Module) -> Iterator[None]:
    """While open, a VAE that overflows in float16, and says so, is in float32."""
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)


def _dtype(denoiser: nn.Module) -> torch.dtype:
    """Of the first layer's weights: blocks may be of another."""
    return next(denoiser.parameters()).dtype


def _encoder_of(denoiser: nn.Module):
    if isinstance(denoiser, DiTTransformer2DModel):
        return _encode_classes
    if isinstance(denoiser, PixArtTransformer2DModel):
        return _encode_pixart
    if denoiser.config.addition_embed_type == "text_time":
        return _encode_sdxl
    return _encode_sd


def _encode_sd(pipe: DiffusionPipeline, captions: list[str]) -> Rows:
    embeds, _ = pipe.encode_prompt(captions, pipe.text_encoder.device, 1, False)
    return {"prompt_embeds": embeds}


def _encode_sdxl(pipe: DiffusionPipeline, captions: list[str]) -> Rows:
    device = pipe.text_encoder_2.device
    embeds, _, pooled, _ = pipe.encode_prompt(
        captions, device=device, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds, "pooled_embeds": pooled}


def _encode_pixart(pipe: DiffusionPipeline, captions: list[str]) -> Rows:
    embeds, mask, _, _ = pipe.encode_prompt(
        captions, do_classifier_free_guidance=False, device=pipe.text_encoder.device
    )
    return {"prompt_embeds": embeds, "prompt_mask": mask}


def _encode_classes(pipe: DiffusionPipeline, captions: list[str]) -> Rows:
    return {"class_labels": torch.tensor(class_numbers(pipe, captions))}
