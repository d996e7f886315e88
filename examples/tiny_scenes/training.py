"""What the training scripts share: arguments, the timed schedule, checkpoints and the loop."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast, set_seed
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid, numpy_to_pil
from torch import Tensor, nn

from gspn2_diffusers.distillation.checkpoints import choose_checkpoint, write_checkpoint

from .data import Pool, PoolFeeder, Renderer, stream_scenes, stream_seed
from .scenes import Scenes

CHECKPOINTS_KEPT = 2
_SYNC_STEPS = 10
_LOG_SECONDS = 15.0


def training_parser(
    description: str, *, output_dir: Path, batch_size: int, learning_rate: float
) -> argparse.ArgumentParser:
    """Arguments of every script, named as in the training scripts of diffusers."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=output_dir, help="weights and checkpoints go here")
    add("--resolution", type=int, default=256, help="side of the training images in pixels")
    add("--supersample", type=int, default=2, help="rays per pixel and axis")
    add("--train_batch_size", type=int, default=batch_size, help="examples per step and process")
    add("--learning_rate", type=float, default=learning_rate, help="peak learning rate")
    add("--lr_warmup_steps", type=int, default=200, help="steps of linear warm-up")
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--max_grad_norm", type=float, default=1.0)
    add("--ema_decay", type=float, default=0.999)
    add("--minutes", type=float, help="wall time at whose end the learning rate reaches zero")
    add("--max_train_steps", type=int, help="steps after which the learning rate reaches zero")
    add("--stop_after_minutes", type=float, help="save a checkpoint and stop early; resume later")
    add("--checkpointing_steps", type=int, default=2000)
    add("--resume_from_checkpoint", help="a checkpoint folder, or 'latest'")
    add("--mixed_precision", choices=("no", "bf16"), default="bf16")
    add("--compile_backend", help="torch.compile backend, or 'no'; default: inductor on CUDA only")
    add("--pool_size", type=int, default=65536, help="training examples kept on the device")
    add("--pool_batch_size", type=int, default=256, help="scenes rendered at once")
    add("--pool_seconds", type=float, default=20.0, help="longest time of filling the pool first")
    add("--refresh_steps", type=int, default=4, help="steps between additions to the pool")
    add("--dataloader_num_workers", type=int, default=4)
    add("--eval_scenes", type=int, default=1024, help="held-out scenes for the closing report")
    add("--seed", type=int, default=0)
    return parser


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator of a script, with float32 matrix products in tf32 and every process seeded.

    Raises ValueError when the run has no end.
    """
    if args.minutes is None and args.max_train_steps is None:
        raise ValueError("expected --minutes or --max_train_steps, received neither")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.optimize_ddp = False  # splits graphs that are too small to gain by it
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=[ddp])
    if args.compile_backend is None:
        args.compile_backend = "inductor" if accelerator.device.type == "cuda" else "no"
    set_seed(args.seed, device_specific=True)
    return accelerator


def compile_in_place(backend: str, *modules: nn.Module) -> None:
    """Compile modules, whose parameters keep their names; backend 'no' leaves them as they are."""
    if backend != "no":
        for module in modules:
            module.compile(dynamic=False, backend=backend)


class Clock:
    """Steps, wall time and progress of a run: the schedule's state, which a resumed run continues.

    ``elapsed`` counts seconds from the program's start, preparation included. It moves only in
    ``synchronise``, so that all processes agree on it. ``progress`` reaches 1 when the budget of
    ``--minutes`` is used up, but counts training time only: a long compilation shortens the
    training, not the decay of its learning rate.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.step = 0
        self.elapsed = 0.0
        self._args = args
        self._started = time.perf_counter()
        self._before = 0.0
        self._share_before = 0.0
        self._prepared: float | None = None

    def synchronise(self, device: torch.device) -> None:
        """Read the first process's clock."""
        now = self._before + time.perf_counter() - self._started
        self.elapsed = broadcast(torch.tensor(now, device=device)).item()

    def end_preparation(self, device: torch.device) -> None:
        """Let progress count from now on."""
        self.synchronise(device)
        self._prepared = self.elapsed

    @property
    def progress(self) -> float:
        """Share of the run that is done, in 0..1."""
        steps = self._args.max_train_steps
        share = 0.0 if steps is None else self.step / steps
        return min(1.0, max(share, self._time_share))

    @property
    def stopped_early(self) -> bool:
        """Whether this process's own share of the run is used up."""
        limit = self._args.stop_after_minutes
        return limit is not None and self.elapsed - self._before >= 60 * limit

    @property
    def _time_share(self) -> float:
        if self._args.minutes is None:
            return 0.0
        budget = 60 * self._args.minutes
        if self.elapsed >= budget:
            return 1.0
        if self._prepared is None:
            return self._share_before
        done = (self.elapsed - self._prepared) / (budget - self._prepared)
        return self._share_before + (1 - self._share_before) * done

    def state_dict(self) -> dict[str, float]:
        return {"step": self.step, "elapsed": self.elapsed, "time_share": self._time_share}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.step = int(state["step"])
        self.elapsed = self._before = float(state["elapsed"])
        self._share_before = float(state["time_share"])
        self._started = time.perf_counter()


def learning_rate_factor(step: int, progress: float, warmup_steps: int) -> float:
    """Linear warm-up by steps times a half cosine to zero by progress in 0..1."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    return warmup * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """The training loop around a loss: optimiser, schedule, average weights, checkpoints, log.

    model: its trainable parameters are trained; ``self.model`` is the prepared model to call.
    """

    def __init__(
        self, args: argparse.Namespace, accelerator: Accelerator, model: nn.Module
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.clock = Clock(args)
        model.to(accelerator.device)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.ema = EMAModel(self._parameters, decay=args.ema_decay, foreach=True)
        optimizer = torch.optim.AdamW(
            self._parameters,
            lr=args.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=args.adam_weight_decay,
            fused=True,
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(self.clock, self.ema)
        if args.resume_from_checkpoint:
            self._resume(args.resume_from_checkpoint)

    def run(self, compute_loss: Callable[[], Tensor], refresh: Callable[[], None]) -> None:
        """Train until the time or the steps are over; leaves the average weights in the model.

        compute_loss: loss of a fresh batch. refresh: called every ``--refresh_steps``.
        """
        clock, device = self.clock, self.accelerator.device
        log = _Log(self.args, self.accelerator, clock.step)
        clock.synchronise(device)
        first_step = clock.step
        while clock.progress < 1 and not clock.stopped_early:
            loss = self._train_step(compute_loss)
            if clock.step == first_step:
                clock.end_preparation(device)  # the first step compiled the model
            clock.step += 1
            if clock.step % self.args.refresh_steps == 0:
                refresh()
            if clock.step % _SYNC_STEPS == 0:
                clock.synchronise(device)
                log.write(clock, loss)
            if clock.step % self.args.checkpointing_steps == 0:
                self.save_checkpoint()
        if clock.progress < 1:
            self.save_checkpoint()
        self.accelerator.print(f"{clock.step} steps in {clock.elapsed:.0f} s")
        self.ema.copy_to(self._parameters)

    def save_checkpoint(self) -> None:
        """Write ``checkpoint-N`` and delete all but the newest checkpoints."""
        write_checkpoint(
            self.args.output_dir,
            self.clock.step,
            lambda folder: self.accelerator.save_state(str(folder)),
            wait=self.accelerator.wait_for_everyone,
            is_main=self.accelerator.is_main_process,
            limit=CHECKPOINTS_KEPT,
        )

    def _train_step(self, compute_loss: Callable[[], Tensor]) -> Tensor:
        factor = learning_rate_factor(
            self.clock.step, self.clock.progress, self.args.lr_warmup_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.learning_rate * factor
        loss = compute_loss()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self._parameters, self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self._parameters)
        return loss.detach()

    def _resume(self, name: str) -> None:
        folder = choose_checkpoint(self.args.output_dir, name)
        if folder is None:
            self.accelerator.print(f"no checkpoint in {self.args.output_dir}: starting anew")
            return
        self.accelerator.load_state(str(folder))
        self.ema.to(self.accelerator.device)
        self.accelerator.print(f"resumed {folder} after {self.clock.elapsed:.0f} s")


class _Log:
    """One line every few seconds, from the main process."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, step: int) -> None:
        self._batch = args.train_batch_size * accelerator.num_processes
        self._print = accelerator.print
        self._losses: list[Tensor] = []
        self._restart(step)

    def write(self, clock: Clock, loss: Tensor) -> None:
        self._losses.append(loss)
        seconds = time.perf_counter() - self._time
        if seconds < _LOG_SECONDS:
            return
        rate = self._batch * (clock.step - self._step) / seconds
        self._print(
            f"step {clock.step}  {rate:.0f} examples/s  "
            f"loss {torch.stack(self._losses).mean().item():.4f}  "
            f"{clock.elapsed:.0f} s  {100 * clock.progress:.0f} %",
            flush=True,
        )
        self._restart(clock.step)

    def _restart(self, step: int) -> None:
        self._time, self._step = time.perf_counter(), step
        self._losses.clear()


def start_feeder(
    args: argparse.Namespace,
    trainer: Trainer,
    make_columns: Callable[[Scenes, Tensor], dict[str, Tensor]],
    *,
    captions: int = 0,
) -> PoolFeeder:
    """Fill this process's pool with rows which ``make_columns`` makes of scenes and token ids."""
    accelerator = trainer.accelerator
    stream = stream_scenes(
        args.pool_batch_size,
        seed=stream_seed(args.seed, accelerator.process_index, trainer.clock.step),
        captions=captions,
        workers=args.dataloader_num_workers,
    )
    feeder = PoolFeeder(Pool(args.pool_size, accelerator.device), stream, make_columns)
    feeder.refresh()  # compiles the renderer, outside the time of filling the pool
    rate = feeder.fill(args.pool_seconds)
    accelerator.print(f"{len(feeder.pool)} examples, {rate:.0f} per second", flush=True)
    return feeder


def make_renderer(args: argparse.Namespace, device: torch.device) -> Renderer:
    """The renderer of the script's resolution, compiled where the model is."""
    compiled = args.compile_backend == "inductor"
    return Renderer(args.resolution, device, supersample=args.supersample, compiled=compiled)


def save_sheet(images: Tensor, path: Path, columns: int) -> None:
    """Write images ``[n, 3, h, w]`` in 0..1 as one picture of ``columns`` columns, gaps white."""
    gaps = images.new_ones(-len(images) % columns, *images.shape[1:])
    cells = torch.cat((images, gaps)).clamp(0, 1).permute(0, 2, 3, 1)
    pictures = numpy_to_pil(cells.float().cpu().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(pictures, rows=len(pictures) // columns, cols=columns).save(path)


def print_table(title: str, shares: Mapping[str, float]) -> None:
    """Print values in 0..1 as percentages."""
    print(title)
    for name, value in shares.items():
        print(f"  {name:<12} {100 * value:6.2f} %", flush=True)
