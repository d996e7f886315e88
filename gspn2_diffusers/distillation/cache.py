"""Latents and prompt embeddings on disk: made once by the teacher, read by every training run.

A cache is a folder named by a hash of all that its rows depend on. For each range of source items
it holds one safetensors file per latent size, and a marker that is written last.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .buckets import Size, SizeConditioning, fit_image, fit_tensor, nearest_bucket
from .sources import Example, Skipped, Source, digest

FORMAT = 1
RECORD = "cache.json"
UNCONDITIONAL = "unconditional.safetensors"

_TEXT = ("prompt_embeds", "prompt_mask")
_NAMES_KEPT = 5

Columns = dict[str, Tensor]


class Encoder(Protocol):
    """What the builder asks of a teacher."""

    @property
    def device(self) -> torch.device:
        """Where images are encoded."""

    def describe(self) -> dict[str, Any]:
        """Identity of the VAE and the text encoders, as plain values for JSON."""

    def describe_generation(self) -> dict[str, Any]:
        """Identity of all that `generate` depends on besides."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Scaled latents ``[n, c, h / 8, w / 8]`` of uint8 images ``[n, 3, h, w]``."""

    def encode_prompts(self, captions: Sequence[str]) -> Columns:
        """Columns ``[n, ...]`` that stand for the captions; with a ``prompt_mask`` ``[n, length]``
        among them, ``prompt_embeds`` is ``[n, length, width]`` and counts where it is not 0."""

    def encode_unconditional(self) -> Columns:
        """The same columns ``[1, ...]`` for no caption."""

    def generate(
        self, captions: Sequence[str], seeds: Sequence[int], height: int, width: int
    ) -> Tensor:
        """Scaled latents ``[n, c, height / 8, width / 8]`` of pictures that the teacher draws."""


def build_cache(
    folder: str | Path,
    source: Source,
    encoder: Encoder,
    buckets: Sequence[Size],
    *,
    shard_size: int = 512,
    batch_size: int = 32,
    workers: int = 4,
    process_index: int = 0,
    process_count: int = 1,
    wait: Callable[[], None] = lambda: None,
    progress: Callable[[int, int | None], None] | None = None,
) -> LatentCache:
    """Encode a source's items, as far as an earlier call has not, and open the result.

    Args:
        folder: where caches are; this one's folder in it is named by `cache_key`.
        buckets: (height, width) of images in pixels.
        shard_size: source items per range, which is what a killed run loses at most.
        batch_size: images that the encoder gets at a time, at most.
        workers: threads that decode and scale images.
        process_index, process_count: this process encodes ranges index, index + count, ...
        wait: returns when every process has called it; all of them call it twice.
        progress: called with the number of items done in all and their total, None if unknown.

    Raises:
        ValueError: nothing could be read, latents are not finite, or a process left ranges out.
        OSError: something could not be written.
    """
    description = describe_cache(source, encoder, buckets, shard_size)
    target = Path(folder) / cache_key(description)
    builder = _Builder(target, source, encoder, tuple(buckets), shard_size, batch_size, workers)
    builder.start(description, main=process_index == 0)
    for number in count(process_index, process_count):
        if source.length is not None and number * shard_size >= source.length:
            break
        marker = builder.finished_range(number) or builder.build_range(number)
        if progress is not None:
            done = number * shard_size + marker["items"]
            progress(done, source.length)
        if marker["last"]:
            break
    wait()
    if process_index == 0:
        builder.finish(description)
    wait()
    return LatentCache(target)


def describe_cache(
    source: Source, encoder: Encoder, buckets: Sequence[Size], shard_size: int
) -> dict[str, Any]:
    """All that the rows of a cache and their order depend on, as plain values for JSON."""
    description = {
        "format": FORMAT,
        "source": source.describe(),
        "encoder": encoder.describe(),
        "buckets": [list(bucket) for bucket in buckets],
        "shard_size": shard_size,
    }
    if source.generated:
        description["generation"] = encoder.describe_generation()
    return description


def cache_key(description: Mapping[str, Any]) -> str:
    """Name of the folder of the cache with this description."""
    return digest(description)[:16]


@dataclass(frozen=True)
class _Fitted:
    """An example ready for the encoder; image uint8 ``[3, h, w]``, None if still to be drawn."""

    bucket: Size
    caption: str
    image: Tensor | None
    size: SizeConditioning
    seed: int


@dataclass(frozen=True)
class _Builder:
    folder: Path
    source: Source
    encoder: Encoder
    buckets: tuple[Size, ...]
    shard_size: int
    batch_size: int
    workers: int

    def start(self, description: dict[str, Any], *, main: bool) -> None:
        for name in ("shard_size", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.buckets:
            raise ValueError("buckets: expected at least one, got none")
        _make_folder(self.folder)
        if main and not (self.folder / RECORD).exists():
            _write_json(self.folder / RECORD, {"description": description})
        if main and not (self.folder / UNCONDITIONAL).exists():
            columns = _storable(self.encoder.encode_unconditional())
            _write_tensors(self.folder / UNCONDITIONAL, columns)

    def finished_range(self, number: int) -> dict[str, Any] | None:
        """The marker of a range whose files are all there."""
        try:
            marker = json.loads((self.folder / f"{number:06d}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return marker if all((self.folder / name).exists() for name in marker["shards"]) else None

    def build_range(self, number: int) -> dict[str, Any]:
        """Encode and write the items of a range; returns its marker."""
        begin, end = number * self.shard_size, (number + 1) * self.shard_size
        items, skipped = 0, {}
        pending: dict[Size, list[_Fitted]] = defaultdict(list)
        encoded: dict[Size, list[Columns]] = defaultdict(list)

        def encode(examples: list[_Fitted]) -> None:
            columns = self._encode(examples)
            encoded[tuple(columns["latents"].shape[-2:])].append(columns)
            examples.clear()

        outcomes = self.source.read(begin, end, self.encoder.device)
        for fitted in _map_ahead(self._fit, outcomes, self.workers):
            items += 1
            if isinstance(fitted, Skipped):
                _count(skipped, fitted.reason, 1, [fitted.name])
                continue
            pending[fitted.bucket].append(fitted)
            if len(pending[fitted.bucket]) == self.batch_size:
                encode(pending[fitted.bucket])
        for examples in pending.values():
            if examples:
                encode(examples)
        ends = items < self.shard_size or end == self.source.length
        return self._write_range(number, items, ends, encoded, skipped)

    def _write_range(
        self,
        number: int,
        items: int,
        last: bool,
        encoded: Mapping[Size, list[Columns]],
        skipped: dict[str, Any],
    ) -> dict[str, Any]:
        shards = {}
        for (height, width), parts in sorted(encoded.items()):
            name = f"{number:06d}-{height}x{width}.safetensors"
            columns = _join(parts)
            _write_tensors(self.folder / name, columns)
            shards[name] = {"rows": len(columns["latents"]), "bucket": [height, width]}
        marker = {"items": items, "last": last, "shards": shards, "skipped": skipped}
        _write_json(self.folder / f"{number:06d}.json", marker)
        return marker

    def _fit(self, item: Example | Skipped) -> _Fitted | Skipped:
        if isinstance(item, Skipped):
            return item
        if item.picture is None:
            bucket = self.buckets[item.seed % len(self.buckets)]
            size = SizeConditioning(bucket, (0, 0), bucket)
            return _Fitted(bucket, item.caption, None, size, item.seed)
        if isinstance(item.picture, Tensor):
            bucket = nearest_bucket(self.buckets, *item.picture.shape[-2:])
            image, size = fit_tensor(item.picture, bucket)
            return _Fitted(bucket, item.caption, image, size, item.seed)
        picture = item.open()
        if isinstance(picture, Skipped):
            return picture
        try:
            image, size = self._fit_picture(picture)
        except Exception as error:  # modes and EXIF tags that Pillow opens, yet cannot convert
            return Skipped(item.name, f"unreadable image ({type(error).__name__})")
        return _Fitted(size.target, item.caption, image, size, item.seed)

    def _fit_picture(self, picture: Image.Image) -> tuple[Tensor, SizeConditioning]:
        return fit_image(picture, nearest_bucket(self.buckets, *upright_size(picture)))

    def _encode(self, examples: Sequence[_Fitted]) -> Columns:
        """Columns of examples of one bucket, as they are stored."""
        captions = [example.caption for example in examples]
        if examples[0].image is None:
            seeds = [example.seed for example in examples]
            latents = self.encoder.generate(captions, seeds, *examples[0].bucket)
        else:
            images = torch.stack([example.image for example in examples])
            latents = self.encoder.encode_images(images.to(self.encoder.device))
        columns = {
            "latents": latents,
            **self.encoder.encode_prompts(captions),
            "sizes": torch.tensor([example.size.to_row() for example in examples]),
        }
        return _trimmed(_storable(columns))

    def finish(self, description: dict[str, Any]) -> None:
        """Add up all ranges and write it down, unless that is done."""
        for abandoned in self.folder.glob(".*.tmp"):
            abandoned.unlink()
        record = {"description": description, **self._totals()}
        path = self.folder / RECORD
        if _read_json(path) != record:
            _write_json(path, record)

    def _totals(self) -> dict[str, Any]:
        totals: dict[str, Any] = {"items": 0, "rows": 0, "skipped": {}, "rows_by_bucket": {}}
        shards: dict[str, Any] = {}
        for marker in self._markers():
            totals["items"] += marker["items"]
            shards |= marker["shards"]
            for reason, found in marker["skipped"].items():
                _count(totals["skipped"], reason, found["count"], found["first"])
        for shard in shards.values():
            totals["rows"] += shard["rows"]
            name = "x".join(map(str, shard["bucket"]))
            totals["rows_by_bucket"].setdefault(name, 0)
            totals["rows_by_bucket"][name] += shard["rows"]
        return {"totals": totals, "shards": shards}

    def _markers(self) -> Iterator[dict[str, Any]]:
        for number in count():
            marker = self.finished_range(number)
            if marker is None:
                raise ValueError(f"expected range {number} in {self.folder}, which no process made")
            yield marker
            if marker["last"]:
                return


class LatentCache:
    """Rows of a finished cache, mapped from disk.

    Attributes:
        folder: where it is.
        description: what the rows depend on.
        totals: numbers of items, rows and skipped items, the latter by reason.
        buckets: latent (height, width) -> the row numbers of this size, ascending.
        unconditional: columns ``[1, ...]`` of the empty caption.

    Raises ValueError for a cache that is unfinished, empty or damaged, naming the file.
    """

    folder: Path
    description: dict[str, Any]
    totals: dict[str, Any]
    buckets: dict[Size, Tensor]
    unconditional: Columns

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        record = _read_json(self.folder / RECORD)
        if "totals" not in record:
            raise ValueError(f"expected a finished cache, got an unfinished one: {self.folder}")
        self.description, self.totals = record["description"], record["totals"]
        if not self.totals["rows"]:
            raise ValueError(
                f"expected an example that can be read in {self.description['source']}, got none "
                f"of {self.totals['items']}: {self.totals['skipped']}; after mending what cannot "
                f"be seen in files' names, sizes and times, delete {self.folder}"
            )
        unconditional = _open_tensors(self.folder / UNCONDITIONAL, rows=1)
        self._text_length = _text_length(unconditional)
        self.unconditional = {
            name: self._pad(name, column) for name, column in _trimmed(unconditional).items()
        }
        shards = record["shards"]
        self._shards = [_open_tensors(self.folder / n, s["rows"]) for n, s in shards.items()]
        self._sizes = [tuple(shard["bucket"]) for shard in shards.values()]
        rows = torch.tensor([shard["rows"] for shard in shards.values()])
        self._starts = rows.cumsum(0) - rows
        self.buckets = self._rows_by_size(rows)

    def __len__(self) -> int:
        return self.totals["rows"]

    def __reduce__(self) -> tuple:
        """Other processes map the files anew instead of receiving their contents."""
        return LatentCache, (self.folder,)

    def rows(self, indices: Sequence[int] | Tensor) -> Columns:
        """Columns ``[n, ...]`` of rows of one bucket, on the CPU.

        ``latents`` ``[n, c, h, w]``, ``sizes`` ``[n, 6]`` (original height and width, top and left
        of the crop, target height and width, in pixels) and what the encoder makes of captions.
        Raises ValueError for rows out of range or of several buckets, and for none.
        """
        index = torch.as_tensor(indices, dtype=torch.long).cpu()
        if not len(index) or index.min() < 0 or index.max() >= len(self):
            raise ValueError(f"expected rows of 0..{len(self) - 1}, got {index.tolist()}")
        shards = torch.searchsorted(self._starts, index, right=True) - 1
        offsets = (index - self._starts[shards]).tolist()
        places = list(zip(shards.tolist(), offsets, strict=True))
        sizes = {self._sizes[shard] for shard, _ in places}
        if len(sizes) > 1:
            raise ValueError(f"expected rows of one bucket, got {sorted(sizes)}")
        return {name: self._gather(name, places) for name in self._shards[0]}

    def held_out_rows(self, count: int, seed: int = 0) -> Tensor:
        """Numbers of `count` random rows, ascending, the same ones for a seed.

        Raises ValueError where no row would remain.
        """
        if not 0 <= count < len(self):
            raise ValueError(f"expected 0 to {len(self) - 1} rows to hold out, got {count}")
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self), generator=generator)[:count].sort().values

    def _rows_by_size(self, rows: Tensor) -> dict[Size, Tensor]:
        numbers: dict[Size, list[Tensor]] = defaultdict(list)
        for size, part in zip(
            self._sizes, torch.arange(len(self)).split(rows.tolist()), strict=True
        ):
            numbers[size].append(part)
        return {size: torch.cat(parts) for size, parts in sorted(numbers.items())}

    def _gather(self, name: str, places: Sequence[tuple[int, int]]) -> Tensor:
        rows = [self._shards[shard][name][row] for shard, row in places]
        if len({row.shape for row in rows}) == 1:
            return self._pad(name, torch.stack(rows))
        gathered = rows[0].new_zeros(len(rows), self._text_length, *rows[0].shape[1:])
        for target, row in zip(gathered, rows, strict=True):
            target[: len(row)] = row
        return gathered

    def _pad(self, name: str, column: Tensor) -> Tensor:
        return _padded(column, self._text_length) if self._is_text(name) else column

    def _is_text(self, name: str) -> bool:
        return self._text_length is not None and name in _TEXT


def upright_size(picture: Image.Image) -> Size:
    """(height, width) of a picture after turning it by its EXIF orientation."""
    sideways = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (picture.width, picture.height) if sideways else (picture.height, picture.width)


def _map_ahead(function: Callable, items: Iterable, workers: int) -> Iterator:
    """`map` by threads, which work a few items ahead of the caller."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _count(skipped: dict[str, Any], reason: str, number: int, names: Sequence[str]) -> None:
    entry = skipped.setdefault(reason, {"count": 0, "first": []})
    entry["count"] += number
    entry["first"] = [*entry["first"], *names][:_NAMES_KEPT]


def _storable(columns: Columns) -> Columns:
    """Columns on the CPU with numbers of 16 bits; raises ValueError where they are not finite."""
    stored = {}
    for name, column in columns.items():
        if column.is_floating_point() and column.dtype != torch.bfloat16:
            column = column.half()
        if not column.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers from the encoder, got others")
        stored[name] = column.detach().cpu().contiguous()
    return stored


def _text_length(columns: Columns) -> int | None:
    """Length of the text columns, None without a mask."""
    return columns["prompt_mask"].shape[1] if "prompt_mask" in columns else None


def _trimmed(columns: Columns) -> Columns:
    """Columns whose text ends with the longest one; without a mask as they are."""
    if "prompt_mask" not in columns:
        return columns
    used = columns["prompt_mask"].nonzero()[:, 1]
    length = max(1, int(used.max()) + 1 if len(used) else 1)
    text = {name: columns[name][:, :length].contiguous() for name in _TEXT}
    return {**columns, **text}


def _padded(column: Tensor, length: int) -> Tensor:
    """A text column ``[n, shorter, ...]`` as ``[n, length, ...]`` with zeros at the end."""
    if column.shape[1] == length:
        return column
    padded = column.new_zeros(len(column), length, *column.shape[2:])
    padded[:, : column.shape[1]] = column
    return padded


def _join(parts: Sequence[Columns]) -> Columns:
    """Rows of several batches, their text padded to the longest."""
    length = max(_text_length(part) or 0 for part in parts)

    def column(name: str) -> Tensor:
        columns = [part[name] for part in parts]
        text = length and name in _TEXT
        return torch.cat([_padded(c, length) for c in columns] if text else columns)

    return {name: column(name) for name in parts[0]}


def _open_tensors(path: Path, rows: int) -> Columns:
    """Tensors of a file, mapped; raises ValueError, naming it, if it is not what was written."""
    mend = f"delete {path} and build the cache again, which encodes that part anew"
    try:
        with safe_open(path, framework="pt") as file:
            columns = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or missing ({error}); {mend}") from error
    if any(len(column) != rows for column in columns.values()):
        shapes = {name: tuple(column.shape) for name, column in columns.items()}
        raise ValueError(f"{path} is damaged: expected {rows} rows, got {shapes}; {mend}")
    return columns


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"expected the record of a cache in {path}, got {error}") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"could not create {folder}: {error.strerror}") from error


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=1)
    _write_atomically(path, lambda temporary: temporary.write_text(text))


def _write_tensors(path: Path, columns: Columns) -> None:
    _write_atomically(path, lambda temporary: save_file(columns, temporary))


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """All of a file or nothing; raises OSError naming it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        number = getattr(error, "errno", None)
        raise OSError(number, f"could not write {path}: {error}") from error
