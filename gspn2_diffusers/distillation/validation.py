"""What a run measures on the way: errors on rows it does not train on, pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image

from ..comparison import draw_comparison
from ..evaluation import check_takes_prompts
from ..patch import softmax_attention
from ..pipelines.generation import generate_images
from .batches import Batches
from .losses import Distillation

TEACHER, STUDENT = "teacher", "student"


class Validation:
    """Called by the trainer with (step, stage).

    Args:
        batches: of rows that are not trained on; the same noise every time.
        count: of global batches.
        pipe: whose denoiser is the student, for the pictures.
        prompts: of the pictures; each has a seed of its own. Empty: no pictures.
        height, width: of the pictures in pixels.

    Raises:
        ValueError: prompts for a pipeline that takes none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        distillation: Distillation,
        batches: Batches,
        count: int,
        *,
        pipe: DiffusionPipeline,
        folder: Path,
        prompts: Sequence[str] = (),
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
    ):
        self.accelerator = accelerator
        self.distillation = distillation
        self.batches = batches
        self.count = count
        self.pipe = pipe
        self.folder = folder
        self.prompts = list(prompts)
        if self.prompts:
            check_takes_prompts(pipe)
        self._options = {
            "height": height, "width": width, "steps": steps, "guidance_scale": guidance_scale,
            "seed": seed,
        }  # fmt: skip
        self._teacher_images: list[Image.Image] | None = None

    def __call__(self, step: int, stage: str) -> dict:
        """``output_error``: relative error of the student's output; ``layer_error``: mean relative
        error of its blocks on the teacher's own inputs; ``layers``: the same of each."""
        results = self.errors()
        if self.prompts and self.accelerator.is_main_process:
            self._draw(step)
        self.accelerator.wait_for_everyone()
        return results

    @torch.no_grad()
    def errors(self) -> dict:
        """The errors alone, means over the held-out batches of all processes."""
        outputs, layers = [], []
        for step in range(self.count):
            for batch in self.batches.of_step(step):
                with self.accelerator.autocast():
                    outputs.append(self.distillation.output_error(batch))
                    layers.append(self.distillation(batch, "teacher_forcing")["layers"])
        found = torch.cat((torch.stack(outputs).mean()[None], torch.stack(layers).mean(0)))
        output, *of_layers = self.accelerator.reduce(found, "mean").tolist()
        return {
            "output_error": output,
            "layer_error": sum(of_layers) / len(of_layers),
            "layers": dict(zip(self.distillation.layers, of_layers, strict=True)),
        }

    def _draw(self, step: int) -> None:
        if self._teacher_images is None:
            with softmax_attention(self.pipe):
                self._teacher_images = self._generate()
        images = {TEACHER: self._teacher_images, STUDENT: self._generate()}
        sheet = draw_comparison(images, self.prompts)
        self.folder.mkdir(parents=True, exist_ok=True)
        sheet.save(self.folder / f"validation-{step:06d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = np.asarray(sheet)[None]
                tracker.log_images({"validation": pixels}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"validation": [sheet]}, step=step)

    def _generate(self) -> list[Image.Image]:
        with self.accelerator.autocast():
            return generate_images(self.pipe, self.prompts, **self._options)
