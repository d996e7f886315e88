"""Distilled blocks at other sizes than they were trained at, with lam scaled to the size and without.

python benchmarks/sizes.py --weights examples/tiny_scenes/weights/gspn2
python benchmarks/sizes.py --teacher examples/tiny_scenes/weights/pixart --weights examples/tiny_scenes/weights/pixart_gspn2
"""  # noqa: E501

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from gate import check_operator
from options import at_least, parser, prepare, run_script
from report import device_name, number, show, table, write_results
from torch import Tensor

from gspn2_diffusers import GSPN2Adapter, apply_gspn2
from gspn2_diffusers.conditioning import native_resolution
from gspn2_diffusers.distillation.batches import Batch
from gspn2_diffusers.distillation.losses import Distillation
from gspn2_diffusers.distillation.teacher import TeacherEncoder
from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.noising import Noising
from gspn2_diffusers.pipelines.loading import load_pipeline
from gspn2_diffusers.tiny_scenes import caption, sample_scenes
from gspn2_diffusers.tiny_scenes.data import Renderer, to_bytes
from gspn2_diffusers.tiny_scenes.models import WEIGHTS

SCENES_SEED = 20_000_003  # far from those of the trainer
ENCODED_AT_ONCE = 4


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = parser(__doc__, repeats=1)
    add = args.add_argument
    add("--teacher", type=Path, default=WEIGHTS / "pipeline", metavar="FOLDER",
        help="a Tiny Scenes pipeline; default: the shipped UNet")  # fmt: skip
    add("--weights", type=Path, required=True, metavar="FOLDER", help="its GSPN-2 blocks")
    add("--factors", type=float, nargs="+", default=[0.5, 1, 2], metavar="F",
        help="sizes as multiples of the native one (0.5 1 2)")  # fmt: skip
    add("--scenes", type=at_least(2), default=8, metavar="N", help="pictures per size (8)")
    add("--seed", type=int, default=0)
    return args.parse_args(argv)


@torch.no_grad()
def measure(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Errors relative to the teacher at the same size, a row per size and treatment of lam.

    ``output_error``: of the student's output; ``layer_error``: mean of its blocks' on the teacher's
    own inputs. Both are squared errors over the teacher's variance.
    """
    pipe = load_pipeline(args.teacher, dtype="float32", device=device)
    apply_gspn2(pipe, args.weights)
    denoiser = find_denoiser(pipe)
    distillation = Distillation(denoiser, Noising(pipe.scheduler)).to(device)
    adapter = GSPN2Adapter.of_patched(pipe)
    rows = []
    for factor in args.factors:
        side = round(factor * native_resolution(pipe))
        batch = draw_batch(args, TeacherEncoder(pipe), side)
        distillation.calibrate([batch])
        for scaled in (True, False):
            with lam_scaled(adapter, scaled):
                rows.append(
                    {
                        "size": side,
                        "lam_scaled": scaled,
                        "output_error": distillation.output_error(batch).item(),
                        "layer_error": distillation(batch, "teacher_forcing")["loss"].item(),
                    }
                )
    return rows


@contextmanager
def lam_scaled(adapter: GSPN2Adapter, scaled: bool) -> Iterator[None]:
    """While open, blocks scale lam to the size as they do by themselves, or not at all."""
    grids = [block.native_grid for block in adapter.blocks]
    if not scaled:
        for block in adapter.blocks:
            block.native_grid = None
    try:
        yield
    finally:
        for block, grid in zip(adapter.blocks, grids, strict=True):
            block.native_grid = grid


def draw_batch(args: argparse.Namespace, encoder: TeacherEncoder, side: int) -> Batch:
    """The same scenes at every size, at noise levels spread evenly."""
    count = args.scenes
    scenes = sample_scenes(count, seed=SCENES_SEED)
    images = to_bytes(Renderer(side, encoder.device)(scenes))
    latents = torch.cat([encoder.encode_images(part) for part in images.split(ENCODED_AT_ONCE)])
    sizes = torch.tensor([[side, side, 0, 0, side, side]], device=latents.device)
    rows = encoder.encode_prompts(caption(scenes, seed=SCENES_SEED))
    rows["sizes"] = sizes.expand(count, 6)
    quantiles = (torch.arange(count, device=latents.device) + 0.5) / count
    return Batch(latents, _noise_like(latents, args.seed), quantiles, rows, {})


def _noise_like(latents: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(latents.shape, generator=generator).to(latents)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device, dtype = prepare(args)
    check_operator(device, dtype)
    rows = measure(args, device)
    shown = table("Errors relative to the teacher", ("size", "lam", "output", "layers"), ("lam",))
    for row in rows:
        lam = "scaled to the size" if row["lam_scaled"] else "as it is"
        shown.add_row(
            str(row["size"]), lam, number(row["output_error"]), number(row["layer_error"])
        )
    show(shown)
    print(device_name(device), write_results(args, f"sizes-{args.weights.name}", device, rows))


if __name__ == "__main__":
    run_script(main)
