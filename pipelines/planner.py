"""How a picture fits into a GPU's memory: predicted before anything is computed.

Every phase is run without data, as plainly as it can be done first and then ever leaner
(ladders.py, tracing.py), until the predicted peak is within the memory that there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache

import torch
from diffusers import DiffusionPipeline
from torch import nn

from gspn2_diffusers.pipelines.cards import measure_rates
from gspn2_diffusers.pipelines.cascade import Stage, cascade_sizes, default_stages
from gspn2_diffusers.pipelines.decoding import Tiling
from gspn2_diffusers.pipelines.ladders import (
    CONTEXT_BYTES,
    WORKSPACE_BYTES,
    Ladder,
    Ladders,
    Option,
)
from gspn2_diffusers.pipelines.lean import LeanOptions
from gspn2_diffusers.pipelines.parts import Parts, weight_bytes
from gspn2_diffusers.pipelines.sampling import Thrift
from gspn2_diffusers.pipelines.tracing import Rates

TRIES = 12  # sizes at most, to find one that fits


class DoesNotFitError(MemoryError):
    """Not even the leanest plan is within the memory.

    Attributes:
        needed_bytes: what that plan needs; None if there is no way at all to run the model.
        vram_bytes: what there is.
        largest: (height, width) of about the largest picture of the same aspect ratio that would
            fit; None if that is not known.
    """

    def __init__(
        self,
        message: str,
        needed_bytes: int | None,
        vram_bytes: int,
        largest: tuple[int, int] | None = None,
    ):
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.vram_bytes = vram_bytes
        self.largest = largest


@dataclass(frozen=True)
class StagePlan:
    """How one stage is denoised, and what that should need.

    Args:
        height, width: of its picture in pixels.
        steps: denoising steps.
        guidance: whether a step takes two forward passes, with the prompt and without.
        split_guidance: they run one after the other instead of in one batch.
        lean: how a LeanUNet saves memory; None: the model's own forward pass.
        reuse: deep features serve for so many steps; 1: for one.
        chunk_feed_forward: tokens that a feed-forward layer takes at once; None: all.
        graph: the forward pass is replayed as a CUDA graph.
        peak_bytes: memory of the GPU, all that occupies it then included.
        host_bytes: pinned CPU memory in which skip connections wait.
        seconds: None where the GPU's rates are not known.
    """

    height: int
    width: int
    steps: int
    guidance: bool
    split_guidance: bool
    lean: LeanOptions | None
    reuse: int
    chunk_feed_forward: int | None
    peak_bytes: int
    host_bytes: int
    seconds: float | None
    graph: bool = False

    @property
    def thrift(self) -> Thrift:
        """What the sampler is told."""
        return Thrift(
            self.split_guidance, self.lean, self.chunk_feed_forward, self.reuse, self.graph
        )

    def describe(self) -> str:
        """How, in words."""
        words = []
        if self.guidance:
            words.append("passes one by one" if self.split_guidance else "passes together")
        if self.lean is not None:
            words.append(f"pieces of 2^{math.log2(self.lean.max_elements):.3g} elements")
            if self.lean.offload_skips:
                words.append("skips in CPU memory")
        if self.chunk_feed_forward is not None:
            words.append(f"feed-forward of {self.chunk_feed_forward} tokens")
        if self.reuse > 1:
            words.append(f"deep features for {self.reuse} steps")
        if self.graph:
            words.append("CUDA graph")
        return ", ".join(words) or "plain"


@dataclass(frozen=True)
class DecodePlan:
    """How latents are decoded, and what that should need.

    Args:
        tiling: None: the whole picture at once.
        peak_bytes, seconds: as in a StagePlan.
    """

    tiling: Tiling | None
    peak_bytes: int
    seconds: float | None

    def describe(self) -> str:
        """How, in words."""
        return "whole" if self.tiling is None else f"tiles of {self.tiling.tile} latent pixels"


@dataclass(frozen=True)
class Plan:
    """How a picture is generated.

    Args:
        stages: in their order; the last has the picture's size.
        decode: None for a denoiser without a VAE.
        offload_text: text encoders leave the GPU when they have encoded, and the denoiser gets
            there after them; else all parts are there from the start.
        offload_denoiser: the denoiser leaves the GPU while the VAE works.
        encode_bytes: memory of the GPU while prompts are encoded.
        weights_bytes: of all parts.
        vram_bytes: memory that the plan was made for.
    """

    stages: tuple[StagePlan, ...]
    decode: DecodePlan | None
    offload_text: bool
    offload_denoiser: bool
    encode_bytes: int
    weights_bytes: int
    vram_bytes: int
    search: _Search | None = field(default=None, repr=False, compare=False)

    @property
    def height(self) -> int:
        return self.stages[-1].height

    @property
    def width(self) -> int:
        return self.stages[-1].width

    @property
    def peak_bytes(self) -> int:
        """The largest of all phases."""
        phases = [*self.stages, *([self.decode] if self.decode else [])]
        return max(self.encode_bytes, *(phase.peak_bytes for phase in phases))

    @property
    def host_bytes(self) -> int:
        """Pinned CPU memory, the largest of all stages."""
        return max(stage.host_bytes for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Of all phases, without loading and encoding prompts; None where not known."""
        phases = [*self.stages, *([self.decode] if self.decode else [])]
        times = [phase.seconds for phase in phases]
        return None if None in times else sum(times)

    def leaner(self, phase: int | None = None) -> Plan | None:
        """The next leaner plan, for after memory ran out all the same; None if there is none.

        Args:
            phase: number of the stage that failed, or their count if decoding did; None: the
                phase with the highest peak of those that can be leaner.
        """
        return None if self.search is None else self.search.leaner(phase)

    def rows(self) -> list[dict]:
        """A table: what, size, steps, how, peak_bytes and seconds of every phase."""
        rows = [
            {
                "what": f"stage {number}",
                "size": (stage.height, stage.width),
                "steps": stage.steps,
                "how": stage.describe(),
                "peak_bytes": stage.peak_bytes,
                "seconds": stage.seconds,
            }
            for number, stage in enumerate(self.stages)
        ]
        if self.decode is not None:
            rows.append(
                {
                    "what": "decode",
                    "size": (self.height, self.width),
                    "steps": None,
                    "how": self.decode.describe(),
                    "peak_bytes": self.decode.peak_bytes,
                    "seconds": self.decode.seconds,
                }
            )
        return rows

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        values = asdict(replace(self, search=None))
        del values["search"]
        return values | {"peak_bytes": self.peak_bytes, "seconds": self.seconds}

    @classmethod
    def from_dict(cls, values: Mapping) -> Plan:
        """The plan of these values; it knows no leaner one."""
        stages = tuple(
            StagePlan(**stage | {"lean": stage["lean"] and LeanOptions(**stage["lean"])})
            for stage in values["stages"]
        )
        decode = values["decode"]
        if decode is not None:
            tiling = decode["tiling"] and Tiling(**decode["tiling"])
            decode = DecodePlan(**decode | {"tiling": tiling})
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**known | {"stages": stages, "decode": decode})


# ---- making plans


def plan(
    height: int,
    width: int,
    model: DiffusionPipeline | nn.Module | Parts,
    vram: int | None = None,
    *,
    stages: Sequence[Stage] | None = None,
    steps: int = 30,
    guidance_scale: float = 5.0,
    upper_guidance_scale: float = 1.0,
    **options: object,
) -> Plan:
    """The plan for a picture of this size.

    Args:
        height, width: in pixels; for a denoiser without a VAE in latent pixels.
        model, vram: as in :func:`plan_stages`.
        stages: the last has this size; None: the default cascade.
        steps: of its first stage.
        guidance_scale, upper_guidance_scale: of the first and of the others; 1: one pass a step.
        options: further ones of :func:`plan_stages`.

    Raises:
        ValueError: the last stage has another size; else as :func:`plan_stages`.
        DoesNotFitError: as :func:`plan_stages`.
    """
    parts = model if isinstance(model, Parts) else Parts.of(model)
    if stages is None:
        sizes = cascade_sizes(parts.native_pixels, height, width, parts.size_step)
        stages = default_stages(
            sizes,
            steps=steps,
            guidance_scale=guidance_scale,
            upper_guidance_scale=upper_guidance_scale,
        )
    last = stages[-1].height, stages[-1].width
    if last != (height, width):
        raise ValueError(
            f"stages: expected the last one of {width}x{height} pixels, got {last[1]}x{last[0]}"
        )
    return plan_stages(parts, stages, vram, **options)


def plan_stages(
    model: DiffusionPipeline | nn.Module | Parts,
    stages: Sequence[Stage],
    vram: int | None = None,
    *,
    batch: int = 1,
    reuse: int = 1,
    upsample: str = "pixel",
    softmax_base: bool = True,
    rates: Rates | None = None,
) -> Plan:
    """The plan for these stages: of each phase the fastest way that fits.

    It is for CUDA devices, wherever the model lies now.

    Args:
        model: a pipeline or a denoiser, patched or not, on any device, or parts without data.
        vram: bytes of GPU memory for all of it; None: what the model's GPU has free for it.
        batch: pictures that are drawn together.
        reuse: steps for which a UNet's deep features serve at the last stage; 1: none.
        upsample: "pixel" if the VAE decodes and encodes between stages.
        softmax_base: the first stage runs the model's own attention.
        rates: of the GPU; None: those of the model's GPU are measured, if it is on one.

    Raises:
        ValueError: no `vram` and no GPU to ask; a model that is quantised, or that `reuse` is not
            for.
        DoesNotFitError: nothing fits; says what would.
    """
    parts = model if isinstance(model, Parts) else Parts.of(model)
    if vram is None:
        vram = available_bytes(parts)
    if rates is None and parts.device.type == "cuda":
        rates = _measured_rates(parts.device)
    ladders = Ladders(parts, batch, rates)
    last = len(stages) - 1
    phases = [
        ladders.stage(
            stage,
            reuse=reuse if number == last else 1,
            softmax=softmax_base and number == 0,
        )
        for number, stage in enumerate(stages)
    ]
    if parts.vae is not None:
        phases.append(ladders.decoding(stages, enlarging=upsample == "pixel"))
    text_bytes = 0 if parts.offloaded else weight_bytes(parts.others)
    plain = _Search(
        tuple(stages), tuple(phases), (), parts.offloaded, text_bytes, _encode_bytes(parts),
        weight_bytes(parts.all), vram,
    )  # fmt: skip
    if plain.encode_bytes > vram:
        raise _weights_do_not_fit(plain, parts)
    without_text = plain.within(offload_text=True)
    if without_text is None:
        raise _does_not_fit(plain, parts, ladders)
    with_text = plain.within(offload_text=False)
    # Text encoders only go where that buys a faster way.
    stays = with_text is not None and with_text.rungs == without_text.rungs
    return (with_text if stays else without_text).plan()


_measured_rates = cache(measure_rates)


def available_bytes(parts: Parts) -> int:
    """Memory that the GPU of these parts has for them: what is free, what their weights take
    already, and the CUDA context, which plans count as well.

    Raises:
        ValueError: they are on no GPU.
    """
    device = parts.device
    if device.type != "cuda":
        raise ValueError(
            f"vram: expected a number of bytes for a model on {device.type!r}, got None: only a "
            "CUDA device can be asked"
        )
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached + parts.bytes_on_device() + CONTEXT_BYTES


def _encode_bytes(parts: Parts) -> int:
    """While prompts are encoded: all parts are there, or one of those that are offloaded."""
    sizes = [weight_bytes([part]) for part in parts.all]
    weights = max(sizes) if parts.offloaded else weight_bytes(parts.all)
    return weights + WORKSPACE_BYTES + CONTEXT_BYTES


@dataclass(frozen=True)
class _Search:
    """A place on the ladders of all phases.

    Args:
        stages: that are planned.
        ladders: of the stages and, where there is a VAE, of decoding.
        rungs: a number for each ladder.
        offload_text: whether text encoders are off the GPU after encoding.
        text_bytes: what that saves.
        encode_bytes, weights_bytes, vram_bytes: as in a Plan.
    """

    stages: tuple[Stage, ...]
    ladders: tuple[Ladder, ...]
    rungs: tuple[int, ...]
    offload_text: bool
    text_bytes: int
    encode_bytes: int
    weights_bytes: int
    vram_bytes: int

    def within(self, offload_text: bool) -> _Search | None:
        """The highest rungs that fit; None if a phase has none."""
        limit = self.vram_bytes - (0 if offload_text else self.text_bytes)
        rungs = tuple(ladder.first_within(limit) for ladder in self.ladders)
        if None in rungs:
            return None
        return replace(self, rungs=rungs, offload_text=offload_text or self.offload_text)

    def leaner(self, phase: int | None) -> Plan | None:
        """See Plan.leaner."""
        if self.text_bytes and not self.offload_text:
            return replace(self, offload_text=True).plan()
        phases = range(len(self.ladders)) if phase is None else [phase]
        possible = [p for p in phases if self.ladders[p].rung(self.rungs[p] + 1) is not None]
        if not possible:
            return None
        worst = max(possible, key=lambda p: self.ladders[p].rung(self.rungs[p]).bytes)
        rungs = [rung + (number == worst) for number, rung in enumerate(self.rungs)]
        return replace(self, rungs=tuple(rungs)).plan()

    def plan(self) -> Plan:
        options = [ladder.rung(rung) for ladder, rung in zip(self.ladders, self.rungs, strict=True)]
        text = 0 if self.offload_text else self.text_bytes
        stages = tuple(
            _stage_plan(stage, option, option.bytes + text)
            for stage, option in zip(self.stages, options, strict=False)
        )
        decode, alone = None, False
        if len(options) > len(stages):
            last = options[-1]
            decode = DecodePlan(last.tiling, last.bytes + text, last.seconds)
            alone = last.without_denoiser
        return Plan(
            stages, decode, self.offload_text, alone, self.encode_bytes, self.weights_bytes,
            self.vram_bytes, self,
        )  # fmt: skip


def _stage_plan(stage: Stage, option: Option, peak_bytes: int) -> StagePlan:
    how: Thrift = option.how
    return StagePlan(
        height=stage.height,
        width=stage.width,
        steps=stage.steps,
        guidance=stage.guided,
        split_guidance=how.split_guidance,
        lean=how.lean,
        reuse=how.reuse,
        chunk_feed_forward=how.chunk_feed_forward,
        peak_bytes=peak_bytes,
        host_bytes=option.host_bytes,
        seconds=option.seconds,
        graph=how.graph,
    )


# ---- when nothing fits


def _weights_do_not_fit(search: _Search, parts: Parts) -> DoesNotFitError:
    needed, vram = search.encode_bytes, search.vram_bytes
    message = (
        f"expected at least {_gib(needed)} of GPU memory for the weights of all parts, "
        f"got {_gib(vram)}"
    )
    if parts.others and not parts.offloaded:
        message += ": call enable_model_cpu_offload() on the pipeline, which needs less"
    return DoesNotFitError(message, needed, vram)


def _does_not_fit(search: _Search, parts: Parts, ladders: Ladders) -> DoesNotFitError:
    final, vram = search.stages[-1], search.vram_bytes
    size = f"{final.width}x{final.height}"
    failed = [ladder for ladder in search.ladders if ladder.first_within(vram) is None]
    leanest = [ladder.leanest() for ladder in failed]
    needed = None if None in leanest else max(option.bytes for option in leanest)
    largest = _largest(search, parts, ladders, needed)
    advice = f"; {largest[1]}x{largest[0]} would fit" if largest else ""
    if needed is None:
        kind = type(parts.denoiser).__name__
        message = f"{size}: expected tensors of fewer than 2^31 elements, got more of a {kind}"
        return DoesNotFitError(message + advice, None, vram, largest)
    message = f"{size}: expected at least {_gib(needed)} of GPU memory, got {_gib(vram)}"
    return DoesNotFitError(message + advice, needed, vram, largest)


def _largest(
    search: _Search, parts: Parts, ladders: Ladders, needed: int | None
) -> tuple[int, int] | None:
    """(height, width) of about the largest picture that fits, of the same aspect ratio."""
    final, vram = search.stages[-1], search.vram_bytes

    def needs(height: int, width: int) -> float:
        return ladders.least_bytes(replace(final, height=height, width=width))

    def shrunk(scale: float) -> tuple[int, int]:
        step = parts.size_step
        sides = (final.height, final.width)
        return tuple(max(step, math.floor(scale * side / step) * step) for side in sides)

    first = search.stages[0]
    start = (first.height, first.width) if len(search.stages) > 1 else shrunk(1 / 4)
    least = needs(*start)
    if least > vram:
        return None
    # Memory grows evenly with the pixels, nearly.
    pixels, fewest = final.height * final.width, math.prod(start)
    share = 0.5 if needed is None else (vram - least) / max(needed - least, 1)
    scale = math.sqrt(min(1.0, (fewest + share * (pixels - fewest)) / pixels))
    for _ in range(TRIES):
        size = shrunk(scale)
        if math.prod(size) <= fewest:
            break
        if needs(*size) <= vram:
            return size
        scale *= 0.95
    return start


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
