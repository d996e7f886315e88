"""A model's self-attention layers from its configuration files alone."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline

from gspn2_diffusers.families import FAMILIES
from gspn2_diffusers.pipelines.loading import load_failure, resolve_model
from gspn2_diffusers.sites import Site, gspn2_sites, pixels_per_latent


def outline_sites(
    model: str | Path, *, height: int | None = None, width: int | None = None
) -> list[Site]:
    """What `gspn2_sites` lists for a pipeline, without its weights: no download, hardly any memory.

    Args:
        model: pipeline folder or hub id.
        height, width: image size in pixels; None takes the model's own.

    Raises:
        ValueError: no pipeline there, or one without a supported model.
        OSError: the hub has no such model, or cannot be reached.
    """
    source = resolve_model(model)
    try:
        index = DiffusionPipeline.load_config(source)
        part, model_class = _find_denoiser_entry(index)
        config = model_class.load_config(source, subfolder=part)
        pixels = _latent_scale(source, index)
    except OSError as error:
        raise OSError(load_failure(source, error)) from error
    with torch.device("meta"):
        denoiser = model_class.from_config(config)
    latent = [size and size // pixels for size in (height, width)]
    return gspn2_sites(denoiser, *latent)


def _find_denoiser_entry(index: dict) -> tuple[str, type[diffusers.ModelMixin]]:
    """Name and class of the supported model that a ``model_index.json`` lists."""
    classes = {part: entry[1] for part, entry in index.items() if isinstance(entry, list)}
    supported = {family.model_class.__name__: family.model_class for family in FAMILIES}
    for part, name in classes.items():
        if name in supported:
            return part, supported[name]
    raise ValueError(
        f"expected a pipeline with one of {', '.join(supported)}; "
        f"got {', '.join(filter(None, classes.values())) or 'no models'}"
    )


def _latent_scale(source: str, index: dict) -> int:
    """Image pixels along one side of a latent pixel; 1 for pipelines that have no VAE."""
    _, name = index.get("vae", (None, None))
    if name is None:
        return 1
    vae = getattr(diffusers, name).load_config(source, subfolder="vae")
    return pixels_per_latent(vae)
