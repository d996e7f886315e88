"""From a model's own size to a large one: the sizes in between, and what is done at each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

GROWTH = 2.0  # times as large, at most, as the stage before
ASPECT_TOLERANCE = 0.02
# What upper stages do by default: the first doubles the model's own size, and so on; the last entry
# serves for all that follow.
STRENGTHS = (0.3, 0.3, 0.25, 0.25)
SHARES_OF_STEPS = (0.2, 0.16, 0.13, 0.1)
FEWEST_STEPS = 3


@dataclass(frozen=True)
class Stage:
    """One size of the cascade and how it is denoised.

    Args:
        height, width: of the image in pixels.
        steps: denoising steps that are taken.
        strength: the part of the noise schedule that is run through: 1 starts from pure noise, 0.3
            from the smaller image with little noise.
        guidance_scale: classifier-free guidance; 1 or less needs one forward pass a step, not two.
        low_frequency: how far the first step's low frequencies are drawn to those of the smaller
            image, 0 to 1; it falls to 0 along a half cosine.
        dilation: of the deep 3 x 3 convolutions of a UNet in the first steps of the stage; 1: none.
        dilated_steps: the part of the steps with that dilation, 0 to 1.

    Raises:
        ValueError: a number out of range.
    """

    height: int
    width: int
    steps: int
    strength: float = 1.0
    guidance_scale: float = 5.0
    low_frequency: float = 0.0
    dilation: int = 1
    dilated_steps: float = 0.0

    def __post_init__(self) -> None:
        for name in ("height", "width", "steps", "dilation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength: expected more than 0 and at most 1, got {self.strength}")
        for name in ("low_frequency", "dilated_steps"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")

    @property
    def guided(self) -> bool:
        """Whether a step takes two forward passes, with the prompt and without."""
        return self.guidance_scale > 1

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)


def cascade_sizes(native: int, height: int, width: int, multiple: int) -> list[tuple[int, int]]:
    """(height, width) of every stage, from about the area of `native`² to the target.

    All have the target's aspect ratio as near as `multiple` allows, and each is at most twice as
    large as the one before, in even ratios. A target of no more than the native area is the only
    stage.

    Args:
        native: side of the square image that the model is made for, in pixels.
        multiple: of which all sides but the target's are multiples, in pixels.

    Raises:
        ValueError: a side is not positive.
    """
    for name, value in {"height": height, "width": width, "native": native}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1 pixel, got {value}")
    return _between(math.sqrt(height * width) / native, height, width, multiple)


def cascade_from(
    start: tuple[int, int], height: int, width: int, multiple: int
) -> list[tuple[int, int]]:
    """The same from a given picture of size `start`, which is the first stage.

    Raises:
        ValueError: the picture has another aspect ratio than the target, or is larger.
    """
    ratio, expected = start[1] / start[0], width / height
    if abs(ratio / expected - 1) > ASPECT_TOLERANCE:
        raise ValueError(
            f"expected a picture of the target's aspect ratio {width}:{height} ({expected:.3f}), "
            f"got {start[1]}x{start[0]} ({ratio:.3f}): crop it first"
        )
    scale = height / start[0]
    if scale < 1:
        raise ValueError(
            f"expected a picture of at most the target's size {width}x{height}, "
            f"got {start[1]}x{start[0]}"
        )
    return [start, *_between(scale, height, width, multiple)[1:]]


def _between(scale: float, height: int, width: int, multiple: int) -> list[tuple[int, int]]:
    """Sizes from 1 / `scale` of the target to the target."""
    doublings = math.ceil(round(math.log(max(scale, 1), GROWTH), 6))

    def part(side: int, index: int) -> int:
        exact = side / scale ** (1 - index / doublings)
        return max(multiple, multiple * round(exact / multiple))

    smaller = [(part(height, index), part(width, index)) for index in range(doublings)]
    return [*smaller, (height, width)]


def default_stages(
    sizes: Sequence[tuple[int, int]],
    *,
    steps: int = 30,
    guidance_scale: float = 5.0,
    upper_guidance_scale: float = 1.0,
    dilated_steps: float = 0.0,
    first: int = 0,
) -> list[Stage]:
    """Stages of these sizes with settings that were found to work on Tiny Scenes.

    Upper stages take fewer steps as sizes grow, and no guidance: what is in the picture is settled
    by then, and guidance above a model's own size draws it again, smaller and elsewhere.

    Args:
        steps: of the first size, from pure noise.
        guidance_scale: of the first size.
        upper_guidance_scale: of the others; 1: none, half the time.
        dilated_steps: of the others, the part of their steps in which a UNet's deep convolutions
            reach as much farther as the picture is larger than the first.
        first: which upper stage the second size counts as; more for a start above the model's own
            size.
    """
    base = Stage(*sizes[0], steps, guidance_scale=guidance_scale)
    upper = []
    for index, (height, width) in enumerate(sizes[1:], first):
        entry = min(index, len(STRENGTHS) - 1)
        upper.append(
            Stage(
                height,
                width,
                steps=max(FEWEST_STEPS, round(steps * SHARES_OF_STEPS[entry])),
                strength=STRENGTHS[entry],
                guidance_scale=upper_guidance_scale,
                low_frequency=1.0,
                dilation=max(1, round(GROWTH**first * height / sizes[0][0])),
                dilated_steps=dilated_steps,
            )
        )
    return [base, *upper]
