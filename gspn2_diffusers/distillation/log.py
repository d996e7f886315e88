"""What a training run tells: a progress bar, a line of JSON and the trackers' curves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from tqdm import tqdm

LOG_FILE = "log.jsonl"


class FinishedStep(NamedTuple):
    """A step, the stage it belongs to, when it was handed in (`time.perf_counter`), its rate."""

    step: int
    stage: str
    time: float
    learning_rate: float


class Log:
    """Means over every `interval` steps, written by the main process.

    ``log.jsonl`` gets one object a line: ``step``, ``stage``, ``loss`` and its terms, ``layers`` by
    name, ``images_per_second``, ``memory_gb`` and ``learning_rate``; lines with ``validation`` hold
    what :meth:`validated` was given.

    Args:
        layers: names of the replaced layers.
        total: steps of the run.
        batch_size: images of a step, over all processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        layers: Sequence[str],
        *,
        total: int,
        batch_size: int,
        interval: int,
    ):
        self._accelerator = accelerator
        self._path = folder / LOG_FILE
        self._layers = list(layers)
        self._batch_size = batch_size
        self._interval = interval
        self._window: list[dict[str, list[float]]] = []
        self._last: FinishedStep | None = None
        self._bar = _bar(accelerator, total=total, unit="step")
        self._begin = (0, time.perf_counter())

    def state_dict(self) -> dict:
        return {"window": self._window}

    def load_state_dict(self, state: dict) -> None:
        self._window = list(state["window"])

    def resume(self, step: int) -> None:
        """Continue after `step`: later lines of the file are of a run that was cut off."""
        self._bar.update(step - self._bar.n)
        self._begin = (step, time.perf_counter())
        if self._accelerator.is_main_process and self._path.is_file():
            lines = self._path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self._path.write_text("".join(kept))

    def record(self, done: FinishedStep, values: Mapping[str, list[float]]) -> None:
        """Take the values of a finished step; write at the end of an interval."""
        if self._window and self._window[0].keys() != values.keys():
            self._window = []  # a new stage has other terms
        self._window.append(dict(values))
        self._bar.update(done.step - self._bar.n)
        self._last = done
        if done.step % self._interval == 0:
            self._write(done)

    def validated(self, step: int, stage: str, results: Mapping) -> None:
        """Write results of a validation."""
        self._append({"step": step, "stage": stage, "validation": dict(results)})
        numbers = {k: v for k, v in results.items() if isinstance(v, float)}
        self._accelerator.log({f"validation/{k}": v for k, v in numbers.items()}, step=step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self.say(f"step {step}: {shown}")
        self._begin = (step, time.perf_counter())

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._accelerator.is_main_process:
            self._bar.write(text)

    def flush(self) -> None:
        """Write what there is of an interval: the run is over."""
        if self._window:
            self._write(self._last)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()

    def _write(self, done: FinishedStep) -> None:
        means = {
            name: _mean_columns([entry[name] for entry in self._window]) for name in self._window[0]
        }
        layers = dict(zip(self._layers, means.pop("layers"), strict=True))
        scalars = {name: value for name, (value,) in means.items()}
        first, begin = self._begin
        speed = (done.step - first) * self._batch_size / max(done.time - begin, 1e-9)
        self._append(
            {"step": done.step, "stage": done.stage, **scalars, "layers": layers,
             "learning_rate": done.learning_rate, "images_per_second": round(speed, 2),
             "memory_gb": round(_memory_gb(self._accelerator.device), 2)}
        )  # fmt: skip
        curves = {f"{done.stage}/{name}": value for name, value in scalars.items()}
        curves |= {f"{done.stage}/layers/{name}": value for name, value in layers.items()}
        curves |= {"learning_rate": done.learning_rate, "images_per_second": speed}
        self._accelerator.log(curves, step=done.step)
        self._bar.set_description_str(done.stage.replace("_", " "))
        memory = f", {_memory_gb(self._accelerator.device):.1f} GB"
        self._bar.set_postfix_str(f"loss {scalars['loss']:.4f}, {speed:.1f} images/s{memory}")
        self._window = []
        self._begin = (done.step, done.time)

    def _append(self, line: dict) -> None:
        if self._accelerator.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _bar(accelerator: Accelerator, **options: object) -> tqdm:
    """A bar of the main process, if it writes to a terminal."""
    return tqdm(
        **options, dynamic_ncols=True, disable=None if accelerator.is_main_process else True
    )


def progress_reporter(
    description: str, accelerator: Accelerator
) -> Callable[[int, int | None], None]:
    """A bar for calls with (done, total), shown by the main process."""
    bar = _bar(accelerator, desc=description)

    def report(done: int, total: int | None) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return report


def _mean_columns(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _memory_gb(device: torch.device) -> float:
    """Most device memory that tensors took so far; 0 where torch does not count it."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
