"""One stage of the cascade: from noise, or from a smaller image with noise, to clean latents."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn

from gspn2_diffusers.conditioning import Rows, denoiser_inputs, predict
from gspn2_diffusers.noising import Noising
from gspn2_diffusers.pipelines.cascade import Stage
from gspn2_diffusers.pipelines.graphs import Replayed
from gspn2_diffusers.pipelines.lean import DeepFeatures, LeanOptions, LeanUNet

# Called with the number of the step and its timestep before the latents go on to the next one;
# returns what they become.
OnStep = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Thrift:
    """How the denoiser is run in a stage: none of it changes the result but `reuse`.

    Args:
        split_guidance: the pass with the prompt and the one without run one after the other.
        lean: piece by piece, see `LeanUNet`; None: the model's own forward pass.
        chunk_feed_forward: tokens that go through a transformer's feed-forward layers at once;
            must divide their number. None: all.
        reuse: what a UNet computes below its first level serves for so many steps; 1: for one.
        graph: the model's own forward pass is replayed as a CUDA graph. Nothing in the model may
            change from step to step.
    """

    split_guidance: bool = False
    lean: LeanOptions | None = None
    chunk_feed_forward: int | None = None
    reuse: int = 1
    graph: bool = False


class GuidedDenoiser:
    """A denoiser's answers for one prompt or several, with classifier-free guidance.

    Args:
        model: the denoiser, compiled or not; walked piece by piece it is not. Compiled or with
            offload hooks, or on another device than CUDA, it is not replayed as a graph.
        told, not_told: rows of the prompts, and of what guidance leads away from, ``[n, ...]``.
        guidance_scale: 1 or less: no guidance.
        thrift: how the model is run.
    """

    def __init__(
        self,
        model: nn.Module,
        told: Rows,
        not_told: Rows,
        guidance_scale: float,
        thrift: Thrift,
    ):
        self.called = model
        self.model = model = getattr(model, "_orig_mod", model)
        self.scale = guidance_scale
        self.reuse = thrift.reuse
        if guidance_scale <= 1:
            passes = [told]
        elif thrift.split_guidance:
            passes = [not_told, told]
        else:
            passes = [{name: torch.cat([not_told[name], told[name]]) for name in told}]
        self.inputs = [denoiser_inputs(model, rows) for rows in passes]
        self.deep = [DeepFeatures() if thrift.reuse > 1 else None for _ in passes]
        needs_walk = thrift.lean is not None or thrift.reuse > 1
        self.lean = LeanUNet(model, thrift.lean or LeanOptions()) if needs_walk else None
        self.graph = (
            thrift.graph
            and not needs_walk
            and self.called is model
            and model.device.type == "cuda"
            and not hasattr(model, "_hf_hook")
        )
        self._dilation = 1
        self._predictions = self._make_predictions()

    def __call__(self, noisy: Tensor, timestep: Tensor, step: int, dilation: int = 1) -> Tensor:
        """The answer ``[n, c, h, w]`` in float32 to latents at step `step` of the stage.

        Args:
            dilation: of the deep convolutions, see `dilated`.
        """
        if step % self.reuse == 0:
            for deep in filter(None, self.deep):
                deep.clear()
        if dilation != self._dilation:  # what was captured has the one before
            self._dilation, self._predictions = dilation, self._make_predictions()
        with dilated(self.model, dilation):
            if self.scale <= 1:
                return self._ask(0, noisy, timestep)
            if len(self.inputs) == 2:
                away, toward = (self._ask(index, noisy, timestep) for index in range(2))
            else:
                away, toward = self._ask(0, torch.cat([noisy, noisy]), timestep).chunk(2)
        return away + self.scale * (toward - away)

    def _make_predictions(self) -> list[Callable[[Tensor, Tensor], Tensor]]:
        """For each pass the model's answer to latents and timesteps."""
        passes = [partial(predict, self.called, inputs=inputs) for inputs in self.inputs]
        return [Replayed(run) for run in passes] if self.graph else passes

    def _ask(self, index: int, noisy: Tensor, timestep: Tensor) -> Tensor:
        inputs = self.inputs[index]
        timesteps = timestep.expand(len(noisy))
        if self.lean is None:
            return self._predictions[index](noisy, timesteps).float()
        noisy = noisy.to(self.model.dtype)
        return self.lean(noisy, timesteps, **inputs, deep=self.deep[index]).float()


class LowFrequencies:
    """Draws answers to the low frequencies of a smaller image.

    The clean latents that an answer stands for get the low frequencies of the enlarged image, less
    and less from step to step: ``weight (1 + cos(pi progress)) / 2`` of them. Like the skip
    residual of DemoFusion (arXiv 2311.16973), but on clean latents, which keeps the noise as it is
    and works with every scheduler.

    Args:
        noising: noise levels of the scheduler.
        image: latents of the enlarged smaller image, ``[n, c, h, w]``.
        coarse: (height, width) of its latents before; frequencies beyond are left alone.
        weight: at the first step, 0 to 1.
    """

    def __init__(self, noising: Noising, image: Tensor, coarse: tuple[int, int], weight: float):
        self.noising = noising
        self.image = image
        self.coarse = coarse
        self.weight = weight

    def __call__(self, answer: Tensor, noisy: Tensor, timestep: Tensor, progress: float) -> Tensor:
        """`answer` to `noisy`, drawn; `progress` is 0 at the first step, 1 after the last."""
        weight = self.weight * (1 + math.cos(math.pi * progress)) / 2
        if weight == 0:
            return answer
        levels = self.noising.level_at(timestep)
        away = self.image - self.noising.clean(noisy, answer, levels)
        return self.noising.moved(answer, weight * self._low(away), levels)

    def _low(self, latents: Tensor) -> Tensor:
        coarse = F.interpolate(latents, self.coarse, mode="area")
        return F.interpolate(coarse, latents.shape[-2:], mode="bicubic")


class StageSampler:
    """Runs the steps of one stage.

    Args:
        scheduler: of the pipeline; a copy of it is used.
        stage: size, steps, strength and the like.
        denoiser: answers for the prompts.
        device: of the latents.

    Raises:
        ValueError: a scheduler whose noise levels cannot be read.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        stage: Stage,
        denoiser: GuidedDenoiser,
        device: torch.device,
    ):
        self.scheduler = type(scheduler).from_config(scheduler.config)
        self.stage = stage
        self.denoiser = denoiser
        self.device = device
        self.noising = Noising(scheduler).to(device)
        self.timesteps = self._set_timesteps()

    def _set_timesteps(self) -> Tensor:
        """The timesteps of this stage: the last of a schedule that is longer by 1 / strength."""
        steps, scheduler = self.stage.steps, self.scheduler
        whole = max(steps, round(steps / self.stage.strength))
        scheduler.set_timesteps(whole, device=self.device)
        skipped = (whole - steps) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        return scheduler.timesteps[skipped:]

    def __call__(
        self,
        shape: Sequence[int],
        generators: Sequence[torch.Generator],
        image: Tensor | None = None,
        coarse: tuple[int, int] | None = None,
        on_step: OnStep | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """Clean latents of `shape` ``[n, c, h, w]``, float32.

        Args:
            generators: one for each image, on the CPU; draw the noise.
            image: latents of the enlarged smaller image; None for a stage from pure noise.
            coarse: (height, width) of its latents before it was enlarged.
            on_step: called after every step.
            stopped: whether to end after the present step.
        """
        noise = torch.cat([torch.randn(1, *shape[1:], generator=each) for each in generators])
        latents = self._start(noise.to(self.device), image)
        guide = None
        if image is not None and self.stage.low_frequency > 0:
            guide = LowFrequencies(self.noising, image, coarse, self.stage.low_frequency)
        extra = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            extra["generator"] = list(generators) if len(generators) > 1 else generators[0]
        count = len(self.timesteps)
        for step, timestep in enumerate(self.timesteps):
            noisy = self._scaled(latents, timestep)
            answer = self.denoiser(noisy, timestep, step, self._dilation(step / count))
            if guide is not None:
                answer = guide(answer, noisy, timestep, step / count)
            latents = self.scheduler.step(answer, timestep, latents, **extra, return_dict=False)[0]
            if on_step is not None:
                latents = on_step(step, timestep, latents)
            if stopped():
                break
        return latents

    def _start(self, noise: Tensor, image: Tensor | None) -> Tensor:
        if image is None or self.stage.strength == 1:
            return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        first = self.timesteps[:1]
        if hasattr(self.scheduler, "add_noise"):
            return self.scheduler.add_noise(image, noise, first)
        return self.scheduler.scale_noise(image, first, noise)

    def _scaled(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """What the denoiser is given; schedulers of flow matching scale nothing."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return latents if scale is None else scale(latents, timestep)

    def _dilation(self, progress: float) -> int:
        return self.stage.dilation if progress < self.stage.dilated_steps else 1


@contextmanager
def dilated(model: nn.Module, dilation: int) -> Iterator[None]:
    """While inside, the deep 3 x 3 convolutions of a UNet reach `dilation` times as far.

    At twice a UNet's size its convolutions see half as much of the picture, and draw things twice
    (ScaleCrafter, arXiv 2310.07702). Those of the last down block, the middle and the first up
    block, which settle what is where, are spread; others would blur the picture.

    Raises:
        ValueError: not a UNet, unless `dilation` is 1.
    """
    if dilation == 1:
        yield
        return
    if not isinstance(model, UNet2DConditionModel):
        raise ValueError(
            f"dilation: expected a UNet2DConditionModel, got {type(model).__name__} with "
            f"dilation {dilation}"
        )
    deep = nn.ModuleList([model.down_blocks[-1], model.mid_block, model.up_blocks[0]])
    with ExitStack() as stack:
        for conv in deep.modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.stride == (1, 1):
                stack.callback(_set_spread, conv, conv.dilation, conv.padding)
                _set_spread(conv, (dilation, dilation), (dilation, dilation))
        yield


def _set_spread(conv: nn.Conv2d, dilation: tuple[int, int], padding: tuple[int, int]) -> None:
    conv.dilation, conv.padding = dilation, padding


@contextmanager
def chunked_feed_forward(model: nn.Module, tokens: int | None) -> Iterator[None]:
    """While inside, feed-forward layers of a transformer take `tokens` tokens at a time."""
    blocks = [m for m in model.modules() if hasattr(m, "set_chunk_feed_forward")]
    if tokens is None:
        blocks = []
    for block in blocks:
        block.set_chunk_feed_forward(tokens, dim=1)
    try:
        yield
    finally:
        for block in blocks:
            block.set_chunk_feed_forward(None, dim=0)
