"""Vectors and colours as tuples of three broadcastable tensors.

Keeping the components apart lets a compiler fuse a whole picture into a few pointwise kernels.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Vector: TypeAlias = tuple[Tensor, Tensor, Tensor]
Constant: TypeAlias = tuple[float, float, float]


def columns(values: Tensor) -> Vector:
    """Split ``[..., 3]`` into a vector of three ``[..., 1]``."""
    return values[..., 0:1], values[..., 1:2], values[..., 2:3]


def add(a: Vector, b: Vector) -> Vector:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def scale(a: Vector, factor: Tensor | float) -> Vector:
    return a[0] * factor, a[1] * factor, a[2] * factor


def multiply(a: Vector, b: Vector) -> Vector:
    return a[0] * b[0], a[1] * b[1], a[2] * b[2]


def dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def normalize(a: Vector) -> Vector:
    return scale(a, torch.rsqrt(dot(a, a) + 1e-12))


def mix(a: Vector, b: Vector | Constant, weight: Tensor | float) -> Vector:
    """From ``a`` at weight 0 to ``b`` at weight 1."""
    return tuple(x + (y - x) * weight for x, y in zip(a, b, strict=True))


def choose(mask: Tensor, a: Vector, b: Vector | Constant) -> Vector:
    """``a`` where the mask is true, otherwise ``b``."""
    return tuple(torch.where(mask, x, y) for x, y in zip(a, b, strict=True))


def reflect(direction: Vector, normal: Vector) -> Vector:
    """Mirror a direction at a surface with a unit normal."""
    return add(direction, scale(normal, -2 * dot(direction, normal)))


def smoothstep(low: Tensor | float, high: Tensor | float, x: Tensor) -> Tensor:
    """0 below ``low``, 1 above ``high``, smooth between."""
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)
