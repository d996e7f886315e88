"""Time training steps of distillation: on SDXL's layout, or on a Tiny Scenes teacher.

python benchmarks/training_speed.py                     SDXL at 1024 x 1024, random weights
python benchmarks/training_speed.py --tiny examples/tiny_scenes/weights/pipeline --cache latents
accelerate launch --multi_gpu --num_processes 2 benchmarks/training_speed.py --tiny ...
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list
from diffusers import DDPMScheduler, UNet2DConditionModel
from distillation import (
    CAPTION_DROPOUT,
    PRECISIONS,
    Recipe,
    build_student,
    load_teacher,
    open_cache,
    put_denoiser,
    write_atomically,
)
from gate import check_finite, check_operator
from measuring import Timer, peak_memory
from mixers import Dropped, patched_layers, swapped
from models import BUILDERS, PIXELS_PER_LATENT, build, random_inputs
from options import at_least, parser, prepare, run_script
from report import RESULTS, device_name, number, show, table
from rich.table import Table
from torch import Tensor, nn
from unet import random_adapter

from gspn2_diffusers import GSPN2Config, apply_gspn2, checkpoint_with_grid, softmax_attention
from gspn2_diffusers.conditioning import denoiser_inputs, predict
from gspn2_diffusers.distillation.batches import Batch, Batches, Share, split_rows
from gspn2_diffusers.distillation.losses import Distillation
from gspn2_diffusers.distillation.trainer import Trainer, TrainingOptions
from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.noising import Noising

GOAL_RATIO = 1.3
GOAL_GB = 40.0
FLOOR = "floor"
LEARNING_RATE = 1e-4
HELD_OUT = 64
LOGGED = 10  # steps between lines of the trainer's log


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = parser(__doc__, repeats=7)
    add = args.add_argument
    add("--model", choices=BUILDERS, default="sdxl")
    add("--size", type=at_least(8), default=1024, metavar="SIDE", help="image pixels (1024)")
    add("--batch_size", type=at_least(1), metavar="N",
        help="images of a step; default: 1, with --tiny 64 per process")  # fmt: skip
    add("--proxy_ratio", type=at_least(1), default=8, metavar="N",
        help="channels per proxy channel (8)")  # fmt: skip
    add("--parameters_from", choices=("proxy", "tokens"), default="tokens")
    add("--tiny", type=Path, metavar="FOLDER", help="images per second of a Tiny Scenes teacher")
    add("--cache", type=Path, metavar="FOLDER",
        help="of its latents; without --scenes: a finished cache itself")  # fmt: skip
    add("--scenes", type=at_least(2), metavar="COUNT", help="pictures to render into the cache")
    add("--steps", type=at_least(2 * LOGGED), default=100, metavar="N",
        help="of each stage, with --tiny (100)")  # fmt: skip
    add("--seed", type=int, default=0)
    return args.parse_args(argv)


class Steps:
    """The steps that are timed, on one model and one batch.

    Args:
        unet: with random weights, which are frozen.
        batch: images of a step.
        latent: side of the latents.
    """

    def __init__(self, unet: UNet2DConditionModel, config: GSPN2Config, batch: int, latent: int):
        adapter = random_adapter(unet, config)
        apply_gspn2(unet, adapter)
        adapter.float().requires_grad_(True)
        self.unet = unet
        self.floors = [
            Dropped(layer, bias=True).float().requires_grad_(True) for layer in patched_layers(unet)
        ]
        self.scheduler = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
        self.distillation = Distillation(unet, Noising(self.scheduler)).to(unet.device)
        self.batch = random_batch(unet, batch, latent)
        self.distillation.calibrate([self.batch])
        self.trained = [p for p in unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE)

    def of_package(self, stage: str) -> Tensor:
        """A whole step of the package: losses, gradients, clipping, optimiser. Returns the loss."""
        with self._autocast():
            loss = self.distillation(self.batch, stage)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def of_floor(self) -> Tensor:
        """Teacher forward, then forward and backward without any token mixing. Returns the loss."""
        levels = self.distillation.noising.levels(self.batch.quantiles)
        noisy = self.distillation.noising.mix(self.batch.latents, self.batch.noise, levels)
        inputs = denoiser_inputs(self.unet, self.batch.rows)
        with self._autocast():
            with torch.no_grad(), softmax_attention(self.unet):
                target = predict(self.unet, noisy, levels.timesteps, inputs)
            with swapped(self.unet, self.floors):
                output = predict(self.unet, noisy, levels.timesteps, inputs)
                loss = F.mse_loss(output.float(), target.float())
                loss.backward()  # inside: checkpointing computes layers again
        for floor in self.floors:
            floor.bias.grad = None
        return loss.detach()

    def named(self) -> dict[str, Callable[[], Tensor]]:
        """All of them; the floor last."""
        stages = {
            stage.replace("_", " "): partial(self.of_package, stage)
            for stage in ("end_to_end", "teacher_forcing")
        }
        return {**stages, FLOOR: self.of_floor}

    def checkpointing(self, on: bool) -> None:
        """Whether activations are computed again in the backward pass instead of kept."""
        if on:
            self.unet.enable_gradient_checkpointing(
                gradient_checkpointing_func=checkpoint_with_grid
            )
        else:
            self.unet.disable_gradient_checkpointing()

    def _autocast(self) -> torch.autocast:
        dtype = next(p.dtype for p in self.unet.parameters() if not p.requires_grad)
        half = dtype != torch.float32
        return torch.autocast(self.unet.device.type, dtype if half else torch.bfloat16, half)


def random_batch(unet: UNet2DConditionModel, batch: int, latent: int) -> Batch:
    """A batch of random latents and prompts."""
    inputs = random_inputs(unet, batch, latent, latent)
    rows = {"prompt_embeds": inputs["encoder_hidden_states"]}
    if "added_cond_kwargs" in inputs:
        rows["pooled_embeds"] = inputs["added_cond_kwargs"]["text_embeds"]
        rows["sizes"] = inputs["added_cond_kwargs"]["time_ids"]
    latents = inputs["sample"].float()
    quantiles = (torch.arange(batch, device=unet.device) + 0.5) / batch
    return Batch(latents, torch.randn_like(latents), quantiles, rows, rows)


def measure(steps: Steps, timer: Timer) -> list[dict]:
    """One result per step and setting of checkpointing; the steps of a setting take turns.

    Raises:
        GateError: a loss is not finite.
    """
    rows = []
    for checkpointing in (False, True):
        steps.checkpointing(checkpointing)
        peaks = {name: _warm_up(name, run, timer) for name, run in steps.named().items()}
        times = _in_turn_ms(steps.named(), timer)
        rows += [
            {
                "step": name,
                "checkpointing": checkpointing,
                "ms": times[name],
                "over_floor": times[name] / times[FLOOR],
                "peak_gb": peaks[name],
            }
            for name in times
        ]
    return rows


def _warm_up(name: str, run: Callable[[], Tensor], timer: Timer) -> float | None:
    """Run a step, check it and return the gigabytes at its peak."""
    for _ in range(max(1, timer.warmup)):
        check_finite(f"loss of {name}", run())
    with peak_memory(timer.device) as peak:
        run()
    return None if peak.total is None else peak.total * 2**20 / 1e9


def _in_turn_ms(runs: dict[str, Callable[[], Tensor]], timer: Timer) -> dict[str, float]:
    """Medians of runs that alternate, so that a device that slows down does so for all."""
    once = Timer(timer.device, repeats=1, warmup=0)
    times = {name: [] for name in runs}
    for _ in range(timer.repeats):
        for name, run in runs.items():
            times[name].append(once.median_ms(run))
    return {name: statistics.median(found) for name, found in times.items()}


def time_layout(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Time steps on a UNet with random weights, print a table and write the results."""
    config = GSPN2Config(proxy_ratio=args.proxy_ratio, parameters_from=args.parameters_from)
    unet = build(args.model, device, dtype)
    args.batch_size = args.batch_size or 1
    steps = Steps(unet, config, args.batch_size, args.size // PIXELS_PER_LATENT)
    rows = measure(steps, Timer(device, args.repeats, args.warmup))
    title = f"Training steps, {args.model} at {args.size}², {device_name(device)}, {args.dtype}"
    show(results_table(title, rows))
    path = args.output or RESULTS / f"training-speed-{args.model}-{device.type}.json"
    figures = {
        "goal_ratio": GOAL_RATIO,
        "goal_gb": GOAL_GB,
        "trained_parameters": sum(p.numel() for p in steps.trained),
    }
    write_atomically(args, path, path.stem, device, rows, **figures)


def results_table(title: str, rows: Sequence[dict]) -> Table:
    """One row per step, a section per setting of checkpointing."""
    columns = ("step", "checkpointing", "ms", "over floor", "goal", "peak GB", "goal GB")
    grid = table(title, columns, left=("step", "checkpointing"))
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        whole = row["step"] == "end to end"
        grid.add_row(
            row["step"],
            "yes" if row["checkpointing"] else "no",
            number(row["ms"]),
            number(row["over_floor"]),
            number(GOAL_RATIO if whole else None),
            number(row["peak_gb"]),
            number(GOAL_GB if whole else None),
            end_section=following is not None
            and following["checkpointing"] != row["checkpointing"],
        )
    return grid


def time_tiny(args: argparse.Namespace) -> None:
    """Images per second of both stages of a Tiny Scenes teacher, by all processes together.

    Raises:
        GateError: the scan is wrong.
        ValueError: without ``--cache``.
    """
    if args.cache is None:
        raise ValueError("--tiny: expected a folder in --cache, got none")
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        mixed_precision=PRECISIONS[args.dtype], cpu=args.device == "cpu", kwargs_handlers=[ddp]
    )
    device, count = accelerator.device, accelerator.num_processes
    check_operator(device, getattr(torch, args.dtype))
    place = (accelerator.process_index, count)
    args.batch_size = args.batch_size or 64
    args.teacher = args.tiny
    pipe = load_teacher(args.tiny, device)
    cache = open_cache(args, pipe, *place, accelerator.wait_for_everyone)
    recipe = Recipe((args.steps, args.steps))
    put_denoiser(pipe, build_student(find_denoiser(pipe), recipe, args.seed))
    distillation = Distillation(find_denoiser(pipe), Noising(pipe.scheduler)).to(device)
    train, _ = split_rows(cache, min(HELD_OUT, len(cache) // 2))
    batches = Batches(
        cache, train, count * args.batch_size, share=Share(*place), seed=args.seed,
        caption_dropout=CAPTION_DROPOUT, device=device,
    )  # fmt: skip
    stages = dict.fromkeys(("teacher_forcing", "end_to_end"), args.steps)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(broadcast_object_list([own])[0])
        options = TrainingOptions(folder, stages, checkpointing_steps=None, logging_steps=LOGGED)
        Trainer(options, accelerator, distillation, dict.fromkeys(stages, batches)).run()
        accelerator.wait_for_everyone()
        rows = read_speeds(folder) if accelerator.is_main_process else []
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        rows = [{"processes": count, "images": count * args.batch_size, **row} for row in rows]
        report_tiny(args, device, rows)
    accelerator.end_training()


def read_speeds(folder: Path) -> list[dict]:
    """Images per second and gigabytes of each stage, from a trainer's log: the median of its lines
    but the first, in which the device warms up."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows = []
    for stage in dict.fromkeys(line["stage"] for line in lines):
        speeds = [
            line["images_per_second"]
            for line in lines
            if line["stage"] == stage and "images_per_second" in line
        ]
        memory = max(line["memory_gb"] for line in lines if line["stage"] == stage)
        rows.append(
            {
                "stage": stage,
                "images_per_second": statistics.median(speeds[1:]),
                "peak_gb": memory or None,
            }
        )
    return rows


def report_tiny(args: argparse.Namespace, device: torch.device, rows: list[dict]) -> None:
    """Print a table and write the results."""
    columns = ("stage", "processes", "images a step", "images/s", "peak GB")
    title = f"Training on Tiny Scenes, {device_name(device)}, {args.dtype}"
    grid = table(title, columns, left=("stage",))
    for row in rows:
        grid.add_row(
            row["stage"].replace("_", " "),
            str(row["processes"]),
            str(row["images"]),
            number(row["images_per_second"]),
            number(row["peak_gb"]),
        )
    show(grid)
    name = f"training-speed-tiny-{rows[0]['processes']}-{device.type}.json"
    path = args.output or RESULTS / name
    write_atomically(args, path, path.stem, device, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print a table and write the results.

    Raises:
        GateError: the scan or a loss is wrong; nothing was written.
        ValueError: an option does not fit this machine or another option.
    """
    args = parse_args(argv)
    device, dtype = prepare(args)
    if args.dtype not in PRECISIONS:
        raise ValueError(f"--dtype: expected one of {', '.join(PRECISIONS)}, got {args.dtype}")
    if args.tiny is not None:
        time_tiny(args)
    else:
        check_operator(device, dtype)
        time_layout(args, device, dtype)


if __name__ == "__main__":
    run_script(main)
