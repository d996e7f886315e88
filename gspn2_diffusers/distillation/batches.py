"""Batches whose every random choice is a function of seed, step and place in the global batch.

Nothing about them has to be saved for an exact resume, and any number of processes, each taking its
places of the global batch, trains on the same examples with the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import LatentCache

Size = tuple[int, int]


class Batch(NamedTuple):
    """One process's share of a global batch."""

    latents: Tensor
    """Clean latents ``[n, c, h, w]``, float32."""
    noise: Tensor
    """Standard normal, like latents."""
    quantiles: Tensor
    """Noise levels ``[n]`` as quantiles in 0..1, evenly spread over the global batch."""
    rows: dict[str, Tensor]
    """The other columns of the cache, ``[n, ...]``; a share of them without a caption."""
    unconditional: dict[str, Tensor]
    """The same columns without a caption, ``[n, ...]``."""


class Order:
    """Which rows each global batch holds: every epoch shuffles each bucket and the batches.

    A batch is of one bucket. A bucket's last, incomplete batch is left out (its rows are in other
    batches of other epochs); a bucket smaller than a batch repeats its rows.

    Args:
        buckets: latent size -> row numbers ``[rows]``.
        batch_size: of the global batch.
    """

    def __init__(self, buckets: Mapping[Size, Tensor], batch_size: int, seed: int):
        self.buckets = [rows for _, rows in sorted(buckets.items()) if len(rows)]
        self.batch_size = batch_size
        self.seed = seed
        if not self.buckets:
            raise ValueError("expected a cache with rows to train on, got none")

    def __len__(self) -> int:
        """Batches per epoch."""
        return sum(max(1, len(rows) // self.batch_size) for rows in self.buckets)

    def rows(self, step: int) -> Tensor:
        """Row numbers ``[batch_size]`` of the global batch of a step."""
        epoch, place = divmod(step, len(self))
        return self._epoch(epoch)[place]

    @lru_cache(maxsize=2)  # noqa: B019 - an order lives as long as its run
    def _epoch(self, epoch: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, "order", epoch))
        batches = []
        for rows in self.buckets:
            shuffled = rows[torch.randperm(len(rows), generator=generator)]
            if len(rows) < self.batch_size:
                shuffled = shuffled.repeat(-(-self.batch_size // len(rows)))[: self.batch_size]
            batches += shuffled.split(self.batch_size)[: len(shuffled) // self.batch_size]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


@dataclass(frozen=True)
class Share:
    """Which places of a global batch a process takes at one of its micro-steps."""

    process_index: int = 0
    process_count: int = 1
    micro_steps: int = 1

    def places(self, micro_step: int) -> slice:
        """Places spread evenly: every share sees all noise levels."""
        first = micro_step * self.process_count + self.process_index
        return slice(first, None, self.process_count * self.micro_steps)


class Batches:
    """Draws the batches of a run from a cache, on a device.

    Args:
        cache: of latents and prompt embeddings.
        buckets: row numbers to use, by latent size.
        batch_size: of the global batch: per device, times processes, times accumulation steps.
        share: this process's.
        caption_dropout: share of the examples that lose their caption.
    """

    def __init__(
        self,
        cache: LatentCache,
        buckets: Mapping[Size, Tensor],
        batch_size: int,
        *,
        share: Share = Share(),
        seed: int = 0,
        caption_dropout: float = 0.0,
        device: torch.device | str = "cpu",
    ):
        self.cache = cache
        self.order = Order(buckets, batch_size, seed)
        self.share = share
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.device = torch.device(device)
        self._unconditional = self._send(cache.unconditional)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="latents")
        self._ahead: dict[int, list[Future[dict[str, Tensor]]]] = {}

    def of_step(self, step: int) -> Iterator[Batch]:
        """This process's micro-batches of a step; their rows and the next step's are read ahead."""
        columns = self._ahead.pop(step, None) or self._read(step)
        self._ahead = {step + 1: self._read(step + 1)}
        for micro, future in enumerate(columns):
            yield self._draw(step, micro, future)

    def _read(self, step: int) -> list[Future[dict[str, Tensor]]]:
        rows = self.order.rows(step)
        shares = [rows[self.share.places(micro)] for micro in range(self.share.micro_steps)]
        return [self._reader.submit(self.cache.rows, numbers) for numbers in shares]

    def _draw(self, step: int, micro: int, columns: Future[dict[str, Tensor]]) -> Batch:
        columns = self._send(columns.result())
        latents = columns.pop("latents").float()
        n = self.order.batch_size
        places = self.share.places(micro)
        generator = torch.Generator(self.device).manual_seed(mix_seed(self.seed, "noise", step))
        random = {"generator": generator, "device": self.device}
        # Whole global batches are drawn and cut, so that a place's numbers are the same whoever
        # takes it.
        spread = (torch.arange(n, device=self.device) + torch.rand(n, **random)) / n
        dropped = torch.rand(n, **random)[places] < self.caption_dropout
        noise = torch.randn(n, *latents.shape[1:], **random)[places]
        nothing = {
            name: column.expand(len(latents), *column.shape[1:])
            for name, column in self._unconditional.items()
        }
        told = {
            name: torch.where(_like(dropped, column), nothing[name], column)
            if name in nothing
            else column
            for name, column in columns.items()
        }
        if "sizes" in columns:
            nothing["sizes"] = columns["sizes"]
        return Batch(latents, noise, spread[places], told, nothing)

    def _send(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: column.to(self.device, non_blocking=True) for name, column in columns.items()}


def split_rows(cache: LatentCache, held_out: int) -> tuple[dict[Size, Tensor], dict[Size, Tensor]]:
    """The rows to train on and `held_out` random others, each by latent size."""
    held = torch.zeros(len(cache), dtype=torch.bool)
    held[cache.held_out_rows(held_out)] = True
    sizes = cache.buckets.items()
    return (
        {size: rows[~held[rows]] for size, rows in sizes},
        {size: rows[held[rows]] for size, rows in sizes},
    )


def mix_seed(seed: int, purpose: str, number: int) -> int:
    """A seed for one purpose and number, unrelated to those of others."""
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _like(flags: Tensor, column: Tensor) -> Tensor:
    return flags.reshape(-1, *[1] * (column.ndim - 1))
