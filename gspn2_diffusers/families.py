"""The model families that can be patched, one table entry each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn


@dataclass(frozen=True)
class Family:
    """What the package must know of a model class.

    Args:
        model_class: the denoiser.
        grid_owner: class of the modules that flatten a map into tokens; the model itself or modules
            inside it.
        conditioning: keyword arguments of a forward pass besides the input map and the timestep,
            for a batch of one, on the current default device.
    """

    model_class: type[ModelMixin]
    grid_owner: type[nn.Module]
    conditioning: Callable[[ModelMixin], dict]


def _unet_conditioning(unet: UNet2DConditionModel) -> dict:
    config = unet.config
    text_dim = config.encoder_hid_dim or config.cross_attention_dim
    if not isinstance(text_dim, int):
        text_dim = text_dim[0]
    inputs = {"encoder_hidden_states": torch.zeros(1, 8, text_dim)}
    if config.addition_embed_type == "text_time":
        pooled_dim = config.projection_class_embeddings_input_dim
        pooled_dim -= 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(1, pooled_dim),
            "time_ids": torch.zeros(1, 6),
        }
    return inputs


def _dit_conditioning(dit: DiTTransformer2DModel) -> dict:
    return {"class_labels": torch.zeros(1, dtype=torch.long)}


def _pixart_conditioning(pixart: PixArtTransformer2DModel) -> dict:
    text_dim = pixart.config.caption_channels or pixart.config.cross_attention_dim
    size = {"resolution": None, "aspect_ratio": None}
    if pixart.use_additional_conditions:
        size = {"resolution": torch.zeros(1, 2), "aspect_ratio": torch.zeros(1, 1)}
    return {"encoder_hidden_states": torch.zeros(1, 8, text_dim), "added_cond_kwargs": size}


FAMILIES = (
    Family(UNet2DConditionModel, Transformer2DModel, _unet_conditioning),
    Family(DiTTransformer2DModel, DiTTransformer2DModel, _dit_conditioning),
    Family(PixArtTransformer2DModel, PixArtTransformer2DModel, _pixart_conditioning),
)


def find_denoiser(pipe_or_model: DiffusionPipeline | nn.Module) -> nn.Module:
    """The supported model in a pipeline, or the model itself; compiled ones are unwrapped.

    Raises:
        TypeError: neither a pipeline nor a model.
        ValueError: no supported model in it, or more than one.
    """
    if isinstance(pipe_or_model, DiffusionPipeline):
        parts = [part for part in pipe_or_model.components.values() if isinstance(part, nn.Module)]
    elif isinstance(pipe_or_model, nn.Module):
        parts = [pipe_or_model]
    else:
        raise TypeError(
            "expected a diffusers pipeline or model, got an object of type "
            f"{type(pipe_or_model).__name__}"
        )
    parts = [getattr(part, "_orig_mod", part) for part in parts]
    supported = tuple(family.model_class for family in FAMILIES)
    denoisers = [part for part in parts if isinstance(part, supported)]
    if len(denoisers) != 1:
        found = ", ".join(type(part).__name__ for part in denoisers or parts) or "no models"
        raise ValueError(
            f"expected one model of {', '.join(model.__name__ for model in supported)}; "
            f"got {type(pipe_or_model).__name__} with {found}"
        )
    return denoisers[0]


def family_of(model: nn.Module) -> Family:
    """The table entry of a model returned by :func:`find_denoiser`."""
    return next(family for family in FAMILIES if isinstance(model, family.model_class))
