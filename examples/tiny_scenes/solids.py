"""Intersection of rays with the objects: every shape is one convex solid with different numbers.

In its own frame (origin at the centre, lengths divided by the radius) a solid is the set of points
inside a quadric ``x² + z² + a y² + b y + c <= 0``, between two horizontal planes, and between the
planes ``low <= ±x + lean * y <= high`` and ``low <= ±z + lean * y <= high``. A ray's part inside a
convex solid is the overlap of its parts inside these six.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .scenes import HALF_HEIGHT, Scenes
from .vectors import Vector, normalize, scale

_FAR = 1e3
_NO_QUADRIC = (1.0, 0.0, -_FAR)
_NO_SLABS = (0.0, -_FAR, _FAR)


def _shape_table() -> Tensor:
    """``[shapes, 8]``: a, b, c, lean, low, high, floor, roof."""
    ball, cube, cylinder, cone, pyramid, gem = HALF_HEIGHT
    slope = 0.46  # radius of the cone one unit below its tip
    half_base, half_width = 0.75, 0.73
    lean = half_base / (2 * pyramid)
    rows = (
        (1.0, 0.0, -(ball**2), *_NO_SLABS, -_FAR, _FAR),
        (*_NO_QUADRIC, 0.0, -cube, cube, -cube, cube),
        (0.0, 0.0, -(0.78**2), *_NO_SLABS, -cylinder, cylinder),
        (-(slope**2), 2 * slope**2 * cone, -((slope * cone) ** 2), *_NO_SLABS, -cone, cone),
        (*_NO_QUADRIC, lean, -_FAR, half_base / 2, -pyramid, _FAR),
        (*_NO_QUADRIC, half_width / gem, -half_width, half_width, -_FAR, _FAR),
    )
    return torch.tensor(rows)


class Solids(NamedTuple):
    """Solids as tensors of one shape: ``[n, 5, 1]`` for all objects, ``[n, p]`` for one per ray."""

    x: Tensor
    y: Tensor
    z: Tensor
    radius: Tensor
    cos: Tensor
    sin: Tensor
    mirror: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    lean: Tensor
    low: Tensor
    high: Tensor
    floor: Tensor
    roof: Tensor

    def take(self, index: Tensor) -> Solids:
        """The solid with the given index ``[n, p]`` for every ray."""
        return Solids(*(torch.gather(field[..., 0], 1, index) for field in self))

    def point_to_local(self, point: Vector) -> Vector:
        offset = (point[0] - self.x, point[1] - self.y, point[2] - self.z)
        return self.direction_to_local(offset)

    def direction_to_local(self, direction: Vector) -> Vector:
        """Turn, mirror and shrink; a ray keeps its parameter t, as both of its parts shrink."""
        shrink = 1 / self.radius
        x, y, z = scale(direction, shrink)
        x = self.mirror * x
        return self.cos * x - self.sin * z, y, self.sin * x + self.cos * z

    def normal_to_world(self, normal: Vector) -> Vector:
        """Unit normal in the world from a normal of any length in the solid's frame."""
        x, y, z = normalize(normal)
        return self.mirror * (self.cos * x + self.sin * z), y, self.cos * z - self.sin * x


def build_solids(scenes: Scenes) -> Solids:
    """The solids ``[n, 5, 1]`` of a batch of scenes."""
    table = _shape_table().to(scenes.device)[scenes.shape]
    half_height = torch.tensor(HALF_HEIGHT, device=scenes.device)[scenes.shape]
    x, base, z = scenes.position.unbind(-1)
    placed = (x, base + half_height * scenes.radius, z, scenes.radius,
              scenes.yaw.cos(), scenes.yaw.sin(), scenes.mirror)  # fmt: skip
    return Solids(*(field[..., None] for field in (*placed, *table.unbind(-1))))


def _overlap_with_slab(low: Tensor, high: Tensor, start: Tensor, step: Tensor):
    """Range of t for which ``low <= start + t * step <= high``."""
    inverse = 1 / torch.where(step.abs() < 1e-7, 1e-7, step)
    first, second = (low - start) * inverse, (high - start) * inverse
    return torch.minimum(first, second), torch.maximum(first, second)


def _overlap_with_quadric(solids: Solids, o: Vector, d: Vector):
    """Range of t inside the quadric; empty (first above second) where the ray misses it.

    No ray of the renderer is steeper than the cone, which keeps the leading coefficient positive.
    """
    leading = d[0] * d[0] + d[2] * d[2] + solids.a * d[1] * d[1]
    half = o[0] * d[0] + o[2] * d[2] + (solids.a * o[1] + 0.5 * solids.b) * d[1]
    constant = o[0] * o[0] + o[2] * o[2] + (solids.a * o[1] + solids.b) * o[1] + solids.c
    discriminant = half * half - leading * constant
    inverse = 1 / leading.clamp(min=1e-6)
    root = discriminant.clamp(min=0).sqrt() * inverse
    middle = -half * inverse
    missed = discriminant < 0
    return torch.where(missed, _FAR, middle - root), torch.where(missed, -_FAR, middle + root)


def _overlaps(solids: Solids, o: Vector, d: Vector) -> list[tuple[Tensor, Tensor]]:
    """Ranges of t inside the quadric, the horizontal planes and the four pairs of planes."""
    ranges = [
        _overlap_with_quadric(solids, o, d),
        _overlap_with_slab(solids.floor, solids.roof, o[1], d[1]),
    ]
    lean_o, lean_d = solids.lean * o[1], solids.lean * d[1]
    for axis in (0, 2):
        for side in (1, -1):
            start, step = lean_o + side * o[axis], lean_d + side * d[axis]
            ranges.append(_overlap_with_slab(solids.low, solids.high, start, step))
    return ranges


def span(solids: Solids, origin: Vector, direction: Vector) -> tuple[Tensor, Tensor]:
    """Parameters t at which rays enter and leave the solids; the ray misses where enter > leave."""
    o, d = solids.point_to_local(origin), solids.direction_to_local(direction)
    ranges = _overlaps(solids, o, d)
    enter, leave = ranges[0]
    for first, second in ranges[1:]:
        enter, leave = torch.maximum(enter, first), torch.minimum(leave, second)
    return enter, leave


def nearest(solids: Solids, origin: Vector, direction: Vector) -> tuple[Tensor, Tensor]:
    """First hit of rays ``[n, p]`` among all objects: t (1000 for none) and object index."""
    lifted = tuple(v[:, None] for v in origin), tuple(v[:, None] for v in direction)
    enter, leave = span(solids, *lifted)
    hit = (enter < leave) & (enter > 1e-3)
    return torch.where(hit, enter, _FAR).min(1)


def blocked(solids: Solids, origin: Vector, direction: Vector) -> Tensor:
    """How much of the light from ``direction`` the objects keep from points ``[n, p]``, in [0, 1].

    A ray which only grazes an object is partly blocked: soft edges without further rays.
    """
    lifted = tuple(v[:, None] for v in origin), tuple(v[:, None] for v in direction)
    enter, leave = span(solids, *lifted)
    inside = leave - enter.clamp(min=0)
    return (inside / (0.3 * solids.radius)).clamp(0, 1).amax(1)


def surface_normal(solid: Solids, origin: Vector, direction: Vector) -> Vector:
    """Unit normal where each ray enters its own solid; all of shape ``[n, p]``."""
    o, d = solid.point_to_local(origin), solid.direction_to_local(direction)
    enters = [first for first, _ in _overlaps(solid, o, d)]
    t = enters[0]
    x, y, z = (o[i] + t * d[i] for i in range(3))
    y = solid.a * y + 0.5 * solid.b
    planes = ((0.0, 1.0, 0.0), (1.0, None, 0.0), (-1.0, None, 0.0), (0.0, None, 1.0),
              (0.0, None, -1.0))  # fmt: skip
    for first, (nx, ny, nz) in zip(enters[1:], planes, strict=True):
        ny = solid.lean if ny is None else ny
        away = -torch.sign(nx * d[0] + ny * d[1] + nz * d[2])
        later = first > t
        t = torch.where(later, first, t)
        x, y, z = (torch.where(later, away * n, v) for n, v in ((nx, x), (ny, y), (nz, z)))
    return solid.normal_to_world((x, y, z))


def bulge(solid: Solids, point: Vector, normal: Vector, amount: float) -> Vector:
    """Bend normals outwards as on a cushion, so that flat faces mirror more than one point."""
    offset = (point[0] - solid.x, point[1] - solid.y, point[2] - solid.z)
    outwards = scale(offset, amount / solid.radius)
    return normalize(tuple(n + o for n, o in zip(normal, outwards, strict=True)))
