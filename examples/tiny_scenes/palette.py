"""Colours of objects and settings; sRGB in [0, 1] as written here, linear as returned."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

from .scenes import ATTRIBUTES

Colour = tuple[float, float, float]

_OBJECT_COLOURS: dict[str, Colour] = {
    "red": (0.86, 0.07, 0.09),
    "orange": (1.0, 0.46, 0.02),
    "yellow": (1.0, 0.86, 0.08),
    "green": (0.08, 0.58, 0.16),
    "blue": (0.07, 0.24, 0.88),
    "purple": (0.47, 0.10, 0.70),
    "pink": (1.0, 0.48, 0.70),
    "white": (0.95, 0.95, 0.95),
}
_LIGHT_TONE: Colour = (0.97, 0.96, 0.92)
_DARK_TONE: Colour = (0.16, 0.12, 0.20)
_WITH_DARK_TONE = ("yellow", "pink", "white")


@dataclass(frozen=True)
class Setting:
    """Everything that tells one setting from another; angles and heights are tangents."""

    zenith: Colour
    horizon: Colour
    sunlight: Colour
    skylight: Colour
    ground: Colour
    ground_patches: Colour
    far_hills: Colour
    near_hills: Colour
    far_height: float = 0.07
    near_height: float = 0.035
    roughness: float = 1.0
    """Frequency of the hills' outline."""
    clouds: float = 0.0
    cloud: Colour = (1.0, 1.0, 1.0)
    disc: Colour = (1.0, 1.0, 1.0)
    disc_size: float = 0.0
    """Radius of the sun or moon; 0 for none in view."""
    stars: float = 0.0
    patch_width: float = 6.0
    patch_depth: float = 6.0
    """Extent of the ground's patches in world units."""
    dots: float = 0.0
    """Share of the ground's cells with a flower, leaf or pebble."""
    dot: Colour = (1.0, 1.0, 1.0)
    dot_other: Colour = (1.0, 1.0, 1.0)
    tiles: float = 0.0
    """1 for a checkered floor of ``ground`` and ``ground_patches``."""
    shore: float = 1e4
    """Depth z beyond which there is water."""
    water: Colour = (0.1, 0.3, 0.4)
    mirror: float = 0.0
    """Reflectivity of dry ground."""


_SETTINGS: dict[str, Setting] = {
    "meadow": Setting(
        zenith=(0.20, 0.50, 0.93), horizon=(0.74, 0.89, 0.98),
        sunlight=(1.0, 0.97, 0.90), skylight=(0.66, 0.74, 0.84),
        ground=(0.36, 0.62, 0.20), ground_patches=(0.52, 0.74, 0.26),
        far_hills=(0.36, 0.58, 0.52), near_hills=(0.24, 0.50, 0.22),
        clouds=0.9, dots=0.35, dot=(1.0, 0.98, 0.92), dot_other=(0.99, 0.88, 0.30),
    ),
    "desert": Setting(
        zenith=(0.32, 0.60, 0.84), horizon=(0.99, 0.87, 0.66),
        sunlight=(1.0, 0.95, 0.84), skylight=(0.74, 0.70, 0.66),
        ground=(0.82, 0.61, 0.36), ground_patches=(0.93, 0.75, 0.49),
        far_hills=(0.77, 0.53, 0.38), near_hills=(0.68, 0.40, 0.25), far_height=0.085,
        near_height=0.02, roughness=0.7, patch_width=9.0, patch_depth=1.6,
        disc=(1.0, 0.97, 0.75), disc_size=0.028,
    ),
    "beach": Setting(
        zenith=(0.10, 0.52, 0.90), horizon=(0.78, 0.94, 0.98),
        sunlight=(1.0, 0.97, 0.90), skylight=(0.70, 0.75, 0.82),
        ground=(0.90, 0.81, 0.62), ground_patches=(0.95, 0.88, 0.72),
        far_hills=(0.45, 0.65, 0.70), near_hills=(0.45, 0.65, 0.70), far_height=0.012,
        near_height=-0.05, roughness=1.6, clouds=0.6, dots=0.10, dot=(0.98, 0.94, 0.90),
        dot_other=(0.75, 0.55, 0.45), shore=4.5, water=(0.05, 0.50, 0.62),
    ),
    "snow": Setting(
        zenith=(0.50, 0.66, 0.86), horizon=(0.90, 0.93, 0.98),
        sunlight=(1.0, 0.97, 0.92), skylight=(0.66, 0.73, 0.86),
        ground=(0.74, 0.81, 0.91), ground_patches=(0.84, 0.89, 0.96),
        far_hills=(0.70, 0.78, 0.90), near_hills=(0.15, 0.30, 0.30), far_height=0.12,
        near_height=0.028, roughness=2.2, clouds=0.5,
    ),
    "night": Setting(
        zenith=(0.02, 0.03, 0.14), horizon=(0.16, 0.20, 0.44),
        sunlight=(0.94, 0.97, 1.05), skylight=(0.50, 0.52, 0.62),
        ground=(0.17, 0.28, 0.33), ground_patches=(0.24, 0.37, 0.40),
        far_hills=(0.09, 0.12, 0.28), near_hills=(0.05, 0.08, 0.17), far_height=0.045,
        near_height=0.02, disc=(1.0, 0.98, 0.86), disc_size=0.03, stars=0.22,
    ),
    "autumn": Setting(
        zenith=(0.55, 0.68, 0.80), horizon=(0.99, 0.91, 0.76),
        sunlight=(1.0, 0.94, 0.82), skylight=(0.70, 0.70, 0.72),
        ground=(0.40, 0.29, 0.17), ground_patches=(0.52, 0.38, 0.20),
        far_hills=(0.80, 0.52, 0.22), near_hills=(0.66, 0.26, 0.10), far_height=0.075,
        near_height=0.045, roughness=2.6, clouds=0.4, dots=0.75, dot=(0.85, 0.45, 0.10),
        dot_other=(0.72, 0.18, 0.08),
    ),
    "lake": Setting(
        zenith=(0.24, 0.50, 0.80), horizon=(0.96, 0.84, 0.80),
        sunlight=(1.0, 0.95, 0.88), skylight=(0.68, 0.72, 0.82),
        ground=(0.1, 0.3, 0.4), ground_patches=(0.1, 0.3, 0.4),
        far_hills=(0.42, 0.50, 0.66), near_hills=(0.12, 0.32, 0.26), far_height=0.11,
        near_height=0.035, roughness=1.6, clouds=0.7, cloud=(1.0, 0.93, 0.90), shore=-1e3,
        water=(0.10, 0.34, 0.44),
    ),
    "tiles": Setting(
        zenith=(0.62, 0.50, 0.46), horizon=(0.90, 0.83, 0.74),
        sunlight=(1.0, 0.97, 0.92), skylight=(0.74, 0.72, 0.70),
        ground=(0.40, 0.45, 0.52), ground_patches=(0.88, 0.87, 0.84),
        far_hills=(0.45, 0.25, 0.22), near_hills=(0.45, 0.25, 0.22), far_height=0.03,
        near_height=-0.05, roughness=0.0, tiles=1.0, mirror=0.22,
    ),
}  # fmt: skip


def _linear(colour: Tensor) -> Tensor:
    return colour.pow(2.2)


@cache
def object_colours() -> tuple[Tensor, Tensor]:
    """First and second tone ``[colours, 3]`` of every colour class, linear."""
    names = ATTRIBUTES["colour_a"]
    first = torch.tensor([_OBJECT_COLOURS[name] for name in names])
    tones = [_DARK_TONE if name in _WITH_DARK_TONE else _LIGHT_TONE for name in names]
    return _linear(first), _linear(torch.tensor(tones))


@cache
def setting_table() -> dict[str, Tensor]:
    """Every field of ``Setting``: ``[settings]``, or ``[settings, 3]`` linear for colours."""
    table = {}
    for field in fields(Setting):
        values = torch.tensor([getattr(_SETTINGS[name], field.name)
                               for name in ATTRIBUTES["setting"]])  # fmt: skip
        table[field.name] = _linear(values) if values.ndim == 2 else values
    return table
