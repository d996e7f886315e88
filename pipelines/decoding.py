"""Decode and encode large pictures in tiles that share their statistics, band by band.

A VAE normalises groups of channels by their mean and variance over the whole picture. Tiles that
each use their own differ in contrast and colour, and show seams however well they are blended. So
one pass over a sample of small crops, taken as one batch whose statistics are common to all of it,
settles the mean and variance of every GroupNorm, and all tiles are computed with these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from gspn2_diffusers.conditioning import safe_dtype
from gspn2_diffusers.sites import pixels_per_latent

CROPS_PER_TILE = 4  # statistics are taken from crops of a tile's side over this
# Latent pixels at the edges of crops that statistics leave out: padding with zeros, which a tile
# has at the picture's edges only, distorts what is near.
CROP_MARGIN = 2

Progress = Callable[[int, int], None]
Span = tuple[int, int]


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut for the VAE, in latent pixels.

    Args:
        tile: side of a tile, overlap included.
        overlap: at least what neighbours share. They are blended in the middle half of it; the
            outer quarters, which a tile's own edges distort, are dropped.
        statistics_crops: crops, of a quarter of a tile's side, from which the normalisations'
            statistics are taken: 16 are as much work as one tile.

    Raises:
        ValueError: a number out of range.
    """

    tile: int = 128
    overlap: int = 16
    statistics_crops: int = 16

    def __post_init__(self) -> None:
        if self.tile < 8:
            raise ValueError(f"tile: expected at least 8 latent pixels, got {self.tile}")
        if not 0 <= self.overlap <= self.tile // 2:
            raise ValueError(
                f"overlap: expected 0 to half a tile, {self.tile // 2} latent pixels, "
                f"got {self.overlap}"
            )
        if self.statistics_crops < 1:
            raise ValueError(f"statistics_crops: expected at least 1, got {self.statistics_crops}")


@torch.no_grad()
def decode_bands(
    vae: AutoencoderKL,
    latents: Tensor,
    tiling: Tiling | None,
    progress: Progress | None = None,
) -> Iterator[np.ndarray]:
    """Decode latents ``[1, c, h, w]`` from top to bottom.

    Args:
        latents: scaled as the denoiser knows them, on any device, in any dtype.
        tiling: None decodes all at once, in one band.
        progress: called with (tiles done, tiles in all).

    Yields:
        uint8 bands ``[rows, width, 3]``, which together are the picture.

    Raises:
        ValueError: latents of another shape.
    """
    if latents.ndim != 4 or len(latents) != 1:
        raise ValueError(f"expected latents [1, c, h, w], got {tuple(latents.shape)}")
    scale = pixels_per_latent(vae.config)
    decode = partial(_decode, vae)
    # A generator keeps its no_grad only while it runs, so that the caller's mode is left alone.
    with _plain_vae(vae), safe_dtype(vae), _shared_statistics(vae.decoder, latents, decode, tiling):
        for band in _bands(latents, decode, 3, scale, tiling, progress):
            pixels = ((band / 2 + 0.5).clamp(0, 1) * 255).round().byte()
            yield pixels.permute(1, 2, 0).contiguous().cpu().numpy()


@torch.no_grad()
def encode_tiled(
    vae: AutoencoderKL,
    image: np.ndarray | Tensor,
    tiling: Tiling | None,
    progress: Progress | None = None,
) -> Tensor:
    """Latents ``[1, c, h / 8, w / 8]`` of a picture, uint8 ``[h, w, 3]``, scaled as the denoiser
    knows them: the means of the VAE's posterior, on its device.

    Args:
        tiling, progress: as in :func:`decode_bands`.

    Raises:
        ValueError: a picture of another shape or dtype, or sides that are no multiples of the
            VAE's factor.
    """
    if isinstance(image, np.ndarray) and not image.flags.writeable:
        image = image.copy()  # torch warns of arrays that it could write to
    picture = torch.as_tensor(image)
    scale = pixels_per_latent(vae.config)
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(
            f"expected a picture of uint8 [h, w, 3], got {picture.dtype} {tuple(picture.shape)}"
        )
    if picture.shape[0] % scale or picture.shape[1] % scale:
        raise ValueError(
            f"expected sides that are multiples of {scale} pixels, "
            f"got {picture.shape[1]}x{picture.shape[0]}"
        )
    pixels = picture.permute(2, 0, 1)[None]
    channels = vae.config.latent_channels
    encode = partial(_encode, vae)
    with (
        _plain_vae(vae),
        safe_dtype(vae),
        _shared_statistics(vae.encoder, pixels, encode, tiling, scale),
    ):
        bands = list(_bands(pixels, encode, channels, 1, tiling, progress, scale))
    return _scaled(vae, torch.cat(bands, dim=1)[None])


def tile_spans(size: int, tile: int, overlap: int) -> list[Span]:
    """(start, stop) of tiles along a side of `size`: full ones, evenly spread, which share at least
    `overlap`; one of `size` if it is no longer than a tile."""
    if size <= tile:
        return [(0, size)]
    count = math.ceil((size - overlap) / (tile - overlap))
    starts = [round(index * (size - tile) / (count - 1)) for index in range(count)]
    return [(start, start + tile) for start in starts]


def blend_weights(spans: Sequence[Span], scale: int) -> list[Tensor]:
    """Weights of every tile along a side, `scale` to a latent pixel; they sum to one everywhere.

    Neighbours cross over linearly in the middle half of what they share.
    """
    weights = [torch.ones((stop - start) * scale) for start, stop in spans]
    for index in range(len(spans) - 1):
        shared = (spans[index][1] - spans[index + 1][0]) * scale
        quarter = shared // 4
        middle = shared - 2 * quarter
        ramp = torch.cat(
            [
                torch.zeros(quarter),
                (torch.arange(middle) + 0.5) / max(middle, 1),
                torch.ones(quarter),
            ]
        )
        if shared:
            weights[index + 1][:shared] *= ramp
            weights[index][-shared:] *= 1 - ramp
    return weights


def seam_metric(picture: np.ndarray, rows: Sequence[int], columns: Sequence[int]) -> float:
    """How much more a picture changes from one side of some lines to the other than elsewhere.

    The mean absolute difference of neighbouring pixels across the lines over that across the lines
    8 pixels beside them: 1 where no seam shows, whatever the picture.

    Args:
        picture: ``[h, w, 3]``.
        rows, columns: numbers of the first row or column behind each line.
    """
    values = picture.astype(np.float64)
    across, beside = [], []
    for axis, lines in ((0, rows), (1, columns)):
        steps = np.abs(np.diff(values, axis=axis)).mean(axis=(1 - axis, 2))
        for line in lines:
            across.append(steps[line - 1])
            beside += [steps[n] for n in (line - 9, line + 7) if 0 <= n < len(steps)]
    return float(np.mean(across) / max(np.mean(beside), 1e-9))


def _bands(
    source: Tensor,
    run: Callable[[Tensor], Tensor],
    channels: int,
    scale: int,
    tiling: Tiling | None,
    progress: Progress | None,
    unit: int = 1,
) -> Iterator[Tensor]:
    """Results ``[channels, rows, width]`` of running over a map, from top to bottom, float32.

    Args:
        source: ``[1, c, h, w]``, `unit` of its pixels to a latent pixel.
        run: a tile of `source` to ``[1, channels, ...]``, `scale` of its pixels to a latent pixel.
    """
    height, width = (side // unit for side in source.shape[-2:])
    tile, overlap = (max(height, width), 0) if tiling is None else (tiling.tile, tiling.overlap)
    rows, columns = (tile_spans(side, tile, overlap) for side in (height, width))
    total = len(rows) * len(columns)
    row_weights, column_weights = (blend_weights(spans, scale) for spans in (rows, columns))
    carried = None  # what the tiles above add to the rows that they share with the next ones
    for index, ((top, bottom), by_row) in enumerate(zip(rows, row_weights, strict=True)):
        band = None
        for number, ((left, right), by_column) in enumerate(
            zip(columns, column_weights, strict=True), 1
        ):
            part = source[..., unit * top : unit * bottom, unit * left : unit * right]
            piece = run(part)[0].float()
            if band is None:
                band = piece.new_zeros(channels, (bottom - top) * scale, width * scale)
            weights = by_row.to(piece)[:, None] * by_column.to(piece)
            band[:, :, left * scale : right * scale] += weights * piece
            del piece
            if progress is not None:
                progress(index * len(columns) + number, total)
        if carried is not None:
            band[:, : carried.shape[1]] += carried
        finished = (rows[index + 1][0] if index + 1 < len(rows) else height) - top
        carried = band[:, finished * scale :]
        yield band[:, : finished * scale]


class SharedGroupNorm(nn.GroupNorm):
    """A GroupNorm that normalises all it meets with the same mean and variance of each group.

    Never constructed: GroupNorms become one for a while. The first batch settles the statistics,
    which are taken over all its elements but the margins; the others use them.
    """

    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared_statistics
        if shared.get(self) is None:
            shared[self] = self._measure(x, shared.margin)
        mean, variance = (
            part.repeat_interleave(self.num_channels // self.num_groups) for part in shared[self]
        )
        weight, bias = (
            None if part is None else part.to(mean.dtype) for part in (self.weight, self.bias)
        )
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=self.eps)

    def _measure(self, x: Tensor, margin: float) -> tuple[Tensor, Tensor]:
        """Mean and variance ``[groups]`` over a batch ``[n, C, h, w]`` or ``[n, C, N]``."""
        if x.ndim == 4:
            rows, columns = (round(margin * side) for side in x.shape[-2:])
            x = x[:, :, rows : x.shape[2] - rows, columns : x.shape[3] - columns]
        x = x.double() if x.dtype == torch.float64 else x.float()
        groups = x.unflatten(1, (self.num_groups, -1)).transpose(0, 1).flatten(1)
        variance, mean = torch.var_mean(groups, dim=1, correction=0)
        return mean, variance


class _Statistics(dict):
    """Statistics by GroupNorm.

    Args:
        margin: share of a crop's side that is left out at each edge.
    """

    def __init__(self, margin: float):
        super().__init__()
        self.margin = margin


@contextmanager
def _shared_statistics(
    part: nn.Module,
    source: Tensor,
    run: Callable[[Tensor], Tensor],
    tiling: Tiling | None,
    unit: int = 1,
) -> Iterator[None]:
    """While inside, the GroupNorms of `part` use statistics taken from crops of `source`.

    Where the source is no more than one tile, they are left alone: its own are exact.
    """
    size = [side // unit for side in source.shape[-2:]]
    if tiling is None or max(size) <= tiling.tile:
        yield
        return
    side = min(*size, tiling.tile // CROPS_PER_TILE)
    spots = _spread(size, side, tiling.statistics_crops)
    crops = [
        source[..., unit * y : unit * (y + side), unit * x : unit * (x + side)] for y, x in spots
    ]
    norms = [module for module in part.modules() if type(module) is nn.GroupNorm]
    statistics = _Statistics(CROP_MARGIN / side if side > 4 * CROP_MARGIN else 0.0)
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(_restore, norm)
            norm.__class__ = SharedGroupNorm
            norm.__dict__["shared_statistics"] = statistics
        run(torch.cat(crops))
        yield


def _restore(norm: nn.GroupNorm) -> None:
    norm.__class__ = nn.GroupNorm
    norm.__dict__.pop("shared_statistics", None)


def _spread(size: Sequence[int], side: int, count: int) -> list[tuple[int, int]]:
    """(top, left) of about `count` squares that lie evenly over a map of this (height, width)."""
    height, width = size
    rows = min(max(1, round(math.sqrt(count * height / width))), -(-height // side))
    columns = min(max(1, count // rows), -(-width // side))
    tops, lefts = (
        [round((index + 0.5) * (length - side) / number) for index in range(number)]
        for length, number in ((height, rows), (width, columns))
    )
    return [(top, left) for top in tops for left in lefts]


@contextmanager
def _plain_vae(vae: AutoencoderKL) -> Iterator[None]:
    """While inside, the VAE does not cut anything itself."""
    before = {name: getattr(vae, name, None) for name in ("use_tiling", "use_slicing")}
    for name in before:
        setattr(vae, name, False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def _decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels in -1..1 of latents, both ``[n, c, h, w]``."""
    config = vae.config
    latents = latents.to(_device(vae), torch.promote_types(latents.dtype, torch.float32))
    if getattr(config, "latents_mean", None) is not None:
        mean, std = _latent_moments(vae, latents)
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0]


def _encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Latents, not scaled, of uint8 pixels, both ``[n, c, h, w]``."""
    pixels = pixels.to(_device(vae)).to(vae.dtype) / 127.5 - 1
    return vae.encode(pixels).latent_dist.mode()


def _scaled(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents as the denoiser knows them."""
    config = vae.config
    if getattr(config, "latents_mean", None) is not None:
        mean, std = _latent_moments(vae, latents)
        return (latents - mean) * config.scaling_factor / std
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def _latent_moments(vae: AutoencoderKL, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = vae.config.latents_mean, vae.config.latents_std
    return tuple(torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (mean, std))


def _device(vae: AutoencoderKL) -> torch.device:
    """Where the VAE computes: an offload hook says so, else where its weights are."""
    hook = getattr(vae, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return vae.device if device is None else torch.device(device)
