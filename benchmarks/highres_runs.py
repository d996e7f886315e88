"""What the benchmarks of the high-resolution pipeline share."""

from __future__ import annotations

import argparse
import gc
import traceback
from collections.abc import Callable

import torch

from gspn2_diffusers.pipelines.cascade import Stage
from gspn2_diffusers.pipelines.highres import HighResPipeline


def stages_of(
    args: argparse.Namespace, pipe: HighResPipeline, size: tuple[int, int]
) -> list[Stage]:
    """The stages to a picture of (height, width) pixels, as the arguments have them."""
    return pipe.default_stages(
        *size, num_inference_steps=args.steps, guidance_scale=args.guidance_scale
    )


def attempt(run: Callable[[], dict], device: torch.device) -> dict:
    """What `run` gives, or ``error``: one failure must not lose what others found."""
    try:
        return run()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        release(device)


def release(device: torch.device) -> None:
    """Give memory that nothing holds back to the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ignore(*_: object) -> None:
    """Stands for progress that nobody looks at."""
