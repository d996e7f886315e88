"""Pictures of tiny scenes: what must be visible in them."""

import pytest
import torch

from gspn2_diffusers.tiny_scenes.render import build_stage, camera_rays, render, render_core
from gspn2_diffusers.tiny_scenes.scenes import (
    ATTRIBUTES,
    HALF_HEIGHT,
    OBJECTS,
    Scenes,
    sample_scenes,
    scenes_from_attributes,
)
from gspn2_diffusers.tiny_scenes.solids import build_solids, nearest, surface_normal


def scene(seed: int = 0, **classes: str) -> Scenes:
    """One scene with the named classes, by default two red balls between two blue cubes."""
    names = {"layout": "mirrored", "shape_a": "ball", "shape_b": "cube", "colour_a": "red",
             "colour_b": "blue", "size_a": "large", "size_b": "large", "material_a": "plain",
             "material_b": "plain", "setting": "snow", "light": "left"} | classes  # fmt: skip
    if names["layout"] == "row":
        names = {key: value for key, value in names.items() if not key.endswith("_b")}
    index = {name: torch.tensor([values.index(names[name]) if name in names else -1])
             for name, values in ATTRIBUTES.items()}  # fmt: skip
    return scenes_from_attributes(index, seed)


def single_solid(shape: str):
    """The solids of a scene whose object 0 has the given shape."""
    other = "cube" if shape != "cube" else "ball"
    return build_solids(scene(layout="pair", shape_a=shape, shape_b=other))


@pytest.mark.parametrize("size", [64, (40, 72), (72, 40), (33, 47), (1, 1)])
def test_any_size_gives_finite_colours_in_range(size):
    picture = render(sample_scenes(3, seed=1), size, 1)
    height, width = (size, size) if isinstance(size, int) else size
    assert picture.shape == (3, 3, height, width)
    assert picture.dtype == torch.float32
    assert picture.isfinite().all() and picture.min() >= 0 and picture.max() <= 1


def test_a_wide_picture_adds_world_at_the_sides_only():
    scenes = sample_scenes(2, seed=3)
    wide = render(scenes, (48, 96), 1)
    torch.testing.assert_close(wide[..., 24:72], render(scenes, 48, 1), rtol=0, atol=1e-3)


def test_pictures_do_not_depend_on_chunks_or_repetition():
    scenes = sample_scenes(5, seed=2)
    whole = render(scenes, 32)
    torch.testing.assert_close(render(scenes, 32, chunk=2), whole, rtol=0, atol=1e-6)
    assert render(scenes[:0], 32).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("arguments", [{"size": 0}, {"supersample": 0}, {"chunk": 0}])
def test_sizes_below_one_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 1, received"):
        render(sample_scenes(1, seed=0), **arguments)


def test_compiles_to_one_graph():
    stage = build_stage(sample_scenes(2, seed=0))
    compiled = torch.compile(render_core, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(stage, 16, 24, 2), render_core(stage, 16, 24, 2))


@pytest.mark.parametrize("shape", ATTRIBUTES["shape_a"])
def test_a_solid_has_its_height_and_normals_face_the_ray(shape):
    """A ray from above meets the top; rays from the camera's side meet faces turned to them."""
    solids = single_solid(shape)
    x, y, z = (solids[i][:, 0] for i in range(3))
    half = HALF_HEIGHT[ATTRIBUTES["shape_a"].index(shape)] * solids.radius[:, 0]
    above = (x + 1e-3, y + 5, z + 1e-3)
    down = (torch.zeros_like(x) + 1e-4, -torch.ones_like(x), torch.zeros_like(x))
    if shape != "cone":  # steeper than any ray of the renderer
        t, _ = nearest(solids, above, down)
        torch.testing.assert_close(t, 5 - half, rtol=0, atol=0.02)
    across = torch.linspace(-0.4, 0.4, 9)[None]
    start = (x + across, y + 0 * across, z - 5 + 0 * across)
    ahead = (0 * across, 0 * across - 0.05, 0 * across + 1)
    t, index = nearest(solids, start, ahead)
    normal = surface_normal(solids.take(index), start, ahead)
    assert (t < 6).all() and (index == 0).all()
    torch.testing.assert_close(sum(n * n for n in normal), torch.ones_like(t))
    assert (sum(n * d for n, d in zip(normal, ahead, strict=True)) < 0).all()


def test_mirrored_scenes_are_mirror_symmetric_but_for_the_light():
    mirrored = scene(material_b="striped", shape_a="gem", seed=5)
    overhead = mirrored[:]
    overhead.light_direction = torch.tensor([[0.0, 0.8, -0.6]])
    overhead.backdrop = torch.zeros_like(overhead.backdrop)
    difference = object_difference(overhead)
    assert difference < 1e-3
    broken = overhead[:]
    broken.mirror = torch.ones_like(broken.mirror)
    assert object_difference(broken) > 10 * difference


def object_difference(scenes: Scenes) -> float:
    """Mean difference between a picture's lower half and its reflection, in flat surroundings."""
    picture = render(scenes, 64, 1)[:, :, 24:44]
    return (picture - picture.flip(-1)).square().mean().item()


@pytest.mark.parametrize("setting", ATTRIBUTES["setting"])
def test_shadows_fall_away_from_the_light_in_every_setting(setting):
    """Cast by two balls on the ground beside them, left or right of the pair."""
    base = {"layout": "row", "count": "two", "size_a": "small", "setting": setting}
    left = render(scene(**base, light="left"), 64, 1)[0].mean(0)
    right = render(scene(**base, light="right"), 64, 1)[0].mean(0)
    ground = slice(36, 46)
    beside = slice(50, 58)  # right of the right ball
    assert left[ground, beside].min() < 0.97 * right[ground, beside].min()
    beside = slice(6, 14)
    assert right[ground, beside].min() < 0.97 * left[ground, beside].min()


def test_a_lake_mirrors_the_objects_below_them():
    def red(setting: str) -> torch.Tensor:
        picture = render(scene(layout="row", count="two", setting=setting), 64, 1)[0]
        return ((picture[0] > 1.5 * picture[1]) & (picture[0] > 1.3 * picture[2])).sum(0).float()

    on_lake, on_snow = red("lake").max(), red("snow").max()
    assert on_lake > 1.3 * on_snow


def test_every_object_is_in_view_and_hardly_hidden():
    """Each object keeps most of the pixels that it covers when it stands alone."""
    scenes = sample_scenes(60, seed=9)
    solids = build_solids(scenes)
    wide = camera_rays(scenes.camera_height[:, None], 64, 96)
    _, seen = nearest(solids, *wide)
    inside = (torch.arange(96) >= 16) & (torch.arange(96) < 80)  # the square picture
    inside = inside.repeat(64)
    for i in range(OBJECTS):
        alone = solids._replace(y=torch.where(torch.arange(OBJECTS)[:, None] == i, solids.y, -1e3))
        covered = nearest(alone, *wide)[0] < 999
        shown = (covered & inside & (seen == i)).sum(1)
        present = scenes.position[:, i, 1] >= 0
        assert (shown[present] > 25).all()
        assert (shown[present] > 0.7 * covered.sum(1)[present]).all()
