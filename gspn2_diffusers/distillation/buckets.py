"""Multi-aspect buckets: the few image sizes to which all pictures are scaled and cropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class SizeConditioning:
    """What SDXL is told of a picture besides its prompt, in pixels.

    Args:
        original: (height, width) before scaling.
        crop: (top, left) of what was cut out of the scaled picture.
        target: (height, width) of what was cut out.
    """

    original: Size
    crop: tuple[int, int]
    target: Size

    def to_row(self) -> list[int]:
        """The six numbers in the order of SDXL's time ids."""
        return [*self.original, *self.crop, *self.target]


def make_buckets(resolution: int, step: int, max_aspect_ratio: float = 2.0) -> list[Size]:
    """Sizes in multiples of `step` with an area of `resolution` squared or little less.

    Aspect ratios go from 1 / max_aspect_ratio to max_aspect_ratio; the square is always there.
    Sorted by height. Raises ValueError for a step above the resolution or a ratio below 1.
    """
    if not 1 <= step <= resolution:
        raise ValueError(f"step: expected 1 to the resolution {resolution}, got {step}")
    if not max_aspect_ratio >= 1:
        raise ValueError(f"max_aspect_ratio: expected at least 1, got {max_aspect_ratio}")
    side = resolution // step * step
    buckets = {(side, side)}
    for short in range(step, side + 1, step):
        long = resolution**2 // short // step * step
        if long <= short * max_aspect_ratio:
            buckets |= {(short, long), (long, short)}
    return sorted(buckets)


def nearest_bucket(buckets: Sequence[Size], height: int, width: int) -> Size:
    """The bucket with the aspect ratio most like that of a picture; of several the largest."""

    def distance(bucket: Size) -> tuple[float, int]:
        log_ratio = math.log(bucket[0] / bucket[1]) - math.log(height / width)
        return round(abs(log_ratio), 9), -bucket[0] * bucket[1]

    return min(buckets, key=distance)


def fit_image(image: Image.Image, bucket: Size) -> tuple[Tensor, SizeConditioning]:
    """Scale a picture until it covers the bucket, and crop the centre: uint8 ``[3, h, w]``.

    It is turned upright by its EXIF orientation; transparent parts become white.
    """
    image = to_rgb(ImageOps.exif_transpose(image))
    scale, conditioning = _cover((image.height, image.width), bucket)
    top, left = conditioning.crop
    bottom = min((top + bucket[0]) / scale, image.height)
    right = min((left + bucket[1]) / scale, image.width)
    # Cutting before scaling keeps a picture of one line from growing to gigabytes.
    fitted = image.resize(
        bucket[::-1], Image.Resampling.LANCZOS, box=(left / scale, top / scale, right, bottom)
    )
    pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()
    return pixels, conditioning


def fit_tensor(image: Tensor, bucket: Size) -> tuple[Tensor, SizeConditioning]:
    """`fit_image` for uint8 ``[3, height, width]`` on any device, where the result stays."""
    height, width = image.shape[-2:]
    scale, conditioning = _cover((height, width), bucket)
    if (height, width) == bucket:
        return image, conditioning
    top, left = (round(offset / scale) for offset in conditioning.crop)
    rows, columns = (max(1, round(length / scale)) for length in bucket)
    cut = image[None, :, top : top + rows, left : left + columns].float()
    scaled = F.interpolate(cut, size=bucket, mode="bicubic", antialias=True, align_corners=False)
    return scaled[0].round().clamp(0, 255).to(torch.uint8), conditioning


def _cover(original: Size, bucket: Size) -> tuple[float, SizeConditioning]:
    """The scale at which a picture covers the bucket, and where the centre is then cut out."""
    scale = max(bucket[0] / original[0], bucket[1] / original[1])
    top, left = (
        max(0, int((length * scale - wanted) / 2))
        for length, wanted in zip(original, bucket, strict=True)
    )
    return scale, SizeConditioning(original, (top, left), bucket)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of a picture in any mode, on white where it is transparent."""
    if image.mode.startswith("I"):
        # 16 bit greyscale, which Pillow's own conversion clips at 255
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
