"""The training loop: stages, optimiser, average weights, checkpoints, exact resume."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .batches import Batches
from .checkpoints import choose_checkpoint, clear_partial, write_checkpoint
from .log import FinishedStep, Log
from .losses import STAGES, Distillation

TRAINED_FILE = "trained.safetensors"

# What a validation measures: called with (step, stage), gives numbers to log.
Validate = Callable[[int, str], Mapping]


class DivergedError(RuntimeError):
    """A loss became infinite or no number; the checkpoints are from before."""


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a run; names as in the training scripts of diffusers.

    Args:
        stage_steps: steps of each of `STAGES`, in their order; 0 leaves a stage out.
        ema_decay: of the average weights, which are what is validated and saved; None: no average.
        checkpointing_steps, validation_steps: None: only at the end.
        checkpoints_total_limit: checkpoints to keep; None keeps all.
    """

    output_dir: Path
    stage_steps: Mapping[str, int]
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 100
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    use_8bit_adam: bool = False
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    checkpointing_steps: int | None = 500
    checkpoints_total_limit: int | None = None
    validation_steps: int | None = None
    calibration_batches: int = 4
    logging_steps: int = 10

    def __post_init__(self) -> None:
        unknown = set(self.stage_steps) - set(STAGES)
        if unknown:
            raise ValueError(f"expected stages of {STAGES}, got {sorted(unknown)}")
        if self.total_steps < 1:
            raise ValueError("expected at least one step in one stage, got none")

    @property
    def total_steps(self) -> int:
        return sum(self.stage_steps.values())

    def stage_at(self, step: int) -> str:
        """The stage that step number `step`, from 0, belongs to."""
        for stage, begin, end in self.spans():
            if begin <= step < end:
                return stage
        raise ValueError(f"expected a step below {self.total_steps}, got {step}")

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """(stage, first step, step after the last) of every stage that has steps."""
        begin = 0
        for stage in STAGES:
            steps = self.stage_steps.get(stage, 0)
            if steps:
                yield stage, begin, begin + steps
            begin += steps


class Trainer:
    """Trains what requires gradients in a `Distillation`.

    Args:
        batches: of every stage that has steps.
        validate: called every `validation_steps` and after the last step of a stage, with the
            average weights in the model.
        before_stage: called with (stage, anew) before the first step that this run takes in it;
            anew: whether that is the stage's first. The average weights are in the model.
        after_stage: called with a stage's name when it is over, with the average weights in place.
    """

    def __init__(
        self,
        options: TrainingOptions,
        accelerator: Accelerator,
        distillation: Distillation,
        batches: Mapping[str, Batches],
        *,
        validate: Validate | None = None,
        before_stage: Callable[[str, bool], None] | None = None,
        after_stage: Callable[[str], None] | None = None,
    ):
        self.options = options
        self.accelerator = accelerator
        self.batches = batches
        self.step = 0
        self._validate = validate
        self._before_stage = before_stage
        self._after_stage = after_stage
        self._stage: str | None = None
        self._module = distillation
        self._named = {n: p for n, p in distillation.named_parameters() if p.requires_grad}
        if not self._named:
            raise ValueError("expected parameters to train, got a model with none")
        optimizer = _build_optimizer(options, list(self._named.values()))
        self.schedule = get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=options.total_steps,
        )
        self.ema = None
        if options.ema_decay is not None:
            self.ema = EMAModel(list(self._named.values()), decay=options.ema_decay, foreach=True)
            self.ema.to(accelerator.device)
        # The schedule is not prepared: accelerate would step it once per process.
        self.model, self.optimizer = accelerator.prepare(distillation, optimizer)
        images = next(iter(batches.values())).order.batch_size
        self.log = Log(
            accelerator, options.output_dir, distillation.layers,
            total=options.total_steps, batch_size=images, interval=options.logging_steps,
        )  # fmt: skip
        self._register_state()
        self._pending: _Pending | None = None
        self._stop_asked = False
        self._stop_agreed = False

    def run(self, resume_from_checkpoint: str | None = None) -> bool:
        """Train to the end, or until SIGTERM or SIGINT asks for a checkpoint and an early end.

        Returns:
            Whether the last step was reached. The average weights are in the model then.

        Raises:
            DivergedError: a loss is not finite.
            ValueError: no such checkpoint.
        """
        options = self.options
        options.output_dir.mkdir(parents=True, exist_ok=True)
        resumed = self._resume(resume_from_checkpoint)
        if not resumed:
            self._calibrate()
        with self._signals_noted():
            while self.step < options.total_steps and not self._stop_agreed:
                self._train_step()
                self._after_step()
        finished = self.step == options.total_steps
        if not finished:
            self.save_checkpoint()
            self.log.say(f"stopped after step {self.step}; resume with latest")
        elif self.ema is not None:
            self.ema.copy_to(self._named.values())
        self.log.close()
        return finished

    def save_checkpoint(self) -> None:
        """Write ``checkpoint-<step>``. Raises DivergedError instead of saving a broken state."""
        self._settle()
        self._check_weights()
        write_checkpoint(
            self.options.output_dir,
            self.step,
            lambda folder: self.accelerator.save_state(str(folder), safe_serialization=True),
            wait=self.accelerator.wait_for_everyone,
            is_main=self.accelerator.is_main_process,
            limit=self.options.checkpoints_total_limit,
        )

    @contextmanager
    def average_weights(self) -> Iterator[None]:
        """While open, the average weights are in the model, if there are any."""
        if self.ema is None:
            yield
            return
        self.ema.store(self._named.values())
        self.ema.copy_to(self._named.values())
        try:
            yield
        finally:
            self.ema.restore(self._named.values())

    def _train_step(self) -> None:
        stage = self._enter_stage()
        count = self.options.gradient_accumulation_steps
        learning_rate = self.schedule.get_last_lr()[0]
        totals: dict[str, Tensor] = {}
        for micro, batch in enumerate(self.batches[stage].of_step(self.step)):
            last = micro == count - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                losses = self.model(batch, stage)
                self.accelerator.backward(losses["loss"] / count)
            for name, value in losses.items():
                share = value.detach().reshape(-1) / count
                totals[name] = totals[name] + share if name in totals else share
        if self.options.max_grad_norm:
            self.accelerator.clip_grad_norm_(self._named.values(), self.options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self._named.values())
        self.step += 1
        self._hand_in(stage, learning_rate, totals)

    def _enter_stage(self) -> str:
        stage = self.options.stage_at(self.step)
        if stage != self._stage:
            self._stage = stage
            if self._before_stage is not None:
                anew = self.step in [begin for _, begin, _ in self.options.spans()]
                with self.average_weights():
                    self._before_stage(stage, anew)
        return stage

    def _after_step(self) -> None:
        options, step = self.options, self.step
        stage = options.stage_at(step - 1)
        ends = step in [end for _, _, end in options.spans()]
        if ends or _is_due(step, options.validation_steps):
            self._settle()
            with self.average_weights():
                if self._validate is not None:
                    self.log.validated(step, stage, self._validate(step, stage))
                if ends and self._after_stage is not None:
                    self._after_stage(stage)
        if step == options.total_steps:
            self._settle()
            self.log.flush()
            self.save_checkpoint()
        elif _is_due(step, options.checkpointing_steps):
            self.save_checkpoint()

    def _hand_in(self, stage: str, learning_rate: float, totals: dict[str, Tensor]) -> None:
        """Log the step before this one, whose numbers are there by now, and keep this one's.

        So that the device need not wait for the host at the end of every step.
        """
        stop = totals["loss"].new_tensor([float(self._stop_asked)])
        numbers = torch.cat([*totals.values(), stop])
        if self.accelerator.num_processes > 1:
            numbers = self.accelerator.reduce(numbers, "mean")
        self._settle()
        done = FinishedStep(self.step, stage, time.perf_counter(), learning_rate)
        lengths = {name: len(value) for name, value in totals.items()}
        self._pending = _Pending(done, lengths, numbers)
        if self.accelerator.num_processes == 1:
            self._stop_agreed = self._stop_asked

    def _settle(self) -> None:
        """Read and log the numbers that are still on the device."""
        if self._pending is None:
            return
        (done, lengths, numbers), self._pending = self._pending, None
        *values, stop = numbers.tolist()
        self._stop_agreed = self._stop_agreed or stop > 0
        columns = iter(values)
        found = {name: [next(columns) for _ in range(n)] for name, n in lengths.items()}
        if not all(map(math.isfinite, values)):
            raise DivergedError(
                f"step {done.step} ({done.stage}): expected a finite loss, got {found['loss'][0]}: "
                "lower the learning rate, or train in bf16 instead of fp16; the newest checkpoint "
                "is from before"
            )
        self.log.record(done, found)

    def _check_weights(self) -> None:
        """Raises DivergedError where weights are not finite, or not the same in all processes."""
        sums = torch.stack([parameter.detach().abs().sum() for parameter in self._named.values()])
        names = list(self._named)
        for index in (~sums.isfinite()).nonzero().flatten().tolist():
            raise DivergedError(
                f"step {self.step}: expected finite weights, got others in {names[index]}"
            )
        everyone = self.accelerator.gather(sums[None])
        for index in (everyone != everyone[0]).any(0).nonzero().flatten().tolist():
            raise DivergedError(
                f"step {self.step}: expected the same weights in all processes, got different "
                f"ones in {names[index]}"
            )

    def _calibrate(self) -> None:
        """Measure the teacher's variances on the first batches of the first stage."""
        stage = self.options.stage_at(0)
        batches = (
            batch
            for step in range(self.options.calibration_batches)
            for batch in self.batches[stage].of_step(step)
        )
        with self.accelerator.autocast():
            self._module.calibrate(batches, partial(self.accelerator.reduce, reduction="mean"))

    def _register_state(self) -> None:
        """Checkpoints hold what is trained, not the whole model, which never changes."""
        self.accelerator.register_for_checkpointing(self, self.schedule, self.log)
        if self.ema is not None:
            self.accelerator.register_for_checkpointing(self.ema)
        self.accelerator.register_save_state_pre_hook(self._save_trained)
        self.accelerator.register_load_state_pre_hook(self._load_trained)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def _trained(self) -> dict[str, Tensor]:
        return self._named | dict(self._module.named_buffers(recurse=False))

    def _save_trained(self, models: list, weights: list, folder: str) -> None:
        weights.clear()
        if self.accelerator.is_main_process:
            state = {name: value.detach().contiguous() for name, value in self._trained().items()}
            save_file(state, Path(folder) / TRAINED_FILE)

    @torch.no_grad()
    def _load_trained(self, models: list, folder: str) -> None:
        models.clear()
        path = Path(folder) / TRAINED_FILE
        if not path.is_file():
            raise ValueError(f"expected {path} in a checkpoint of this trainer, found none")
        state, own = load_file(path), self._trained()
        if state.keys() != own.keys() or any(state[n].shape != own[n].shape for n in own):
            raise ValueError(
                f"{path}: expected weights of this run's blocks, got others: resume with the block "
                "options and layers the checkpoint was made with"
            )
        for name, value in own.items():
            value.copy_(state[name])

    def _resume(self, name: str | None) -> bool:
        if self.accelerator.is_main_process:
            clear_partial(self.options.output_dir)
        self.accelerator.wait_for_everyone()
        folder = choose_checkpoint(self.options.output_dir, name) if name else None
        if folder is None:
            if name:
                self.log.say(f"no checkpoint in {self.options.output_dir}: starting anew")
            self.log.resume(0)
            return False
        self.accelerator.load_state(str(folder))
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        self.log.resume(self.step)
        self.log.say(f"resumed {folder.name}")
        return True

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """While open, SIGTERM and SIGINT ask for a checkpoint and an end; a second one kills."""

        def note(number: int, frame: object) -> None:
            self._stop_asked = True
            signal.signal(number, before[number])

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Pending(NamedTuple):
    """What a step handed in and nobody has read yet."""

    done: FinishedStep
    lengths: dict[str, int]
    """Name -> number of values, in the order of `numbers`."""
    numbers: Tensor
    """All values and, last, whether a process wants to stop."""


def _build_optimizer(options: TrainingOptions, parameters: Sequence[nn.Parameter]):
    settings = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
    }
    if not options.use_8bit_adam:
        return torch.optim.AdamW(parameters, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            "expected bitsandbytes for the 8-bit optimiser, found none: pip install bitsandbytes"
        ) from error
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
