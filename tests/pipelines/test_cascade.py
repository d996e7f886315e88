"""Sizes grow evenly to the target, by 2 at most."""

import math

import pytest

from gspn2_diffusers.pipelines.cascade import (
    Stage,
    cascade_from,
    cascade_sizes,
    default_stages,
)


@pytest.mark.parametrize(
    ("height", "width", "count"),
    [(1024, 1024, 1), (2048, 2048, 2), (4096, 4096, 3), (16384, 16384, 5),
     (4096, 16384, 4), (3840, 2160, 3), (1536, 1536, 2), (640, 640, 1)],
)  # fmt: skip
def test_sizes_lead_from_the_native_area_to_the_target_in_steps_of_two(height, width, count):
    sizes = cascade_sizes(1024, height, width, 32)
    assert len(sizes) == count
    assert sizes[-1] == (height, width)
    assert all(side % 32 == 0 for size in sizes[:-1] for side in size)
    if count > 1:
        assert math.sqrt(math.prod(sizes[0])) == pytest.approx(1024, rel=0.03)
    for smaller, larger in zip(sizes, sizes[1:], strict=False):
        for before, after in zip(smaller, larger, strict=True):
            assert 1 < after / before <= 2.05
    for size in sizes:
        assert size[1] / size[0] == pytest.approx(width / height, rel=0.05)


def test_growth_is_even_and_does_not_leave_the_last_stage_a_rest():
    sizes = cascade_sizes(1024, 2896, 2896, 8)
    assert len(sizes) == 3
    assert sizes[1][0] / sizes[0][0] == pytest.approx(sizes[2][0] / sizes[1][0], rel=0.01)


def test_a_given_picture_is_the_first_stage():
    assert cascade_from((768, 1024), 3072, 4096, 32) == [(768, 1024), (1536, 2048), (3072, 4096)]
    assert cascade_from((512, 512), 512, 512, 32) == [(512, 512)]


@pytest.mark.parametrize(
    ("start", "message"),
    [((768, 768), "aspect ratio 4096:3072"), ((6144, 8192), "at most the target's size 4096x3072")],
)
def test_a_picture_that_cannot_lead_to_the_target_is_refused(start, message):
    with pytest.raises(ValueError, match=message):
        cascade_from(start, 3072, 4096, 32)


def test_later_stages_do_less_and_start_from_less_noise():
    stages = default_stages(cascade_sizes(1024, 8192, 8192, 32), steps=40, guidance_scale=6)
    assert stages[0].strength == 1 and stages[0].steps == 40 and stages[0].low_frequency == 0
    steps, strengths = ([getattr(s, name) for s in stages] for name in ("steps", "strength"))
    assert steps == sorted(steps, reverse=True)
    assert strengths == sorted(strengths, reverse=True)
    assert all(stage.low_frequency > 0 and not stage.guided for stage in stages[1:])
    assert stages[0].guidance_scale == 6


@pytest.mark.parametrize(
    "changes",
    [{"steps": 0}, {"strength": 0}, {"strength": 1.2}, {"low_frequency": 2}, {"height": 0},
     {"dilation": 0}, {"dilated_steps": -1}],
)  # fmt: skip
def test_a_stage_out_of_range_is_refused(changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Stage(**{"height": 64, "width": 64, "steps": 4} | changes)
