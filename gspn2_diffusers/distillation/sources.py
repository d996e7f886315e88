"""Where training examples come from: folders, datasets, tar shards, renders, the teacher itself.

All sources give access to ranges of numbered items, so that a cache can be built in pieces and
by several processes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from glob import escape, glob
from itertools import groupby, product
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import fsspec
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, IterableDataset

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

_SCENES_PER_BLOCK = 64
_WORTH_COMPILING = 10_000  # scenes: compiling takes a minute and makes a GPU 25 times faster
_T = TypeVar("_T")


@dataclass(frozen=True)
class Example:
    """A caption with its picture.

    Args:
        name: says in messages which item of the source this is.
        caption: may be empty.
        picture: a file, a url, an encoded file's bytes, pixels uint8 ``[3, height, width]`` on
            the device, or None where the teacher is to draw it with `seed`.
        seed: for pictures that the teacher draws.
    """

    name: str
    caption: str
    picture: Path | str | bytes | Tensor | None
    seed: int = 0

    def open(self) -> Image.Image | Skipped:
        """Decode a file; a missing or corrupt one is skipped, a failing server raises."""
        try:
            data = _read_bytes(self.picture)
        except FileNotFoundError:
            return Skipped(self.name, "missing file")
        except OSError as error:
            if isinstance(self.picture, str):
                raise
            return Skipped(self.name, f"unreadable file ({error.strerror})")
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except Exception as error:  # Pillow's decoders raise almost anything on corrupt files
            return Skipped(self.name, f"unreadable image ({type(error).__name__})")
        return image


@dataclass(frozen=True)
class Skipped:
    """An item that cannot be used."""

    name: str
    reason: str


class Source(Protocol):
    """Numbered items."""

    @property
    def length(self) -> int | None:
        """Number of items; None for a stream that ends when it ends."""

    @property
    def generated(self) -> bool:
        """Whether the teacher draws the pictures."""

    def describe(self) -> dict[str, Any]:
        """Everything that the items depend on, as plain values for JSON."""

    def read(self, begin: int, end: int, device: torch.device) -> Iterator[Example | Skipped]:
        """One result for each of the items begin to end - 1; fewer only where the source ends.

        A range gives the same items however the others are cut. Reading ranges in ascending order
        is fast with every source. `device` is where sources that render do so.
        """


@dataclass(frozen=True)
class Limited:
    """The first `count` items of a source."""

    source: Source
    count: int

    def __post_init__(self) -> None:
        _check_at_least_one("count", self.count)

    @property
    def length(self) -> int | None:
        return None if self.source.length is None else min(self.count, self.source.length)

    @property
    def generated(self) -> bool:
        return self.source.generated

    def describe(self) -> dict[str, Any]:
        return {"source": "limited", "count": self.count, "of": self.source.describe()}

    def read(self, begin: int, end: int, device: torch.device) -> Iterator[Example | Skipped]:
        return self.source.read(begin, max(begin, min(end, self.count)), device)


@dataclass(frozen=True)
class ImageFolder:
    """Pictures below a folder, with captions in ``metadata.jsonl``: diffusers' convention.

    Args:
        path: the folder. Every line of a metadata.jsonl in it, or in folders below it, holds a
            ``file_name`` relative to the metadata file.
        caption_column: key of the caption in these lines; None takes all pictures in the folder,
            with empty captions.

    Raises ValueError, when used, where there is no picture, no metadata or no such column.
    """

    path: str | Path
    caption_column: str | None = "text"

    generated = False

    @property
    def length(self) -> int:
        return len(self._entries)

    def describe(self) -> dict[str, Any]:
        files = [file for file, _ in self._entries]
        captions = [caption for _, caption in self._entries]
        return {
            "source": "image folder",
            "caption_column": self.caption_column,
            "items": self.length,
            "files": digest([file_facts(files, Path(self.path)), captions]),
        }

    def read(self, begin: int, end: int, device: torch.device) -> Iterator[Example | Skipped]:
        for file, caption in self._entries[begin:end]:
            name = os.path.relpath(file, self.path)
            if caption is None:
                yield Skipped(name, "no caption")
            else:
                yield Example(name, caption, file)

    @cached_property
    def _entries(self) -> list[tuple[Path, str | None]]:
        folder = Path(self.path)
        if not folder.is_dir():
            raise ValueError(f"expected a folder of images, got {folder}")
        if self.caption_column is None:
            files = (f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
            entries: list[tuple[Path, str | None]] = [(file, "") for file in sorted(files)]
        else:
            entries = self._captioned(folder)
        if not entries:
            raise ValueError(f"expected images in {folder}, got none")
        return entries

    def _captioned(self, folder: Path) -> list[tuple[Path, str | None]]:
        tables = sorted(folder.rglob("metadata.jsonl"))
        if not tables:
            raise ValueError(
                f"expected captions in {folder / 'metadata.jsonl'}, got no such file; "
                "caption_column=None takes the images with empty captions"
            )
        rows = [(table.parent, row) for table in tables for row in _read_json_lines(table)]
        columns = sorted({key for _, row in rows for key in row})
        for wanted in ("file_name", self.caption_column):
            if wanted not in columns:
                raise ValueError(f"{tables[0]}: expected a column {wanted!r}, got {columns}")
        return [
            (parent / row["file_name"], _first_caption(row.get(self.caption_column)))
            for parent, row in rows
            if row.get("file_name")
        ]


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the hub, or a local folder (of parquet files, say), by the datasets library.

    Args:
        name_or_path, config, split: as in ``datasets.load_dataset``.
        image_column: images, encoded bytes or paths.
        caption_column: captions; of a list of them the first; None for empty captions.
        streaming: read the rows in passing instead of downloading the dataset first; each process
            then reads all of the stream.

    Raises ValueError, when used, where a column or split does not exist, and ImportError without
    the datasets library.
    """

    name_or_path: str
    config: str | None = None
    split: str = "train"
    image_column: str = "image"
    caption_column: str | None = "text"
    streaming: bool = False

    generated = False

    @property
    def length(self) -> int | None:
        return None if self.streaming else len(self._rows)

    def describe(self) -> dict[str, Any]:
        path = Path(self.name_or_path)
        described = {"source": "dataset", **asdict(self)}
        if path.exists():
            described["name_or_path"] = path.name
            described["files"] = digest(file_facts(_files_below(path), path))
        else:
            described["revision"] = self._builder.hash
        return described

    def read(self, begin: int, end: int, device: torch.device) -> Iterator[Example | Skipped]:
        if self.streaming:
            rows: Iterable[dict] = self._stream.read(begin, end)
        else:
            rows = (self._rows[index] for index in range(begin, min(end, len(self._rows))))
        for index, row in enumerate(rows, start=begin):
            yield self._example(index, row)

    def _example(self, index: int, row: dict[str, Any]) -> Example | Skipped:
        image = row[self.image_column] or {}
        picture = image.get("bytes") or _as_location(image.get("path"))
        name = f"{self.split}[{index}] {image.get('path') or ''}".strip()
        caption = "" if self.caption_column is None else _first_caption(row[self.caption_column])
        if picture is None:
            return Skipped(name, "no image")
        if caption is None:
            return Skipped(name, "no caption")
        return Example(name, caption, picture)

    @cached_property
    def _builder(self) -> DatasetBuilder:
        return import_datasets().load_dataset_builder(str(self.name_or_path), self.config)

    @cached_property
    def _rows(self) -> Dataset | IterableDataset:
        datasets = import_datasets()
        if self.streaming:
            rows = self._builder.as_streaming_dataset(split=self.split)
        else:
            self._builder.download_and_prepare()
            rows = self._builder.as_dataset(split=self.split)
        wanted = [c for c in (self.image_column, self.caption_column) if c is not None]
        columns = rows.column_names or list(next(iter(rows), {}))
        missing = [column for column in wanted if column not in columns]
        if missing:
            raise ValueError(f"{self.name_or_path}: expected columns {missing}, got {columns}")
        # Undecoded, so that a corrupt image is skipped instead of ending the iteration.
        return rows.select_columns(wanted).cast_column(
            self.image_column, datasets.Image(decode=False)
        )

    @cached_property
    def _stream(self) -> _Stream[dict[str, Any]]:
        return _Stream(lambda: iter(self._rows))


@dataclass(frozen=True)
class WebDatasetShards:
    """Uncompressed tar archives of ``key.jpg`` (png, webp, ...) with ``key.txt`` or ``key.json``.

    Args:
        pattern: files or urls, with braces as in ``{000..127}`` or ``{a,b}`` and, for files, ``*``;
            or a folder of tar files. Servers have to support range requests.
        caption_field: key of the caption in the json files, used where there is no text file.

    Archives are read in order, without an index: each process walks through all of them, yet reads
    the contents of its own items only. Raises ValueError, when used, where nothing matches.
    """

    pattern: str
    caption_field: str = "caption"

    length = None
    generated = False

    def describe(self) -> dict[str, Any]:
        local = [Path(shard) for shard in self._shards if not _is_url(shard)]
        urls = [shard for shard in self._shards if _is_url(shard)]
        return {
            "source": "webdataset",
            "caption_field": self.caption_field,
            "shards": len(self._shards),
            "files": digest([file_facts(local), urls]),
        }

    def read(self, begin: int, end: int, device: torch.device) -> Iterator[Example | Skipped]:
        for sample in self._stream.read(begin, end):
            yield sample if isinstance(sample, Skipped) else sample.load(self.caption_field)

    @cached_property
    def _shards(self) -> list[str]:
        pattern = str(self.pattern)
        if os.path.isdir(pattern):
            pattern = os.path.join(escape(pattern), "*.tar")
        shards = []
        for name in expand_braces(pattern):
            shards += sorted(glob(name)) or ([] if _has_wildcards(name) else [name])
        if not any(_is_url(shard) or os.path.exists(shard) for shard in shards):
            raise ValueError(f"expected tar files, got none for {self.pattern}")
        return shards

    @cached_property
    def _stream(self) -> _Stream[_TarSample | Skipped]:
        return _Stream(lambda: (sample for shard in self._shards for sample in _tar_samples(shard)))


@dataclass(frozen=True)
class TinyScenes:
    """Ray-traced pictures of `gspn2_diffusers.tiny_scenes` with captions, rendered when read.

    Args:
        count: number of pictures.
        resolution: their height and width.
        seed: other pictures for every seed.
    """

    count: int
    resolution: int = 256
    seed: int = 0

    generated = False

    def __post_init__(self) -> None:
        _check_at_least_one("count", self.count)
        _check_at_least_one("resolution", self.resolution)

    @property
    def length(self) -> int:
        return self.count

    def describe(self) -> dict[str, Any]:
        return {"source": "tiny scenes", **asdict(self)}

    def read(self, begin: int, end: int, device: torch.device) -> Iterator[Example | Skipped]:
        end = min(end, self.count)
        for block in range(begin // _SCENES_PER_BLOCK, -(-end // _SCENES_PER_BLOCK)):
            first = block * _SCENES_PER_BLOCK
            yield from self._read_block(block, max(begin - first, 0), end - first, device)

    def _read_block(
        self, block: int, begin: int, end: int, device: torch.device
    ) -> Iterator[Example]:
        """Scenes begin to end - 1 of a block, which is sampled as a whole."""
        from gspn2_diffusers.tiny_scenes import caption, sample_scenes
        from gspn2_diffusers.tiny_scenes.data import Renderer, to_bytes

        seed = random.Random(f"tiny scenes {self.seed} {block}").getrandbits(48)
        scenes = sample_scenes(_SCENES_PER_BLOCK, seed=seed)
        captions = caption(scenes, seed=seed)[begin:end]
        device = torch.device(device)
        compiled = device.type == "cuda" and self.count > _WORTH_COMPILING
        render = Renderer(self.resolution, device, compiled=compiled)
        pictures = to_bytes(render(scenes[begin:end]))
        first = block * _SCENES_PER_BLOCK + begin
        for index, (text, picture) in enumerate(zip(captions, pictures, strict=True), first):
            yield Example(f"scene {index}", text, picture)


@dataclass(frozen=True)
class SelfGenerated:
    """No data at all: prompts, for which the teacher draws the pictures.

    Args:
        prompts_file: one prompt per line; empty lines do not count.
        images_per_prompt: pictures of each prompt, with seeds of their own.
        seed: picture i is drawn with seed + i.

    Raises ValueError, when used, where the file holds no prompts.
    """

    prompts_file: str | Path
    images_per_prompt: int = 1
    seed: int = 0

    generated = True

    def __post_init__(self) -> None:
        _check_at_least_one("images_per_prompt", self.images_per_prompt)

    @property
    def length(self) -> int:
        return len(self._prompts) * self.images_per_prompt

    def describe(self) -> dict[str, Any]:
        described = {"source": "self-generated", **asdict(self)}
        described["prompts_file"] = Path(self.prompts_file).name
        return {**described, "prompts": digest(self._prompts)}

    def read(self, begin: int, end: int, device: torch.device) -> Iterator[Example | Skipped]:
        for index in range(begin, min(end, self.length)):
            prompt = self._prompts[index // self.images_per_prompt]
            yield Example(f"prompt {index}", prompt, None, self.seed + index)

    @cached_property
    def _prompts(self) -> list[str]:
        lines = Path(self.prompts_file).read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"expected a prompt per line in {self.prompts_file}, got none")
        return prompts


class _Stream(Generic[_T]):
    """Ranges of what can only be read from its start; going forward continues where it was."""

    def __init__(self, start: Callable[[], Iterator[_T]]) -> None:
        self._start = start
        self._items: Iterator[_T] | None = None
        self._position = 0

    def read(self, begin: int, end: int) -> Iterator[_T]:
        if self._items is None or begin < self._position:
            self._items, self._position = self._start(), 0
        while self._position < end:
            try:
                item = next(self._items)
            except StopIteration:
                return
            except BaseException:
                self._items = None  # or the next range would take the failure for the end
                raise
            self._position += 1
            if self._position > begin:
                yield item


@dataclass(frozen=True)
class _TarSample:
    """The files of one key in a tar archive, whose contents are read while the archive is open."""

    name: str
    archive: tarfile.TarFile
    members: dict[str, tarfile.TarInfo]

    def load(self, caption_field: str) -> Example | Skipped:
        image = next((suffix for suffix in self.members if suffix in IMAGE_SUFFIXES), None)
        if image is None:
            return Skipped(self.name, "no image")
        try:
            caption, picture = self._caption(caption_field), self._contents(image)
        except (tarfile.TarError, EOFError):
            return Skipped(self.name, "damaged archive")
        if caption is None:
            return Skipped(self.name, "no caption")
        return Example(self.name, caption, picture)

    def _caption(self, field: str) -> str | None:
        if ".txt" in self.members:
            return self._contents(".txt").decode("utf-8", errors="replace").strip()
        if ".json" not in self.members:
            return None
        try:
            values = json.loads(self._contents(".json"))
        except ValueError:
            return None
        return _first_caption(values.get(field)) if isinstance(values, dict) else None

    def _contents(self, suffix: str) -> bytes:
        file = self.archive.extractfile(self.members[suffix])
        assert file is not None  # it is for regular files, and there are no others among members
        return file.read()


def _tar_samples(shard: str) -> Iterator[_TarSample | Skipped]:
    name = shard.rsplit("/", 1)[-1]
    try:
        # Grouping looks one file ahead, and going back in a compressed archive reads it anew.
        with fsspec.open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            files = (member for member in archive if member.isfile())
            for key, members in groupby(files, key=lambda member: _split_member(member.name)[0]):
                by_suffix = {_split_member(member.name)[1]: member for member in members}
                yield _TarSample(f"{name}: {key}", archive, by_suffix)
    except FileNotFoundError:
        yield Skipped(name, "missing file")
    except (tarfile.TarError, EOFError):
        yield Skipped(name, "damaged or compressed archive")


def _split_member(name: str) -> tuple[str, str]:
    """A key, which ends at the first dot of a file's name, and the file's last suffix."""
    path = PurePosixPath(name)
    return str(path.parent / path.name.partition(".")[0]), path.suffix.lower()


def import_datasets():
    """The datasets library; raises ImportError saying how to get it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading a dataset needs the datasets library: pip install gspn2-diffusers[training]"
        ) from error
    return datasets


def digest(value: object) -> str:
    """SHA-256 of plain values, the same for dictionaries in any order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_facts(files: Iterable[Path], root: Path | None = None) -> list[list]:
    """Name below `root`, size and time of change of each file; of a missing one the name."""
    facts = []
    for file in files:
        name = file.name if root is None else Path(os.path.relpath(file, root)).as_posix()
        try:
            status = file.stat()
            facts.append([name, status.st_size, status.st_mtime_ns])
        except OSError:
            facts.append([name])
    return facts


def expand_braces(pattern: str) -> list[str]:
    """All names meant by ``{000..127}`` and ``{a,b}`` in a pattern."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_alternatives(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def _alternatives(inside: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers is None:
        return inside.split(",")
    first, last = numbers.groups()
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _files_below(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: expected JSON, got {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected an object, got {row!r}")
            yield row


def _read_bytes(picture: Path | str | bytes | Tensor | None) -> bytes:
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, Path):
        return picture.read_bytes()
    with fsspec.open(picture, "rb") as file:
        return file.read()


def _as_location(path: str | None) -> Path | str | None:
    return path if path is None or _is_url(path) else Path(path)


def _is_url(name: str) -> bool:
    return "://" in name


def _has_wildcards(name: str) -> bool:
    return not _is_url(name) and any(character in name for character in "*?[")


def _first_caption(value: object) -> str | None:
    """A caption, the first of a list of captions, or None where there is none."""
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, str) else None


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
