"""A cache holds every row once, resumes, finds itself again and says what is broken."""

from __future__ import annotations

import json
import pickle
import threading
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gspn2_diffusers.distillation import cache as cache_module
from gspn2_diffusers.distillation.buckets import make_buckets
from gspn2_diffusers.distillation.cache import LatentCache, build_cache
from gspn2_diffusers.distillation.sources import (
    Example,
    ImageFolder,
    Limited,
    SelfGenerated,
    Skipped,
)

BUCKETS = make_buckets(32, 8)
LENGTH = 12


@dataclass
class FakeEncoder:
    """Latents are pooled pixels, a caption is its characters; counts the images it encodes."""

    name: str = "fake"
    masked: bool = True
    dtype: torch.dtype = torch.float32
    fail_after: int | None = None
    encoded: list[int] = field(default_factory=list)

    device = torch.device("cpu")

    def describe(self) -> dict:
        return {"name": self.name}

    def describe_generation(self) -> dict:
        return {"steps": 3}

    def encode_images(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        if self.fail_after is not None and sum(self.encoded) >= self.fail_after:
            raise RuntimeError("killed")
        self.encoded.append(len(images))
        return F.avg_pool2d(images.to(self.dtype), 8) / 255

    def encode_prompts(self, captions) -> dict[str, Tensor]:
        codes = torch.zeros(len(captions), LENGTH, dtype=torch.long)
        for row, caption in zip(codes, captions, strict=True):
            row[: len(caption)] = torch.tensor([ord(c) for c in caption])
        embeds = torch.stack([codes, codes + 1], dim=-1).to(self.dtype)
        return {"prompt_embeds": embeds, **({"prompt_mask": codes > 0} if self.masked else {})}

    def encode_unconditional(self) -> dict[str, Tensor]:
        return self.encode_prompts([""])

    def generate(self, captions, seeds, height, width) -> Tensor:
        noise = [torch.randn(4, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(noise)[:, :, None, None].expand(-1, -1, height // 8, width // 8)


@dataclass(frozen=True)
class Numbers:
    """Grey pictures of shade i in turn upright, square and wide; every seventh is skipped."""

    count: int
    known: bool = True

    generated = False

    @property
    def length(self) -> int | None:
        return self.count if self.known else None

    def describe(self) -> dict:
        return {"count": self.count, "known": self.known}

    def read(self, begin, end, device):
        for i in range(begin, min(end, self.count)):
            shape = ((3, 48, 32), (3, 32, 32), (3, 32, 48))[i % 3]
            pixels = torch.full(shape, i, dtype=torch.uint8)
            yield Skipped(f"item {i}", "seventh") if i % 7 == 6 else Example("", f"{i}", pixels)


def all_rows(cache: LatentCache) -> list[tuple[str, int]]:
    """(caption, shade) of every row in order."""
    found = {}
    for rows in cache.buckets.values():
        columns = cache.rows(rows)
        shades = (columns["latents"][:, 0, 0, 0].float() * 255).round().int().tolist()
        for number, embeds, shade in zip(
            rows.tolist(), columns["prompt_embeds"], shades, strict=True
        ):
            codes = embeds[:, 0].int().tolist()
            found[number] = "".join(chr(code) for code in codes if code), shade
    return [found[number] for number in range(len(cache))]


def files(cache: LatentCache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.folder.iterdir()}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("count", [1, 8, 20])
def test_every_readable_item_is_there_once_with_its_caption(tmp_path, count, known):
    cache = build_cache(tmp_path, Numbers(count, known), FakeEncoder(), BUCKETS, shard_size=4)
    rows = all_rows(cache)
    assert all(caption == str(shade) for caption, shade in rows)
    assert sorted(shade for _, shade in rows) == [i for i in range(count) if i % 7 != 6]
    assert cache.totals["items"] == count
    assert sum(cache.totals["rows_by_bucket"].values()) == len(cache) == len(rows)


def test_rows_have_the_documented_columns(tmp_path):
    cache = build_cache(tmp_path, Numbers(9), FakeEncoder(), BUCKETS, batch_size=2)
    assert set(cache.buckets) == {(5, 3), (4, 4), (3, 5)}
    columns = cache.rows(cache.buckets[5, 3])
    assert columns["latents"].shape == (2, 3, 5, 3) and columns["latents"].dtype == torch.float16
    assert columns["prompt_embeds"].shape == (2, LENGTH, 2)
    assert columns["sizes"].tolist() == [[48, 32, 0, 1, 40, 24]] * 2
    assert cache.totals["skipped"] == {"seventh": {"count": 1, "first": ["item 6"]}}


def test_bfloat16_of_the_encoder_is_kept(tmp_path):
    cache = build_cache(tmp_path, Numbers(3), FakeEncoder(dtype=torch.bfloat16), BUCKETS)
    assert cache.rows([0])["latents"].dtype == torch.bfloat16


def test_trimmed_text_comes_back_padded_with_zeros(tmp_path):
    cache = build_cache(tmp_path, Numbers(120), FakeEncoder(), [(32, 32)], shard_size=8)
    stored = {len(shard["prompt_mask"][0]) for shard in cache._shards}
    assert stored == {1, 2, 3}
    rows = cache.rows([0, 20, len(cache) - 1])
    assert rows["prompt_embeds"].shape == (3, LENGTH, 2)
    assert rows["prompt_mask"].sum(1).tolist() == [1, 2, 3]
    # the encoder gives 1 in the second channel of padding, which nothing may depend on
    assert not rows["prompt_embeds"][~rows["prompt_mask"]].any()


def test_text_without_mask_is_kept_whole(tmp_path):
    cache = build_cache(tmp_path, Numbers(3), FakeEncoder(masked=False), BUCKETS)
    assert cache.rows([0])["prompt_embeds"][0, -1].tolist() == [0, 1]
    assert cache.unconditional["prompt_embeds"].shape == (1, LENGTH, 2)


def test_unconditional_is_as_long_as_the_rows(tmp_path):
    cache = build_cache(tmp_path, Numbers(3), FakeEncoder(), BUCKETS)
    assert cache.unconditional["prompt_embeds"].shape == (1, LENGTH, 2)
    assert not cache.unconditional["prompt_mask"].any()


def test_finished_cache_is_found_and_nothing_is_written(tmp_path):
    first = build_cache(tmp_path, Numbers(20), FakeEncoder(), BUCKETS, shard_size=4)
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    encoder = FakeEncoder()
    again = build_cache(tmp_path, Numbers(20), encoder, BUCKETS, shard_size=4)
    assert again.folder == first.folder and not encoder.encoded
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == times


@pytest.mark.parametrize("known", [True, False])
def test_interrupted_build_goes_on_after_the_last_complete_range(tmp_path, known):
    source = Numbers(20, known)
    expected = files(build_cache(tmp_path / "a", source, FakeEncoder(), BUCKETS, shard_size=4))
    broken = FakeEncoder(fail_after=9)
    with pytest.raises(RuntimeError, match="killed"):
        build_cache(tmp_path / "b", source, broken, BUCKETS, shard_size=4)
    (folder,) = (tmp_path / "b").iterdir()
    with pytest.raises(ValueError, match="unfinished"):
        LatentCache(folder)
    (folder / ".000003.json.1.tmp").write_text("left behind")
    encoder = FakeEncoder()
    cache = build_cache(tmp_path / "b", source, encoder, BUCKETS, shard_size=4)
    assert files(cache) == expected
    assert sum(encoder.encoded) == 18 - 7  # items 0 to 7 without item 6 were done


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("count", [7, 8, 30])
def test_two_processes_write_what_one_does(tmp_path, count, known):
    source = Numbers(count, known)
    expected = build_cache(tmp_path / "one", source, FakeEncoder(), BUCKETS, shard_size=4)
    barrier, caches, encoders = threading.Barrier(2, timeout=30), {}, [FakeEncoder(), FakeEncoder()]

    def process(index: int) -> None:
        caches[index] = build_cache(
            tmp_path / "two", source, encoders[index], BUCKETS, shard_size=4,
            process_index=index, process_count=2, wait=barrier.wait,
        )  # fmt: skip

    threads = [threading.Thread(target=process, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all_rows(caches[0]) == all_rows(caches[1]) == all_rows(expected)
    assert min(sum(encoder.encoded) for encoder in encoders) > 1


def test_range_that_no_process_made_is_named(tmp_path):
    with pytest.raises(ValueError, match="range 1"):
        build_cache(tmp_path, Numbers(9), FakeEncoder(), BUCKETS, shard_size=4, process_count=2)


def pictures(folder, captions: list[str]) -> ImageFolder:
    folder.mkdir(exist_ok=True)
    lines = []
    for i, caption in enumerate(captions):
        if not (folder / f"{i}.png").exists():
            Image.new("RGB", (64, 40), (i, i, i)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return ImageFolder(folder)


def test_key_changes_with_caption_image_encoder_and_buckets(tmp_path):
    def folder_of(source, encoder=None, buckets=BUCKETS):
        return build_cache(tmp_path / "cache", source, encoder or FakeEncoder(), buckets).folder

    source = pictures(tmp_path / "images", ["0", "1"])
    keys = [folder_of(source), folder_of(source, FakeEncoder("other"))]
    keys += [folder_of(source, buckets=[(32, 32)]), folder_of(Limited(source, 1))]
    keys += [folder_of(pictures(tmp_path / "images", ["0", "2"]))]
    (tmp_path / "images" / "0.png").unlink()
    keys += [folder_of(pictures(tmp_path / "images", ["0", "2"]))]
    assert len(set(keys)) == 6
    assert folder_of(ImageFolder(tmp_path / "images")) == keys[-1]
    assert len(keys[0].name) == 16


def test_unreadable_images_are_counted_and_named(tmp_path):
    source = pictures(tmp_path / "images", [str(i) for i in range(5)])
    (tmp_path / "images" / "1.png").write_bytes(b"broken")
    (tmp_path / "images" / "3.png").unlink()
    cache = build_cache(tmp_path / "cache", source, FakeEncoder(), BUCKETS)
    assert [caption for caption, _ in all_rows(cache)] == ["0", "2", "4"]
    skipped = cache.totals["skipped"]
    assert skipped["missing file"] == {"count": 1, "first": ["3.png"]}
    assert skipped["unreadable image (UnidentifiedImageError)"]["first"] == ["1.png"]
    assert cache.rows([0])["sizes"].tolist() == [[40, 64, 0, 0, 24, 40]]


def test_nothing_readable_says_what_was_tried(tmp_path):
    source = pictures(tmp_path / "images", ["a"])
    (tmp_path / "images" / "0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"image folder.*UnidentifiedImageError.*0\.png"):
        build_cache(tmp_path / "cache", source, FakeEncoder(), BUCKETS)


@pytest.mark.parametrize("name", ["000001-4x4.safetensors", "unconditional.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone", "other rows"])
def test_damaged_shard_is_named_and_made_anew_once_deleted(tmp_path, name, damage):
    cache = build_cache(tmp_path, Numbers(9), FakeEncoder(), BUCKETS, shard_size=4)
    expected = all_rows(cache)
    path = cache.folder / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "other rows":
        cache_module.save_file({"latents": torch.zeros(5, 2)}, path)
    else:
        path.unlink()
    with pytest.raises(ValueError, match=name):
        LatentCache(cache.folder)
    path.unlink(missing_ok=True)
    encoder = FakeEncoder()
    again = build_cache(tmp_path, Numbers(9), encoder, BUCKETS, shard_size=4)
    assert all_rows(again) == expected
    assert sum(encoder.encoded) < 5


def test_folder_without_cache_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cache\.json"):
        LatentCache(tmp_path)


def test_rows_of_several_buckets_and_out_of_range_are_refused(tmp_path):
    cache = build_cache(tmp_path, Numbers(9), FakeEncoder(), BUCKETS)
    mixed = [rows[0].item() for rows in cache.buckets.values()]
    with pytest.raises(ValueError, match="one bucket"):
        cache.rows(mixed)
    for wrong in ([], [-1], [len(cache)]):
        with pytest.raises(ValueError, match="expected rows of"):
            cache.rows(wrong)


def test_rows_come_in_the_order_asked_for_across_shards(tmp_path):
    cache = build_cache(tmp_path, Numbers(60), FakeEncoder(), [(32, 32)], shard_size=8)
    order = torch.randperm(len(cache))
    latents = cache.rows(order)["latents"]
    assert torch.equal(latents, cache.rows(range(len(cache)))["latents"][order])
    assert torch.equal(cache.rows(order[:1])["latents"], latents[:1])


def test_held_out_rows_are_random_and_always_the_same(tmp_path):
    cache = build_cache(tmp_path, Numbers(60), FakeEncoder(), BUCKETS)
    held_out = cache.held_out_rows(10)
    assert len(set(held_out.tolist())) == 10
    assert torch.equal(held_out, LatentCache(cache.folder).held_out_rows(10))
    assert set(cache.held_out_rows(5).tolist()) <= set(held_out.tolist())
    assert held_out.tolist() != list(range(10))
    with pytest.raises(ValueError, match="hold out"):
        cache.held_out_rows(len(cache))


def test_worker_processes_map_the_files_anew(tmp_path):
    cache = build_cache(tmp_path, Numbers(60), FakeEncoder(), BUCKETS)
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    assert all_rows(pickle.loads(sent)) == all_rows(cache)


def test_teacher_draws_prompts_with_their_seeds_in_all_sizes(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    source = SelfGenerated(tmp_path / "prompts.txt", images_per_prompt=5, seed=3)
    encoder = FakeEncoder()
    cache = build_cache(tmp_path / "cache", source, encoder, BUCKETS, shard_size=4, batch_size=2)
    assert len(cache) == 10 and not encoder.encoded
    assert len(cache.buckets) == len(BUCKETS)
    found = torch.cat([cache.rows(r)["latents"][:, 0, 0, 0] for r in cache.buckets.values()])
    drawn = encoder.generate([""] * 10, range(3, 13), 8, 8)[:, 0, 0, 0].half()
    assert torch.equal(found.sort().values, drawn.sort().values)
    assert cache.description["generation"] == {"steps": 3}
    (height, width), rows = next(iter(cache.buckets.items()))
    size = [8 * height, 8 * width]
    assert cache.rows(rows)["sizes"][0].tolist() == [*size, 0, 0, *size]


def test_latents_that_are_not_finite_are_refused(tmp_path):
    encoder = FakeEncoder()
    encoder.encode_images = lambda images: torch.full((len(images), 4, 2, 2), torch.nan)
    with pytest.raises(ValueError, match="latents: expected finite"):
        build_cache(tmp_path, Numbers(3), encoder, BUCKETS)


def test_full_disk_names_the_file_and_leaves_no_half_of_it(tmp_path, monkeypatch):
    def full(columns, path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "save_file", full)
    with pytest.raises(OSError, match=r"could not write .*unconditional.*No space left") as caught:
        build_cache(tmp_path, Numbers(3), FakeEncoder(), BUCKETS)
    assert caught.value.errno == 28
    assert [path.name for path in next(tmp_path.iterdir()).iterdir()] == ["cache.json"]


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not create .*file"):
        build_cache(tmp_path / "file", Numbers(3), FakeEncoder(), BUCKETS)


def test_progress_reaches_the_total(tmp_path):
    seen = []
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    build_cache(tmp_path, Numbers(9), FakeEncoder(), BUCKETS, shard_size=4, progress=report)
    assert seen == [(4, 9), (8, 9), (9, 9)]


@pytest.mark.parametrize("option", ["shard_size", "batch_size", "workers"])
def test_options_below_one_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=option):
        build_cache(tmp_path, Numbers(3), FakeEncoder(), BUCKETS, **{option: 0})
    with pytest.raises(ValueError, match="buckets"):
        build_cache(tmp_path, Numbers(3), FakeEncoder(), [])
