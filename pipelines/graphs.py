"""A forward pass as a CUDA graph: launched by the driver at once, not by Python piece by piece."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from diffusers.utils import logging
from torch import Tensor

logger = logging.get_logger(__name__)

EAGER_RUNS = 2  # before a graph is captured
_WAITING = "called a synchronizing CUDA operation"  # torch's warning in sync debug mode


class Replayed:
    """A function that runs as it is at first, is then captured as a CUDA graph, and replayed.

    The first run loads what is loaded at first use. The second one is watched: where it waits for
    the device, it cannot be captured, and all goes on as it is.

    Args:
        run: from CUDA tensors, all on one device, to a tensor. Each call must do the same with
            tensors of the same shapes; what else it reads must stay where it is.
    """

    def __init__(self, run: Callable[..., Tensor]):
        self._run = run
        self._runs = 0
        self._possible = True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._output: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        self._runs += 1
        if self._runs == EAGER_RUNS:
            return self._watched(inputs)
        if self._runs < EAGER_RUNS or not self._possible:
            return self._run(*inputs)
        if self._graph is None and not self._capture(inputs):
            return self._run(*inputs)
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._output.clone()

    def _watched(self, inputs: Sequence[Tensor]) -> Tensor:
        """The result, having found out whether computing it waits for the device."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                output = self._run(*inputs)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = False
        for warning in caught:
            if _WAITING in str(warning.message):
                waits = True
            elif "debug mode" not in str(warning.message):
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        if waits:
            self._give_up("it waits for the device")
        return output

    def _capture(self, inputs: Sequence[Tensor]) -> bool:
        """Whether it worked."""
        graph, own = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in inputs]
        with torch.cuda.device(own[0].device):
            try:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    output = self._run(*own)
            except RuntimeError as error:
                self._give_up(str(error).partition("\n")[0])
                # A capture that broke off leaves torch's random numbers waiting for its end.
                with torch.cuda.graph(torch.cuda.CUDAGraph()):
                    torch.zeros(1, device=own[0].device)
                return False
        self._graph, self._inputs, self._output = graph, own, output
        return True

    def _give_up(self, reason: str) -> None:
        self._possible = False
        logger.info(f"the forward pass is not replayed as a CUDA graph: {reason}")
