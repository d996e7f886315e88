"""Ray tracing of tiny scenes: one sharp light, shadows and a single mirror reflection.

``render`` prepares a batch and calls ``render_core``, a pure function of tensors with static shapes
that ``torch.compile`` traces into one graph.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .backdrop import World, build_world, ground_albedo, sky
from .noise import noise_texture
from .scenes import Scenes
from .shading import Surfaces, build_surfaces, shade
from .solids import Solids, blocked, build_solids, nearest, surface_normal
from .vectors import Vector, add, choose, mix, multiply, normalize, scale, smoothstep

_CAMERA_DISTANCE = 9.0
_AIM_HEIGHT = 1.3
_HALF_VIEW = 0.33
"""Tangent of half the angle of view along the picture's shorter side."""
_MISS = 999.0


class Stage(NamedTuple):
    """A batch of scenes as the renderer needs them."""

    solids: Solids
    surfaces: Surfaces
    world: World
    camera_height: Tensor


def build_stage(scenes: Scenes) -> Stage:
    """Look up all tables for a batch of scenes, on the scenes' device."""
    world = build_world(scenes, noise_texture(scenes.device))
    return Stage(build_solids(scenes), build_surfaces(scenes), world, scenes.camera_height[:, None])


def render(scenes: Scenes, size: int | tuple[int, int] = 256, supersample: int = 2, *,
           chunk: int = 8, compiled: bool = False) -> Tensor:  # fmt: skip
    """Pictures float32 ``[n, 3, height, width]`` in [0, 1] (sRGB) on the scenes' device.

    size: pixels, one number for a square or (height, width). The shorter side always shows the
        same part of the world, so that no object is cut off; the longer side shows more of it.
    supersample: rays along each side of a pixel.
    chunk: scenes traced at a time, which bounds the memory (some 170 MB each at the defaults).
    compiled: run ``render_core`` through ``torch.compile``; each new shape of a chunk, and so a
        shorter last one, compiles anew.

    Raises ValueError for a size, supersample or chunk below 1.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width, supersample, chunk) < 1:
        raise ValueError("expected size, supersample and chunk of at least 1, received "
                         f"{size}, {supersample} and {chunk}")  # fmt: skip
    core = _compiled_core() if compiled else render_core
    parts = [core(build_stage(scenes[i : i + chunk]), height, width, supersample)
             for i in range(0, len(scenes), chunk)]  # fmt: skip
    return torch.cat(parts) if parts else torch.empty(0, 3, height, width, device=scenes.device)


@cache
def _compiled_core():
    return torch.compile(render_core, dynamic=False, fullgraph=True)


def render_core(stage: Stage, height: int, width: int, supersample: int) -> Tensor:
    """Pictures ``[n, 3, height, width]`` of a stage of n scenes."""
    rows, cols = height * supersample, width * supersample
    origin, direction = camera_rays(stage.camera_height, rows, cols)
    colour = torch.stack(_tone(_trace(stage, origin, direction)), 1)
    return colour.unflatten(2, (height, supersample, width, supersample)).mean((3, 5))


def camera_rays(camera_height: Tensor, rows: int, cols: int) -> tuple[Vector, Vector]:
    """Origins and directions, each component ``[n, rows * cols]``, of the rays of a picture."""
    device = camera_height.device
    pixel = 2 * _HALF_VIEW / min(rows, cols)
    up = ((rows - 1) / 2 - torch.arange(rows, device=device, dtype=torch.float32)) * pixel
    right = (torch.arange(cols, device=device, dtype=torch.float32) - (cols - 1) / 2) * pixel
    up, right = (v.reshape(1, -1) for v in torch.meshgrid(up, right, indexing="ij"))
    fall = (camera_height - _AIM_HEIGHT) / _CAMERA_DISTANCE
    cos = torch.rsqrt(1 + fall.square())
    direction = (right, cos * (up - fall), cos * (1 + fall * up))
    direction = tuple(v.expand(camera_height.shape[0], -1) for v in direction)
    zero = torch.zeros_like(direction[0])
    return (zero, zero + camera_height, zero - _CAMERA_DISTANCE), direction


def _trace(stage: Stage, origin: Vector, direction: Vector) -> Vector:
    """Linear colour seen along camera rays: an object, otherwise the ground, otherwise the sky."""
    t, index = nearest(stage.solids, origin, direction)
    ground_t = -origin[1] / direction[1].clamp(max=-1e-4)
    on_object = t < ground_t.clamp(max=_MISS)
    point = add(origin, scale(direction, torch.where(on_object, t, ground_t)))
    solid = stage.solids.take(index)
    normal = surface_normal(solid, origin, direction)
    normal = choose(on_object, normal, (0.0, 1.0, 0.0))
    start = add(point, scale(normal, 0.01))
    shadow = blocked(stage.solids, start, stage.world.light)
    surface = stage.surfaces.take(index)
    towards = normalize(direction)
    body = shade(stage.world, solid, surface, point, normal, towards, shadow)
    ground = _ground(stage, point, ground_t, direction, shadow)
    background = choose(direction[1] < -1e-4, ground, sky(stage.world, direction))
    return choose(on_object, body, background)


def _ground(stage: Stage, point: Vector, distance: Tensor, direction: Vector,
            shadow: Tensor) -> Vector:  # fmt: skip
    """Lit ground, dark where objects touch it, with mirror image and haze."""
    world = stage.world
    albedo, reflectivity, water = ground_albedo(world, point, distance)
    sunlight = scale(world.setting["sunlight"], (1 - shadow) * 0.85 * world.light[1])
    contact = _contact(stage.solids, point)
    skylight = scale(world.setting["skylight"], 0.48 * (1 - contact))
    colour = multiply(albedo, add(sunlight, skylight))
    waves = torch.sin(11 * point[2] + 2.5 * torch.sin(1.7 * point[0]))
    ripple = 0.012 * waves * water / (1 + (distance / 14).square())
    mirrored = _mirror_image(stage, point, (direction[0], ripple - direction[1], direction[2]))
    mirrored = scale(mirrored, 1 - water * (0.15 + 0.3 * shadow + 0.5 * contact))
    colour = mix(colour, mirrored, reflectivity)
    haze = 0.85 * (1 - torch.exp(-distance / 90))
    return mix(colour, world.setting["horizon"], haze * (1 - water))


def _mirror_image(stage: Stage, point: Vector, direction: Vector) -> Vector:
    """What a horizontal mirror shows: objects lit without shadows, else the sky."""
    start = (point[0], point[1] + 0.005, point[2])
    t, index = nearest(stage.solids, start, direction)
    solid = stage.solids.take(index)
    hit = add(start, scale(direction, t))
    normal = surface_normal(solid, start, direction)
    body = shade(stage.world, solid, stage.surfaces.take(index), hit, normal,
                 normalize(direction), torch.zeros_like(t))  # fmt: skip
    return choose(t < _MISS, body, sky(stage.world, direction))


def _contact(solids: Solids, point: Vector) -> Tensor:
    """Share of the sky which the nearest object hides from ground points ``[n, p]``."""
    x, z = point[0][:, None] - solids.x, point[2][:, None] - solids.z
    distance = (x * x + z * z).sqrt() / solids.radius
    on_ground = (solids.y > 0) & (solids.y < 1.2 * solids.radius)  # neither stacked nor absent
    near = smoothstep(1.5, 0.4, distance) * on_ground
    return 0.6 * near.amax(1)


def _tone(colour: Vector) -> Vector:
    """From linear light to sRGB in [0, 1], with a soft shoulder above 0.7."""
    lifted = scale(colour, 1.15)
    soft = (v.clamp(max=0.7) + 0.3 * torch.tanh((v - 0.7).clamp(min=0) / 0.3) for v in lifted)
    return tuple(v.clamp(1e-5, 1).pow(1 / 2.2) for v in soft)
