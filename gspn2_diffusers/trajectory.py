"""How far a student's answers are from its teacher's, along the teacher's own trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .families import find_denoiser
from .hardware import execution_device

QUARTERS = 4


@dataclass(frozen=True)
class KDError:
    """Mean squared difference from the teacher's answers over their variance: 0 is the teacher, 1
    is no better than always answering the mean.

    `quarters` are the errors in equal parts of the trajectory, from noise to picture; fewer than
    four where it has fewer steps.
    """

    total: float
    quarters: tuple[float, ...]


@dataclass(frozen=True)
class Call:
    """One call of a denoiser, in CPU memory: its arguments and its answer ``[n, c, h, w]``."""

    args: tuple
    kwargs: dict
    answer: Tensor


@contextmanager
def record_calls(pipe_or_model: DiffusionPipeline | nn.Module) -> Iterator[list[Call]]:
    """While inside, every forward pass of the denoiser is added to the list that this yields.

    Raises:
        TypeError, ValueError: not a supported pipeline or model.
    """
    model = find_denoiser(pipe_or_model)
    calls: list[Call] = []
    asked = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        # Copied before the call, since what a model is given may be changed in place later.
        asked[:] = [_moved((args, kwargs), "cpu")]

    def after(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        calls.append(Call(*asked.pop(), _moved(_answer(module, output), "cpu")))

    handles = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class KDMeter:
    """Adds up how a model's answers differ from recorded ones, over batches of one trajectory."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []  # per step: squared error, count, sum, sum of squares

    @torch.no_grad()
    def add(self, calls: Sequence[Call], pipe_or_model: DiffusionPipeline | nn.Module) -> None:
        """Ask the denoiser what the teacher was asked; `calls` are a whole trajectory in order.

        Raises:
            ValueError: no calls, or another number of them than before.
        """
        if not calls or len(calls) != len(self._sums or calls):
            expected = len(self._sums) or "at least 1"
            raise ValueError(f"expected {expected} recorded calls, got {len(calls)}")
        model = find_denoiser(pipe_or_model)
        device = execution_device(pipe_or_model)
        self._sums = self._sums or [torch.zeros(4, dtype=torch.double) for _ in calls]
        for sums, call in zip(self._sums, calls, strict=True):
            args, kwargs = _moved((call.args, call.kwargs), device)
            answer = _answer(model, model(*args, **kwargs)).cpu().double()
            truth = call.answer.double()
            terms = ((answer - truth).square().sum(), truth.numel(), truth.sum())
            sums += torch.tensor([*terms, truth.square().sum()], dtype=torch.double)

    def result(self) -> KDError:
        """The error over all answers, and in the quarters of the trajectory.

        Raises:
            ValueError: nothing was added.
        """
        if not self._sums:
            raise ValueError("expected recorded calls to have been added, got none")
        sums = torch.stack(self._sums)
        quarters = sums.tensor_split(min(QUARTERS, len(sums)))
        return KDError(_relative_error(sums), tuple(map(_relative_error, quarters)))


def _relative_error(sums: Tensor) -> float:
    """Mean squared error over variance, of sums ``[steps, 4]``."""
    error, count, total, squares = sums.sum(0).tolist()
    variance = squares / count - (total / count) ** 2
    if variance <= 0:
        return float("inf") if error else 0.0
    return error / count / variance


def _answer(model: nn.Module, output: object) -> Tensor:
    """What the pipeline uses of a denoiser's output: PixArt's and DiT's second half is a variance
    that is thrown away."""
    return output[0][:, : model.config.in_channels]


def _moved(value: object, device: torch.device | str) -> object:
    """A copy of nested tuples, lists and dictionaries with the tensors in them on a device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: _moved(inner, device) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(inner, device) for inner in value)
    return value
