"""Generate one image per prompt, each from a seed of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline
from PIL import Image

Progress = Callable[[int, int], None]


def generate_images(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: Progress | None = None,
) -> list[Image.Image]:
    """Generate the prompts one after the other; prompt i starts from noise of seed + i.

    Args:
        steps, guidance_scale, height, width: None leaves them to the pipeline; sizes in pixels.
            Pipelines that would round a size to one of their own (PixArt) are told not to.
        progress: called with (done, expected), in steps or in images, over all prompts.

    Raises:
        ValueError: the pipeline takes no text prompt.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    if "prompt" not in accepted:
        raise ValueError(f"expected a pipeline that takes a text prompt; got {type(pipe).__name__}")
    options = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if {"height", "width"} & options.keys() and "use_resolution_binning" in accepted:
        options["use_resolution_binning"] = False
    images = []
    for index, prompt in enumerate(prompts):
        # Some pipelines, PixArt among them, have no such callback: their progress is by image.
        if "callback_on_step_end" in accepted:
            options["callback_on_step_end"] = _step_counter(index, len(prompts), progress)
        output = pipe(prompt, generator=seeded(seed + index), **options)
        images.append(output.images[0])
        if progress is not None:
            progress(index + 1, len(prompts))
    return images


def literal_options(pipe: DiffusionPipeline) -> dict[str, bool]:
    """Options of a call that make PixArt draw the size it is asked for, and read prompts as they
    are whether or not the packages that clean them are installed; others need none."""
    accepted = inspect.signature(pipe.__call__).parameters
    return {name: False for name in ("use_resolution_binning", "clean_caption") if name in accepted}


def seeded(seed: int) -> torch.Generator:
    """A CPU generator: the same seed gives the same noise whatever device the pipeline is on."""
    return torch.Generator("cpu").manual_seed(seed)


def _step_counter(index: int, prompts: int, progress: Progress | None) -> Callable[..., dict]:
    def on_step_end(pipe: DiffusionPipeline, step: int, timestep: int, tensors: dict) -> dict:
        if progress is not None:
            steps = pipe.num_timesteps
            progress(index * steps + step + 1, prompts * steps)
        return tensors

    return on_step_end
