"""Print how SDXL's layout, patched with GSPN-2, fits into GPUs of several sizes. Needs none.

python benchmarks/plans.py
python benchmarks/plans.py --sizes 4096 4096x16384 --cards "RTX 4090:24" --upsample latent
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from models import build_sdxl_unet
from options import parser, prepare, run_script
from report import number, show, table, write_results
from rich.table import Table
from sdxl import build_sdxl_vae, build_text_encoders, put_random_blocks
from unet import image_size

from gspn2_diffusers import GSPN2Config
from gspn2_diffusers.pipelines.cards import card_rates
from gspn2_diffusers.pipelines.parts import Parts
from gspn2_diffusers.pipelines.planner import DoesNotFitError, plan

CARDS = ["RTX 4070:12", "RTX 4080:16", "RTX 4090:24", "L40S:48", "H100:80"]
SIZES = [(side, side) for side in (2048, 4096, 8192, 16384)]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = parser(__doc__, repeats=1)
    add = args.add_argument
    add("--sizes", type=image_size, nargs="+", metavar="SIZE", default=SIZES,
        help="pixels: 4096, or 2160x3840 for height x width (2048 to 16384)")  # fmt: skip
    add("--cards", nargs="+", metavar="NAME:GIB", default=CARDS,
        help="speeds that are taken, and memory")  # fmt: skip
    add("--upsample", choices=("pixel", "latent"), default="pixel")
    return args.parse_args(argv)


def sdxl_parts() -> Parts:
    """SDXL's layout in bfloat16. Only the blocks have weights: the rest is room not yet touched."""
    with torch.device("meta"):
        unet = build_sdxl_unet().to(torch.bfloat16)
        vae = build_sdxl_vae().to(torch.bfloat16)
        others = [part.to(torch.bfloat16) for part in build_text_encoders()]
    unet = unet.to_empty(device="cpu").eval().requires_grad_(False)
    put_random_blocks(unet, GSPN2Config())
    return Parts(unet, vae.eval(), tuple(part.eval() for part in others))


def find_plans(sizes: Sequence[tuple[int, int]], cards: Sequence[str], upsample: str) -> list[dict]:
    """One row per card and size: the plan, or what would fit.

    Raises:
        ValueError: a card that is not known, or without its memory.
    """
    known = []
    for card in cards:
        name, _, gib = card.partition(":")
        rates = card_rates(name)
        if rates is None or not gib:
            raise ValueError(f"--cards: expected a known GPU and its GiB, NAME:GIB, got {card!r}")
        known.append((name, gib, rates))
    parts, rows = sdxl_parts(), []
    for name, gib, rates in known:
        for size in sizes:
            row = {"card": name, "vram_gib": float(gib), "size": list(size), "how": None}
            try:
                found = plan(*size, parts, int(float(gib) * 2**30), rates=rates, upsample=upsample)
            except DoesNotFitError as error:
                row |= {"needed_gib": error.needed_bytes / 2**30, "largest": error.largest}
            else:
                row |= {
                    "peak_gib": found.peak_bytes / 2**30,
                    "host_gib": found.host_bytes / 2**30,
                    "seconds": found.seconds,
                    "how": found.stages[-1].describe(),
                    "decode": found.decode.describe(),
                    "offload": found.offload_text + found.offload_denoiser,
                }
            rows.append(row)
    return rows


def results_table(rows: Sequence[dict]) -> Table:
    """One row per card and size."""
    columns = ("card", "GiB", "picture", "peak", "s", "last stage", "decode", "CPU GiB")
    grid = table("Plans for SDXL's layout, bfloat16", columns, left=("card", "last stage"))
    for row in rows:
        height, width = row["size"]
        start = (row["card"], number(row["vram_gib"]), f"{width}x{height}")
        if row["how"] is None:
            largest = "x".join(map(str, reversed(row["largest"] or ()))) or "nothing"
            rest = (f"needs {number(row['needed_gib'])}", "-", f"{largest} would fit", "-", "-")
        else:
            rest = (
                number(row["peak_gib"]), number(row["seconds"]), row["how"], row["decode"],
                number(row["host_gib"]),
            )  # fmt: skip
        grid.add_row(*start, *rest)
    return grid


def main(argv: Sequence[str] | None = None) -> None:
    """Plan, print a table and write the results."""
    args = parse_args(argv)
    device, _ = prepare(args)
    rows = find_plans(args.sizes, args.cards, args.upsample)
    show(results_table(rows))
    write_results(args, "highres-plans", device, rows)


if __name__ == "__main__":
    run_script(main)
