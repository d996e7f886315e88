"""Sampling of tiny scenes: what is drawn, and what it promises about truth and geometry."""

from dataclasses import fields

import pytest
import torch

from gspn2_diffusers.tiny_scenes.scenes import (
    ATTRIBUTES,
    FLAT_TOPPED,
    HALF_HEIGHT,
    MIRRORED,
    PAIR,
    ROW,
    STACK,
    Scenes,
    sample_scenes,
    scenes_from_attributes,
)

SCENES = sample_scenes(4000, seed=1)


def assert_same(a: Scenes, b: Scenes) -> None:
    for field in fields(Scenes):
        torch.testing.assert_close(getattr(a, field.name), getattr(b, field.name), rtol=0, atol=0)


def test_seed_alone_decides_what_is_drawn():
    assert_same(SCENES, sample_scenes(4000, seed=1))
    assert not torch.equal(SCENES.position, sample_scenes(4000, seed=2).position)


def test_sampling_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    sample_scenes(3, seed=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_class_of_an_attribute_is_about_equally_likely(name):
    value = SCENES.truth()[name]
    if name == "shape_b":  # only two shapes can carry another one
        value = value[SCENES.layout != STACK]
    counts = torch.bincount(value[value >= 0], minlength=len(ATTRIBUTES[name])).float()
    assert counts.min() > 0.75 * counts.mean()
    assert counts.max() < 1.25 * counts.mean()


def test_truth_is_absent_exactly_where_an_attribute_does_not_apply():
    truth = SCENES.truth()
    row = SCENES.layout == ROW
    assert torch.equal(truth["count"] >= 0, row)
    for name in ("shape_b", "colour_b", "size_b", "material_b"):
        assert torch.equal(truth[name] < 0, row)


def test_the_two_kinds_can_be_told_apart_by_colour_and_shape():
    two = SCENES[SCENES.layout != ROW]
    assert (two.colour_a != two.colour_b).all()
    beside = two[two.layout != STACK]
    assert (beside.shape_a != beside.shape_b).all()


def test_a_row_shows_as_many_objects_as_its_count():
    row = SCENES[SCENES.layout == ROW]
    assert torch.equal((row.position[..., 1] >= 0).sum(1), row.count + 2)


def test_the_left_object_of_a_pair_is_a():
    pair = SCENES[SCENES.layout == PAIR]
    assert (pair.position[:, 0, 0] < pair.position[:, 1, 0]).all()
    assert torch.equal(pair.colour[:, 0], pair.colour_a)
    assert torch.equal(pair.colour[:, 1], pair.colour_b)


def test_a_stack_stands_on_a_flat_top():
    stack = SCENES[SCENES.layout == STACK]
    assert torch.isin(stack.shape[:, 1], torch.tensor(FLAT_TOPPED)).all()
    top = 2 * torch.tensor(HALF_HEIGHT)[stack.shape[:, 1]] * stack.radius[:, 1]
    torch.testing.assert_close(stack.position[:, 0, 1], top)


def test_twins_of_a_mirrored_scene_are_mirror_images():
    mirrored = SCENES[SCENES.layout == MIRRORED]
    for left, right in ((0, 1), (2, 3)):
        image = mirrored.position[:, left] * torch.tensor([-1.0, 1.0, 1.0])
        torch.testing.assert_close(mirrored.position[:, right], image)
        assert torch.equal(mirrored.mirror[:, left], -mirrored.mirror[:, right])
        for name in ("shape", "colour", "material", "radius", "yaw", "tint", "pattern"):
            value = getattr(mirrored, name)
            assert torch.equal(value[:, left], value[:, right]), name


def test_objects_do_not_overlap():
    """The widest shape reaches 1.07 radii from its axis."""
    beside = SCENES[SCENES.layout != STACK]
    gap = (beside.position[:, :, None] - beside.position[:, None]).norm(dim=-1)
    reach = 1.07 * (beside.radius[:, :, None] + beside.radius[:, None])
    here = beside.position[..., 1] >= 0
    apart = (gap > reach) | ~(here[:, :, None] & here[:, None]) | torch.eye(5, dtype=torch.bool)
    assert apart.all()


def test_light_is_a_unit_vector_from_its_side():
    torch.testing.assert_close(SCENES.light_direction.norm(dim=1), torch.ones(4000))
    assert torch.equal(SCENES.light_direction[:, 0] > 0, SCENES.light == 1)
    assert (SCENES.light_direction[:, 1] > 0).all()


def test_slices_and_index_tensors_join_to_the_whole():
    head, tail = SCENES[:10], SCENES[torch.arange(10, 20)]
    assert len(head) == 10
    assert_same(Scenes.cat([head, tail]), SCENES[:20])
    assert_same(SCENES[[3]], SCENES[3:4])
    with pytest.raises(TypeError, match="received int"):
        SCENES[3]
    with pytest.raises(ValueError, match="received none"):
        Scenes.cat([])


def test_chosen_attributes_come_back_as_truth():
    truth = SCENES[:50].truth()
    built = scenes_from_attributes(truth, seed=3)
    for name, value in built.truth().items():
        assert torch.equal(value, truth[name]), name
    assert not torch.equal(built.yaw, SCENES[:50].yaw)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("light", torch.tensor([2]), "light: expected 0..1"),
        ("count", torch.tensor([0]), "count: .*-1 elsewhere"),
        ("shape_b", torch.tensor([0]), "shape_b: expected cube or cylinder"),
        ("setting", torch.tensor([1, 2]), "setting: expected shape"),
    ],
)
def test_impossible_attributes_are_refused(name, value, message):
    stack = SCENES[SCENES.layout == STACK][:1].truth()
    with pytest.raises(ValueError, match=message):
        scenes_from_attributes(stack | {name: value}, seed=0)


def test_a_missing_attribute_is_refused():
    truth = SCENES[:1].truth()
    del truth["light"]
    with pytest.raises(ValueError, match="expected attributes"):
        scenes_from_attributes(truth, seed=0)
