"""Decode and encode large pictures in tiles that share their statistics, band by band.

A VAE normalises groups of channels by their mean and variance over the whole picture. Tiles that
each use their own differ in contrast and colour, and show seams however well they are blended. So
all tiles use the same: those of a sample of small crops from all over the picture, computed in
batches whose GroupNorms see every crop at once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from torch import Tensor, nn

from gspn2_diffusers.conditioning import safe_dtype
from gspn2_diffusers.sites import pixels_per_latent

# Side of a crop for statistics, in latent pixels. What is near in a picture is alike, so that many
# small crops tell more of it than a few large ones.
CROP = 8
# Area of a batch of crops over that of a tile. The rest is for the copies that padding makes: as
# traced for the VAE of SDXL, a batch and a tile then need the same memory.
BATCH_SHARE = 0.75
# Samples of a batch are measured in so many parts: the copy in float32 that this takes is then
# small beside the batch.
MEASURED_PARTS = 8

Progress = Callable[[int, int], None]
Span = tuple[int, int]


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut for the VAE, in latent pixels.

    Args:
        tile: side of a tile at most, overlap included; tiles are as small as their number lets
            them be.
        overlap: at least what neighbours share. They are blended in the middle half of it; the
            outer quarters, which a tile's own edges distort, are dropped.
        statistics_crops: crops of 8 x 8 from which the statistics are taken, at most. They are
            computed in batches that need no more memory than the largest tile; 256 are as much
            work as one of 128.

    Raises:
        ValueError: a number out of range.
    """

    tile: int = 128
    overlap: int = 16
    statistics_crops: int = 256

    def __post_init__(self) -> None:
        if self.tile < 2 * CROP:
            raise ValueError(f"tile: expected at least {2 * CROP} latent pixels, got {self.tile}")
        if not 0 <= self.overlap <= self.tile // 2:
            raise ValueError(
                f"overlap: expected 0 to {self.tile // 2} latent pixels, half a tile, "
                f"got {self.overlap}"
            )
        if self.statistics_crops < 1:
            raise ValueError(f"statistics_crops: expected at least 1, got {self.statistics_crops}")


def decode_bands(
    vae: AutoencoderKL,
    latents: Tensor,
    tiling: Tiling | None,
    progress: Progress | None = None,
) -> Iterator[np.ndarray]:
    """Bands uint8 ``[rows, width, 3]``, from top to bottom, that together are the picture.

    The VAE is as it was whenever a band is handed out, and after an error.

    Args:
        latents: ``[1, c, h, w]``, scaled as the denoiser knows them, on any device, of any dtype.
        tiling: None decodes all at once, in one band.
        progress: called with the number of tiles done and their total.

    Raises:
        TypeError: another kind of VAE.
        ValueError: latents of another shape, a VAE with hooks on its layers or one that
            overflows in its dtype.
    """
    channels = _checked(vae).config.latent_channels
    if latents.ndim != 4 or latents.shape[:2] != (1, channels):
        raise ValueError(f"expected latents [1, {channels}, h, w], got {list(latents.shape)}")
    job = _Job(
        vae,
        vae.decoder,
        source=latents,
        run=lambda tile: _decode(vae, tile),
        channels=vae.config.out_channels,
        source_scale=1,
        scale=pixels_per_latent(vae.config),
    )
    return (_to_bytes(band) for band in job.bands(tiling, progress))


def encode_tiled(
    vae: AutoencoderKL,
    image: np.ndarray | Tensor,
    tiling: Tiling | None,
    progress: Progress | None = None,
) -> Tensor:
    """Latents ``[1, c, h / 8, w / 8]`` of a picture, scaled as the denoiser knows them.

    They are the means of the VAE's posterior, in float32 or better, on the VAE's device.

    Args:
        image: uint8 ``[h, w, 3]``, or floating point ``[1, 3, h, w]`` in -1..1.
        tiling, progress: as in :func:`decode_bands`.

    Raises:
        TypeError: another kind of VAE.
        ValueError: a picture of another shape or dtype, sides that are no multiples of the VAE's
            factor, a VAE with hooks on its layers or one that overflows in its dtype.
    """
    scale = pixels_per_latent(_checked(vae).config)
    if isinstance(image, np.ndarray) and not image.flags.writeable:
        image = image.copy()  # torch warns of arrays that it could write to
    job = _Job(
        vae,
        vae.encoder,
        source=_check_image(torch.as_tensor(image), scale),
        run=lambda tile: _encode(vae, tile),
        channels=vae.config.latent_channels,
        source_scale=scale,
        scale=1,
    )
    return _scaled(vae, torch.cat(list(job.bands(tiling, progress)), dim=1)[None])


def tile_spans(size: int, tile: int, overlap: int) -> list[Span]:
    """(start, stop) of tiles along a side of `size`: as few of at most `tile` as share `overlap`,
    all of one length, evenly spread."""
    if size <= tile:
        return [(0, size)]
    count = math.ceil((size - overlap) / (tile - overlap))
    length = math.ceil((size + (count - 1) * overlap) / count)
    starts = [round(index * (size - length) / (count - 1)) for index in range(count)]
    return [(start, start + length) for start in starts]


def seam_metric(
    picture: np.ndarray, rows: Sequence[int] = (), columns: Sequence[int] = (), width: int = 1
) -> float:
    """How much more a picture changes across some lines than across others nearby: 1 is no seam.

    The change across a line is the absolute difference between the means of the `width` pixels
    before and behind it, averaged along the line and over channels. The metric is its mean over
    the lines in question, over its mean over the lines that are 2 to 4 `width` away from them.

    Args:
        picture: ``[h, w, channels]``; or the difference of two, which tells more.
        rows, columns: numbers of the first row or column behind a line.
        width: of what may hide a seam: that of the blending.

    Raises:
        ValueError: no line, or one with fewer than 3 `width` pixels on either side.
    """
    across, nearby = [], []
    for axis, lines in ((0, rows), (1, columns)):
        sums = np.cumsum(np.asarray(picture, np.float64), axis=axis)
        sums = np.moveaxis(np.insert(sums, 0, 0, axis=axis), axis, 0)
        means = (sums[width:] - sums[:-width]) / width
        changes = np.abs(means[width:] - means[:-width]).mean(axis=(1, 2))  # [n] is line n + width
        for line in lines:
            index = line - width
            others = [index + sign * far for sign in (-1, 1) for far in range(2 * width, 4 * width)]
            others = [other for other in others if 0 <= other < len(changes)]
            if not (0 <= index < len(changes) and others):
                raise ValueError(
                    f"expected a line with {3 * width} pixels on both sides of it, got {line} "
                    f"of {picture.shape[axis]}"
                )
            across.append(changes[index])
            nearby.append(changes[others].mean())
    if not across:
        raise ValueError("expected rows or columns, got none")
    return float(np.sum(across) / max(np.sum(nearby), 1e-12))


# ---- tiles


@dataclass(frozen=True)
class _Part:
    """A tile along one axis, and what of it enters the result.

    Args:
        start, stop: of the tile, in latent pixels.
        begin, end: of what enters the result, in its pixels.
        weights: ``[end - begin]``; those of all tiles sum to one everywhere.
        ramp: how many of them, at the end, the next tile shares.
    """

    start: int
    stop: int
    begin: int
    end: int
    weights: Tensor
    ramp: int

    def inside(self, scale: int) -> slice:
        """The pixels of the tile's own result, `scale` to a latent pixel, that enter."""
        return slice(self.begin - scale * self.start, self.end - scale * self.start)


def _parts(size: int, tile: int, overlap: int, scale: int) -> list[_Part]:
    """The tiles along an axis of `size` latent pixels, each of `scale` pixels in the result.

    Neighbours cross over linearly around the middle of what they share.
    """
    spans = tile_spans(size, tile, overlap)
    ramp = overlap // 2 * scale
    rise = (torch.arange(ramp, dtype=torch.float64) + 0.5) / max(ramp, 1)
    middles = [scale * (left[1] + right[0]) // 2 for left, right in zip(spans, spans[1:])]  # noqa: B905
    begins = [0, *(middle - ramp // 2 for middle in middles)]
    ends = [*(begin + ramp for begin in begins[1:]), size * scale]
    parts = []
    for number, ((start, stop), begin, end) in enumerate(zip(spans, begins, ends, strict=True)):
        weights = torch.ones(end - begin, dtype=torch.float64)
        is_last = number == len(spans) - 1
        if ramp and number:
            weights[:ramp] = rise
        if ramp and not is_last:
            weights[-ramp:] = 1 - rise
        parts.append(_Part(start, stop, begin, end, weights, 0 if is_last else ramp))
    return parts


@dataclass(frozen=True)
class _Job:
    """A map that a part of a VAE is to be run over.

    Args:
        part: the module that `run` runs, and whose GroupNorms are to agree.
        source: ``[1, c, h, w]``, `source_scale` of its pixels to a latent pixel.
        run: from a batch cut from it to ``[n, channels, ...]``, `scale` pixels to a latent pixel.
    """

    vae: AutoencoderKL
    part: nn.Module
    source: Tensor
    run: Callable[[Tensor], Tensor]
    channels: int
    source_scale: int
    scale: int

    def bands(self, tiling: Tiling | None, progress: Progress | None) -> Iterator[Tensor]:
        """The result from top to bottom, ``[channels, rows, width]`` in float32 or better."""
        height, width = self._size
        tile, overlap = (tiling.tile, tiling.overlap) if tiling else (max(height, width), 0)
        rows = _parts(height, tile, overlap, self.scale)
        columns = _parts(width, tile, overlap, self.scale)
        total = len(rows) * len(columns)
        statistics = self._measure(tiling) if total > 1 else None
        shared = None  # what the tiles above contribute to the rows that they share
        for index, row in enumerate(rows):

            def advance(done: int, before: int = index * len(columns)) -> None:
                if progress is not None:
                    progress(before + done, total)

            band = self._band(row, columns, statistics, advance)
            if shared is not None:
                band[:, : shared.shape[1]] += shared
            finished = band.shape[1] - row.ramp
            shared = band[:, finished:].clone()
            yield band[:, :finished]

    @torch.no_grad()
    def _band(
        self,
        row: _Part,
        columns: Sequence[_Part],
        statistics: _Statistics | None,
        advance: Callable[[int], None],
    ) -> Tensor:
        """Weighted sum of the tiles in a row of them."""
        band = None
        with self._ready(statistics):
            for number, column in enumerate(columns, start=1):
                tile = self.run(self._cut(row.start, row.stop, column.start, column.stop))[0]
                tile = tile[:, row.inside(self.scale), column.inside(self.scale)]
                tile = tile.to(torch.promote_types(tile.dtype, torch.float32))
                if band is None:
                    band = tile.new_zeros(self.channels, row.end - row.begin, columns[-1].end)
                band[:, :, column.begin : column.end] += column.weights.to(tile) * tile
                del tile  # its memory is wanted for the next one
                advance(number)
            # Tensors without data, with which the planner follows this, have no values to look at.
            if not (band.is_meta or math.isfinite(band.sum().item())):
                raise ValueError(
                    f"expected a VAE that gives finite numbers, got one that overflows in "
                    f"{str(self.vae.dtype).removeprefix('torch.')}: use bfloat16 or float32 for it"
                )
        return band.mul_(row.weights.to(band)[:, None])

    @torch.no_grad()
    def _measure(self, tiling: Tiling) -> _Statistics:
        """The statistics of crops that lie evenly over the source, in batches at random."""
        side = min(CROP, *self._size)
        corners = _spread(self._size, side, tiling.statistics_crops)
        random.Random(0).shuffle(corners)
        batches = math.ceil(len(corners) / int(BATCH_SHARE * (tiling.tile / side) ** 2))
        statistics = _Statistics()
        with self._ready(statistics), _crops_of_a_whole(self.part):
            for first in range(batches):
                crops = [self._cut(y, y + side, x, x + side) for y, x in corners[first::batches]]
                self.run(torch.cat(crops))
        statistics.settle()
        return statistics

    @property
    def _size(self) -> tuple[int, int]:
        """Height and width in latent pixels."""
        height, width = self.source.shape[-2:]
        return height // self.source_scale, width // self.source_scale

    def _cut(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        unit = self.source_scale
        return self.source[..., unit * top : unit * bottom, unit * left : unit * right]

    @contextmanager
    def _ready(self, statistics: _Statistics | None) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_undivided(self.vae))
            stack.enter_context(safe_dtype(self.vae))
            if statistics is not None:
                stack.enter_context(_shared_by_all_norms(self.part, statistics))
            yield


def _spread(size: tuple[int, int], side: int, count: int) -> list[tuple[int, int]]:
    """(top, left) of about `count` squares, or as many as fit, that lie evenly over a map of this
    height and width."""
    height, width = size
    rows = min(max(1, round(math.sqrt(count * height / width))), count, height // side)
    columns = min(max(1, count // rows), width // side)
    tops, lefts = (
        [round((number + 0.5) * length / total - side / 2) for number in range(total)]
        for length, total in ((height, rows), (width, columns))
    )
    return [(top, left) for top in tops for left in lefts]


# ---- statistics that all tiles share


@dataclass
class _Statistics:
    """Mean and variance of every group, by the name of their GroupNorm.

    They are measured until they are settled, for each batch anew: its own statistics are what a
    batch is normalised with.
    """

    measured: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    settled: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of(self, name: str, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance ``[groups]`` to normalise `x` ``[n, C, ...]`` with."""
        if name in self.settled:
            return self.settled[name]
        parts = x.split(math.ceil(len(x) / MEASURED_PARTS))
        moments = _pool([_moments(part.unflatten(1, (groups, -1)).flatten(2)) for part in parts])
        self.measured.setdefault(name, []).append(moments)
        return moments

    def settle(self) -> None:
        self.settled = {
            name: _pool([(mean[None], variance[None]) for mean, variance in moments])
            for name, moments in self.measured.items()
        }


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[n, groups]`` of ``[n, groups, elements]``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=2, correction=0)
    return mean, variance


def _pool(moments: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[groups]`` of the union of samples of one size, from theirs
    ``[n, groups]``."""
    means, variances = (torch.cat(values) for values in zip(*moments, strict=True))
    mean = means.mean(dim=0)
    return mean, variances.mean(dim=0) + (means - mean).square().mean(dim=0)


class SharedGroupNorm(nn.GroupNorm):
    """A GroupNorm that normalises all samples with the same mean and variance of each group.

    Never constructed: the GroupNorms of a VAE are one for a while.
    """

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.statistics.of(self.name, x, self.num_groups)
        size = self.num_channels // self.num_groups
        affine = [None if p is None else p.to(mean) for p in (self.weight, self.bias)]
        # Given statistics, batch norm is all that is left; it takes float32 ones with x of 16 bits.
        return F.batch_norm(
            x, mean.repeat_interleave(size), variance.repeat_interleave(size), *affine, eps=self.eps
        )


class BatchAttention(Attention):
    """Attention from each sample of a batch of maps ``[n, C, h, w]`` to all of them.

    Never constructed: the attention layers of a VAE are one for a while.
    """

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        tall = hidden_states.transpose(0, 1).flatten(1, 2)[None]
        tall = super().forward(tall, *args, **kwargs)
        return tall[0].unflatten(1, (len(hidden_states), -1)).transpose(0, 1)


class ReplicatingDownsample2D(Downsample2D):
    """A strided convolution that repeats the last row and column instead of adding zeros.

    Never constructed: those of an encoder are one for a while.
    """

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1), mode="replicate"))


@contextmanager
def _shared_by_all_norms(part: nn.Module, statistics: _Statistics) -> Iterator[None]:
    """While inside, the GroupNorms of `part` measure or use these statistics.

    Raises:
        ValueError: a hook has replaced a layer's forward pass.
    """
    with ExitStack() as stack:
        for name, module in part.named_modules():
            if isinstance(module, nn.GroupNorm):
                stack.enter_context(_as_class(name, module, SharedGroupNorm))
                stack.enter_context(_with_values(module, statistics=statistics, name=name))
        yield


@contextmanager
def _crops_of_a_whole(part: nn.Module) -> Iterator[None]:
    """While inside, the samples of a batch are taken for parts of one picture: attention reaches
    all, and convolutions find no zeros beyond the edges, which a picture's inside does not have."""
    with ExitStack() as stack:
        for name, module in part.named_modules():
            if type(module) is Attention:
                stack.enter_context(_as_class(name, module, BatchAttention))
            elif type(module) is Downsample2D and module.use_conv and module.padding == 0:
                stack.enter_context(_as_class(name, module, ReplicatingDownsample2D))
            elif isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
                stack.enter_context(_with_values(module, padding_mode="replicate"))
        yield


@contextmanager
def _as_class(name: str, module: nn.Module, cls: type[nn.Module]) -> Iterator[None]:
    # A hook library that replaced `forward` on the instance holds on to the class's own.
    if "forward" in module.__dict__:
        raise ValueError(
            f"{name}: expected a layer whose forward is its class's own, got one replaced by a "
            "hook: remove the hook (sequential or group offload, ...), or decode without tiles"
        )
    own, module.__class__ = module.__class__, cls
    try:
        yield
    finally:
        module.__class__ = own


@contextmanager
def _with_values(module: nn.Module, **values: object) -> Iterator[None]:
    """While inside, the module's plain attributes have these values."""
    before = {name: module.__dict__[name] for name in values if name in module.__dict__}
    module.__dict__.update(values)
    try:
        yield
    finally:
        for name in values:
            del module.__dict__[name]
        module.__dict__.update(before)


def _undivided(vae: AutoencoderKL):
    """While inside, the VAE cuts nothing into tiles or slices itself."""
    return _with_values(vae, use_tiling=False, use_slicing=False)


# ---- the VAE


def _checked(vae: AutoencoderKL) -> AutoencoderKL:
    if not isinstance(vae, AutoencoderKL):
        raise TypeError(f"expected an AutoencoderKL, got {type(vae).__name__}")
    return vae


def _check_image(image: Tensor, scale: int) -> Tensor:
    """A picture as ``[1, 3, h, w]``."""
    if image.dtype == torch.uint8 and image.ndim == 3 and image.shape[2] == 3:
        image = image.permute(2, 0, 1)[None]
    elif not (image.is_floating_point() and image.ndim == 4 and image.shape[:2] == (1, 3)):
        raise ValueError(
            "expected a picture of uint8 [h, w, 3] or floating point [1, 3, h, w], "
            f"got {str(image.dtype).removeprefix('torch.')} {list(image.shape)}"
        )
    height, width = image.shape[-2:]
    if height % scale or width % scale or not height * width:
        raise ValueError(
            f"expected sides that are multiples of {scale} pixels, got {height} x {width}"
        )
    return image


def _decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels in -1..1 of latents as the denoiser knows them."""
    factor, shift = _scaling(vae)
    latents = latents.to(_device(vae), torch.promote_types(latents.dtype, torch.float32))
    latents = latents * factor.to(latents) + shift.to(latents)
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0]


def _encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Latents as the VAE gives them, of pixels in 0..255 or -1..1."""
    if pixels.dtype == torch.uint8:
        # Rows of a picture lie in one piece, its channels do not: they would be copied one by one.
        pixels = pixels.permute(0, 2, 3, 1).to(_device(vae)).permute(0, 3, 1, 2)
        pixels = pixels.to(vae.dtype) / 127.5 - 1
    pixels = pixels.to(_device(vae), vae.dtype)
    return vae.encode(pixels, return_dict=False)[0].mode()


def _scaled(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    factor, shift = _scaling(vae)
    return (latents - shift.to(latents)) / factor.to(latents)


def _scaling(vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """Factor and shift ``[1, c or 1, 1, 1]`` from the denoiser's latents to the VAE's own."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = [config.get("shift_factor") or 0.0], [1.0]
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
    return std / config.scaling_factor, mean


def _device(vae: AutoencoderKL) -> torch.device:
    """Where the VAE computes: it waits elsewhere while it is offloaded."""
    device = getattr(getattr(vae, "_hf_hook", None), "execution_device", None)
    return vae.device if device is None else torch.device(device)


def _to_bytes(band: Tensor) -> np.ndarray:
    """Pixels ``[3, h, w]`` in -1..1 as uint8 ``[h, w, 3]``."""
    levels = (band / 2 + 0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    return levels.permute(1, 2, 0).contiguous().cpu().numpy()
