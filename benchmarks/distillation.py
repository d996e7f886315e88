"""Distil a Tiny Scenes teacher into GSPN-2 blocks and into what they compete with; compare.

python benchmarks/distillation.py --experiment table ratio --cache latents --scenes 65536
python benchmarks/distillation.py --experiment stages --cache latents --scenes 65536 --devices 2
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import math
import os
import queue
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from gate import check_operator
from layer import gspn2_layer, run_on, softmax_layer
from measuring import Timer, capturing_stream
from mixers import MIXERS, put_mixers
from options import at_least, parser, prepare, run_script
from report import RESULTS, device_name, number, results_to_keep, show, table, write_results
from rich.table import Table
from torch import nn

from gspn2_diffusers import GSPN2Adapter, GSPN2Config, apply_gspn2, gspn2_sites
from gspn2_diffusers.conditioning import native_resolution
from gspn2_diffusers.distillation.batches import Batches, split_rows
from gspn2_diffusers.distillation.cache import LatentCache, build_cache
from gspn2_diffusers.distillation.losses import Distillation, LossWeights
from gspn2_diffusers.distillation.sources import TinyScenes
from gspn2_diffusers.distillation.teacher import TeacherEncoder
from gspn2_diffusers.distillation.trainer import Trainer, TrainingOptions
from gspn2_diffusers.distillation.validation import Validation
from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.noising import Noising
from gspn2_diffusers.pipelines.loading import load_pipeline
from gspn2_diffusers.tiny_scenes.models import WEIGHTS
from gspn2_diffusers.tiny_scenes.score import Exam, prepare_exam, score

BLOCK = GSPN2Config(proxy_ratio=4, groups=1, parameters_from="tokens", mean_path=True)
EXPERIMENTS = ("table", "ratio", "start", "stages", "losses")
PRECISIONS = {"float32": "no", "bfloat16": "bf16"}
TEACHERS = {"UNet2DConditionModel": "unet", "PixArtTransformer2DModel": "pixart"}
CAPTION_DROPOUT = 0.1
KEPT_OF_DIT = 4  # a hybrid with one resolution keeps every fourth layer
RATIOS = (2, 4, 8, 16, 32)
# What may differ between a run and the one that it goes on from.
NOT_SETTINGS = {
    "experiment", "runs", "devices", "jobs_per_device", "cache_processes", "resume", "output",
    "device", "threads", "step_ratio",
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What makes one student; equal ones of several experiments are trained once.

    Args:
        steps: of teacher forcing and end to end.
        mixer: "gspn2", a name of `MIXERS`, or "softmax" for the teacher itself.
        hybrid: keep some layers as they are: those of the lowest resolution, or every fourth
            where all have the same.
    """

    steps: tuple[int, int]
    mixer: str = "gspn2"
    block: GSPN2Config = BLOCK
    inherit: bool = True
    hybrid: bool = False
    weights: LossWeights = field(default_factory=LossWeights)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = parser(__doc__, repeats=10)
    add = args.add_argument
    add("--experiment", choices=EXPERIMENTS, nargs="+", default=["table"], metavar="NAME",
        help=f"some of {', '.join(EXPERIMENTS)} (table)")  # fmt: skip
    add("--runs", nargs="+", metavar="NAME", help="only the runs with these names")
    add("--teacher", type=Path, default=WEIGHTS / "pipeline", metavar="FOLDER",
        help="a Tiny Scenes pipeline; default: the shipped one")  # fmt: skip
    add("--probe", type=Path, default=WEIGHTS / "probe", metavar="FOLDER")
    add("--cache", type=Path, required=True, metavar="FOLDER",
        help="where latents are kept; without --scenes: a finished cache itself")  # fmt: skip
    add("--scenes", type=at_least(2), metavar="COUNT", help="pictures to render into the cache")
    add("--cache_processes", type=at_least(1), default=1, metavar="N",
        help="that render at once (1); on CUDA each compiles the renderer first")  # fmt: skip
    add("--held_out", type=at_least(1), default=512, metavar="ROWS", help="to validate on (512)")
    add("--teacher_forcing_steps", type=at_least(0), default=700, metavar="N")
    add("--end_to_end_steps", type=at_least(0), default=1300, metavar="N")
    add("--step_ratio", type=float, metavar="R", help="seconds of an end-to-end step over those "
        "of teacher forcing, for equal times in `stages`; default: measured")  # fmt: skip
    add("--batch_size", type=at_least(1), default=64, metavar="N")
    add("--learning_rate", type=float, default=1e-3, metavar="LR")
    add("--validation_steps", type=at_least(1), default=200, metavar="N")
    add("--score_scenes", type=at_least(0), default=1024, metavar="N",
        help="held-out captions to draw (1024); 0: none")  # fmt: skip
    add("--score_batch_size", type=at_least(1), default=128, metavar="N")
    add("--num_inference_steps", type=at_least(1), default=50, metavar="N")
    add("--guidance_scale", type=float, default=4.0, metavar="G")
    add("--layer_channels", type=at_least(64), default=640, metavar="C",
        help="width of the layer that `ratio` times (640)")  # fmt: skip
    add("--layer_grid", type=at_least(1), default=128, metavar="SIDE",
        help="tokens along each side of it (128)")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--devices", type=at_least(1), default=1, metavar="N", help="GPUs to spread runs over (1)")
    add("--jobs_per_device", type=at_least(1), default=1, metavar="K",
        help="runs at once on each (1); more make the seconds of a run longer")  # fmt: skip
    add("--resume", action="store_true", help="keep the finished runs of the results file")
    return args.parse_args(argv)


def plan(experiment: str, steps: tuple[int, int], step_ratio: float) -> dict[str, Recipe]:
    """The runs of an experiment by name.

    Args:
        steps: of teacher forcing and end to end.
        step_ratio: seconds of an end-to-end step over those of a step of teacher forcing.
    """
    base = Recipe(steps)
    block = partial(replace, BLOCK)
    teacher = {"teacher": replace(base, steps=(0, 0), mixer="softmax")}
    if experiment == "table":
        others = {name: replace(base, mixer=name) for name in MIXERS}
        return {**teacher, "gspn2": base, "gspn2 hybrid": replace(base, hybrid=True), **others}
    if experiment == "ratio":
        ratios = {f"C/P = {n}": block(proxy_ratio=n) for n in RATIOS}
        groups = {"groups 4": block(groups=4), "groups P": block(groups=None)}
        blocks = {**ratios, **groups, "chunk_size 4": block(chunk_size=4)}
        return {**teacher, **{name: replace(base, block=b) for name, b in blocks.items()}}
    if experiment == "start":
        return {
            "inherited": base,
            "random start": replace(base, inherit=False),
            "no mean path": replace(base, block=block(mean_path=False)),
            "parameters from proxy": replace(base, block=block(parameters_from="proxy")),
        }
    if experiment == "stages":
        forcing, end_to_end = steps
        return {
            "both": base,
            "teacher forcing": replace(base, steps=(forcing + round(end_to_end * step_ratio), 0)),
            "end to end": replace(base, steps=(0, end_to_end + round(forcing / step_ratio))),
        }
    weights = {
        "output": LossWeights(output=1, layer=0, block=0),
        "output + layer": LossWeights(output=1, layer=0.5, block=0),
        "output + layer + block": LossWeights(output=1, layer=0.5, block=0.5),
        "output + base": LossWeights(output=1, layer=0, block=0, base=1),
    }
    return {name: replace(base, weights=chosen) for name, chosen in weights.items()}


def plan_all(args: argparse.Namespace, step_ratio: float) -> dict[tuple[str, str], Recipe]:
    """All runs that were asked for, by experiment and name.

    Raises:
        ValueError: there is no run of a name that was asked for.
    """
    steps = (args.teacher_forcing_steps, args.end_to_end_steps)
    runs = {
        (experiment, name): recipe
        for experiment in args.experiment
        for name, recipe in plan(experiment, steps, step_ratio).items()
        if args.score_scenes or recipe.mixer != "softmax"
    }
    names = {name for _, name in runs}
    unknown = set(args.runs or ()) - names
    if unknown:
        raise ValueError(f"--runs: expected some of {sorted(names)}, got {sorted(unknown)}")
    return {key: recipe for key, recipe in runs.items() if not args.runs or key[1] in args.runs}


def load_teacher(folder: Path, device: torch.device) -> DiffusionPipeline:
    """The pipeline in float32, frozen."""
    pipe = load_pipeline(folder, dtype="float32", device=device)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def put_denoiser(pipe: DiffusionPipeline, denoiser: nn.Module) -> None:
    """Make a denoiser that of the pipeline."""
    own = find_denoiser(pipe)
    setattr(pipe, next(name for name, part in pipe.components.items() if part is own), denoiser)


def open_cache(
    args: argparse.Namespace,
    pipe: DiffusionPipeline,
    index: int = 0,
    count: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> LatentCache:
    """The cache of ``--cache`` and ``--scenes``, rendered as far as it is not there.

    Args:
        index, count, wait: of the processes that render together, as in `build_cache`.

    Raises:
        ValueError: without ``--scenes``, no finished cache.
    """
    if args.scenes is None:
        return LatentCache(args.cache)
    side = native_resolution(pipe)
    source = TinyScenes(args.scenes, side, args.seed)
    return build_cache(
        args.cache, source, TeacherEncoder(pipe), [(side, side)], batch_size=64,
        process_index=index, process_count=count, wait=wait,
    )  # fmt: skip


def draw_batches(args: argparse.Namespace, cache: LatentCache, device: torch.device) -> Batches:
    """Batches to train on in one process."""
    train, _ = split_rows(cache, _held_out(args, cache))
    return Batches(
        cache, train, args.batch_size, seed=args.seed, caption_dropout=CAPTION_DROPOUT,
        device=device,
    )  # fmt: skip


def draw_held_out(args: argparse.Namespace, cache: LatentCache, device: torch.device) -> Batches:
    """Batches to validate on."""
    count = _held_out(args, cache)
    _, held = split_rows(cache, count)
    return Batches(cache, held, min(args.batch_size, count), seed=args.seed, device=device)


def _held_out(args: argparse.Namespace, cache: LatentCache) -> int:
    return max(1, min(args.held_out, len(cache) // 2))


def build_student(teacher: nn.Module, recipe: Recipe, seed: int) -> nn.Module:
    """A copy of the denoiser with the recipe's mixers, in which only they require gradients."""
    torch.manual_seed(seed)
    student = copy.deepcopy(teacher).requires_grad_(False)
    if recipe.mixer != "gspn2":
        put_mixers(student, MIXERS[recipe.mixer])
        return student
    kept = kept_layers(student) if recipe.hybrid else None
    adapter = GSPN2Adapter.for_model(
        student, recipe.block, keep_attention=kept, inherit=recipe.inherit
    )
    apply_gspn2(student, adapter)
    adapter.float().requires_grad_(True)
    return student


def kept_layers(denoiser: nn.Module) -> list[str]:
    """Names of the attention layers that a hybrid keeps: of the lowest resolution, or every fourth
    where there is only one."""
    sites = gspn2_sites(denoiser)
    areas = [math.prod(site.grid) for site in sites]
    if len(set(areas)) == 1:
        return [site.name for site in sites[KEPT_OF_DIT - 1 :: KEPT_OF_DIT]]
    return [site.name for site, area in zip(sites, areas, strict=True) if area == min(areas)]


class Clock:
    """Seconds of training, without those of what happens in between."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Count from now on."""
        self._synchronise()
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Count no more; does nothing where nothing was started."""
        self._synchronise()
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Course:
    """The training of one student, with what is measured on the way."""

    def __init__(
        self,
        args: argparse.Namespace,
        pipe: DiffusionPipeline,
        recipe: Recipe,
        batches: Batches,
        held_out: Batches,
    ):
        self.args, self.recipe, self.batches = args, recipe, batches
        device = batches.device
        self.accelerator = Accelerator(
            mixed_precision=PRECISIONS[args.dtype], cpu=device.type == "cpu"
        )
        self.distillation = Distillation(
            find_denoiser(pipe), Noising(pipe.scheduler), recipe.weights
        ).to(device)
        count = max(1, _rows_of(held_out) // held_out.order.batch_size)
        self.validation = Validation(
            self.accelerator, self.distillation, held_out, count, pipe=pipe, folder=Path()
        )
        self.clock = Clock(device)
        self.curve: list[dict] = []

    def run(self) -> dict:
        """Train, and return the errors on held-out rows over steps and seconds, and the losses."""
        losses = self._train() if any(self.recipe.steps) and self._trainable() else []
        if not self.curve:
            with self.accelerator.autocast():
                self.distillation.calibrate(
                    batch for step in range(4) for batch in self.batches.of_step(step)
                )
            self._validate(0, "none")
        return {
            "trained_parameters": sum(parameter.numel() for parameter in self._trainable()),
            "replaced_layers": len(self.distillation.layers),
            "seconds": self.clock.seconds,
            "output_error": self.curve[-1]["output_error"],
            "layer_error": self.curve[-1]["layer_error"],
            "curve": self.curve,
            "losses": losses,
        }

    def _train(self) -> list[dict]:
        steps = dict(zip(("teacher_forcing", "end_to_end"), self.recipe.steps, strict=True))
        with tempfile.TemporaryDirectory() as folder, _silence():
            options = TrainingOptions(
                Path(folder), steps, learning_rate=self.args.learning_rate,
                lr_warmup_steps=min(100, sum(steps.values()) // 10), checkpointing_steps=None,
                validation_steps=self.args.validation_steps,
            )  # fmt: skip
            finished = Trainer(
                options, self.accelerator, self.distillation, dict.fromkeys(steps, self.batches),
                validate=self._validate, before_stage=partial(self._before_stage, steps),
            ).run()  # fmt: skip
            if not finished:
                raise SystemExit("stopped by a signal")  # half a run is no result
            return read_losses(Path(folder))

    def _before_stage(self, steps: dict[str, int], stage: str, anew: bool) -> None:
        if self.curve:
            return
        self._validate(0, stage)
        for used in (name for name, count in steps.items() if count):
            self._warm_up(used)
        self.clock.start()

    def _warm_up(self, stage: str) -> None:
        """Compile and allocate before the clock runs."""
        for batch in self.batches.of_step(0):
            with self.accelerator.autocast():
                loss = self.distillation(batch, stage)["loss"]
            loss.backward()
        self.distillation.zero_grad()

    def _validate(self, step: int, stage: str) -> dict:
        started = bool(self.curve)
        self.clock.stop()
        errors = self.validation.errors()
        entry = {"step": step, "stage": stage, "seconds": self.clock.seconds}
        self.curve.append({**entry, **errors})
        if started:
            self.clock.start()
        return errors

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.distillation.parameters() if p.requires_grad]


def read_losses(folder: Path) -> list[dict]:
    """Step, stage and loss of the lines of a trainer's log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {name: line[name] for name in ("step", "stage", "loss")} for line in lines if "loss" in line
    ]


def _rows_of(batches: Batches) -> int:
    return sum(len(rows) for rows in batches.order.buckets)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """While inside, nothing is printed: runs side by side have one line each."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


class Bench:
    """Runs recipes one after the other on one device; the teacher is loaded once.

    Args:
        exam: None: no pictures are drawn and judged.
    """

    def __init__(
        self, args: argparse.Namespace, exam: Exam | None, cache: LatentCache, device: torch.device
    ):
        self.args, self.device = args, device
        self.pipe = load_teacher(args.teacher, device)
        self.teacher = find_denoiser(self.pipe)
        self.batches = draw_batches(args, cache, device)
        self.held_out = draw_held_out(args, cache, device)
        self.exam = exam
        if exam is not None:
            self.exam = replace(
                exam, probe=exam.probe.to(device), reference=exam.reference.to(device)
            )

    def attempt(self, recipe: Recipe) -> dict:
        """What `run` gives, or ``error``: one failure must not lose what others found."""
        try:
            return self.run(recipe)
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            put_denoiser(self.pipe, self.teacher)
            gc.collect()  # students are in reference cycles
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def run(self, recipe: Recipe) -> dict:
        """Train a student and measure it."""
        result = {"output_error": 0.0, "layer_error": 0.0, "seconds": 0.0}
        if recipe.mixer != "softmax":
            put_denoiser(self.pipe, build_student(self.teacher, recipe, self.args.seed))
            result = Course(self.args, self.pipe, recipe, self.batches, self.held_out).run()
        begin = time.perf_counter()
        result["scores"] = self._scores()
        return result | {"score_seconds": time.perf_counter() - begin}

    def _scores(self) -> dict[str, dict]:
        """Of pictures at the training resolution and at twice it, by their sides."""
        if self.exam is None:
            return {}
        args, side = self.args, native_resolution(self.pipe)
        with torch.autocast(self.device.type, torch.bfloat16, args.dtype == "bfloat16"):
            return {
                str(scale * side): score(
                    self.pipe, self.exam, steps=args.num_inference_steps,
                    guidance_scale=args.guidance_scale, height=scale * side, width=scale * side,
                    batch_size=max(1, args.score_batch_size // scale**2),
                )
                for scale in (1, 2)
            }  # fmt: skip


def work(
    args: argparse.Namespace,
    exam: Exam | None,
    cache: LatentCache,
    device: torch.device,
    tasks: mp.Queue,
    results: mp.Queue,
) -> None:
    """A worker process: run recipes from `tasks` until one is None or the parent is gone."""
    parent = os.getppid()
    enter_worker(args, device)
    bench = Bench(args, exam, cache, device)
    for recipe in iter(tasks.get, None):
        if os.getppid() != parent:
            return
        results.put((os.getpid(), recipe, None))
        results.put((os.getpid(), recipe, bench.attempt(recipe)))


def enter_worker(args: argparse.Namespace, device: torch.device) -> None:
    """Settle down on a device with a fair share of the processor."""
    prepare(copy.copy(args))
    share = (os.cpu_count() or 1) // (args.devices * args.jobs_per_device)
    torch.set_num_threads(args.threads or max(1, share))
    if device.type == "cuda":
        torch.cuda.set_device(device)


def run_spread(
    args: argparse.Namespace,
    exam: Exam | None,
    cache: LatentCache,
    devices: Sequence[torch.device],
    recipes: Sequence[Recipe],
) -> Iterator[tuple[Recipe, dict]]:
    """Results as they come, of a process for each of `devices`; a recipe whose process died has
    an ``error``."""
    context = mp.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    for recipe in [*recipes, *[None] * len(devices)]:
        tasks.put(recipe)
    workers = [
        context.Process(target=work, args=(args, exam, cache, device, tasks, results))
        for device in devices
    ]
    for worker in workers:
        worker.start()
    try:
        yield from _collect(workers, results, recipes)
        for worker in workers:
            worker.join(timeout=30)
    finally:
        for worker in workers:
            worker.kill()  # a trainer would take SIGTERM for a request to end its run early
        tasks.cancel_join_thread()


def _collect(
    workers: Sequence[mp.Process], results: mp.Queue, recipes: Sequence[Recipe]
) -> Iterator[tuple[Recipe, dict]]:
    waiting, in_hand = set(recipes), {}
    while waiting:
        ended = {worker.pid: worker.exitcode for worker in workers if not worker.is_alive()}
        try:
            pid, recipe, result = results.get(timeout=2)
        except queue.Empty:
            lost = {r: ended[pid] for pid, r in in_hand.items() if pid in ended and r in waiting}
            if len(ended) == len(workers):
                lost |= {r: None for r in waiting - lost.keys()}
            for recipe, code in lost.items():
                waiting.discard(recipe)
                yield recipe, {"error": f"its process ended, exit code {code}"}
            continue
        in_hand[pid] = recipe
        if result is not None and recipe in waiting:
            waiting.discard(recipe)
            yield recipe, result


def run_here(
    args: argparse.Namespace,
    exam: Exam | None,
    cache: LatentCache,
    device: torch.device,
    recipes: Sequence[Recipe],
) -> Iterator[tuple[Recipe, dict]]:
    """Results as they come, of this process."""
    bench = Bench(args, exam, cache, device)
    for recipe in recipes:
        yield recipe, bench.attempt(recipe)


def render_part(
    args: argparse.Namespace, index: int, device: torch.device, barrier: object
) -> None:
    """One of the processes that render a cache together."""
    enter_worker(args, device)
    open_cache(args, load_teacher(args.teacher, device), index, args.cache_processes, barrier.wait)


def render_together(args: argparse.Namespace, devices: Sequence[torch.device]) -> None:
    """Render the cache by ``--cache_processes``.

    Raises:
        ValueError: one of them failed.
    """
    context = mp.get_context("spawn")
    barrier = context.Barrier(args.cache_processes)
    workers = [
        context.Process(
            target=render_part, args=(args, index, devices[index % len(devices)], barrier)
        )
        for index in range(args.cache_processes)
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if any(worker.exitcode for worker in workers):
            barrier.abort()  # or the others would wait for ever
        time.sleep(0.2)
    if any(worker.exitcode for worker in workers):
        raise ValueError(f"expected {args.cache_processes} processes to render, one failed")


def seconds_per_step(args: argparse.Namespace, cache: LatentCache, device: torch.device) -> dict:
    """Seconds of a step of either stage, forward and backward, of the default blocks."""
    pipe = load_teacher(args.teacher, device)
    put_denoiser(pipe, build_student(find_denoiser(pipe), Recipe((1, 1)), args.seed))
    distillation = Distillation(find_denoiser(pipe), Noising(pipe.scheduler)).to(device)
    (batch,) = draw_batches(args, cache, device).of_step(0)
    timer = Timer(device, args.repeats, args.warmup)

    def step(stage: str) -> None:
        with torch.autocast(device.type, torch.bfloat16, args.dtype == "bfloat16"):
            loss = distillation(batch, stage)["loss"]
        loss.backward()
        distillation.zero_grad()

    return {
        stage: timer.median_ms(partial(step, stage)) / 1000
        for stage in ("teacher_forcing", "end_to_end")
    }


@torch.no_grad()
def time_layers(
    args: argparse.Namespace, device: torch.device, blocks: Sequence[GSPN2Config]
) -> dict[GSPN2Config | None, float]:
    """Milliseconds of one patched layer forward, batch 1, by its block; None: of the softmax layer.

    On CUDA replayed from a graph, so that launching from Python does not count.
    """
    torch.manual_seed(0)
    grid, dtype = (args.layer_grid, args.layer_grid), getattr(torch, args.dtype)
    attention = softmax_layer(args.layer_channels)
    layers = {None: attention, **{block: gspn2_layer(attention, block) for block in blocks}}
    times = {}
    with capturing_stream(device):
        tokens = torch.randn(1, math.prod(grid), args.layer_channels, device=device, dtype=dtype)
        for block, layer in layers.items():
            layer = layer.to(device, dtype).eval()
            name = "softmax" if block is None else "gspn2"
            run = partial(run_on, name, layer, tokens, grid)
            run()
            timer = Timer(device, args.repeats, args.warmup)
            times[block] = timer.in_turn_ms([run], graph=device.type == "cuda")
    return times


def results_path(args: argparse.Namespace, device: torch.device, teacher: nn.Module) -> Path:
    """``--output``, or a file in results/ named by the teacher and the experiments."""
    if args.output is not None:
        return args.output
    name = TEACHERS.get(type(teacher).__name__, type(teacher).__name__)
    experiments = "-".join(args.experiment)
    return RESULTS / f"distillation-{name}-{experiments}-{device.type}.json"


def write_atomically(
    args: argparse.Namespace,
    path: Path,
    name: str,
    device: torch.device,
    rows: list[dict],
    **figures: object,
) -> None:
    """`write_results`, so that whoever interrupts it leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as folder:
        shown = argparse.Namespace(**vars(args))
        shown.output = Path(folder) / path.name
        for local in ("teacher", "tiny", "cache", "probe"):  # where they lie says nothing
            if getattr(shown, local, None) is not None:
                setattr(shown, local, getattr(shown, local).name)
        os.replace(write_results(shown, name, device, rows, **figures), path)


def finished_rows(args: argparse.Namespace, path: Path) -> list[dict]:
    """Rows without error of a results file that ``--resume`` keeps.

    Raises:
        ValueError: the file is of other settings.
    """
    if not args.resume or not path.is_file():
        return []
    settings = {name: getattr(args, name) for name in vars(args).keys() - NOT_SETTINGS}
    settings |= {name: settings[name].name for name in ("teacher", "cache", "probe")}
    found = results_to_keep(path, settings)
    args.step_ratio = args.step_ratio or found["step_ratio"]
    return found["rows"]


def make_row(experiment: str, name: str, recipe: Recipe, result: dict, layer_ms: dict) -> dict:
    """What is written of a run."""
    ms = _layer_ms(recipe, layer_ms)
    settings = asdict(recipe)
    return {"experiment": experiment, "run": name, "settings": settings, "layer_ms": ms, **result}


def _layer_ms(recipe: Recipe, times: dict[GSPN2Config | None, float]) -> float | None:
    return times.get({"gspn2": recipe.block, "softmax": None}.get(recipe.mixer, recipe.mixer))


def _revived(settings: dict) -> dict:
    """Arguments of a Recipe as they were before JSON."""
    block, weights = GSPN2Config(**settings["block"]), LossWeights(**settings["weights"])
    return {**settings, "steps": tuple(settings["steps"]), "block": block, "weights": weights}


def describe_run(row: dict) -> str:
    """One line on a run that has ended."""
    head = f"{row['experiment']}, {row['run']}"
    if "error" in row:
        return f"{head}: {row['error'].splitlines()[0]}"
    scores = "".join(
        f", {100 * found['mean_accuracy']:.1f} % right at {side}"
        for side, found in row["scores"].items()
    )
    return f"{head}: output error {number(row['output_error'])}{scores}, {row['seconds']:.0f} s"


def results_table(title: str, rows: Sequence[dict]) -> Table:
    """One row per run of an experiment."""
    columns = (
        "run", "M", "ms", "layer", "output", "s", "right", "all", "Fr.", "right 2x", "all 2x",
        "Fr. 2x",
    )  # fmt: skip
    grid = table(title, columns, left=("run",))
    for row in rows:
        grid.add_row(row["run"], *_cells(row))
    return grid


def _cells(row: dict) -> list[str]:
    if "error" in row:
        return ["failed", *10 * ["-"]]
    parameters = row.get("trained_parameters")
    cells = [
        number(None if parameters is None else parameters / 1e6),
        number(row["layer_ms"]),
        f"{row['layer_error']:.4f}",
        f"{row['output_error']:.4f}",
        f"{row['seconds']:.0f}",
    ]
    for found in row["scores"].values():
        shares = [f"{100 * found[name]:.1f}" for name in ("mean_accuracy", "all_right")]
        cells += [*shares, number(found["frechet"])]
    return cells + ["-"] * (11 - len(cells))


def main(argv: Sequence[str] | None = None) -> None:
    """Train and measure every run; write the results after each, and print a table at the end.

    Raises:
        GateError: the scan is wrong; nothing was trained.
        ValueError: an option does not fit this machine or another option.
    """
    args = parse_args(argv)
    device, dtype = prepare(args)
    if args.dtype not in PRECISIONS:
        raise ValueError(f"--dtype: expected one of {', '.join(PRECISIONS)}, got {args.dtype}")
    if args.score_scenes == 1:
        raise ValueError("--score_scenes: expected 0 or at least 2, got 1")
    if not args.teacher_forcing_steps + args.end_to_end_steps:
        raise ValueError("expected steps in one stage at least, got none")
    if "stages" in args.experiment and not args.teacher_forcing_steps * args.end_to_end_steps:
        raise ValueError("stages: expected steps in both stages, got none in one")
    plan_all(args, 1.0)
    devices = worker_devices(args, device)
    check_operator(device, dtype)
    compare(args, device, devices)


def worker_devices(args: argparse.Namespace, device: torch.device) -> list[torch.device]:
    """One entry for each run at a time.

    Raises:
        ValueError: there are fewer GPUs than ``--devices``.
    """
    if device.type != "cuda":
        if args.devices > 1:
            raise ValueError(f"--devices: expected 1 without CUDA, got {args.devices}")
        return [device] * args.jobs_per_device
    if args.devices > torch.cuda.device_count():
        raise ValueError(f"--devices: expected at most {torch.cuda.device_count()}, "
                         f"got {args.devices}")  # fmt: skip
    first = [torch.device("cuda", index) for index in range(args.devices)]
    return first * args.jobs_per_device


def compare(
    args: argparse.Namespace, device: torch.device, devices: Sequence[torch.device]
) -> None:
    """Everything after the checks of the options."""
    if args.scenes is not None and args.cache_processes > 1:
        render_together(args, devices)
    pipe = load_teacher(args.teacher, device)
    path = results_path(args, device, find_denoiser(pipe))
    rows = finished_rows(args, path)
    begin = time.perf_counter()
    cache = open_cache(args, pipe)
    print(f"{len(cache)} rows in the cache after {time.perf_counter() - begin:.0f} s", flush=True)
    exam = open_exam(args, device)
    del pipe
    figures = measure_before(args, cache, device)
    runs = plan_all(args, figures["step_ratio"] or 1.0)
    layer_ms = figures.pop("layer_ms")
    for row in rows if layer_ms else ():  # times of one run only, also after --resume
        row["layer_ms"] = _layer_ms(Recipe(**_revived(row["settings"])), layer_ms)
    if device.type == "cuda":
        torch.cuda.empty_cache()

    done = {(row["experiment"], row["run"]) for row in rows}
    recipes = list(dict.fromkeys(recipe for key, recipe in runs.items() if key not in done))
    spread = len(devices) > 1
    outcomes = (
        run_spread(args, exam, cache, devices, recipes)
        if spread
        else run_here(args, exam, cache, device, recipes)
    )
    for recipe, result in outcomes:
        for key, own in runs.items():
            if own == recipe and key not in done:
                rows.append(make_row(*key, recipe, result, layer_ms))
                print(describe_run(rows[-1]), flush=True)
        rows.sort(key=lambda row: (EXPERIMENTS.index(row["experiment"]), _place(runs, row)))
        write_atomically(args, path, path.stem, device, rows, **figures)
    for experiment in dict.fromkeys(row["experiment"] for row in rows):
        title = f"Distillation, {experiment}, {args.dtype}, {device_name(device)}"
        show(results_table(title, [row for row in rows if row["experiment"] == experiment]))


def open_exam(args: argparse.Namespace, device: torch.device) -> Exam | None:
    """What students are examined in, on the CPU; None where ``--score_scenes`` is 0."""
    if not args.score_scenes:
        return None
    exam = prepare_exam(device, args.score_scenes, args.seed, probe=args.probe)
    return replace(exam, probe=exam.probe.cpu(), reference=exam.reference.cpu())


def measure_before(args: argparse.Namespace, cache: LatentCache, device: torch.device) -> dict:
    """Times taken while nothing else runs: of layers for `ratio`, of steps for `stages`."""
    figures = {"step_seconds": None, "step_ratio": args.step_ratio, "layer_ms": {}}
    if "stages" in args.experiment and args.step_ratio is None:
        seconds = seconds_per_step(args, cache, device)
        ratio = seconds["end_to_end"] / seconds["teacher_forcing"]
        figures |= {"step_seconds": seconds, "step_ratio": ratio}
    if "ratio" in args.experiment:
        blocks = [
            recipe.block
            for recipe in plan("ratio", (1, 1), 1.0).values()
            if recipe.mixer == "gspn2"
        ]
        figures["layer_ms"] = time_layers(args, device, blocks)
        figures["softmax_layer_ms"] = figures["layer_ms"][None]
    return figures


def _place(runs: dict[tuple[str, str], Recipe], row: dict) -> int:
    key = (row["experiment"], row["run"])
    return list(runs).index(key) if key in runs else len(runs)


if __name__ == "__main__":
    # So that an end by SIGTERM, as of `timeout`, takes the workers along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by a signal"))
    run_script(main)
