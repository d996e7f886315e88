import copy
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.attention_processor import Attention
from tiny_models import tiny_vae
from torch import nn

from gspn2_diffusers.pipelines import decoding
from gspn2_diffusers.pipelines.decoding import (
    Tiling,
    decode_bands,
    encode_tiled,
    seam_metric,
    tile_spans,
)
from gspn2_diffusers.shipped import shipped_folder
from gspn2_diffusers.tiny_scenes.render import render
from gspn2_diffusers.tiny_scenes.scenes import sample_scenes

TINY = Tiling(tile=16, overlap=4, statistics_crops=8)
SMALL = Tiling(tile=32, overlap=8)


def vae_of(*widths: int, **changes) -> AutoencoderKL:
    """A VAE with random weights in float64, a level per width."""
    torch.manual_seed(0)
    config = {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**config | changes).double().eval()


def decode(vae, latents, tiling, **options) -> np.ndarray:
    return np.concatenate(list(decode_bands(vae, latents, tiling, **options)))


def random_latents(height: int, width: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(1, 4, height, width, dtype=torch.float64)


def snapshot(vae: nn.Module) -> list:
    """All that tiling could have changed in a VAE."""
    return [(type(module), dict(module.__dict__)) for module in vae.modules()] + [vae.dtype]


def with_statistics_of_each_tile(monkeypatch):
    monkeypatch.setattr(decoding._Job, "_measure", lambda *_: None)


def with_statistics_of_everything(monkeypatch):
    def measure(self, tiling):
        statistics = decoding._Statistics()
        with self._ready(statistics), torch.no_grad():
            self.run(self.source)
        statistics.settle()
        return statistics

    monkeypatch.setattr(decoding._Job, "_measure", measure)


# ---- tiles


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "spans"),
    [
        (5, 16, 4, [(0, 5)]),
        (16, 16, 4, [(0, 16)]),
        (17, 16, 4, [(0, 11), (6, 17)]),
        (28, 16, 4, [(0, 16), (12, 28)]),
        (29, 16, 4, [(0, 13), (8, 21), (16, 29)]),
        (32, 16, 0, [(0, 16), (16, 32)]),
        (512, 272, 16, [(0, 264), (248, 512)]),
    ],
)
def test_tiles_are_as_few_as_can_be_and_then_as_small_evenly_spread(size, tile, overlap, spans):
    assert tile_spans(size, tile, overlap) == spans


@pytest.mark.parametrize("tile", [16, 17, 24])
@pytest.mark.parametrize("scale", [1, 8])
def test_weights_sum_to_one_and_keep_away_from_the_edges_of_tiles(tile, scale):
    for overlap in range(tile // 2 + 1):
        for size in range(1, 5 * tile):
            total = torch.zeros(size * scale, dtype=torch.float64)
            parts = decoding._parts(size, tile, overlap, scale)
            for number, part in enumerate(parts):
                assert part.stop - part.start == parts[0].stop <= min(size, tile)
                assert (part.weights > 0).all()
                total[part.begin : part.end] += part.weights
                margin = scale * overlap // 4 if scale > 1 else overlap // 4
                assert number == 0 or part.begin >= scale * part.start + margin
                assert part is parts[-1] or part.end <= scale * part.stop - margin
            assert (total - 1).abs().max() < 1e-15, (size, overlap)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 15}, "tile: expected at least 16 latent pixels, got 15"),
        ({"overlap": -1}, "overlap: expected 0 to 64 latent pixels, half a tile, got -1"),
        ({"tile": 20, "overlap": 11}, "overlap: expected 0 to 10 latent pixels"),
        ({"statistics_crops": 0}, "statistics_crops: expected at least 1, got 0"),
    ],
)
def test_a_tiling_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Tiling(**options)


# ---- exactness


@pytest.mark.parametrize("size", [(24, 24), (5, 70), (1, 3)], ids=str)
@pytest.mark.parametrize("tiling", [None, Tiling(tile=128)], ids=["whole", "one tile"])
def test_one_tile_is_the_vae_itself(size, tiling):
    if tiling and max(size) > tiling.tile:
        pytest.fail("meant for one tile")
    vae, latents = tiny_vae().double(), random_latents(*size)
    with torch.no_grad():
        pixels = vae.decode(latents / vae.config.scaling_factor).sample[0].permute(1, 2, 0)
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().numpy()
    (band,) = decode_bands(vae, latents, tiling)
    assert band.dtype == np.uint8 and np.array_equal(band, expected)


def test_tiles_are_exact_with_statistics_of_everything_and_overlap_for_the_receptive_field(
    monkeypatch,
):
    # 12 latent pixels: the convolutions before the 2 x upsampling reach 9 of them, the others 3.
    vae, latents = vae_of(8, 8), random_latents(96, 144)
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor).sample[0]
    with_statistics_of_everything(monkeypatch)
    monkeypatch.setattr(decoding, "_to_bytes", lambda band: band)
    bands = list(decode_bands(vae, latents, Tiling(tile=96, overlap=48)))
    torch.testing.assert_close(torch.cat(bands, dim=1), expected, rtol=0, atol=1e-11)
    bands = list(decode_bands(vae, latents, Tiling(tile=88, overlap=32)))
    assert (torch.cat(bands, dim=1) - expected).abs().max() > 1e-9


def test_encoding_is_exact_with_statistics_of_everything_and_overlap_for_the_receptive_field(
    monkeypatch,
):
    vae = vae_of(8, 8)
    torch.manual_seed(1)
    image = torch.rand(1, 3, 192, 288, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(image).latent_dist.mode() * vae.config.scaling_factor
    with_statistics_of_everything(monkeypatch)
    latents = encode_tiled(vae, image, Tiling(tile=96, overlap=48))
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.5, "shift_factor": 0.25},
        {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
        {"latents_mean": None, "latents_std": None, "shift_factor": None},
    ],
    ids=["shift", "mean and std", "none"],
)
def test_latents_are_scaled_as_pipelines_do_it(config, monkeypatch):
    vae, latents = vae_of(8, 8, **config), random_latents(20, 40)
    seen = []
    monkeypatch.setattr(vae, "decode", lambda z, return_dict: seen.append(z) or (z[:, :3],))
    monkeypatch.setattr(decoding, "pixels_per_latent", lambda config: 1)
    decode(vae, latents, None)
    scaling = vae.config.scaling_factor
    if vae.config.latents_mean is not None:
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(1, 4, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        expected = latents * std / scaling + mean
    else:
        expected = latents / scaling + (vae.config.shift_factor or 0)
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(decoding._scaled(vae, expected), latents)


# ---- shapes and inputs


@pytest.mark.parametrize("size", [(16, 17), (30, 33), (1, 40), (40, 3)], ids=str)
@pytest.mark.parametrize("overlap", [0, 3, 8])
def test_bands_join_to_a_picture_of_the_right_size(size, overlap):
    vae, tiling = tiny_vae(), Tiling(tile=16, overlap=overlap, statistics_crops=4)
    bands = list(decode_bands(vae, random_latents(*size).float(), tiling))
    assert len(bands) == len(tile_spans(size[0], 16, overlap))
    assert all(band.dtype == np.uint8 and band.flags.c_contiguous for band in bands)
    assert np.concatenate(bands).shape == (4 * size[0], 4 * size[1], 3)


def test_a_band_is_handed_out_as_soon_as_its_tiles_are_done():
    done = []
    bands = decode_bands(
        tiny_vae(), random_latents(40, 28).float(), TINY, lambda *progress: done.append(progress)
    )
    assert not done
    for number, _ in enumerate(bands, start=1):
        assert done == [(n, 6) for n in range(1, 2 * number + 1)]
    assert number == 3


def test_the_same_latents_give_the_same_picture_whatever_random_numbers_are_drawn():
    vae, latents = tiny_vae(), random_latents(40, 28).float()
    first = decode(vae, latents, TINY)
    torch.randn(7)
    state = torch.get_rng_state()
    assert np.array_equal(decode(vae, latents, TINY), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_latents_may_have_another_dtype_than_the_vae():
    vae, latents = tiny_vae(), random_latents(20, 20)
    expected = decode(vae, latents.float(), TINY).astype(int)
    # Scaled in float64 they may round to the next level.
    difference = np.abs(decode(vae, latents, TINY) - expected)
    assert difference.max() <= 1 and difference.mean() < 1e-3
    half = decode(vae, latents.half(), TINY).astype(int)
    assert np.abs(half - expected).max() <= 2
    brain = decode(copy.deepcopy(vae).bfloat16(), latents.float(), TINY).astype(int)
    assert 0 < np.abs(brain - expected).mean() < 2


def test_an_image_may_be_bytes_or_numbers():
    vae = tiny_vae()
    image = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    numbers = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 127.5 - 1
    latents = encode_tiled(vae, image, TINY)
    assert latents.shape == (1, 4, 20, 30) and latents.dtype == torch.float32
    torch.testing.assert_close(encode_tiled(vae, numbers, TINY), latents, rtol=1e-4, atol=1e-5)


def test_encoding_tells_of_its_progress():
    done = []
    image = np.zeros((160, 112, 3), np.uint8)
    encode_tiled(tiny_vae(), image, TINY, lambda *progress: done.append(progress))
    assert done == [(n, 6) for n in range(1, 7)]


def test_what_does_not_fit_is_refused():
    vae = tiny_vae()
    with pytest.raises(ValueError, match=r"expected latents \[1, 4, h, w\], got \[2, 4, 8, 8\]"):
        decode_bands(vae, torch.zeros(2, 4, 8, 8), None)
    with pytest.raises(ValueError, match=r"got \[1, 16, 8, 8\]"):
        decode_bands(vae, torch.zeros(1, 16, 8, 8), None)
    with pytest.raises(TypeError, match="expected an AutoencoderKL, got AutoencoderTiny"):
        decode_bands(AutoencoderTiny(), torch.zeros(1, 4, 8, 8), None)
    with pytest.raises(ValueError, match="multiples of 4 pixels, got 30 x 32"):
        encode_tiled(vae, np.zeros((30, 32, 3), np.uint8), None)
    for image in (
        np.zeros((32, 32, 3), int),
        np.zeros((3, 32, 32), np.uint8),
        torch.zeros(3, 8, 8),
    ):
        with pytest.raises(ValueError, match=r"expected a picture of uint8 \[h, w, 3\] or"):
            encode_tiled(vae, image, None)


def test_an_overflowing_vae_is_named_instead_of_drawing_black():
    vae = tiny_vae()
    vae.decoder.conv_out.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match="overflows in float32: use bfloat16 or float32"):
        decode(vae, random_latents(8, 8), None)


# ---- what is left behind


@pytest.mark.parametrize("tiling", [None, TINY], ids=["whole", "tiles"])
def test_nothing_is_left_on_the_vae_between_bands(tiling):
    vae = vae_of(8, 8, mid_block_add_attention=True)
    vae.enable_tiling()
    before = snapshot(vae)
    for _ in decode_bands(vae, random_latents(40, 28), tiling):
        assert snapshot(vae) == before
    encode_tiled(vae, np.zeros((80, 56, 3), np.uint8), tiling)
    assert snapshot(vae) == before and vae.use_tiling


@pytest.mark.parametrize("call", range(5))
def test_nothing_is_left_on_the_vae_after_an_error(call, monkeypatch):
    vae = vae_of(8, 8, mid_block_add_attention=True)
    calls, own = [], vae.decoder.conv_out.forward

    def fail(x):
        calls.append(x)
        if len(calls) > call:  # in the first pass, then in tiles
            raise MemoryError("out of memory")
        return own(x)

    monkeypatch.setattr(vae.decoder.conv_out, "forward", fail)
    before = snapshot(vae)
    with pytest.raises(MemoryError):
        decode(vae, random_latents(40, 28), TINY)
    assert snapshot(vae) == before


def test_the_vae_does_not_tile_or_slice_inside_a_tile():
    vae, latents = tiny_vae(), random_latents(40, 28).float()
    expected = decode(vae, latents, TINY)
    vae.enable_tiling()
    vae.enable_slicing()
    vae.tile_latent_min_size = 4
    assert np.array_equal(decode(vae, latents, TINY), expected)


def test_a_vae_that_overflows_in_float16_is_in_float32_while_it_works(monkeypatch):
    vae = vae_of(8, 8, force_upcast=True).half()
    seen, own = [], vae.decode

    def spy(z, **options):
        seen.append(z.dtype)
        return own(z, **options)

    monkeypatch.setattr(vae, "decode", spy)
    for _ in decode_bands(vae, random_latents(40, 28), TINY):
        assert vae.dtype == torch.float16
    assert set(seen) == {torch.float32}


def test_no_gradients_are_kept_and_the_callers_mode_stays():
    vae, latents = tiny_vae(), random_latents(40, 28).float().requires_grad_()
    for _ in decode_bands(vae, latents, TINY):
        assert torch.is_grad_enabled()
    assert not encode_tiled(vae, np.zeros((80, 56, 3), np.uint8), TINY).requires_grad
    with torch.inference_mode():
        decode(vae, latents, TINY)


def test_a_hook_on_a_layer_is_refused_before_a_tile_is_computed():
    vae = tiny_vae()
    vae.decoder.conv_norm_out.forward = vae.decoder.conv_norm_out.forward
    before = snapshot(vae)
    with pytest.raises(ValueError, match="conv_norm_out: expected a layer whose forward is its"):
        decode(vae, random_latents(40, 28), TINY)
    assert snapshot(vae) == before
    decode(vae, random_latents(40, 28), None)


@pytest.mark.parametrize("tile", [16, 24, 40])
def test_statistics_need_no_more_memory_than_a_tile(tile, monkeypatch):
    vae, seen = tiny_vae(), []
    own = vae.decode

    def spy(z, **options):
        seen.append(z.shape)
        return own(z, **options)

    monkeypatch.setattr(vae, "decode", spy)
    decode(vae, random_latents(90, 70), Tiling(tile, 4, statistics_crops=30))
    crops = [shape for shape in seen if shape[-1] == 8]
    sides = [tile_spans(side, tile, 4)[0][1] for side in (90, 70)]
    tiles = [shape for shape in seen if list(shape[2:]) == sides]
    assert len(crops) + len(tiles) == len(seen) and tiles
    assert 25 <= sum(shape[0] for shape in crops) <= 30
    assert all(math.prod(shape[2:]) * shape[0] <= 0.75 * tile**2 for shape in crops)
    assert all(shape[0] == 1 for shape in tiles)


# ---- statistics


def measured(norm: nn.GroupNorm, *batches: torch.Tensor):
    """The outputs for these batches while measuring, and the norm's settled statistics."""
    statistics = decoding._Statistics()
    holder = nn.Sequential(norm)
    with decoding._shared_by_all_norms(holder, statistics), torch.no_grad():
        outputs = [holder(batch) for batch in batches]
    statistics.settle()
    return outputs, statistics


def test_a_batch_is_normalised_as_if_its_samples_were_parts_of_one_picture():
    norm = nn.GroupNorm(4, 8).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    batch = (
        torch.randn(3, 8, 5, 7, dtype=torch.float64)
        * torch.tensor([1.0, 5, 9])[:, None, None, None]
    )
    (output,), statistics = measured(norm, batch)
    expected = norm(torch.cat(list(batch), dim=1)[None])[0]
    torch.testing.assert_close(torch.cat(list(output), dim=1), expected)
    with decoding._shared_by_all_norms(nn.Sequential(norm), statistics):
        torch.testing.assert_close(norm(batch[1:2]), output[1:2])


def test_statistics_of_several_batches_are_those_of_their_union():
    norm, batches = nn.GroupNorm(4, 8).double(), torch.randn(2, 3, 8, 5, 7, dtype=torch.float64)
    batches[0] += 3
    _, separate = measured(norm, *batches)
    _, together = measured(norm, batches.flatten(0, 1))
    for got, expected in zip(separate.settled["0"], together.settled["0"], strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_sound_where_the_mean_is_far_from_zero(dtype):
    x = torch.randn(4, 8, 32, 32, dtype=torch.float64) + 1000 * torch.arange(4)[:, None, None, None]
    x = x.to(dtype)
    _, statistics = measured(nn.GroupNorm(4, 8).to(dtype), x)
    mean, variance = statistics.settled["0"]
    groups = x.double().unflatten(1, (4, 2)).transpose(0, 1).flatten(1)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), groups.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), groups.var(1, correction=0), rtol=1e-5, atol=0)


def test_attention_in_a_batch_of_crops_reaches_all_of_them():
    torch.manual_seed(0)
    attention = Attention(8, heads=1, dim_head=8, norm_num_groups=4, residual_connection=True)
    crops = torch.randn(3, 8, 4, 5)
    with torch.no_grad():
        expected = attention(torch.cat(list(crops), dim=1)[None])
        statistics = decoding._Statistics()
        holder = nn.Sequential(attention)
        with (
            decoding._shared_by_all_norms(holder, statistics),
            decoding._crops_of_a_whole(holder),
        ):
            got = holder(crops)
    torch.testing.assert_close(torch.cat(list(got), dim=1)[None], expected)
    assert type(attention) is Attention


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_crops_have_no_edges_that_statistics_could_see(part):
    vae = vae_of(8, 8, 8, mid_block_add_attention=True)
    module = getattr(vae, part)
    flat = torch.randn(1, 3 if part == "encoder" else 4, 1, 1, dtype=torch.float64)
    flat = flat.expand(2, -1, 16, 16)
    with torch.no_grad():
        assert module(flat).std(dim=(2, 3)).max() > 1e-3
        with decoding._crops_of_a_whole(module):
            assert module(flat).std(dim=(2, 3)).max() < 1e-9


def test_every_normalisation_of_a_vae_with_attention_takes_shared_statistics():
    vae = vae_of(8, 8, mid_block_add_attention=True)
    for part in (vae.encoder, vae.decoder):
        norms = [name for name, module in part.named_modules() if isinstance(module, nn.GroupNorm)]
        assert any("attentions" in name for name in norms)
        job = decoding._Job(vae, part, random_latents(40, 40), lambda x: x, 3, 1, 1)
        statistics = decoding._Statistics()
        with job._ready(statistics), torch.no_grad():
            part(torch.randn(2, 3 if part is vae.encoder else 4, 16, 16, dtype=torch.float64))
        assert set(statistics.measured) == set(norms)


def test_crops_lie_all_over_the_picture_and_inside_it():
    for size in ((40, 90), (8, 8), (300, 9), (128, 128)):
        corners = decoding._spread(size, 8, 64)
        assert len(set(corners)) == len(corners) <= 64
        for axis, length in enumerate(size):
            firsts = sorted({corner[axis] for corner in corners})
            assert 0 <= firsts[0] and firsts[-1] + 8 <= length
            gaps = np.diff([-8 - firsts[0], *firsts, 2 * length - 8 - firsts[-1]])
            assert gaps.max() <= gaps.min() + 2, (size, firsts)


# ---- a trained VAE


@pytest.fixture(scope="module")
def trained() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(shipped_folder("pipeline") / "vae").eval()


@pytest.fixture(scope="module")
def scene(trained) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """A picture of 512 x 768 pixels, its latents, and the picture that they give at once."""
    pixels = render(sample_scenes(1, seed=3), (512, 768), supersample=1)[0]
    picture = pixels.mul(255).round().byte().permute(1, 2, 0).numpy()
    latents = encode_tiled(trained, picture, None)
    return picture, latents, decode(trained, latents, None)


def seams(difference: np.ndarray) -> float:
    """How much a difference of pictures changes across the blended zones, which are 32 wide."""
    lines = []
    for side in difference.shape[:2]:
        spans = tile_spans(side // 8, SMALL.tile, SMALL.overlap)
        lines.append([4 * (a[1] + b[0]) for a, b in zip(spans, spans[1:], strict=False)])
    return seam_metric(difference, *lines, width=32)


def test_tiles_show_no_seams_and_no_other_colours(trained, scene, monkeypatch):
    _, latents, whole = scene
    difference = decode(trained, latents, SMALL).astype(int) - whole
    with_statistics_of_each_tile(monkeypatch)
    with_own = decode(trained, latents, SMALL).astype(int) - whole
    assert np.abs(difference).mean() < 1 and np.abs(with_own).mean() > 5
    assert np.abs(difference.mean((0, 1))).max() < 1.1 and np.abs(with_own.mean((0, 1))).max() > 4
    assert seams(difference) < 1.3 and seams(with_own) > 1.6


def test_the_vaes_own_tiling_is_many_times_further_from_the_whole_picture(trained, scene):
    _, latents, whole = scene
    vae = copy.deepcopy(trained)
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = SMALL.tile, 8 * SMALL.tile
    with torch.no_grad():
        tiled = vae.decode(latents / vae.config.scaling_factor).sample[0].permute(1, 2, 0)
    tiled = ((tiled / 2 + 0.5).clamp(0, 1) * 255).numpy()
    error = np.abs(decode(trained, latents, SMALL).astype(int) - whole).mean()
    assert np.abs(tiled - whole).mean() > 8 * error


def test_tiles_encode_like_the_whole_picture(trained, scene, monkeypatch):
    picture, latents, _ = scene
    error = (encode_tiled(trained, picture, SMALL) - latents).abs().mean() / latents.std()
    with_statistics_of_each_tile(monkeypatch)
    with_own = (encode_tiled(trained, picture, SMALL) - latents).abs().mean() / latents.std()
    assert error < 0.07 and with_own > 3 * error


def test_with_statistics_of_everything_a_trained_vae_shows_no_tiles(trained, scene, monkeypatch):
    _, latents, whole = scene
    with_statistics_of_everything(monkeypatch)
    difference = np.abs(decode(trained, latents, SMALL).astype(int) - whole)
    assert difference.mean() < 0.1 and difference.max() <= 6


# ---- the metric


def test_the_metric_is_one_without_a_seam_and_large_on_one():
    noise = np.random.default_rng(0).normal(100, 20, (200, 200, 3))
    assert seam_metric(noise, [100], [60, 120]) == pytest.approx(1, abs=0.1)
    assert seam_metric(noise, [100], [60, 120], width=8) == pytest.approx(1, abs=0.2)
    step = noise.copy()
    step[100:] += 60
    assert seam_metric(step, [100]) > 2
    assert seam_metric(step, [], [100]) == pytest.approx(1, abs=0.1)


def test_a_blended_seam_shows_at_the_width_of_the_blending_only():
    noise = np.random.default_rng(0).normal(100, 5, (200, 40, 3))
    blended = noise + np.clip(np.arange(-100, 100) / 16 + 0.5, 0, 1)[:, None, None] * 20
    assert seam_metric(blended, [100]) < 1.1
    assert seam_metric(blended, [100], width=16) > 5


def test_the_metric_is_a_ratio_of_mean_changes():
    picture = np.zeros((20, 1, 1))
    picture[:, 0, 0] = np.cumsum([0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 7, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    assert seam_metric(picture, [10]) == pytest.approx(7)


def test_a_line_too_near_the_border_is_refused():
    with pytest.raises(
        ValueError, match="expected a line with 12 pixels on both sides of it, got 2"
    ):
        seam_metric(np.zeros((50, 50, 3)), [2], width=4)
    with pytest.raises(ValueError, match="expected rows or columns, got none"):
        seam_metric(np.zeros((50, 50, 3)))
