"""Records what layers of a model see and answer during a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn


class Observer:
    """Hooks on named modules that write down their inputs and outputs while recording.

    The hooks stay for good, because a compiled model does not see hooks that come later.

    Args:
        modules: to observe, by name; the first argument of each and its output are tensors.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.active = False
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        for name, module in modules.items():
            module.register_forward_hook(partial(_write, self, name), with_kwargs=True)

    @contextmanager
    def recording(self) -> Iterator[Observer]:
        """While open, passes are written down in `inputs` and `outputs`, emptied before."""
        self.forget()
        self.active = True
        try:
            yield self
        finally:
            self.active = False

    def forget(self) -> None:
        """Let go of what was recorded, and of the graphs it belongs to."""
        self.inputs, self.outputs = {}, {}


def _write(
    observer: Observer,
    name: str,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    kwargs: dict,
    output: Tensor,
) -> None:
    if observer.active:
        observer.inputs[name] = inputs[0] if inputs else kwargs["hidden_states"]
        observer.outputs[name] = output
