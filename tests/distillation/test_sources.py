"""Every source gives the same items however its ranges are cut, and skips what it cannot read."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import fsspec
import pytest
import torch
from PIL import Image

from gspn2_diffusers.distillation.sources import (
    Example,
    HubDataset,
    ImageFolder,
    Limited,
    SelfGenerated,
    Skipped,
    TinyScenes,
    WebDatasetShards,
    expand_braces,
)

CPU = torch.device("cpu")


def picture(colour: str = "red", format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(file, format)
    return file.getvalue()


def image_folder(folder: Path, captions: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / "metadata.jsonl").open("w") as lines:
        for name, caption in captions.items():
            (folder / name).write_bytes(picture())
            lines.write(json.dumps({"file_name": name, "text": caption}) + "\n")
    return folder


def read(source, begin: int = 0, end: int = 100) -> list[Example | Skipped]:
    return list(source.read(begin, end, CPU))


def captions(items: list[Example | Skipped]) -> list[str]:
    return [item.caption if isinstance(item, Example) else item.reason for item in items]


def test_image_folder_pairs_files_with_captions(tmp_path):
    folder = image_folder(tmp_path, {"a.png": "one", "b.png": ["two", "other"], "c.png": None})
    source = ImageFolder(folder)
    assert source.length == 3
    assert captions(read(source)) == ["one", "two", "no caption"]
    assert captions(read(source, 1, 2)) == ["two"]
    assert read(source)[0].open().size == (12, 8)


def test_missing_and_corrupt_files_are_skipped_not_fatal(tmp_path):
    folder = image_folder(tmp_path, {"a.png": "", "b.png": "", "c.png": ""})
    (folder / "a.png").unlink()
    (folder / "b.png").write_bytes(b"no image")
    whole = (folder / "c.png").read_bytes()
    (folder / "c.png").write_bytes(whole[: len(whole) - 30])
    reasons = [item.open().reason for item in read(ImageFolder(folder))]
    assert reasons[:2] == ["missing file", "unreadable image (UnidentifiedImageError)"]
    assert reasons[2].startswith("unreadable image")


def test_metadata_below_the_folder_is_relative_to_itself(tmp_path):
    image_folder(tmp_path / "inner", {"a.png": "one"})
    (item,) = read(ImageFolder(tmp_path))
    assert item.open().size == (12, 8)


def test_folder_without_metadata_needs_the_wish_for_empty_captions(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    with pytest.raises(ValueError, match="metadata.jsonl"):
        read(ImageFolder(tmp_path))
    assert captions(read(ImageFolder(tmp_path, caption_column=None))) == [""]


def test_image_folder_names_columns_that_exist(tmp_path):
    image_folder(tmp_path, {"a.png": "one"})
    with pytest.raises(ValueError, match=r"'caption'.*file_name.*text"):
        read(ImageFolder(tmp_path, "caption"))


def test_broken_metadata_line_is_named(tmp_path):
    image_folder(tmp_path, {"a.png": "one"})
    with (tmp_path / "metadata.jsonl").open("a") as lines:
        lines.write("{oops\n")
    with pytest.raises(ValueError, match="line 2"):
        read(ImageFolder(tmp_path))


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_empty_folders_are_refused(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected"):
        read(ImageFolder(tmp_path / path, caption_column=None))


def test_description_changes_with_captions_and_files(tmp_path):
    folder = image_folder(tmp_path, {"a.png": "one"})
    first = ImageFolder(folder).describe()
    assert ImageFolder(folder).describe() == first
    os.utime(folder / "a.png", (1, 1))
    touched = ImageFolder(folder).describe()
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace("one", "two"))
    retold = ImageFolder(folder).describe()
    assert first != touched != retold
    json.dumps(retold)


def parquet(folder: Path, rows: dict[str, list]) -> Path:
    datasets = pytest.importorskip("datasets")
    columns = datasets.Features(
        {"image": datasets.Image(), **{n: datasets.Value("string") for n in rows if n != "image"}}
    )
    if isinstance(rows["text"][0], list):
        columns["text"] = datasets.List(datasets.Value("string"))
    folder.mkdir()
    table = datasets.Dataset.from_dict(rows, features=columns)
    table.to_parquet(folder / "train-00000.parquet")
    return folder


@pytest.fixture
def dataset_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "dataset-cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_folder_is_read_undecoded_in_ranges(tmp_path, dataset_cache, streaming):
    images = [{"bytes": data, "path": None} for data in (picture(), b"broken", picture("blue"))]
    rows = {"image": [*images, None], "text": ["a", "b", None, "d"]}
    source = HubDataset(str(parquet(tmp_path / "data", rows)), streaming=streaming)
    assert source.length == (None if streaming else 4)
    assert captions(read(source)) == ["a", "b", "no caption", "no image"]
    assert captions(read(source, 1, 3)) == ["b", "no caption"]
    assert captions(read(source, 3, 9)) == ["no image"]
    assert read(source, 9, 12) == []
    first, second = read(source, 0, 2)
    assert first.open().size == (12, 8)
    assert second.open().reason == "unreadable image (UnidentifiedImageError)"


def test_first_of_several_captions_is_taken(tmp_path, dataset_cache):
    rows = {"image": [{"bytes": picture(), "path": None}] * 2, "text": [["a", "b"], []]}
    source = HubDataset(str(parquet(tmp_path / "data", rows)))
    assert captions(read(source)) == ["a", "no caption"]
    assert captions(read(HubDataset(source.name_or_path, caption_column=None))) == ["", ""]


@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_names_columns_and_splits_that_exist(tmp_path, dataset_cache, streaming):
    rows = {"image": [{"bytes": picture(), "path": None}], "text": ["a"]}
    folder = str(parquet(tmp_path / "data", rows))
    with pytest.raises(ValueError, match=r"\['caption'\].*'image', 'text'"):
        read(HubDataset(folder, caption_column="caption", streaming=streaming))
    with pytest.raises(ValueError, match="train"):
        read(HubDataset(folder, split="validation", streaming=streaming))


def test_dataset_description_changes_with_its_files(tmp_path, dataset_cache):
    rows = {"image": [{"bytes": picture(), "path": None}], "text": ["a"]}
    folder = parquet(tmp_path / "data", rows)
    before = HubDataset(str(folder)).describe()
    os.utime(folder / "train-00000.parquet", (1, 1))
    assert HubDataset(str(folder)).describe() != before


def test_missing_datasets_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install gspn2-diffusers\[training\]"):
        read(HubDataset("owner/name"))


def tar(path: Path, files: dict[str, bytes]) -> Path:
    path.write_bytes(tar_bytes(files))
    return path


def tar_bytes(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def shards(folder: Path) -> WebDatasetShards:
    tar(folder / "a-000.tar", {"1.png": picture(), "1.txt": b"one\n", "2.jpg": b"broken",
                               "2.json": b'{"caption": ["two", "deux"]}'})  # fmt: skip
    tar(folder / "a-001.tar", {"x/1.txt": b"three", "x/1.webp": picture("blue", "WEBP"),
                               "x/2.txt": b"alone", "x/3.png": picture(),
                               "x/4.png": picture(), "x/4.json": b"{oops"})  # fmt: skip
    return WebDatasetShards(str(folder / "a-{000..001}.tar"))


def test_shards_pair_pictures_with_text_in_ranges(tmp_path):
    source = shards(tmp_path)
    expected = ["one", "two", "three", "no image", "no caption", "no caption"]
    assert captions(read(source)) == expected
    items = read(source, 0, 3)
    assert items[2].open().size == (12, 8)
    assert items[1].open().reason == "unreadable image (UnidentifiedImageError)"
    for begin, end in [(0, 2), (2, 4), (5, 7), (1, 3), (0, 6)]:
        assert captions(read(source, begin, end)) == expected[begin:end]
    assert source.describe()["shards"] == 2
    assert captions(read(WebDatasetShards(str(tmp_path)))) == expected


def test_damaged_and_missing_shards_cost_only_themselves(tmp_path):
    source = shards(tmp_path)
    whole = (tmp_path / "a-000.tar").read_bytes()
    (tmp_path / "a-000.tar").write_bytes(whole[:600])
    (tmp_path / "a-002.tar").write_bytes(b"no archive at all" * 99)
    source = WebDatasetShards(str(tmp_path / "a-{000..003}.tar"))
    found = captions(read(source))
    assert found.count("damaged or compressed archive") == 2
    assert "three" in found and found[-1] == "missing file"


def test_shards_are_read_from_urls():
    files = fsspec.filesystem("memory")
    files.pipe("/shards/0.tar", tar_bytes({"1.png": picture(), "1.txt": b"one"}))
    (item,) = read(WebDatasetShards("memory://shards/{0..0}.tar"))
    assert item.caption == "one" and item.open().size == (12, 8)


def test_pattern_without_files_is_named(tmp_path):
    with pytest.raises(ValueError, match="none-here"):
        read(WebDatasetShards(str(tmp_path / "none-here-*.tar")))
    with pytest.raises(ValueError, match="none-here"):
        read(WebDatasetShards(str(tmp_path / "none-here-{0..3}.tar")))


def test_braces_are_expanded():
    assert expand_braces("a{08..10}b") == ["a08b", "a09b", "a10b"]
    assert expand_braces("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def test_failing_stream_is_not_taken_for_its_end(tmp_path, monkeypatch):
    source = shards(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(fsspec, "open", lambda *_: (_ for _ in ()).throw(TimeoutError()))
        with pytest.raises(TimeoutError):
            read(source)
    assert captions(read(source, 0, 1)) == ["one"]


def test_tiny_scenes_do_not_depend_on_how_ranges_are_cut():
    source = TinyScenes(70, resolution=16)
    whole = read(source, 60, 70)
    parts = [item for begin in (60, 63, 66, 69) for item in read(source, begin, begin + 3)]
    assert captions(whole) == captions(parts) and len(whole) == 10
    for a, b in zip(whole, parts, strict=True):
        assert a.picture.shape == (3, 16, 16) and a.picture.dtype == torch.uint8
        assert (a.picture.int() - b.picture.int()).abs().max() <= 1
    assert len(set(captions(whole))) > 5
    assert captions(read(TinyScenes(70, 16, seed=1), 60, 70)) != captions(whole)


def test_prompts_get_seeds_of_their_own(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n", encoding="utf-8")
    source = SelfGenerated(tmp_path / "prompts.txt", images_per_prompt=2, seed=10)
    items = read(source)
    assert captions(items) == ["a cat", "a cat", "a dog", "a dog"]
    assert [item.seed for item in items] == [10, 11, 12, 13]
    assert all(item.picture is None for item in items) and source.generated
    before = source.describe()
    (tmp_path / "prompts.txt").write_text("a cat\na fox\n", encoding="utf-8")
    assert SelfGenerated(source.prompts_file, 2, seed=10).describe() != before


def test_file_without_prompts_is_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompts\.txt"):
        read(SelfGenerated(tmp_path / "prompts.txt"))


def test_limit_holds_for_folders_and_streams(tmp_path):
    limited = Limited(shards(tmp_path), 2)
    assert limited.length is None
    assert captions(read(limited)) == ["one", "two"]
    assert captions(read(limited, 1, 5)) == ["two"]
    assert read(limited, 2, 4) == []
    assert Limited(TinyScenes(9), 4).length == 4
    assert Limited(TinyScenes(9), 40).length == 9
    assert Limited(TinyScenes(9), 4).describe() != Limited(TinyScenes(9), 5).describe()
    with pytest.raises(ValueError, match="count"):
        Limited(TinyScenes(9), 0)
