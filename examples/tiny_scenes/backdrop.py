"""Sky, hills and ground of a setting as seen along a ray."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .noise import cell_values, sample_noise
from .palette import setting_table
from .scenes import Scenes
from .vectors import Vector, add, choose, columns, mix, scale, smoothstep


class World(NamedTuple):
    """What all objects of a scene share; tensors ``[n, 1]``, colours as vectors of those."""

    setting: dict[str, Tensor | Vector]
    light: Vector
    """Unit vector towards the light."""
    offsets: tuple[Tensor, ...]
    """Where the four uses of the noise texture start."""
    noise: Tensor
    """``[SIZE, SIZE]`` texture."""


def build_world(scenes: Scenes, noise: Tensor) -> World:
    setting = {}
    for name, table in setting_table().items():
        values = table.to(scenes.device)[scenes.setting]
        setting[name] = columns(values) if values.ndim == 2 else values[:, None]
    offsets = tuple(scenes.backdrop[:, i : i + 1] for i in range(4))
    return World(setting, columns(scenes.light_direction), offsets, noise)


def sky_gradient(world: World, elevation: Tensor) -> Vector:
    """Clear sky at an elevation (tangent), from the horizon's colour to the zenith's."""
    weight = 1 - torch.exp(-4.0 * elevation.clamp(min=0))
    return mix(world.setting["horizon"], world.setting["zenith"], weight)


def sky(world: World, direction: Vector) -> Vector:
    """Sky with sun or moon, stars, clouds and hills along rays that look away from the camera."""
    ahead = 1 / direction[2].clamp(min=0.05)
    azimuth, elevation = direction[0] * ahead, direction[1] * ahead
    colour = _add_stars(world, sky_gradient(world, elevation), azimuth, elevation)
    colour = _add_disc(world, colour, azimuth, elevation)
    colour = _add_clouds(world, colour, azimuth, elevation)
    colour = _add_windows(world, colour, azimuth, elevation)
    return _add_hills(world, colour, azimuth, elevation)


def _add_stars(world: World, colour: Vector, azimuth: Tensor, elevation: Tensor) -> Vector:
    u, v = azimuth * 45, elevation * 45
    column, row = u.floor(), v.floor()
    value = cell_values(world.noise, column, row)
    du, dv = u - column - 0.2 - 2 * value, v - row - 0.8 + 2 * value
    glow = (1.2 - 25 * (du * du + dv * dv)).clamp(0, 1)
    return mix(colour, (1.0, 1.0, 0.95), glow * (value < world.setting["stars"]))


def _add_disc(world: World, colour: Vector, azimuth: Tensor, elevation: Tensor) -> Vector:
    size = world.setting["disc_size"]
    x = azimuth - torch.sign(world.light[0]) * (0.19 + 0.05 * world.offsets[0])
    y = elevation - 0.14
    distance = (x * x + y * y).sqrt()
    halo = 0.25 * torch.exp(-distance / size.clamp(min=1e-3))
    cover = smoothstep(size, size - 0.004, distance)
    return mix(colour, world.setting["disc"], torch.maximum(cover, halo) * (size > 0))


def _add_clouds(world: World, colour: Vector, azimuth: Tensor, elevation: Tensor) -> Vector:
    value = sample_noise(world.noise, azimuth * 0.35 + world.offsets[0],
                         elevation * 0.9 + world.offsets[1])  # fmt: skip
    cover = smoothstep(0.0, 1.0, value) * smoothstep(0.02, 0.12, elevation)
    return mix(colour, world.setting["cloud"], cover * world.setting["clouds"])


def _add_windows(world: World, colour: Vector, azimuth: Tensor, elevation: Tensor) -> Vector:
    """Arched windows in the wall of a tiled hall, with the sky behind them."""
    x = (azimuth * 6 + world.offsets[3]) % 1.0 - 0.5
    above = (elevation * 6 - 0.62).clamp(min=0)
    inside = smoothstep(0.27, 0.25, (x * x + above * above).sqrt())
    inside = inside * smoothstep(0.32, 0.34, elevation * 6) * (world.setting["tiles"] > 0)
    behind = mix((0.75, 0.88, 0.95), (0.12, 0.42, 0.80), (elevation * 5).clamp(0, 1))
    return mix(colour, behind, inside)


def _add_hills(world: World, colour: Vector, azimuth: Tensor, elevation: Tensor) -> Vector:
    setting = world.setting
    for layer, spread in (("far", 0.4), ("near", 0.9)):
        along = azimuth * spread * setting["roughness"] + world.offsets[2]
        shift = world.offsets[3] + spread
        outline = sample_noise(world.noise, along, shift.expand_as(along))
        height = setting[f"{layer}_height"] * (1 + 0.4 * outline)
        texture = 0.85 + 1.5 * elevation
        cover = smoothstep(-0.003, 0.003, height - elevation)
        colour = mix(colour, scale(setting[f"{layer}_hills"], texture), cover)
    return colour


def ground_albedo(world: World, point: Vector, distance: Tensor) -> tuple[Vector, Tensor, Tensor]:
    """Colour of the ground at points ``[n, p]``, its reflectivity and where it is water.

    distance: from the camera; detail fades with it, so that it never becomes finer than a pixel.
    """
    setting = world.setting
    x, z = point[0], point[2]
    fade = 1 / (1 + (distance / 25).square())
    uneven = sample_noise(world.noise, x / (6 * setting["patch_width"]) + world.offsets[2],
                          z / (6 * setting["patch_depth"]) + world.offsets[3])  # fmt: skip
    checks = _checks(x / 1.3, z / 1.3, 0.02 * distance / 9)
    patches = 0.5 + fade * 0.3 * uneven
    weight = torch.where(setting["tiles"] > 0, 0.5 + 0.5 * fade * checks, patches)
    colour = mix(setting["ground"], setting["ground_patches"], weight)
    colour = _add_dots(world, colour, x, z, fade)
    return _add_water(world, colour, z + 0.5 * uneven)


def _checks(u: Tensor, v: Tensor, softness: Tensor) -> Tensor:
    """Checkerboard of cells of size 1, from -1 to 1, with blurred edges."""
    blur = 1 / (3.1 * softness)
    return (torch.sin(torch.pi * u) * blur).clamp(-1, 1) * (
        torch.sin(torch.pi * v) * blur
    ).clamp(-1, 1)


def _add_dots(world: World, colour: Vector, x: Tensor, z: Tensor, fade: Tensor) -> Vector:
    """Flowers, leaves or pebbles: at most one in every cell of the ground."""
    u, v = x * 2.2, z * 1.3
    row = v.floor()
    u = u + row * 0.618
    column = u.floor()
    value = cell_values(world.noise, column, row)
    other = (value * 16) % 1.0
    du, dv = u - column - 0.3 - 0.4 * other, v - row - 0.25 - 0.5 * ((value * 53) % 1.0)
    cover = (2.5 - 60 * (du * du + dv * dv)).clamp(0, 1) * fade * fade
    dot = choose(other > 0.5, world.setting["dot_other"], world.setting["dot"])
    return mix(colour, dot, cover * (value < world.setting["dots"]))


def _add_water(world: World, colour: Vector, depth: Tensor) -> tuple[Vector, Tensor, Tensor]:
    shore = world.setting["shore"]
    water = smoothstep(shore, shore + 0.15, depth)
    foam = water * smoothstep(shore + 0.7, shore + 0.3, depth)
    colour = mix(colour, world.setting["water"], water)
    colour = add(colour, scale((0.5, 0.5, 0.5), foam))
    return colour, torch.maximum(0.5 * water * (1 - foam), world.setting["mirror"]), water
