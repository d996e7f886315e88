"""Colour of an object's surface: pattern, light, shadow and what a shiny surface mirrors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backdrop import World, sky_gradient
from .palette import object_colours
from .scenes import ATTRIBUTES, FLAT_TOPPED, Scenes
from .solids import Solids, bulge
from .vectors import Vector, add, dot, mix, multiply, normalize, reflect, scale, smoothstep

_SHINY, _STRIPED, _CHECKERED, _SPOTTED = (
    ATTRIBUTES["material_a"].index(name) for name in ("shiny", "striped", "checkered", "spotted")
)

_FINEST_PERIOD = 0.58
"""World units; about 17 pixels in a picture of 256, so that patterns survive the latents."""


class Surfaces(NamedTuple):
    """Surfaces as tensors of one shape: ``[n, 5]`` for all objects, ``[n, p]`` for one per ray."""

    red: Tensor
    green: Tensor
    blue: Tensor
    second_red: Tensor
    second_green: Tensor
    second_blue: Tensor
    material: Tensor
    flat_topped: Tensor
    cos: Tensor
    sin: Tensor
    frequency: Tensor
    phase_u: Tensor
    phase_v: Tensor

    def take(self, index: Tensor) -> Surfaces:
        """The surface with the given object index ``[n, p]`` for every ray."""
        return Surfaces(*(torch.gather(field, 1, index) for field in self))


def build_surfaces(scenes: Scenes) -> Surfaces:
    """The surfaces ``[n, 5]`` of a batch of scenes."""
    first, second = (tones.to(scenes.device)[scenes.colour] for tones in object_colours())
    first = (first * (1 + 0.08 * scenes.tint) + 0.01 * scenes.tint).clamp(0.003, 1)
    angle, relative, phase_u, phase_v = scenes.pattern.unbind(-1)
    period = (0.75 * scenes.radius).clamp(min=_FINEST_PERIOD) * relative
    flat = torch.tensor(FLAT_TOPPED, device=scenes.device)
    return Surfaces(
        *first.unbind(-1),
        *second.unbind(-1),
        scenes.material,
        torch.isin(scenes.shape, flat),
        angle.cos(),
        angle.sin(),
        scenes.radius / period,
        phase_u,
        phase_v,
    )


def shade(world: World, solid: Solids, surface: Surfaces, point: Vector, normal: Vector,
          towards: Vector, shadow: Tensor) -> Vector:  # fmt: skip
    """Light sent to the camera by surface points ``[n, p]``.

    towards: unit direction in which the ray travels; shadow: share of the light kept off.
    """
    sunlight = scale(world.setting["sunlight"], 1 - shadow)
    lambert = dot(normal, world.light).clamp(min=0)
    contact = 0.55 + 0.45 * (point[1] / (0.5 * solid.radius)).clamp(0, 1)
    fill = (0.34 + 0.14 * normal[1]) * contact
    light = add(scale(sunlight, 0.85 * lambert), scale(world.setting["skylight"], fill))
    albedo = _albedo(solid, surface, point, normal)
    matte = multiply(albedo, light)
    return mix(matte, _polished(world, solid, matte, albedo, point, normal, towards, sunlight),
               surface.material == _SHINY)  # fmt: skip


def _polished(world: World, solid: Solids, matte: Vector, albedo: Vector, point: Vector,
              normal: Vector, towards: Vector, sunlight: Vector) -> Vector:  # fmt: skip
    """Lacquered look: dark ground, bright sky and the light's glare in the object's colour."""
    cushion = bulge(solid, point, normal, 0.85)
    mirrored = reflect(towards, cushion)
    above = smoothstep(-0.03, 0.06, mirrored[1])
    hue = mix(world.setting["ground_patches"], sky_gradient(world, 0.8 * mirrored[1]), above)
    brightness = (hue[0] + hue[1] + hue[2]) / 3
    hue = mix(scale(hue, 1 / (0.02 + brightness)), (1.0, 1.0, 1.0), 0.6)
    environment = scale(hue, 0.22 + 0.75 * above + 0.25 * mirrored[1].clamp(min=0))
    tinted = multiply(mix(albedo, (1.0, 1.0, 1.0), 0.03), environment)
    colour = add(scale(matte, 0.35), scale(tinted, 0.7))
    halfway = normalize(add(world.light, scale(towards, -1)))
    spot = scale(sunlight, 0.8 * smoothstep(0.975, 0.988, dot(cushion, halfway)))
    window = scale(world.setting["sunlight"], 0.55 * _window(world, cushion))
    return add(colour, tuple(torch.maximum(s, w) for s, w in zip(spot, window, strict=True)))


def _window(world: World, normal: Vector) -> Tensor:
    """A soft upright window mirrored on the light's side of every bulging face."""
    beside = (normal[0] - 1.05 * world.light[0]).abs()
    return smoothstep(0.15, 0.10, beside) * smoothstep(0.27, 0.20, (normal[1] - 0.22).abs())


def _albedo(solid: Solids, surface: Surfaces, point: Vector, normal: Vector) -> Vector:
    """Colour of the pattern at surface points; the first tone covers more than the second."""
    x, y, z = solid.point_to_local(point)
    top = surface.flat_topped & (normal[1] > 0.95)
    across = (x + z) * surface.frequency
    upwards = torch.where(top, x - z, 1.414 * y) * surface.frequency
    u = surface.cos * across + surface.sin * upwards + surface.phase_u
    v = surface.cos * upwards - surface.sin * across + surface.phase_v
    material = surface.material
    second = torch.where(material == _STRIPED, _stripes(u), 0.0)
    second = torch.where(material == _CHECKERED, _checkers(u, v), second)
    second = torch.where(material == _SPOTTED, _spots(u, v), second)
    return mix(surface[0:3], surface[3:6], second)


def _stripes(u: Tensor) -> Tensor:
    return smoothstep(0.22, 0.32, torch.sin(2 * torch.pi * u))


def _checkers(u: Tensor, v: Tensor) -> Tensor:
    return smoothstep(-0.03, 0.09, torch.sin(2 * torch.pi * u) * torch.sin(2 * torch.pi * v))


def _spots(u: Tensor, v: Tensor) -> Tensor:
    """Round spots in rows, every other row shifted by half a period."""
    v = 1.2 * v
    row = v.floor()
    u = 1.1 * u + 0.5 * row
    du, dv = u - u.floor() - 0.5, v - row - 0.5
    return smoothstep(0.105, 0.075, du * du + dv * dv)
