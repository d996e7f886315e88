"""A tileable texture of smooth noise: the one source of hills, clouds and uneven ground."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

SIZE = 256


@cache
def noise_texture(device: torch.device | str = "cpu") -> Tensor:
    """``[SIZE, SIZE]`` noise whose amplitude falls with frequency; mean 0, deviation 1.

    Values beyond three deviations are clipped.
    """
    generator = torch.Generator().manual_seed(7)
    white = torch.randn(SIZE, SIZE, generator=generator)
    frequency = torch.fft.fftfreq(SIZE, 1 / SIZE)
    distance = torch.hypot(frequency[:, None], frequency[None])
    spectrum = torch.fft.fft2(white) / distance.clamp(min=2.0) ** 1.7
    smooth = torch.fft.ifft2(spectrum).real
    smooth = (smooth - smooth.mean()) / smooth.std()
    return smooth.clamp(-3, 3).to(device)


def sample_noise(texture: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Bilinear samples at coordinates of which 1 is one period of the texture."""
    x, y = u * SIZE, v * SIZE
    left, top = x.floor(), y.floor()
    fx, fy = x - left, y - top
    column, row = left.long(), top.long()
    x0, x1 = column % SIZE, (column + 1) % SIZE
    y0, y1 = row % SIZE * SIZE, (row + 1) % SIZE * SIZE
    flat = texture.reshape(-1)
    above = torch.lerp(flat[y0 + x0], flat[y0 + x1], fx)
    below = torch.lerp(flat[y1 + x0], flat[y1 + x1], fx)
    return torch.lerp(above, below, fy)


def cell_values(texture: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """An unrelated value in [0, 1) for every cell of an integer grid."""
    column, row = column.long(), row.long()
    index = (97 * column + 57 * row) % SIZE, (43 * column + 131 * row) % SIZE
    return (texture[index] * 37.7) % 1.0
