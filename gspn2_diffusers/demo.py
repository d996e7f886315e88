"""The same prompts and seeds by softmax self-attention and by GSPN-2, side by side and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from gspn2_diffusers import apply_gspn2
from gspn2_diffusers.comparison import draw_comparison
from gspn2_diffusers.conditioning import native_resolution
from gspn2_diffusers.hardware import synchronize
from gspn2_diffusers.pipelines.cascade import Stage
from gspn2_diffusers.pipelines.generation import seeded
from gspn2_diffusers.pipelines.highres import HighResPipeline
from gspn2_diffusers.pipelines.loading import load_pipeline
from gspn2_diffusers.shipped import shipped_folder

if TYPE_CHECKING:
    from gspn2_diffusers.tiny_scenes.score import Exam

SOFTMAX = "softmax self-attention"
GSPN2 = "GSPN-2"
DIRECT = "drawn at this size at once"
CASCADE = "high-resolution pipeline"
GUIDANCE_SCALE = 4.0
LARGE = 4  # times the training size
STEPS_AT_ONCE = 12  # at most, of a picture that comes out wrong with more of them as well
SCORE_BATCH = 16  # images at a time: bounds memory, and paces the progress bar

Progress = Callable[[str, int, int], None]


@dataclass
class StageTimes:
    """Seconds that each stage of one run took, for all its prompts together."""

    steps: int
    load: float = 0.0
    text: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0

    @property
    def total(self) -> float:
        """Seconds from the first stage to the last."""
        return self.load + self.text + self.denoise + self.decode

    @property
    def step_ms(self) -> float:
        """Milliseconds of one denoising step of all prompts, guidance included."""
        return 1000 * self.denoise / self.steps


@dataclass
class DemoResult:
    """What `run_demo` wrote and measured; dictionaries go by `SOFTMAX` and `GSPN2`, those of the
    large picture by `DIRECT` and `CASCADE`.

    `scores` is empty unless scoring was asked for, `large_seconds` if the large picture was not.
    """

    comparison: Path
    images: dict[str, list[Path]]
    times: dict[str, StageTimes]
    scores: dict[str, dict] = field(default_factory=dict)
    large_comparison: Path | None = None
    large_seconds: dict[str, float] = field(default_factory=dict)


def run_demo(
    output: Path,
    prompts: Sequence[str] = (),
    *,
    steps: int = 25,
    guidance_scale: float = GUIDANCE_SCALE,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.float32,
    backend: str = "auto",
    score_scenes: int = 0,
    large: bool = True,
    progress: Progress | None = None,
) -> DemoResult:
    """Generate the prompts by both, and write ``comparison.png`` and the single images to output.

    Args:
        output: folder; made if it is not there.
        prompts: empty takes `gallery_prompts`.
        seed: prompt i starts from noise of seed + i, in both runs.
        dtype: the models are small enough for float32 everywhere; shorter ones round the latents.
        backend: of the GSPN-2 scan, see `apply_gspn2`.
        score_scenes: scenes to score both runs on by the attribute probe; 0 leaves scoring out.
        large: also draw the first prompt at four times the training size, by the high-resolution
            pipeline and at once, and write ``large.png``.
        progress: called with (what is running, done, expected), in steps or in scenes.

    Raises:
        FileNotFoundError: this installation lacks the Tiny Scenes weights.
        ValueError: an unknown device, dtype or backend, fewer than one step.
        RuntimeError: the backend that was asked for cannot run here.
    """
    if steps < 1:
        raise ValueError(f"expected at least 1 step; got {steps}")
    prompts = list(prompts) or gallery_prompts()
    model, weights = shipped_folder("pipeline"), shipped_folder("gspn2")
    times = {name: StageTimes(steps) for name in (SOFTMAX, GSPN2)}
    images, scores = {}, {}

    with _timed(times[SOFTMAX], "load"):
        pipe = load_pipeline(model, dtype=dtype, device=device)
    pipe.set_progress_bar_config(disable=True)
    exam = _prepare_exam(pipe, score_scenes, seed) if score_scenes else None
    for name in (SOFTMAX, GSPN2):
        if name == GSPN2:
            with _timed(times[GSPN2], "load"):
                apply_gspn2(pipe, str(weights), backend=backend)
        on_step = _step_counter(name, steps, progress)
        images[name] = _generate(pipe, prompts, guidance_scale, seed, times[name], on_step)
        if exam is not None:
            scores[name] = _score(pipe, name, exam, steps, guidance_scale, progress)

    output.mkdir(parents=True, exist_ok=True)
    paths = {name: _save(images[name], output, name) for name in images}
    comparison = output / "comparison.png"
    draw_comparison(images, prompts).save(comparison)
    result = DemoResult(comparison, paths, times, scores)
    if large:
        drawn, result.large_seconds = _draw_large(
            pipe, prompts[0], steps, guidance_scale, seed, progress
        )
        result.large_comparison = output / "large.png"
        draw_comparison(drawn, prompts[:1]).save(result.large_comparison)
    return result


def gallery_prompts(count: int = 4) -> list[str]:
    """The first captions of the Tiny Scenes gallery."""
    from gspn2_diffusers.tiny_scenes.captions import GALLERY

    return [caption for caption, _ in GALLERY[:count]]


def _generate(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    guidance_scale: float,
    seed: int,
    times: StageTimes,
    on_step_end: Callable[..., dict],
) -> list[Image.Image]:
    """Run the pipeline's three stages one by one, so that each can be timed."""
    # Untimed, or the first run would pay for what both need: kernels loaded, threads started.
    pipe(prompts, num_inference_steps=1, guidance_scale=guidance_scale, output_type="latent")
    with _timed(times, "text"):
        embeds, negative = pipe.encode_prompt(
            prompts, pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    with _timed(times, "denoise"):
        latents = pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative,
            num_inference_steps=times.steps,
            guidance_scale=guidance_scale,
            generator=[seeded(seed + index) for index in range(len(prompts))],
            output_type="latent",
            callback_on_step_end=on_step_end,
        ).images
    with _timed(times, "decode"), torch.inference_mode():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        return pipe.image_processor.postprocess(decoded, output_type="pil")


def _draw_large(
    pipe: StableDiffusionPipeline,
    prompt: str,
    steps: int,
    guidance_scale: float,
    seed: int,
    progress: Progress | None,
) -> tuple[dict[str, list[Image.Image]], dict[str, float]]:
    """Pictures of one prompt at `LARGE` times the training size, and the seconds they took."""
    side = LARGE * native_resolution(pipe)
    highres = HighResPipeline(pipe)
    highres.set_progress_bar_config(disable=True)
    cascade = highres.default_stages(
        side, side, num_inference_steps=steps, guidance_scale=guidance_scale, dilated_steps=1.0
    )
    at_once = [Stage(side, side, min(steps, STEPS_AT_ONCE), guidance_scale=guidance_scale)]
    images, seconds = {}, {}
    for name, stages in {DIRECT: at_once, CASCADE: cascade}.items():
        result = highres(
            prompt,
            stages=stages,
            softmax_base=name == CASCADE,
            generator=seeded(seed),
            progress=None if progress is None else partial(_tell_large, progress, name),
        )
        images[name], seconds[name] = result.images, sum(result.seconds.values())
    return images, seconds


def _tell_large(progress: Progress, run: str, part: str, done: int, total: int) -> None:
    progress(f"{run}: {part}", done, total)


def _prepare_exam(pipe: DiffusionPipeline, scenes: int, seed: int) -> Exam:
    """What both runs are scored on."""
    from gspn2_diffusers.tiny_scenes.score import prepare_exam

    probe = shipped_folder("probe")
    return prepare_exam(pipe.device, scenes, seed, batch_size=SCORE_BATCH, probe=probe)


def _score(
    pipe: DiffusionPipeline,
    name: str,
    exam: Exam,
    steps: int,
    guidance_scale: float,
    progress: Progress | None,
) -> dict:
    """What `tiny_scenes.score.score` says of the pipeline."""
    from gspn2_diffusers.tiny_scenes.score import count_images, score

    return score(
        pipe,
        exam,
        steps=steps,
        guidance_scale=guidance_scale,
        batch_size=SCORE_BATCH,
        progress=count_images(f"scoring {name}", exam, progress),
    )


@contextmanager
def _timed(times: StageTimes, stage: str) -> Iterator[None]:
    """Set one stage's seconds, with the GPU's queue emptied at both ends."""
    synchronize()
    start = time.perf_counter()
    yield
    synchronize()
    setattr(times, stage, time.perf_counter() - start)


def _step_counter(name: str, steps: int, progress: Progress | None) -> Callable[..., dict]:
    def on_step_end(pipe: DiffusionPipeline, step: int, timestep: int, tensors: dict) -> dict:
        if progress is not None:
            progress(name, step + 1, steps)
        return tensors

    return on_step_end


def _save(images: list[Image.Image], output: Path, name: str) -> list[Path]:
    stem = name.split()[0].lower()
    paths = [output / f"{index:02d}-{stem}.png" for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return paths
