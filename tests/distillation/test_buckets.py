"""Buckets fit their area and ratio; any picture comes out upright, in RGB and centred."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from gspn2_diffusers.distillation.buckets import (
    fit_image,
    fit_tensor,
    make_buckets,
    nearest_bucket,
)


@pytest.mark.parametrize(("resolution", "step"), [(1024, 64), (512, 64), (256, 32), (1000, 64)])
def test_buckets_keep_to_step_area_and_ratio(resolution, step):
    buckets = make_buckets(resolution, step)
    side = resolution // step * step
    assert (side, side) in buckets
    assert {(w, h) for h, w in buckets} == set(buckets)
    for height, width in buckets:
        assert height % step == width % step == 0
        assert 0.75 * resolution**2 < height * width <= resolution**2
        assert 0.5 <= height / width <= 2


def test_buckets_of_sdxl_are_the_known_ones():
    assert {(832, 1216), (896, 1152), (1216, 832), (768, 1344)} <= set(make_buckets(1024, 64))


def test_ratio_of_one_gives_the_square_only():
    assert make_buckets(512, 64, 1.0) == [(512, 512)]


@pytest.mark.parametrize("arguments", [(512, 0), (512, 513), (512, 64, 0.5)])
def test_impossible_buckets_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        make_buckets(*arguments)


def test_nearest_bucket_treats_portrait_and_landscape_alike():
    buckets = make_buckets(512, 64)
    for height, width in [(1000, 1000), (900, 1300), (3000, 1000), (101, 100)]:
        chosen = nearest_bucket(buckets, height, width)
        assert nearest_bucket(buckets, width, height) == chosen[::-1]
    assert nearest_bucket(buckets, 77, 77) == (512, 512)


def stripes(height: int, width: int) -> Image.Image:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


def test_crop_is_centred_and_reported_in_the_scaled_picture():
    pixels, size = fit_image(stripes(100, 300), (50, 50))
    assert pixels.shape == (3, 50, 50) and pixels.dtype == torch.uint8
    assert size.to_row() == [100, 300, 0, 50, 50, 50]
    assert pixels[0, :, :24].min() > 250 and pixels[2, :, 26:].min() > 250


def test_small_picture_is_enlarged_and_a_line_does_not_explode():
    assert fit_image(stripes(5, 10), (64, 128))[0].shape == (3, 64, 128)
    assert fit_image(Image.new("RGB", (20000, 1)), (512, 1024))[0].shape == (3, 512, 1024)


@pytest.mark.parametrize(("height", "width"), [(37, 53), (333, 1001), (1001, 333), (64, 96)])
def test_odd_sizes_never_leave_the_picture(height, width):
    for bucket in make_buckets(96, 32):
        image, size = fit_image(stripes(height, width), bucket)
        assert image.shape == (3, *bucket) and min(size.crop) >= 0


def test_exif_orientation_turns_picture_and_original_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    stripes(40, 80).save(tmp_path / "turned.png", exif=exif)
    pixels, size = fit_image(Image.open(tmp_path / "turned.png"), (80, 40))
    assert size.original == (80, 40)
    assert pixels[0, :38].min() > 250 and pixels[2, 42:].min() > 250


def test_transparent_parts_become_white():
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert fit_image(clear, (8, 8))[0].min() == 255
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([200, 0, 0])
    palette.info["transparency"] = 0
    assert fit_image(palette, (8, 8))[0].min() == 255


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("RGB", (8, 8), "white").convert("RGBA" if mode == "LA" else "RGB")
    assert fit_image(image.convert(mode), (8, 8))[0].float().mean() > 250


def test_16_bit_greyscale_keeps_its_shades(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    pixels, _ = fit_image(Image.open(tmp_path / "grey.png"), (64, 64))
    expected = torch.from_numpy(values.astype(np.float32)) / 257
    assert (pixels - expected).abs().max() <= 0.51


def test_tensors_are_fitted_like_images():
    image = stripes(90, 200)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    pixels, size = fit_tensor(tensor, (32, 48))
    expected, expected_size = fit_image(image, (32, 48))
    assert size == expected_size and pixels.dtype == torch.uint8
    assert (pixels.float() - expected.float()).abs().mean() < 8
    same, _ = fit_tensor(tensor, (90, 200))
    assert torch.equal(same, tensor)
