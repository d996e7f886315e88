"""The high-resolution pipeline: seconds and memory from prompt to file, and how good the pictures are.

python benchmarks/highres.py --sizes 2048 4096 8192 16384 16384x4096 2160x3840 --native
python benchmarks/highres.py --sizes 16384 --vram 24
python benchmarks/highres.py --experiment quality --scales 2 4 --sheet sheet.png
python benchmarks/highres.py --model tiny --sizes 512 --device cpu
"""  # noqa: E501

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
)
from distillation import PRECISIONS, write_atomically
from gate import check_finite, check_operator
from highres_quality import run_quality
from highres_runs import attempt, ignore, release, stages_of
from measuring import SLOW_MS, Timer
from models import PIXELS_PER_LATENT, random_inputs
from options import at_least, parser, prepare, run_script
from report import RESULTS, device_name, number, results_to_keep, show, table
from rich.table import Table
from sdxl import build_sdxl_pipeline
from torch import Tensor, nn
from unet import image_size

from gspn2_diffusers import GSPN2Config, fuse_gspn2, softmax_attention
from gspn2_diffusers.conditioning import native_resolution
from gspn2_diffusers.hardware import prefer_growing_memory, synchronize
from gspn2_diffusers.kernels.backends import why_not_cuda
from gspn2_diffusers.pipelines import running
from gspn2_diffusers.pipelines.cascade import Stage
from gspn2_diffusers.pipelines.generation import seeded
from gspn2_diffusers.pipelines.highres import UPSAMPLING, HighResPipeline
from gspn2_diffusers.pipelines.loading import load_pipeline
from gspn2_diffusers.pipelines.planner import Plan, plan_stages
from gspn2_diffusers.tiny_scenes.models import WEIGHTS

EXPERIMENTS = ("speed", "quality")
PROMPT = "a red cube and a blue ball on a meadow at dawn, mountains in the distance"
LARGEST_PNG = 8192  # pixels; pictures with a longer side are TIFFs
# Seconds from prompt to file at (height, width), SDXL's layout on an H100, and with little memory
# (seconds, GiB).
GOALS = {(4096, 4096): 8, (8192, 8192): 20, (16384, 16384): 60}
LEAN_GOALS = {(4096, 4096): (None, 10), (16384, 16384): (180, 24)}
# The library's kernels count a tensor's elements in 32 bits.
TOO_MANY_ELEMENTS = 2**31

# What may differ between a run and the one that it goes on from.
NOT_SETTINGS = {
    "experiment", "sizes", "scales", "resume", "output", "sheet", "device", "threads", "repeats",
    "warmup",
}  # fmt: skip
LOCAL = ("teacher", "weights", "probe", "sheet")  # where they lie says nothing



def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = parser(__doc__, repeats=1)
    add = args.add_argument
    add("--experiment", choices=EXPERIMENTS, nargs="+", default=["speed"], metavar="NAME",
        help=f"some of {', '.join(EXPERIMENTS)} (speed)")  # fmt: skip
    add("--steps", type=at_least(1), default=30, metavar="N", help="of the first stage (30)")
    add("--guidance-scale", type=float, default=4.0, metavar="G", help="of the first stage (4)")
    add("--upsample", choices=UPSAMPLING, default="pixel", help="between stages (pixel)")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="keep the finished rows of the results file")
    add("--teacher", type=Path, default=WEIGHTS / "pipeline", metavar="FOLDER",
        help="the Tiny Scenes pipeline; default: the shipped UNet")  # fmt: skip
    add("--weights", type=Path, metavar="FOLDER", help="its GSPN-2 blocks; default: shipped ones")
    _add_speed_options(args.add_argument_group("speed").add_argument)
    _add_quality_options(args.add_argument_group("quality").add_argument)
    return args.parse_args(argv)


def _add_speed_options(add: Callable) -> None:
    add("--model", choices=("tiny", "sdxl"), help="default: sdxl on CUDA, else tiny")
    add("--sizes", type=image_size, nargs="+", metavar="SIZE",
        default=[(side, side) for side in (2048, 4096, 8192, 16384)],
        help="pixels: 4096, or 2160x3840 for height x width (2048 to 16384)")  # fmt: skip
    add("--reuse", type=at_least(1), default=1, metavar="N",
        help="steps for which deep features serve at the last stage (1)")  # fmt: skip
    add("--vram", type=float, metavar="GIB",
        help="plan for so much GPU memory, and let torch have no more")  # fmt: skip
    add("--native", action="store_true",
        help="also time a step of the UNet's own attention at the size")  # fmt: skip
    add("--native-steps", type=at_least(1), default=50, metavar="N",
        help="steps that native generation is taken to need (50)")  # fmt: skip
    add("--native-max", type=at_least(1), default=8192, metavar="SIDE",
        help="none of that for more than SIDE² pixels (8192)")  # fmt: skip
    add("--channels-last", action="store_true", help="keep weights and maps in that layout")
    add("--compile", action="store_true", help="torch.compile the denoiser; plain stages gain")
    add("--fp8", action="store_true", help="linear layers of the denoiser in 8 bits, by torchao")
    add("--proxy-ratio", type=at_least(1), default=8, metavar="N",
        help="channels per proxy channel of sdxl's random blocks (8)")  # fmt: skip
    add("--parameters-from", choices=("proxy", "tokens"), default="proxy")


def _add_quality_options(add: Callable) -> None:
    add("--scales", type=at_least(2), nargs="+", default=[2, 4], metavar="S",
        help="sizes as multiples of the model's own (2 4)")  # fmt: skip
    add("--scenes", type=at_least(2), default=64, metavar="N", help="held-out captions (64)")
    add("--batch-size", "--batch_size", type=at_least(1), default=32, metavar="N")
    add("--probe", type=Path, default=WEIGHTS / "probe", metavar="FOLDER")
    add("--detail-renders", type=at_least(0), default=8, metavar="N",
        help="scenes rendered at every size to compare details with (8)")  # fmt: skip
    add("--sheet", type=Path, metavar="FILE", help="write a PNG of some pictures")


# ---- speed


class Watch:
    """Seconds and peak memory of the parts of a run: of the denoiser in "stage 0", "stage 1" and so
    on, of the "VAE" between and after stages, and of the "rest". Used as a context.

    Args:
        pipe: that runs inside.
        device: where it computes; only on CUDA memory is known.

    Attributes:
        seconds: by part, without those of the rest.
        peaks: bytes that torch held at most, by part.
        reserved: bytes that torch had taken from the device at most.
    """

    def __init__(self, pipe: HighResPipeline, device: torch.device):
        self.pipe = pipe
        self.on_cuda = device.type == "cuda"
        self.seconds: Counter[str] = Counter()
        self.peaks: Counter[str] = Counter()
        self.reserved = 0
        self._stack = ExitStack()

    def __enter__(self) -> Watch:
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        for name, watched in {
            "GuidedDenoiser": self._watched_denoiser(),
            "decode_bands": self._watched_decoding(running.decode_bands),
            "encode_tiled": self._watched_encoding(running.encode_tiled),
        }.items():
            self._stack.enter_context(patch.object(running, name, watched))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._note("rest")

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        synchronize()
        self._note("rest")
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronize()
            self.seconds[name] += time.perf_counter() - start
            self._note(name)

    def _note(self, name: str) -> None:
        """What was held since the last call, this part held."""
        if self.on_cuda:
            self.peaks[name] = max(self.peaks[name], torch.cuda.max_memory_allocated())
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()

    def _watched_denoiser(self) -> type:
        watch = self

        class Watched(running.GuidedDenoiser):
            def __call__(self, *args: object) -> Tensor:
                with watch._part(f"stage {watch.pipe.stage}"):
                    return super().__call__(*args)

        return Watched

    def _watched_decoding(self, decode: Callable) -> Callable:
        def watched(*args: object, **kwargs: object) -> Iterator[np.ndarray]:
            with closing(decode(*args, **kwargs)) as bands:
                while True:
                    with self._part("VAE"):
                        band = next(bands, None)
                    if band is None:
                        return
                    yield band

        return watched

    def _watched_encoding(self, encode: Callable) -> Callable:
        def watched(*args: object, **kwargs: object) -> Tensor:
            with self._part("VAE"):
                return encode(*args, **kwargs)

        return watched


class SpeedBench:
    """Takes pictures of several sizes from prompt to file, by one pipeline.

    Args:
        plans: made before, by size; of other sizes making the plan is part of the time.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        pipe: HighResPipeline,
        plans: dict[tuple[int, int], Plan | None],
    ):
        self.args, self.pipe, self.plans = args, pipe, plans
        self.device = pipe.device

    def measure(self, size: tuple[int, int]) -> dict:
        """The median run of ``--repeats``."""
        if self.args.compile:
            self.compile_for(size)
        runs = [self.run(size) for _ in range(self.args.repeats)]
        return sorted(runs, key=lambda run: run["seconds"])[(len(runs) - 1) // 2]

    def run(self, size: tuple[int, int]) -> dict:
        """One picture, with its parts and phases."""
        args, stages = self.args, stages_of(self.args, self.pipe, size)
        watch = Watch(self.pipe, self.device)
        suffix = ".png" if max(size) <= LARGEST_PNG else ".tif"
        with (
            tempfile.TemporaryDirectory() as folder,
            memory_limit(self.device, args.vram),
            watch,
        ):
            start = time.perf_counter()
            plan = self.plans.get(size) or make_plan(args, self.pipe, stages)
            planned = time.perf_counter()
            result = self.pipe(
                PROMPT, *size, stages=stages, plan=plan, reuse=args.reuse, upsample=args.upsample,
                generator=seeded(args.seed), output=Path(folder) / f"picture{suffix}",
                progress=ignore,
            )  # fmt: skip
            end = time.perf_counter()
            file_bytes = result.path.stat().st_size
        denoising = sum(watch.seconds[f"stage {number}"] for number in range(len(stages)))
        parts = {
            "plan": planned - start,
            "text": result.seconds["text"],
            "denoiser": denoising,
            "VAE": watch.seconds["VAE"],
        }
        parts["rest"] = end - start - sum(parts.values())
        outside = outside_bytes(self.device)
        peak = max(watch.peaks.values()) + outside if watch.on_cuda else None
        return {
            "seconds": end - start,
            "parts": parts,
            "phases": phases_of(result.plan, stages, watch, outside),
            "peak_gib": _gib(peak),
            "reserved_gib": _gib(watch.reserved + outside if watch.on_cuda else None),
            "outside_gib": _gib(outside if watch.on_cuda else None),
            "predicted_gib": _gib(result.plan and result.plan.peak_bytes),
            "host_gib": _gib(result.plan and result.plan.host_bytes),
            "became_leaner": plan != result.plan,
            "file_mib": file_bytes / 2**20,
        }

    @torch.no_grad()
    def compile_for(self, size: tuple[int, int]) -> None:
        """Let every stage run once, one step long, so that compiling takes no time later."""
        stages = [replace(stage, steps=1) for stage in stages_of(self.args, self.pipe, size)]
        plan = self.plans.get(size) or make_plan(self.args, self.pipe, stages)
        with memory_limit(self.device, self.args.vram):
            self.pipe(
                PROMPT, *size, stages=stages, plan=plan, reuse=self.args.reuse,
                upsample=self.args.upsample, output_type="latent", progress=ignore,
            )  # fmt: skip


def run_speed(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, done: set[tuple]
) -> Iterator[dict]:
    """A row for every size that is not done."""
    sizes = [size for size in dict.fromkeys(args.sizes) if ("speed", *size) not in done]
    if not sizes:
        return
    pipe = HighResPipeline(build_pipeline(args, device, dtype))
    release(device)
    # Twice the model's own size has every kind of part, and takes seconds.
    doubled = 2 * native_resolution(pipe.base)
    smallest = min([*sizes, (doubled, doubled)], key=math.prod)
    plans = {}
    if args.fp8:  # whose weights the planner cannot trace; they are smaller than it then takes them
        planned = {*sizes, smallest}
        plans = {size: make_plan(args, pipe, stages_of(args, pipe, size)) for size in planned}
    make_cheaper(args, pipe.denoiser)
    bench = SpeedBench(args, pipe, plans)
    for _ in range(args.warmup):
        attempt(partial(bench.run, smallest), device)
    for size in sizes:
        row = {"experiment": "speed", "size": list(size)}
        row |= attempt(partial(bench.measure, size), device)
        goal_seconds, goal_gib = goals(args, size)
        row |= {"goal_seconds": goal_seconds, "goal_gib": goal_gib, "native": None}
        if args.native and math.prod(size) <= args.native_max**2:
            row["native"] = attempt(partial(time_native, args, pipe.denoiser, size), device)
        yield row


def build_pipeline(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> DiffusionPipeline:
    """The patched pipeline that ``--model`` names, fused where ``gspn2 highres`` would fuse it."""
    if args.model == "tiny":
        names = {"weights": args.weights, "dtype": dtype, "device": device}
        return load_pipeline(args.teacher, **names, fuse=True)
    config = GSPN2Config(proxy_ratio=args.proxy_ratio, parameters_from=args.parameters_from)
    pipe = build_sdxl_pipeline(device, dtype, config)
    return fuse_gspn2(pipe) if why_not_cuda(device, dtype) is None else pipe


def make_cheaper(args: argparse.Namespace, denoiser: nn.Module) -> None:
    """Do to the denoiser what ``--channels-last``, ``--fp8`` and ``--compile`` ask for."""
    if args.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if args.fp8:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

        quantize_(denoiser, Float8DynamicActivationFloat8WeightConfig(), _takes_fp8)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # for each size of each stage there is a graph
        # In place: a pipeline unwraps what torch.compile returns.
        denoiser.compile(dynamic=False)


def _takes_fp8(module: nn.Module, name: str) -> bool:
    """Only layers outside of GSPN-2 blocks, whose sides suit the 8-bit product."""
    plain = type(module) is nn.Linear and ".gspn2." not in name
    return plain and module.in_features % 16 == 0 and module.out_features % 16 == 0


def make_plan(
    args: argparse.Namespace, pipe: HighResPipeline, stages: Sequence[Stage]
) -> Plan | None:
    """What the pipeline would plan by itself, or for ``--vram``; None where it would not."""
    if args.vram is None and pipe.device.type != "cuda":
        return None
    vram = None if args.vram is None else round(args.vram * 2**30)
    return plan_stages(pipe.base, stages, vram, reuse=args.reuse, upsample=args.upsample)


@contextmanager
def memory_limit(device: torch.device, gib: float | None) -> Iterator[None]:
    """While inside, the process takes no more of the device than a card with so much would give."""
    if gib is None or device.type != "cuda":
        yield
        return
    release(device)
    total = torch.cuda.mem_get_info()[1]
    share = (gib * 2**30 - outside_bytes(device)) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def outside_bytes(device: torch.device) -> int:
    """What of the device's memory is in use, but not torch's: context, kernels, other processes."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def phases_of(plan: Plan | None, stages: Sequence[Stage], watch: Watch, outside: int) -> list[dict]:
    """Measured and predicted seconds and memory of every stage's denoiser, and of the VAE."""
    predicted = {row["what"]: row for row in plan.rows()} if plan else {}
    phases = []
    for what, stage in [*((f"stage {n}", s) for n, s in enumerate(stages)), ("VAE", stages[-1])]:
        planned = predicted.get("decode" if what == "VAE" else what, {})
        peak = watch.peaks[what] + outside if watch.on_cuda else None
        phases.append(
            {
                "what": what,
                "size": [stage.height, stage.width],
                "steps": None if what == "VAE" else stage.steps,
                "how": planned.get("how"),
                "seconds": watch.seconds[what],
                "predicted_seconds": planned.get("seconds"),
                "peak_gib": _gib(peak),
                "predicted_gib": _gib(planned.get("peak_bytes")),
            }
        )
    return phases


def goals(args: argparse.Namespace, size: tuple[int, int]) -> tuple[float | None, float | None]:
    """(seconds, GiB) that a picture should take at most; None where there is no goal."""
    if args.model != "sdxl":
        return None, None
    if args.vram is None:
        return GOALS.get(size), None
    seconds, gib = LEAN_GOALS.get(size, (None, None))
    # A plan for more memory than the goal may well use it.
    return (seconds, gib) if gib is not None and args.vram <= gib else (None, None)


@torch.no_grad()
def time_native(args: argparse.Namespace, unet: nn.Module, size: tuple[int, int]) -> dict:
    """Seconds of one guided step of the UNet's own attention at this size, and of all steps.

    Both passes of a step run as one batch if that fits, else one after the other.
    """
    latent = [side // PIXELS_PER_LATENT for side in size]
    # Its largest map is the first of the last up block, before which two are joined.
    elements = math.prod(latent) * sum(unet.config.block_out_channels[:2])
    batches = [2, 1] if 2 * elements < TOO_MANY_ELEMENTS else [1]
    for batch in batches:
        try:
            seconds = _native_seconds(args, unet, batch, latent)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            release(unet.device)
            continue
        step = seconds * 2 / batch
        return {
            "batch": batch,
            "step_seconds": step,
            "steps": args.native_steps,
            "seconds": step * args.native_steps,
        }
    raise AssertionError("a batch of 1 either runs or raises")


def _native_seconds(
    args: argparse.Namespace, unet: nn.Module, batch: int, latent: Sequence[int]
) -> float:
    inputs = random_inputs(unet, batch, *latent)
    forward = partial(unet, **inputs, return_dict=False)
    outputs = []

    def run() -> None:
        outputs[:] = forward()

    with softmax_attention(unet):
        # Passes of minutes are timed once; what is compiled, after that.
        first = Timer(unet.device, repeats=1, warmup=1 if args.compile else 0).median_ms(run)
        check_finite(f"softmax at {latent[0]}x{latent[1]}", outputs[0])
        if first > SLOW_MS:
            return first / 1000
        return Timer(unet.device, repeats=3, warmup=0).median_ms(run) / 1000


# ---- rows, tables and files


def _gib(count: int | None) -> float | None:
    return None if count is None else count / 2**30


def row_key(row: dict) -> tuple:
    """What no two rows of a file have in common."""
    if row["experiment"] == "speed":
        return ("speed", *row["size"])
    return ("quality", row["scale"], row["contestant"])


def row_order(args: argparse.Namespace, row: dict) -> tuple:
    """Where a row stands: sizes as they were asked for, scales from small to large."""
    if row["experiment"] == "quality":
        return (1, row["scale"])
    sizes = [list(size) for size in args.sizes]
    return (0, sizes.index(row["size"]) if row["size"] in sizes else len(sizes))


def teacher_kind(folder: Path) -> str:
    """What a Tiny Scenes pipeline denoises with."""
    return "pixart" if (folder / "transformer").is_dir() else "unet"


def results_path(args: argparse.Namespace, device: torch.device) -> Path:
    """``--output``, or a file in results/ named by the experiments and what sets the run apart."""
    if args.output is not None:
        return args.output
    words = ["highres", *args.experiment]
    if "speed" in args.experiment:
        words += [args.model]
        words += [] if args.vram is None else [f"{args.vram:g}gib"]
        words += [] if args.reuse == 1 else [f"reuse{args.reuse}"]
        words += [name for name in ("channels_last", "fp8", "compile") if getattr(args, name)]
    if "quality" in args.experiment:
        words += [teacher_kind(args.teacher)]
    words += [] if args.upsample == "pixel" else [args.upsample]
    return RESULTS / f"{'-'.join(words).replace('_', '-')}-{device.type}.json"


def finished_rows(args: argparse.Namespace, path: Path) -> list[dict]:
    """Rows without error of a results file that ``--resume`` keeps.

    Raises:
        ValueError: the file is of other settings.
    """
    if not args.resume or not path.is_file():
        return []
    shown = vars(_without_places(args))
    settings = {name: shown[name] for name in shown.keys() - NOT_SETTINGS}
    return results_to_keep(path, settings)["rows"]


def _without_places(args: argparse.Namespace) -> argparse.Namespace:
    shown = copy.copy(args)
    for name in LOCAL:
        if getattr(shown, name) is not None:
            setattr(shown, name, Path(getattr(shown, name).name))
    return shown


def describe_row(row: dict) -> str:
    """One line on a row that was just measured."""
    size = "x".join(map(str, row["size"]))
    head = f"{row['experiment']}, {size}" + (
        f", {row['contestant']}" if row["experiment"] == "quality" else ""
    )
    if "error" in row:
        return f"{head}: {row['error'].splitlines()[0]}"
    if row["experiment"] == "quality":
        right = 100 * row["scores"]["mean_accuracy"]
        return f"{head}: {right:.1f} % right, {number(row['seconds'])} s per picture"
    memory = f", {number(row['peak_gib'])} GiB" if row["peak_gib"] is not None else ""
    return f"{head}: {number(row['seconds'])} s{memory}"


def speed_table(title: str, rows: Sequence[dict]) -> Table:
    """One row per size."""
    columns = (
        "size", "s", "goal", "GiB", "goal", "reserved", "predicted", "ratio", "native s", "times",
    )  # fmt: skip
    grid = table(title, columns)
    for row in rows:
        size = "x".join(map(str, row["size"]))
        native = (row.get("native") or {}).get("seconds")
        if "error" in row:
            grid.add_row(size, "failed", *6 * ["-"], number(native), "-")
            continue
        grid.add_row(
            size,
            number(row["seconds"]),
            goal_cell(row["seconds"], row["goal_seconds"]),
            number(row["peak_gib"]),
            goal_cell(row["reserved_gib"], row["goal_gib"]),
            number(row["reserved_gib"]),
            number(row["predicted_gib"]),
            ratio_cell(row["predicted_gib"], row["peak_gib"]),
            number(native),
            ratio_cell(native, row["seconds"]),
        )
    return grid


def goal_cell(value: float | None, goal: float | None) -> str:
    """A goal, and whether it is met."""
    if goal is None:
        return "-"
    if value is None:
        return f"{goal:g}"
    return f"{goal:g} {'met' if value <= goal else 'missed'}"


def ratio_cell(value: float | None, to: float | None) -> str:
    return number(value / to if value is not None and to else None)


def phases_table(title: str, rows: Sequence[dict]) -> Table:
    """Where time and memory went: a section for each size."""
    columns = (
        "size", "part", "at", "steps", "s", "predicted", "ratio", "GiB", "predicted", "ratio",
    )  # fmt: skip
    grid = table(title, columns, left=("part",))
    for row in rows:
        size, parts = "x".join(map(str, row["size"])), row["parts"]
        nothing = ["-"] * 5
        for name in ("plan", "text"):
            grid.add_row(size, name, "-", "-", number(parts[name]), *nothing)
        for phase in row["phases"]:
            grid.add_row(
                size,
                "denoiser" if phase["steps"] else phase["what"],
                "x".join(map(str, phase["size"])),
                str(phase["steps"] or "-"),
                number(phase["seconds"]),
                number(phase["predicted_seconds"]),
                ratio_cell(phase["predicted_seconds"], phase["seconds"]),
                number(phase["peak_gib"]),
                number(phase["predicted_gib"]),
                ratio_cell(phase["predicted_gib"], phase["peak_gib"]),
            )
        rest = number(parts["rest"])
        grid.add_row(size, "rest", "-", "-", rest, *nothing, end_section=True)
    return grid


def quality_table(title: str, rows: Sequence[dict]) -> Table:
    """One row per scale and contestant."""
    columns = ("size", "contestant", "right", "all", "Fr.", "detail", "s/picture")
    grid = table(title, columns, left=("contestant",))
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        end = following is not None and following["size"] != row["size"]
        cells = ["failed", *4 * ["-"]]
        if "error" not in row:
            found = row["scores"]
            cells = [f"{100 * found[name]:.1f}" for name in ("mean_accuracy", "all_right")]
            cells += [number(found["frechet"]), number(row["detail"]), number(row["seconds"])]
        size = "x".join(map(str, row["size"]))
        grid.add_row(size, row["contestant"], *cells, end_section=end)
    return grid


def show_tables(args: argparse.Namespace, device: torch.device, rows: Sequence[dict]) -> None:
    """Print what was found."""
    speed = [row for row in rows if row["experiment"] == "speed"]
    if speed:
        about = f"{args.model}, {args.dtype}, {device_name(device)}"
        show(speed_table(f"Prompt to file: {about}", speed))
        measured = [row for row in speed if "error" not in row]
        if measured:
            show(phases_table(f"Its parts: {about}", measured))
    quality = [row for row in rows if row["experiment"] == "quality"]
    if quality:
        kind = teacher_kind(args.teacher)
        about = f"Tiny Scenes {kind}, {args.scenes} captions, {args.dtype}, {device_name(device)}"
        show(quality_table(about, quality))


def settle(args: argparse.Namespace, device: torch.device) -> None:
    """Work out defaults that depend on others, and check what does not fit.

    Raises:
        ValueError: an option does not fit this machine or another option.
    """
    kind = teacher_kind(args.teacher)
    if args.model is None:
        args.model = "sdxl" if device.type == "cuda" else "tiny"
    if args.weights is None:
        args.weights = WEIGHTS / {"unet": "gspn2", "pixart": "pixart_gspn2"}[kind]
    if args.vram is not None and not args.vram > 0:
        raise ValueError(f"--vram: expected more than 0 GiB, got {args.vram:g}")
    if args.fp8 and importlib.util.find_spec("torchao") is None:
        raise ValueError("--fp8: expected torchao: pip install torchao")
    if args.fp8 and device.type != "cuda":
        raise ValueError(f"--fp8: expected a CUDA device, got {device.type!r}")
    if args.native and args.model == "tiny" and kind != "unet":
        raise ValueError(f"--native: expected a UNet, got a {kind} teacher")
    if "quality" in args.experiment and args.dtype not in PRECISIONS:
        raise ValueError(f"--dtype: expected one of {', '.join(PRECISIONS)}, got {args.dtype}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure; write the results after every row, and print tables at the end.

    Raises:
        GateError: the scan is wrong; nothing was measured.
        ValueError: an option does not fit this machine or another option.
    """
    args = parse_args(argv)
    prefer_growing_memory()
    device, dtype = prepare(args)
    settle(args, device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    check_operator(device, dtype)
    path = results_path(args, device)
    rows = finished_rows(args, path)
    done = {row_key(row) for row in rows}
    total = torch.cuda.mem_get_info()[1] if device.type == "cuda" else None
    runs = {"speed": run_speed, "quality": run_quality}
    for experiment in dict.fromkeys(args.experiment):
        for row in runs[experiment](args, device, dtype, done):
            rows.append(row)
            rows.sort(key=partial(row_order, args))
            print(describe_row(row), flush=True)
            write_atomically(
                _without_places(args), path, path.stem, device, rows, device_gib=_gib(total)
            )
    show_tables(args, device, rows)


if __name__ == "__main__":
    # So that an end by SIGTERM, as of `timeout`, leaves no limit and no temporary files behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by a signal"))
    run_script(main)
