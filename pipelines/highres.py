"""Pictures far above a model's own size: a cascade of stages, and a decoder that works in tiles."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput, logging
from PIL import Image
from torch import Tensor, nn

from gspn2_diffusers.conditioning import native_resolution, size_step
from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.hardware import execution_device
from gspn2_diffusers.pipelines.cascade import Stage, cascade_from, cascade_sizes, default_stages
from gspn2_diffusers.pipelines.planner import Plan, plan_stages
from gspn2_diffusers.pipelines.running import Progress, Request, Run
from gspn2_diffusers.pipelines.writing import check_writable
from gspn2_diffusers.sites import pixels_per_latent

logger = logging.get_logger(__name__)

UPSAMPLING = ("pixel", "latent")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers import DiffusionPipeline
        >>> from gspn2_diffusers import apply_gspn2
        >>> from gspn2_diffusers.pipelines import HighResPipeline

        >>> pipe = DiffusionPipeline.from_pretrained("owner/model", dtype=torch.bfloat16).to("cuda")
        >>> apply_gspn2(pipe, "owner/gspn2-weights-for-this-model")
        >>> highres = HighResPipeline(pipe)
        >>> highres("a lake at dawn", height=4096, width=4096).images[0].save("lake.png")
        >>> highres("a lake at dawn", height=16384, width=16384, output="lake.tif")
        ```
"""


@dataclass
class HighResOutput(BaseOutput):
    """What a :class:`HighResPipeline` returns.

    Args:
        images: PIL images, an array ``[n, h, w, 3]`` in 0..1, a tensor ``[n, 3, h, w]`` in 0..1 or
            latents ``[n, c, h, w]``, by ``output_type``; empty if written to a file.
        path: the file, if one was asked for.
        stages: settings of the stages that ran.
        plan: how memory was saved in the end; None where nothing was planned.
        seconds: of each part of the run, by name.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    path: Path | None = None
    stages: list[Stage] = field(default_factory=list)
    plan: Plan | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class HighResPipeline(DiffusionPipeline):
    """Generates pictures of any size and aspect ratio with a supported text-to-image pipeline.

    The first stage draws at about the model's own size, with its softmax attention. Each further
    stage enlarges the picture by at most 2, adds some noise and denoises it, with GSPN-2 in place
    of self-attention if the pipeline is patched (`apply_gspn2`), while the low frequencies are
    drawn to those of the smaller picture. At the end the VAE decodes in tiles.

    It shares all parts with the pipeline it is made from, and changes none of them. Offload hooks,
    LoRA and compiled denoisers keep working; stages whose plan walks the UNet piece by piece
    bypass a compiled one.

    Args:
        pipe: a `StableDiffusionPipeline`, `StableDiffusionXLPipeline` or PixArt pipeline, or any
            other with a supported denoiser, a VAE and prompts.

    Raises:
        TypeError, ValueError: a pipeline without a supported denoiser, VAE or scheduler.
    """

    _callback_tensor_inputs = ["latents"]

    def __init__(self, pipe: DiffusionPipeline):
        super().__init__()
        find_denoiser(pipe)
        for part in ("vae", "scheduler"):
            if getattr(pipe, part, None) is None:
                raise ValueError(
                    f"expected a pipeline with a {part}, got a {type(pipe).__name__} without"
                )
        self.base = pipe
        self.register_modules(**pipe.components)
        self.model_cpu_offload_seq = pipe.model_cpu_offload_seq
        self._interrupt = False
        self._stage = 0

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline, **_: object) -> HighResPipeline:
        """The same as the constructor, by the name that diffusers gives it."""
        return cls(pipe)

    @classmethod
    def _get_signature_keys(cls, obj: DiffusionPipeline) -> tuple[set[str], set[str]]:
        # What diffusers asks for components, devices and offload: all as in the pipeline it shares.
        return type(obj.base)._get_signature_keys(obj.base)

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer."""
        return find_denoiser(self.base)

    @property
    def called_denoiser(self) -> nn.Module:
        """The same as its pipeline calls it: compiled, if it was."""
        modules = (part for part in self.components.values() if isinstance(part, nn.Module))
        return next(m for m in modules if getattr(m, "_orig_mod", m) is self.denoiser)

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to stop after the step."""
        return self._interrupt

    @property
    def stage(self) -> int:
        """Number of the stage that runs, for callbacks."""
        return self._stage

    def default_stages(
        self,
        height: int,
        width: int,
        *,
        num_inference_steps: int = 30,
        guidance_scale: float = 5.0,
        upper_guidance_scale: float = 1.0,
        dilated_steps: float = 0.0,
        start: tuple[int, int] | None = None,
    ) -> list[Stage]:
        """The stages to a picture of this size, to be looked at or changed before a call.

        Args:
            height, width: of the picture in pixels.
            num_inference_steps: of the first stage; the others take fewer.
            guidance_scale, upper_guidance_scale: of the first stage, and of the others.
            dilated_steps: part of the others' steps with dilated convolutions, 0 to 1.
            start: (height, width) of a given picture to start from.

        Raises:
            ValueError: a size that the model cannot draw.
        """
        self._check_size(height, width)
        multiple, native = size_step(self.base), native_resolution(self.base)
        options = {
            "steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "upper_guidance_scale": upper_guidance_scale,
            "dilated_steps": dilated_steps,
        }
        if start is None:
            return default_stages(cascade_sizes(native, height, width, multiple), **options)
        sizes = cascade_from(start, height, width, multiple)
        above = max(0, round(math.log2(max(1, math.sqrt(math.prod(start)) / native))))
        return default_stages(sizes, **options, first=above)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        image: Image.Image | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 5.0,
        upper_guidance_scale: float = 1.0,
        dilated_steps: float = 0.0,
        stages: Sequence[Stage] | None = None,
        upsample: str = "pixel",
        softmax_base: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        plan: Plan | None = None,
        vram: int | None = None,
        reuse: int = 1,
        keep: str | os.PathLike | None = None,
        resume: bool = False,
        output: str | os.PathLike | None = None,
        metadata: Mapping[str, str] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress: Progress | None = None,
    ) -> HighResOutput | tuple:
        """Generate pictures.

        Args:
            prompt: one prompt, or several that are drawn together.
            height, width: in pixels; None: those of the last stage, or the model's own.
            negative_prompt: what guidance leads away from; default: as the pipeline itself does.
            image: a picture to enlarge, instead of a first stage from noise.
            num_inference_steps: of the first stage.
            guidance_scale: of the first stage; 1: none.
            upper_guidance_scale: of the others; 1: none, half the time.
            dilated_steps: part of the upper stages' steps, 0 to 1, in which a UNet's deep
                convolutions reach as much farther as the picture is larger than the first: against
                objects that are drawn twice.
            stages: settings of every stage, instead of `default_stages`. With `image` the first
                only gives the size to which the picture is resized.
            upsample: "pixel" decodes, enlarges and encodes between stages; "latent" enlarges the
                latents, which takes no time.
            softmax_base: the first stage uses the model's own attention even where it is patched.
            generator: seeds the run; a list has one for each prompt. Every stage has a seed of its
                own, drawn from it at the start.
            plan: how memory is saved; default: on CUDA what `plan_stages` finds, else nothing.
            vram: bytes that the default plan may use; default: what the device has free.
            reuse: steps for which a UNet's deep features serve at the last stage; 1: none. Faster,
                and not the same picture.
            keep: folder for the latents of finished stages.
            resume: go on from what an interrupted run of the same settings left in `keep`.
            output: file to write the one picture to, band by band as it is decoded.
            metadata: texts to be written into the file besides the settings.
            output_type: "pil", "np", "pt" or "latent"; without `output`.
            return_dict: a `HighResOutput`; else a tuple of the images.
            callback_on_step_end: called as ``callback(pipe, step, timestep, tensors)`` with the
                number of the step over all stages; may return changed tensors.
            callback_on_step_end_tensor_inputs: only "latents".
            progress: called with (what is running, done, expected), in steps and tiles; replaces
                the bars.

        Raises:
            ValueError: an argument that does not fit another, the model or the device.
            DoesNotFitError: the device has too little memory; says what would fit.
            OSError: the output or `keep` cannot be written.
            RuntimeError: the model gave latents that are not finite.
        """
        _check_choice("upsample", upsample, UPSAMPLING)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if stages is None:
            side = native_resolution(self.base)
            stages = self.default_stages(
                height or side,
                width or side,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                upper_guidance_scale=upper_guidance_scale,
                dilated_steps=dilated_steps,
                start=None if image is None else (image.height, image.width),
            )
        self._check_stages(stages, height, width)
        request = Request(
            prompts=_texts("prompt", prompts, len(prompts)),
            negative_prompts=_texts("negative_prompt", negative_prompt, len(prompts)),
            stages=tuple(stages),
            seeds=_draw_seeds(generator, len(prompts), len(stages)),
            upsample=upsample,
            softmax_base=softmax_base,
            image=image,
        )
        _check_choice("output_type", output_type, OUTPUT_TYPES)
        for name in callback_on_step_end_tensor_inputs:
            _check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)
        _check_outputs(request, output, keep, resume)
        if plan is not None:
            _check_plan(plan, request.stages)
        elif execution_device(self).type == "cuda":
            plan = self._plan(request, vram, reuse)
        self._interrupt = False
        images, path = [], None
        with Run(self, request, plan, reuse, progress, callback_on_step_end) as run:
            latents = run.latents(keep, resume)
            if output is not None:
                path = run.write(latents, Path(output), metadata or {})
            elif output_type == "latent":
                images = latents
            else:
                images = _as_type(run.decode(latents), output_type)
        result = HighResOutput(images, path, list(request.stages), run.plan, run.seconds)
        return result if return_dict else (result.images,)

    __call__.__doc__ += EXAMPLE_DOC_STRING

    def _plan(self, request: Request, vram: int | None, reuse: int) -> Plan | None:
        """What fits the device; None for models whose needs cannot be predicted."""
        if getattr(self.denoiser, "hf_quantizer", None) is not None:
            logger.warning("a quantised denoiser: this run is not planned and may need more memory")
            return None
        return plan_stages(
            self.base, request.stages, vram, batch=len(request.prompts), reuse=reuse,
            upsample=request.upsample, softmax_base=request.softmax_base,
        )  # fmt: skip

    def _check_stages(self, stages: Sequence[Stage], height: int | None, width: int | None) -> None:
        if not stages:
            raise ValueError("stages: expected at least one, got none")
        for stage in stages:
            self._check_size(stage.height, stage.width)
        if stages[0].strength != 1:
            raise ValueError(
                f"stages: expected the first with strength 1, got {stages[0].strength}"
            )
        last = (stages[-1].height, stages[-1].width)
        asked = (height or last[0], width or last[1])
        if asked != last:
            raise ValueError(
                f"height and width: expected those of the last stage, {last[1]}x{last[0]}, "
                f"got {asked[1]}x{asked[0]}"
            )

    def _check_size(self, height: int, width: int) -> None:
        patch = self.denoiser.config.get("patch_size") or 1
        multiple = pixels_per_latent(self.vae.config) * patch
        if height < multiple or width < multiple or height % multiple or width % multiple:
            near = [max(multiple, multiple * round(side / multiple)) for side in (height, width)]
            raise ValueError(
                f"expected a height and width that are multiples of {multiple} pixels, "
                f"such as {near[1]}x{near[0]}, got {width}x{height}"
            )


def _texts(name: str, texts: str | Sequence[str] | None, count: int) -> tuple[str, ...] | None:
    """One text for each picture, or None for none."""
    if texts is None:
        return None
    each = (texts,) * count if isinstance(texts, str) else tuple(texts)
    if not each or len(each) != count or not all(isinstance(text, str) for text in each):
        raise ValueError(f"{name}: expected one text or {max(1, count)}, got {texts!r}")
    return each


def _check_plan(plan: Plan, stages: Sequence[Stage]) -> None:
    planned, asked = (
        [(stage.height, stage.width) for stage in some] for some in (plan.stages, stages)
    )
    if planned != asked:
        raise ValueError(f"plan: expected one for stages of (height, width) {asked}, got {planned}")


def _draw_seeds(
    generator: torch.Generator | Sequence[torch.Generator] | None, prompts: int, stages: int
) -> tuple[tuple[int, ...], ...]:
    """A seed for every prompt and stage. With one generator, prompts draw one after the other."""
    several = isinstance(generator, list | tuple)
    if several and len(generator) != prompts:
        raise ValueError(f"generator: expected one or {prompts}, got {len(generator)}")
    each = generator if several else [generator] * prompts
    return tuple(
        tuple(
            torch.randint(2**62, (stages,), generator=one, device=one.device if one else "cpu")
            .tolist()
        )
        for one in each
    )  # fmt: skip


def _check_choice(name: str, value: str, expected: Sequence[str]) -> None:
    if value not in expected:
        raise ValueError(f"{name}: expected one of {', '.join(expected)}, got {value!r}")


def _check_outputs(
    request: Request, output: str | os.PathLike | None, keep: str | os.PathLike | None, resume: bool
) -> None:
    """What does not fit or cannot be written is found before anything is computed."""
    if request.image is not None and len(request.prompts) > 1:
        raise ValueError(f"image: expected one prompt, got {len(request.prompts)}")
    if resume and keep is None:
        raise ValueError("resume: expected a folder in keep to go on from, got none")
    if output is not None:
        if len(request.prompts) > 1:
            raise ValueError(f"output: expected one prompt, got {len(request.prompts)}")
        last = request.stages[-1]
        check_writable(Path(output), last.height, last.width)


def _as_type(
    pictures: list[np.ndarray], output_type: str
) -> list[Image.Image] | np.ndarray | Tensor:
    """uint8 pictures ``[h, w, 3]`` as what was asked for."""
    if output_type == "pil":
        return [Image.fromarray(picture) for picture in pictures]
    scaled = np.stack(pictures).astype(np.float32) / 255
    return scaled if output_type == "np" else torch.from_numpy(scaled).permute(0, 3, 1, 2)
