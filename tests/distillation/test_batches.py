"""Batches depend on seed, step and place only: not on processes, micro-steps or what ran before."""

import pytest
import torch

from gspn2_diffusers.distillation.batches import Batches, Order, Share, split_rows

SMALL, WIDE = (8, 8), (6, 10)


class Rows:
    """Stands in for a cache: rows numbered in their latents, 20 of one size and 7 of another."""

    def __init__(self):
        self.buckets = {SMALL: torch.arange(20), WIDE: torch.arange(20, 27)}
        self.unconditional = {"prompt_embeds": torch.zeros(1, 3, 2)}

    def __len__(self):
        return 27

    def rows(self, numbers):
        size = SMALL if numbers[0] < 20 else WIDE
        return {
            "latents": numbers[:, None, None, None].expand(-1, 4, *size).half(),
            "prompt_embeds": numbers[:, None, None].expand(-1, 3, 2).half() + 1,
            "sizes": numbers[:, None].expand(-1, 6),
        }

    def held_out_rows(self, count):
        return torch.arange(0, 27, 3)[:count]


def draw(batch_size=4, step=0, dropout=0.3, **share):
    cache = Rows()
    batches = Batches(
        cache, cache.buckets, batch_size, share=Share(**share), seed=5, caption_dropout=dropout
    )
    return list(batches.of_step(step))


def same(batch, other):
    flat = [batch.latents, batch.noise, batch.quantiles, *batch.rows.values()]
    others = [other.latents, other.noise, other.quantiles, *other.rows.values()]
    return all(torch.equal(a, b) for a, b in zip(flat, others, strict=True))


@pytest.mark.parametrize("step", [0, 3, 11])
def test_processes_and_micro_steps_together_take_the_global_batch(step):
    (whole,) = draw(8, step)
    parts = [
        (2 * micro + process, batch)
        for process in range(2)
        for micro, batch in enumerate(
            draw(8, step, process_index=process, process_count=2, micro_steps=2)
        )
    ]
    for first, part in parts:
        assert len(part.latents) == 2
        assert torch.equal(part.latents, whole.latents[first::4])
        assert torch.equal(part.noise, whole.noise[first::4])
        assert torch.equal(part.quantiles, whole.quantiles[first::4])
        assert torch.equal(part.rows["prompt_embeds"], whole.rows["prompt_embeds"][first::4])


def test_a_step_is_the_same_whatever_was_drawn_before():
    cache = Rows()
    batches = Batches(cache, cache.buckets, 4, seed=5, caption_dropout=0.3)
    for step in (7, 0, 2):
        (batch,) = batches.of_step(step)
        assert same(batch, *draw(4, step))


def test_steps_and_seeds_have_noise_of_their_own():
    (first,), (second,) = draw(4, 0), draw(4, 1)
    assert first.latents.shape != second.latents.shape or not torch.equal(first.noise, second.noise)
    other = Batches(Rows(), Rows().buckets, 4, seed=6)
    (batch,) = other.of_step(0)
    assert batch.noise.shape != first.noise.shape or not torch.equal(batch.noise, first.noise)


def test_an_epoch_holds_every_row_of_full_batches_once_and_never_mixes_sizes():
    order = Order(Rows().buckets, 5, seed=1)
    assert len(order) == 5  # 20 / 5 and 7 // 5
    for epoch in range(3):
        batches = [order.rows(epoch * 5 + place).tolist() for place in range(5)]
        rows = [row for batch in batches for row in batch]
        assert len(rows) == len(set(rows)) == 25
        assert all(len({row < 20 for row in batch}) == 1 for batch in batches)
    assert order.rows(0).tolist() != order.rows(5).tolist()


def test_a_bucket_smaller_than_the_batch_repeats_its_rows():
    order = Order({WIDE: torch.arange(3)}, 8, seed=0)
    assert len(order) == 1 and len(order.rows(0)) == 8
    assert set(order.rows(0).tolist()) == {0, 1, 2}


def test_noise_levels_are_spread_evenly_over_the_global_batch():
    (batch,) = draw(10, 2)
    n = len(batch.quantiles)
    assert (batch.quantiles.sort().values * n).long().tolist() == list(range(n))


@pytest.mark.parametrize(("dropout", "empty"), [(0.0, 0), (1.0, 4)])
def test_captions_are_dropped_at_the_rate_that_was_asked_for(dropout, empty):
    (batch,) = draw(4, 0, dropout)
    assert (batch.rows["prompt_embeds"] == 0).all((1, 2)).sum() == empty
    assert torch.equal(batch.unconditional["prompt_embeds"], torch.zeros(4, 3, 2))
    assert torch.equal(batch.unconditional["sizes"], batch.rows["sizes"])


def test_held_out_rows_are_never_trained_on():
    train, held = split_rows(Rows(), 6)
    kept = {int(row) for rows in train.values() for row in rows}
    left_out = {int(row) for rows in held.values() for row in rows}
    assert left_out == {0, 3, 6, 9, 12, 15} and kept == set(range(27)) - left_out


def test_no_rows_to_train_on_is_an_error():
    with pytest.raises(ValueError, match="expected a cache with rows"):
        Order({SMALL: torch.arange(0)}, 4, seed=0)
