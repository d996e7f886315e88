"""The ways through each phase of a generation, from the fastest to the leanest, and their needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

from gspn2_diffusers.conditioning import Rows
from gspn2_diffusers.families import family_of
from gspn2_diffusers.patch import softmax_attention
from gspn2_diffusers.pipelines.cascade import Stage
from gspn2_diffusers.pipelines.decoding import Tiling, decode_bands, encode_tiled, tile_spans
from gspn2_diffusers.pipelines.graphs import EAGER_RUNS
from gspn2_diffusers.pipelines.lean import LeanOptions, LeanUNet
from gspn2_diffusers.pipelines.parts import Parts, weight_bytes, without_data
from gspn2_diffusers.pipelines.sampling import GuidedDenoiser, Thrift, chunked_feed_forward
from gspn2_diffusers.pipelines.tracing import Cost, Rates, trace
from gspn2_diffusers.sites import is_patched, pixels_per_latent, walk_sites

# Memory of a process that no tensor of a trace has. The CUDA context and the kernels' code, outside
# torch's own peak, took 0.68 to 0.79 GiB (benchmarks/results/highres-sdxl-*.json).
CONTEXT_BYTES = 768 * 2**20
# Measured peaks of the SDXL UNet on an H100
# (benchmarks/results/unet-sdxl-cuda.json) are above the traced ones by 142 MiB and 1.7 %, from
# 1024² to 8192²: the workspaces of cuBLAS and cuDNN.
WORKSPACE_BYTES = 160 * 2**20
WORKSPACE_SHARE = 0.02
FRAGMENTATION_SHARE = 0.05  # of the traced peak: gaps that the allocator cannot use
# What the VAE of SDXL took on an H100 in bfloat16, from 2048² to 8192² pixels, whole and in tiles
# (benchmarks/results/highres-sdxl-*.json compare what follows from it with measurements). Python
# launches ahead of it. Its convolutions reach another share of a device's rates than those of
# denoisers, and take workspaces.
VAE_RATE_SHARES = {"decode": 1.15, "encode": 0.64}
VAE_WORKSPACE_SHARES = {"decode": 0.0, "encode": 0.17}
# For tensors from this size on cuDNN has slower kernels, which need more memory: decoding 2048²
# pixels at once half as much again.
MANY_BYTES = 2**31
MANY_BYTES_RATE_SHARE, MANY_BYTES_WORKSPACE_SHARE = 0.45, 0.5
LATENT_COPIES = 8  # float32 latents that wait while the denoiser runs, some to spare
REPLAYED_LAUNCH = 2e-6  # seconds from one operator of a CUDA graph to the next
# Bytes a second at which CPU memory is pinned, once in a stage: an H100's host got 1.7 GB in
# torch's usual way, 6.8 GB in the one that `prefer_growing_memory` chooses.
PINNING_RATE = 2e9
# From here on a tensor's elements are counted in more than 32 bits, which not every kernel does.
TOO_MANY_ELEMENTS = 2**31

TEXT_TOKENS, PIXART_TEXT_TOKENS = 77, 300
PIECES = (2**30, 2**28, 2**26)
CHUNKS = (2, 4, 8, 16, 32)
# Sides of tiles and what they share. Larger ones than the first are slower: attention takes more.
TILES = ((192, 16), (96, 16), (48, 8))


@dataclass(frozen=True)
class Option:
    """One way through a phase.

    Args:
        how: of a stage; None for decoding.
        tiling: of the decoding, None for the whole picture at once.
        without_denoiser: whether it is off the GPU then.
        bytes: of GPU memory, but for text encoders and the like.
        host_bytes: of pinned CPU memory.
        seconds: None where the GPU's rates are not known.
    """

    bytes: int
    seconds: float | None
    how: Thrift | None = None
    tiling: Tiling | None = None
    without_denoiser: bool = False
    host_bytes: int = 0


class Ladder:
    """The options of a phase: each rung needs less memory than those before it.

    They are worked out when they are asked for.
    """

    def __init__(self, options: Iterable[Option]):
        self._rest = iter(options)
        self._rungs: list[Option] = []

    def rung(self, number: int) -> Option | None:
        """None beyond the last."""
        while len(self._rungs) <= number:
            option = next(self._rest, None)
            if option is None:
                return None
            if not self._rungs or option.bytes < self._rungs[-1].bytes:
                self._rungs.append(option)
        return self._rungs[number]

    def first_within(self, limit: int) -> int | None:
        """Number of the first rung that needs at most `limit` bytes."""
        number = 0
        while (option := self.rung(number)) is not None:
            if option.bytes <= limit:
                return number
            number += 1
        return None

    def leanest(self) -> Option | None:
        """The last rung; None if there is no option at all."""
        self.first_within(-1)
        return self._rungs[-1] if self._rungs else None


class Ladders:
    """Makes the ladders of the phases of one pipeline.

    Args:
        parts: of the pipeline.
        batch: pictures that are drawn together.
        rates: of the GPU; None: no times.

    Raises:
        ValueError: quantised parts.
    """

    def __init__(self, parts: Parts, batch: int, rates: Rates | None):
        self.batch = batch
        self.rates = rates
        self.scale = parts.pixels_per_latent
        self.denoiser = without_data(parts.denoiser)
        self.vae = None if parts.vae is None else without_data(parts.vae)
        self._denoiser_bytes = weight_bytes([parts.denoiser])
        self._vae_bytes = 0 if parts.vae is None else weight_bytes([parts.vae])
        self._vae_costs: dict[tuple, tuple[Cost, float]] = {}
        # Offloaded, it is off the GPU whenever the VAE is on it.
        self._without_denoiser = (True,) if parts.offloaded else (False, True)
        # Passes one by one would need a graph each, and twice the memory.
        self._replayable = () if parts.offloaded else (Thrift(),)

    def least_bytes(self, stage: Stage) -> float:
        """What the leanest way through a stage and its decoding needs; infinite if none works."""
        options = [self._stage_option(stage, self._thrifts(stage, 1)[-1], softmax=False)]
        if self.vae is not None:
            latent = self._latent_size(stage)
            options.append(self._vae_option([latent], False, _tilings(latent)[-1], True))
        return math.inf if None in options else max(option.bytes for option in options)

    # ---- stages

    def stage(self, stage: Stage, *, reuse: int = 1, softmax: bool = False) -> Ladder:
        """The options of a stage.

        Args:
            reuse: steps for which deep features serve.
            softmax: whether the model's own attention runs, if it is still there.

        Raises:
            ValueError: reuse for a model that LeanUNet does not know.
        """
        thrifts = self._thrifts(stage, reuse)
        softmax = softmax and all(
            hasattr(attn, "to_q") for _, _, attn in walk_sites(self.denoiser) if is_patched(attn)
        )
        options = (self._stage_option(stage, thrift, softmax) for thrift in thrifts)
        return Ladder(option for option in options if option is not None)

    def _thrifts(self, stage: Stage, reuse: int) -> list[Thrift]:
        """All ways to run the denoiser, in the order of speed."""
        guided = [False, True] if stage.guided else [False]
        if LeanUNet.supports(self.denoiser):
            pieces = [LeanOptions(size) for size in PIECES]
            # Launching the smallest pieces takes longer than sending skip connections away.
            pieces = [*pieces[:-1], *(replace(each, offload_skips=True) for each in pieces)]
            lean = [Thrift(stage.guided, options, reuse=reuse) for options in pieces]
            whole = None if reuse == 1 else pieces[0]
            return [*(Thrift(split, whole, reuse=reuse) for split in guided), *lean]
        if reuse > 1:
            raise ValueError(
                f"reuse: expected 1 for a {type(self.denoiser).__name__}, whose deep features "
                f"cannot be reused, got {reuse}"
            )
        thrifts = [Thrift(split) for split in guided]
        patch = self.denoiser.config.get("patch_size")
        if patch is not None:  # a transformer, with as many tokens in one layer as in another
            tokens = math.prod(side // patch for side in self._latent_size(stage))
            chunks = [tokens // count for count in CHUNKS if tokens % count == 0]
            thrifts += [Thrift(stage.guided, chunk_feed_forward=chunk) for chunk in chunks]
        return thrifts

    def _stage_option(self, stage: Stage, thrift: Thrift, softmax: bool) -> Option | None:
        """What this way needs; None if it does not work."""
        first, *later = self._pass_costs(stage, thrift, softmax)
        if thrift.lean is None and first.largest_elements >= TOO_MANY_ELEMENTS:
            return None
        passes = 2 if thrift.split_guidance else 1
        # The second pass runs while the result of the first waits.
        peak = first.peak_bytes + (passes - 1) * first.kept_bytes
        away = thrift.lean is not None and thrift.lean.offload_skips
        sent = self._skip_bytes(stage, thrift) if away else 0
        seconds = None
        if self.rates is not None:
            filled = math.ceil(stage.steps / thrift.reuse)
            seconds = filled * (first.seconds(self.rates) + sent / self.rates.transfer)
            seconds += (stage.steps - filled) * sum(cost.seconds(self.rates) for cost in later)
            seconds = passes * seconds + sent / PINNING_RATE
            if thrift in self._replayable and self._pays_to_replay(first, stage.steps):
                thrift = replace(thrift, graph=True)
                seconds = self._replayed_seconds(first, stage.steps)
        return Option(
            bytes=self._denoiser_bytes
            + self._vae_bytes
            + self._latent_bytes(stage)
            + with_reserve(peak),
            seconds=seconds,
            how=thrift,
            host_bytes=sent,
        )

    def _pays_to_replay(self, cost: Cost, steps: int) -> bool:
        """Whether so many passes wait for Python for longer than capturing one takes: it launches
        ahead of the GPU as long as that is not done with what it has."""
        launching = cost.launches * self.rates.launch
        waiting = max(0.0, launching - self._unlaunched_seconds(cost))
        return (steps - EAGER_RUNS) * waiting > launching

    def _replayed_seconds(self, cost: Cost, steps: int) -> float:
        """Of passes as they are, of one that is only launched, to be captured, and of replays."""
        launching = cost.launches * self.rates.launch
        replays = (steps - EAGER_RUNS) * self._unlaunched_seconds(cost)
        return EAGER_RUNS * cost.seconds(self.rates) + launching + replays

    def _unlaunched_seconds(self, cost: Cost) -> float:
        """Of what need not wait for Python, as in a CUDA graph."""
        return cost.seconds(replace(self.rates, launch=REPLAYED_LAUNCH))

    def _pass_costs(self, stage: Stage, thrift: Thrift, softmax: bool) -> list[Cost]:
        """Of a forward pass, and of one that reuses the deep features of the one before."""
        model = self.denoiser
        shape = self.batch, model.config.in_channels, *self._latent_size(stage)
        noisy = torch.empty(shape, device="meta")
        timestep = torch.zeros((), dtype=torch.long, device="meta")
        scale = 1.0 if thrift.split_guidance else stage.guidance_scale
        denoiser = GuidedDenoiser(model, self._rows, self._rows, scale, thrift)
        with (
            softmax_attention(model) if softmax else nullcontext(),
            chunked_feed_forward(model, thrift.chunk_feed_forward),
        ):
            steps = range(min(thrift.reuse, 2))
            return [trace(partial(denoiser, noisy, timestep, step)) for step in steps]

    @cached_property
    def _rows(self) -> Rows:
        """What prompts are encoded to, without data."""
        model, batch = self.denoiser, self.batch
        with torch.device("meta"):
            known = family_of(model).conditioning(model)
            if isinstance(model, DiTTransformer2DModel):
                return {"class_labels": torch.zeros(batch, dtype=torch.long)}
            pixart = isinstance(model, PixArtTransformer2DModel)
            tokens = PIXART_TEXT_TOKENS if pixart else TEXT_TOKENS
            width = known["encoder_hidden_states"].shape[-1]
            rows = {
                "prompt_embeds": torch.empty(batch, tokens, width, dtype=model.dtype),
                "sizes": torch.empty(batch, 6),
            }
            if pixart:
                rows["prompt_mask"] = torch.ones(batch, tokens)
            pooled = known.get("added_cond_kwargs", {}).get("text_embeds")
            if pooled is not None:
                rows["pooled_embeds"] = torch.empty(batch, pooled.shape[-1], dtype=model.dtype)
            return rows

    def _latent_size(self, stage: Stage) -> tuple[int, int]:
        return stage.height // self.scale, stage.width // self.scale

    def _latent_bytes(self, stage: Stage) -> int:
        channels = self.denoiser.config.in_channels
        pixels = self.batch * math.prod(self._latent_size(stage))
        return 4 * LATENT_COPIES * channels * pixels

    def _skip_bytes(self, stage: Stage, thrift: Thrift) -> int:
        """Of the skip connections of a pass; one pass after the other uses the same memory."""
        height, width = self._latent_size(stage)
        widths = self.denoiser.config.block_out_channels
        elements = widths[0] * height * width
        for block, channels in zip(self.denoiser.down_blocks, widths, strict=True):
            elements += len(block.resnets) * channels * height * width
            if block.downsamplers:
                height, width = -(-height // 2), -(-width // 2)
                elements += channels * height * width
        together = 2 if stage.guided and not thrift.split_guidance else 1
        return together * self.batch * elements * self.denoiser.dtype.itemsize

    # ---- the VAE

    def decoding(self, stages: Sequence[Stage], *, enlarging: bool) -> Ladder:
        """The options of all that the VAE does: it decodes the last stage and, if it is what
        enlarges between stages, also decodes the others and encodes all but the first."""
        latent = [self._latent_size(stage) for stage in stages]
        options = (
            self._vae_option(latent, enlarging, tiling, without_denoiser)
            for tiling in _tilings(latent[-1])
            for without_denoiser in self._without_denoiser
        )
        return Ladder(option for option in options if option is not None)

    def _vae_option(
        self,
        latent: Sequence[tuple[int, int]],
        enlarging: bool,
        tiling: Tiling | None,
        without_denoiser: bool,
    ) -> Option | None:
        """What this way needs for latents of these sizes; None if it does not work."""
        jobs = [("decode", size) for size in (latent if enlarging else latent[-1:])]
        jobs += [("encode", size) for size in latent[1:] if enlarging]
        peak, seconds = 0, 0.0
        if without_denoiser and self.rates is not None:
            trips = 2 * (len(latent) if enlarging else 1)
            seconds = trips * self._denoiser_bytes / self.rates.transfer
        for what, size in jobs:
            cost, share = self._vae_cost(what, latent[-1], tiling)
            if cost.largest_elements >= TOO_MANY_ELEMENTS:
                return None
            many = cost.largest_elements * self.vae.dtype.itemsize >= MANY_BYTES
            workspace = MANY_BYTES_WORKSPACE_SHARE if many else VAE_WORKSPACE_SHARES[what]
            peak = max(peak, math.ceil((1 + workspace) * cost.peak_bytes))
            if self.rates is not None:
                rate = VAE_RATE_SHARES[what] * (MANY_BYTES_RATE_SHARE if many else 1)
                area = _area(size, tiling) / _area(latent[-1], tiling) / share
                seconds += self.batch * area * self._unlaunched_seconds(cost) / rate
        waiting = 4 * self.batch * self.denoiser.config.in_channels * math.prod(latent[-1])
        weights = self._vae_bytes + (0 if without_denoiser else self._denoiser_bytes)
        return Option(
            bytes=weights + waiting + with_reserve(peak),
            seconds=None if self.rates is None else seconds,
            tiling=tiling,
            without_denoiser=without_denoiser,
        )

    def _vae_cost(
        self, what: str, size: tuple[int, int], tiling: Tiling | None
    ) -> tuple[Cost, float]:
        """Of decoding latents of this size, or encoding to them: two rows of tiles need as much
        memory as all. Also which share of all tiles these are."""
        key = what, size, tiling
        if key not in self._vae_costs:
            height, width = size
            if tiling is not None:
                first, *others = tile_spans(height, tiling.tile, tiling.overlap)
                height = 2 * first[1] - tiling.overlap if others else height
            run = _decode if what == "decode" else _encode
            cost = trace(partial(run, self.vae, height, width, tiling))
            share = _area((height, width), tiling) / _area(size, tiling)
            self._vae_costs[key] = cost, share
        return self._vae_costs[key]


def _decode(vae: nn.Module, height: int, width: int, tiling: Tiling | None) -> None:
    latents = torch.empty(1, vae.config.latent_channels, height, width, device="meta")
    for _ in decode_bands(vae, latents, tiling):
        pass


def _encode(vae: nn.Module, height: int, width: int, tiling: Tiling | None) -> Tensor:
    scale = pixels_per_latent(vae.config)
    picture = torch.zeros((), dtype=torch.uint8).expand(scale * height, scale * width, 3)
    return encode_tiled(vae, picture, tiling)


def _tilings(size: tuple[int, int]) -> list[Tiling | None]:
    """How latents of this size can be decoded, from the fastest way to the leanest."""
    return [None, *(Tiling(*tile) for tile in TILES if tile[0] < max(size))]


def _area(size: tuple[int, int], tiling: Tiling | None) -> int:
    """Latent pixels of all tiles for latents of this size, those that tiles share counted twice."""
    if tiling is None:
        return math.prod(size)
    spans = (tile_spans(side, tiling.tile, tiling.overlap) for side in size)
    return math.prod(sum(stop - start for start, stop in each) for each in spans)


def with_reserve(peak: int) -> int:
    """Memory of a process whose tensors are traced to need `peak`."""
    share = WORKSPACE_SHARE + FRAGMENTATION_SHARE
    return peak + math.ceil(share * peak) + WORKSPACE_BYTES + CONTEXT_BYTES
