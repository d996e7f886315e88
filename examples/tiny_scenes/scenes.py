"""What a tiny scene is: its scored attributes, its hidden details and how both are sampled.

A scene shows at most five objects of at most two kinds, A and B, on the ground plane ``y = 0``. The
x axis points right, the y axis up and the z axis away from the camera; lengths are world units, of
which about six fit across a square picture at the objects' depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import LongTensor, Tensor

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "layout": ("pair", "row", "flanked", "stack", "mirrored"),
    "count": ("two", "three", "four", "five"),
    "shape_a": ("ball", "cube", "cylinder", "cone", "pyramid", "gem"),
    "shape_b": ("ball", "cube", "cylinder", "cone", "pyramid", "gem"),
    "colour_a": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
    "colour_b": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
    "size_a": ("small", "large"),
    "size_b": ("small", "large"),
    "material_a": ("plain", "shiny", "striped", "checkered", "spotted"),
    "material_b": ("plain", "shiny", "striped", "checkered", "spotted"),
    "setting": ("meadow", "desert", "beach", "snow", "night", "autumn", "lake", "tiles"),
    "light": ("left", "right"),
}
"""Scored attributes and their classes. ``count`` is scored in rows, B's attributes outside them."""

OBJECTS = 5
PAIR, ROW, FLANKED, STACK, MIRRORED = range(5)
FLAT_TOPPED = (1, 2)
"""Shapes that can carry another object: cube and cylinder."""

HALF_HEIGHT = (1.0, 0.72, 0.8, 1.0, 0.9, 1.1)
"""Half of each shape's height, in units of the object's radius."""

_A, _B, _ABSENT = 0, 1, -1


@dataclass(frozen=True)
class _Arrangement:
    """Where a layout puts its objects: (owner, x, mirrored) each, radii and sideways freedom."""

    places: tuple[tuple[int, float, bool], ...]
    small: float
    large: float
    jitter_a: float
    jitter_b: float


def _row(count: int, spacing: float, small: float, large: float) -> _Arrangement:
    middle = (count - 1) / 2
    places = tuple((_A, (i - middle) * spacing, False) for i in range(count))
    return _Arrangement(places, small, large, 0.06, 0.0)


_ARRANGEMENTS = (
    _Arrangement(((_A, -1.35, False), (_B, 1.35, False)), 0.64, 0.98, 0.2, 0.2),
    _Arrangement(((_A, 0, False), (_B, -2.02, False), (_B, 2.02, False)), 0.53, 0.77, 0.1, 0.0),
    _Arrangement(((_A, 0, False), (_B, 0, False)), 0.57, 0.87, 0.5, 0.0),
    _Arrangement(
        ((_A, -0.69, False), (_A, 0.69, True), (_B, -2.05, False), (_B, 2.05, True)),
        0.46, 0.63, 0.0, 0.0,
    ),
    _row(2, 2.5, 0.64, 0.95),
    _row(3, 1.85, 0.56, 0.83),
    _row(4, 1.42, 0.47, 0.65),
    _row(5, 1.13, 0.39, 0.52),
)  # fmt: skip
_ARRANGEMENT_OF_LAYOUT = (0, 4, 1, 2, 3)  # rows continue by their count


@dataclass
class Scenes:
    """A batch of n scenes as a structure of arrays: ``[n]``, ``[n, k]``, ``[n, 5]``, ``[n, 5, k]``.

    Class indices (long; -1 where an attribute does not apply) are the fields named as in
    ``ATTRIBUTES``. The remaining fields are float32 unless said otherwise.
    """

    layout: Tensor
    count: Tensor
    shape_a: Tensor
    shape_b: Tensor
    colour_a: Tensor
    colour_b: Tensor
    size_a: Tensor
    size_b: Tensor
    material_a: Tensor
    material_b: Tensor
    setting: Tensor
    light: Tensor

    shape: Tensor
    """``[n, 5]`` long: class of each object's shape."""
    colour: Tensor
    """``[n, 5]`` long: class of each object's colour."""
    material: Tensor
    """``[n, 5]`` long: class of each object's material."""
    position: Tensor
    """``[n, 5, 3]``: where each object stands; absent ones lie far below the ground."""
    radius: Tensor
    """``[n, 5]``: each object's size; every shape fits in a sphere of little more than this."""
    yaw: Tensor
    """``[n, 5]``: turn about the vertical axis in radians."""
    mirror: Tensor
    """``[n, 5]``: -1 for an object which is the mirror image of its twin, otherwise 1."""
    tint: Tensor
    """``[n, 5, 3]``: deviation from the class's colour, in [-1, 1]."""
    pattern: Tensor
    """``[n, 5, 4]``: angle in radians, relative scale, and two phases in periods."""

    camera_height: Tensor
    """``[n]``: height of the camera above the ground."""
    light_direction: Tensor
    """``[n, 3]``: unit vector towards the light."""
    backdrop: Tensor
    """``[n, 4]``: where hills, clouds and ground are cut from the noise texture, in [0, 1]."""

    def __len__(self) -> int:
        return self.layout.shape[0]

    @property
    def device(self) -> torch.device:
        return self.layout.device

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Scenes:
        """Select scenes by a slice, an index or mask tensor, or a list of indices."""
        if not isinstance(index, (slice, Tensor, list, tuple)):
            raise TypeError(f"expected a slice, tensor or list, received {type(index).__name__}")
        if isinstance(index, (list, tuple)):
            index = torch.tensor(index, dtype=torch.long)
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Scenes:
        """Return the scenes with every tensor on ``device``."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
                 for f in fields(self)}  # fmt: skip
        return Scenes(**moved)

    def truth(self) -> dict[str, LongTensor]:
        """Class index ``[n]`` of every attribute, -1 where it does not apply."""
        return {name: getattr(self, name) for name in ATTRIBUTES}

    @staticmethod
    def cat(parts: Sequence[Scenes]) -> Scenes:
        """Join batches of scenes; raises ValueError without any."""
        if not parts:
            raise ValueError("expected at least one batch of scenes, received none")
        names = (f.name for f in fields(Scenes))
        return Scenes(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})


def sample_scenes(n: int, *, seed: int, device: torch.device | str = "cpu") -> Scenes:
    """Draw ``n`` scenes, the same ones for a seed on every device.

    Layouts are equally likely, and given the layout so are the classes of every attribute. A and B
    always differ in colour and, except in a stack, in shape.
    """
    generator = torch.Generator().manual_seed(seed)
    attributes = _sample_attributes(n, generator)
    return _add_details(attributes, generator).to(device)


def scenes_from_attributes(attributes: Mapping[str, LongTensor], seed: int) -> Scenes:
    """Build scenes with chosen attributes and random hidden details, on the CPU.

    attributes: class indices ``[n]`` for every name in ``ATTRIBUTES``, -1 where an attribute does
        not apply (``count`` outside rows, B's attributes in rows).

    Raises ValueError where a name is missing or unknown, shapes differ, an index is out of range,
    or an attribute is present without applying (or the other way round).
    """
    checked = _check_attributes(attributes)
    return _add_details(checked, torch.Generator().manual_seed(seed))


def _sample_attributes(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    def draw(classes: int) -> Tensor:
        return torch.randint(classes, (n,), generator=generator)

    drawn = {name: draw(len(classes)) for name, classes in ATTRIBUTES.items()}
    for kind in ("shape", "colour"):
        classes = len(ATTRIBUTES[f"{kind}_a"])
        drawn[f"{kind}_b"] = (drawn[f"{kind}_a"] + 1 + draw(classes - 1)) % classes
    carrier = torch.tensor(FLAT_TOPPED)[draw(len(FLAT_TOPPED))]
    drawn["shape_b"] = torch.where(drawn["layout"] == STACK, carrier, drawn["shape_b"])
    for name in drawn:
        drawn[name] = drawn[name].where(_applies(name, drawn["layout"]), -1)
    return drawn


def _applies(name: str, layout: Tensor) -> Tensor:
    """Mask ``[n]`` of the scenes for which attribute ``name`` is defined."""
    if name == "count":
        return layout == ROW
    if name.endswith("_b"):
        return layout != ROW
    return torch.ones_like(layout, dtype=torch.bool)


def _check_attributes(attributes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if set(attributes) != set(ATTRIBUTES):
        raise ValueError(f"expected attributes {sorted(ATTRIBUTES)}, received {sorted(attributes)}")
    checked = {name: torch.as_tensor(attributes[name], dtype=torch.long).cpu()
               for name in ATTRIBUTES}  # fmt: skip
    layout = checked["layout"]
    for name, classes in ATTRIBUTES.items():
        value = checked[name]
        if value.ndim != 1 or value.shape != layout.shape:
            raise ValueError(f"{name}: expected shape [n] as layout's {tuple(layout.shape)}, "
                             f"received {tuple(value.shape)}")  # fmt: skip
        applies = _applies(name, layout)
        right = torch.where(applies, (value >= 0) & (value < len(classes)), value == -1)
        if not right.all():
            raise ValueError(f"{name}: expected 0..{len(classes) - 1} where it applies and -1 "
                             f"elsewhere, received {value[~right].unique().tolist()}")  # fmt: skip
    carrier = torch.isin(checked["shape_b"], torch.tensor(FLAT_TOPPED)) | (layout != STACK)
    if not carrier.all():
        raise ValueError("shape_b: expected cube or cylinder at the bottom of a stack, received "
                         f"{checked['shape_b'][~carrier].unique().tolist()}")  # fmt: skip
    return checked


def _add_details(truth: dict[str, Tensor], generator: torch.Generator) -> Scenes:
    n = truth["layout"].shape[0]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    owner, spot, mirror, radius, jitter = _arrange(truth)
    kind = owner.clamp(min=0)  # absent objects borrow A's attributes

    def per_object(a: Tensor, b: Tensor) -> Tensor:
        """Classes ``[n, 5]`` from those of A and B; a missing B has no objects to show class 0."""
        return torch.stack((a, b.clamp(min=0)), 1).gather(1, kind)

    def shared(low: float, high: float) -> Tensor:
        """One random value per kind, so that matching objects share it: ``[n, 5]``."""
        return uniform(low, high, 2).gather(1, kind)

    def chosen(name: str) -> Tensor:
        return per_object(truth[f"{name}_a"], truth[f"{name}_b"])

    shape = chosen("shape")
    radius = radius.gather(2, chosen("size")[..., None])[..., 0]
    stack = truth["layout"] == STACK
    sideways = torch.where(stack[:, None], jitter[:, :1] * uniform(-1, 1, 1),
                           jitter * uniform(-1, 1, 2)).gather(1, kind)  # fmt: skip
    depth = torch.where(stack[:, None], uniform(-0.3, 0.3, 1), shared(-0.3, 0.3))
    ground = _base_heights(stack, shape, radius).where(owner != _ABSENT, -1e3)
    angle = shared(0, 4).floor() * (math.pi / 4) + shared(-0.12, 0.12)
    phases = (shared(0, 1), shared(0, 1))
    return Scenes(
        **truth,
        shape=shape,
        colour=chosen("colour"),
        material=chosen("material"),
        position=torch.stack((spot + sideways, ground, depth), -1),
        radius=radius,
        yaw=math.pi / 4 + shared(-0.38, 0.38),
        mirror=mirror,
        tint=torch.stack([shared(-1, 1) for _ in range(3)], -1),
        pattern=torch.stack((angle, shared(0.9, 1.15), *phases), -1),
        camera_height=uniform(2.2, 3.0),
        light_direction=_light_direction(truth["light"], uniform(0.66, 0.9), uniform(1.05, 1.3)),
        backdrop=uniform(0, 1, 4),
    )


def _arrange(truth: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Owner, x, mirror ``[n, 5]``, radii by size ``[n, 5, 2]``, sideways jitter ``[n, 2]``."""
    absent = ((_ABSENT, 0.0, False),)
    padded = [a.places + absent * (OBJECTS - len(a.places)) for a in _ARRANGEMENTS]
    owner = torch.tensor([[place[0] for place in row] for row in padded])
    x = torch.tensor([[float(place[1]) for place in row] for row in padded])
    mirror = torch.tensor([[-1.0 if place[2] else 1.0 for place in row] for row in padded])
    radii = torch.tensor([[a.small, a.large] for a in _ARRANGEMENTS])
    jitter = torch.tensor([[a.jitter_a, a.jitter_b] for a in _ARRANGEMENTS])
    index = torch.tensor(_ARRANGEMENT_OF_LAYOUT)[truth["layout"]] + truth["count"].clamp(min=0)
    return (owner[index], x[index], mirror[index],
            radii[index][:, None].expand(-1, OBJECTS, -1), jitter[index])  # fmt: skip


def _base_heights(stack: Tensor, shape: Tensor, radius: Tensor) -> Tensor:
    """Height ``[n, 5]`` of the surface on which each object stands."""
    top = 2 * torch.tensor(HALF_HEIGHT)[shape] * radius
    heights = torch.zeros_like(radius)
    heights[:, 0] = top[:, 1].where(stack, 0)  # A is object 0 and stands on B, object 1
    return heights


def _light_direction(light: Tensor, elevation: Tensor, sideways: Tensor) -> Tensor:
    """Unit vectors ``[n, 3]`` from side (0 left, 1 right) and angles in radians.

    The light comes from the camera's side of the objects, so that no face in view is black.
    """
    side = light * 2.0 - 1.0
    level = elevation.cos()
    return torch.stack(
        (side * sideways.sin() * level, elevation.sin(), -sideways.cos() * level), -1
    )
