"""Training data made on the fly: a stream of scenes with captions, and a pool of examples.

Rendering (and encoding) a scene costs more than a training step takes with it, so examples are
used several times: a pool on the device is filled once and then refreshed little by little.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import lru_cache

import torch
from numpy import ndarray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .captions import caption
from .render import render
from .scenes import Scenes, sample_scenes
from .tokenizer import build_tokenizer

_ENDLESS = 2**31
_RENDER_CHUNK = 64
_EAGER_RENDER_CHUNK = 8  # without fusion every operation allocates its result


class CaptionedScenes(Dataset):
    """Batches of scenes, each with the token ids ``[n, captions, length]`` (int16) of its captions.

    Item ``i`` is drawn with seed ``first_seed + i``. Without captions the ids are ``[n, 0, 0]``.
    """

    def __init__(self, batch_size: int, first_seed: int, captions: int = 0) -> None:
        self.batch_size = batch_size
        self.first_seed = first_seed
        self.captions = captions

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> tuple[Scenes, Tensor]:
        seed = self.first_seed + index
        scenes = sample_scenes(self.batch_size, seed=seed)
        if self.captions == 0:
            return scenes, torch.empty(len(scenes), 0, 0, dtype=torch.int16)
        tellings = [tokenize(caption(scenes, seed=seed + k)) for k in range(self.captions)]
        return scenes, torch.stack(tellings, dim=1).to(torch.int16)


def stream_scenes(
    batch_size: int, *, seed: int, captions: int = 0, workers: int = 0
) -> Iterator[tuple[Scenes, Tensor]]:
    """Endless batches of ``CaptionedScenes``, made ahead of use by worker processes."""
    loader = DataLoader(
        CaptionedScenes(batch_size, seed, captions),
        batch_size=None,
        num_workers=workers,
        collate_fn=_to_arrays,
        worker_init_fn=_keep_to_one_thread,
    )
    return map(_to_tensors, iter(loader))


def _to_arrays(batch: tuple[Scenes, Tensor]) -> tuple[dict[str, ndarray], ndarray]:
    """Arrays travel between processes by value; each tensor would hold a file descriptor."""
    scenes, ids = batch
    return {f.name: getattr(scenes, f.name).numpy() for f in fields(scenes)}, ids.numpy()


def _to_tensors(batch: tuple[dict[str, ndarray], ndarray]) -> tuple[Scenes, Tensor]:
    arrays, ids = batch
    scenes = Scenes(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    return scenes, torch.from_numpy(ids)


def _keep_to_one_thread(worker: int) -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def stream_seed(seed: int, process: int, step: int) -> int:
    """First seed of a process's stream, far from those of other processes and resumed runs."""
    return random.Random(f"{seed} {process} {step}").getrandbits(48)


@lru_cache(maxsize=1)
def _tokenizer():
    return build_tokenizer()


def tokenize(captions: list[str]) -> Tensor:
    """Token ids ``[n, length]`` (int64), padded to the tokenizer's length."""
    tokens = _tokenizer()(captions, padding="max_length", truncation=True, return_tensors="pt")
    return tokens.input_ids


class Renderer:
    """Draws scenes as images ``[n, 3, resolution, resolution]`` (float32 in 0..1) on a device.

    compiled: through torch.compile, always for the same number of scenes: a last, smaller part of
    a batch is filled up and cut off again.
    """

    def __init__(
        self, resolution: int, device: torch.device, *, supersample: int = 2, compiled: bool = False
    ) -> None:
        self.resolution = resolution
        self.device = device
        self.supersample = supersample
        self.compiled = compiled

    @torch.no_grad()
    def __call__(self, scenes: Scenes) -> Tensor:
        padding = -len(scenes) % _RENDER_CHUNK if self.compiled else 0
        padded = Scenes.cat([scenes, scenes[torch.arange(padding) % len(scenes)]])
        images = render(
            padded.to(self.device),
            self.resolution,
            self.supersample,
            chunk=_RENDER_CHUNK if self.compiled else _EAGER_RENDER_CHUNK,
            compiled=self.compiled,
        )
        return images[: len(scenes)]


def held_out_scenes(n: int, seed: int) -> Scenes:
    """``n`` scenes which a training run with the same seed does not see."""
    return sample_scenes(n, seed=stream_seed(seed, process=-1, step=0))


def to_bytes(images: Tensor) -> Tensor:
    """Images in 0..1 as uint8 in 0..255."""
    return images.mul(255).round().to(torch.uint8)


class Pool:
    """Ring buffer of examples on a device; once it is full, new ones replace the oldest.

    An example is one row of named columns ``[capacity, ...]``, which the first ``add`` allocates.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.device = device
        self._columns: dict[str, Tensor] = {}
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    def add(self, **columns: Tensor) -> None:
        """Write rows ``[n, ...]`` of every column.

        Raises ValueError where the columns differ in length or from those of the pool.
        """
        lengths = {name: len(rows) for name, rows in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"expected columns of one length, received {lengths}")
        if not self._columns:
            self._columns = {name: self._allocate(rows) for name, rows in columns.items()}
        if columns.keys() != self._columns.keys():
            raise ValueError(f"expected columns {set(self._columns)}, received {set(columns)}")
        n = next(iter(lengths.values()))
        slots = (torch.arange(n, device=self.device) + self._added) % self.capacity
        for name, rows in columns.items():
            self._columns[name][slots] = rows.to(self.device, self._columns[name].dtype)
        self._added += n

    def draw(self, n: int) -> dict[str, Tensor]:
        """``n`` random rows of every column, with replacement; raises ValueError when empty."""
        if not len(self):
            raise ValueError("expected a pool with examples, received an empty one")
        chosen = torch.randint(len(self), (n,), device=self.device)
        return {name: column[chosen] for name, column in self._columns.items()}

    def _allocate(self, rows: Tensor) -> Tensor:
        return torch.empty(self.capacity, *rows.shape[1:], dtype=rows.dtype, device=self.device)


class PoolFeeder:
    """Keeps a pool supplied from a stream of scenes.

    make_columns: turns a batch of scenes and their token ids into the pool's columns.
    """

    def __init__(
        self,
        pool: Pool,
        stream: Iterator[tuple[Scenes, Tensor]],
        make_columns: Callable[[Scenes, Tensor], dict[str, Tensor]],
    ) -> None:
        self.pool = pool
        self.stream = stream
        self.make_columns = make_columns

    def fill(self, seconds: float) -> float:
        """Fill the pool to capacity or for ``seconds``, one batch at least; returns scenes/s."""
        begin, before = time.perf_counter(), len(self.pool)
        while True:
            self.refresh()
            if self.pool.device.type == "cuda":
                torch.cuda.synchronize(self.pool.device)
            elapsed = time.perf_counter() - begin
            if len(self.pool) == self.pool.capacity or elapsed > seconds:
                return (len(self.pool) - before) / elapsed

    def refresh(self) -> None:
        """Add the stream's next batch of scenes."""
        self.pool.add(**self.make_columns(*next(self.stream)))
