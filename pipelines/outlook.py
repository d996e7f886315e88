"""A plan for a model that is not loaded, on a GPU that need not be there."""

from __future__ import annotations

from pathlib import Path

import torch

from gspn2_diffusers.pipelines.cards import CARDS, card_rates, measure_rates
from gspn2_diffusers.pipelines.loading import resolve_dtype
from gspn2_diffusers.pipelines.parts import outline_parts
from gspn2_diffusers.pipelines.planner import Plan, plan
from gspn2_diffusers.pipelines.tracing import Rates


def look_ahead(
    model: str | Path,
    height: int,
    width: int,
    *,
    weights: str | Path | None = None,
    vram: int | None = None,
    card: str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    **options: object,
) -> Plan:
    """The plan for a picture of this size, from a pipeline's configuration files.

    Args:
        model: pipeline folder or hub id.
        height, width: in pixels.
        weights: GSPN-2 sidecar, folder or hub id; None: softmax attention.
        vram: bytes of GPU memory; None: what the first GPU of this machine has free.
        card: name of the GPU whose speed is taken; None: the first one of this machine, and
            without one no times.
        options: further ones of `plan`.

    Raises:
        ValueError: no such model or card, no `vram` and no GPU to ask.
        OSError: the hub has no such model, or cannot be reached.
        DoesNotFitError: nothing fits; says what would.
    """
    here = torch.device("cuda", 0) if torch.cuda.is_available() else None
    if vram is None and here is None:
        raise ValueError("vram: expected an amount of memory, as there is no GPU to ask, got none")
    rates = _rates(card, here)
    parts = outline_parts(model, weights=weights, dtype=resolve_dtype(dtype, torch.device("cpu")))
    if vram is None:
        vram = torch.cuda.mem_get_info(here)[0]
    return plan(height, width, parts, vram, rates=rates, **options)


def _rates(card: str | None, here: torch.device | None) -> Rates | None:
    if card is None:
        return None if here is None else measure_rates(here)
    rates = card_rates(card)
    if rates is None:
        raise ValueError(f"card: expected one of {', '.join(CARDS)}, got {card!r}")
    return rates
