"""What must hold before anything is timed: the operator computes GSPN-2, outputs are finite."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from cases import Operands
from torch import Tensor

from gspn2_diffusers import gspn2_scan
from gspn2_diffusers.kernels.dense import RELATIVE_RMS, dense_scan, relative_error

CHECKED_CHANNELS = 8


class GateError(RuntimeError):
    """A result is wrong, so its time means nothing."""


def check_operator(
    device: torch.device, dtype: torch.dtype, scan: Callable[..., Tensor] = gspn2_scan
) -> None:
    """Hold `scan` to the dense affinity in float64, on a small map that is not square.

    Raises:
        GateError: it differs by more than the rounding of `dtype`.
    """
    batch, proxy_dim, groups, height, width = 2, 4, 2, 5, 7
    generator = torch.Generator().manual_seed(0)
    gate = (batch, 4, proxy_dim, height, width)
    shapes = ((batch, proxy_dim, height, width), (batch, 4, groups, 3, height, width), *3 * [gate])
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    actual = scan(*(tensor.to(device) for tensor in inputs))
    check_close("the scan of a 5x7 map", actual, dense_scan(*inputs))


def check_close(label: str, actual: Tensor, expected: Tensor, roundings: int = 1) -> None:
    """Hold `actual` to a reference of higher precision.

    Raises:
        GateError: they differ by more than `roundings` times the tolerance of the dtype of `actual`
            allows.
    """
    error, limit = _relative_error(actual, expected), roundings * RELATIVE_RMS[actual.dtype]
    if not error <= limit:  # so that NaN fails
        raise GateError(
            f"{label} is wrong, it was not timed: expected a relative error of at most "
            f"{limit:.0e}, got {error:.1e}"
        )


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """As the package's own, but where `expected` lies: large maps take long to fetch."""
    if expected.device.type == "mps":  # which has no float64
        return relative_error(actual, expected)
    expected = expected.double()
    error = (actual.to(expected.device).double() - expected).norm()
    return (error / expected.norm().clamp_min(1e-30)).item()


def check_finite(label: str, output: Tensor) -> None:
    """Raises GateError if an element of `output` is infinite or NaN."""
    if not torch.isfinite(output).all():
        raise GateError(f"{label}: expected finite outputs, got infinities or NaN")


def check_result(label: str, operands: Operands, y: Tensor) -> None:
    """Every element of y finite; its first and last channels those of torch in float32.

    Raises:
        GateError: it is not so.
    """
    check_finite(label, y)
    for part in _ends(operands):
        expected = part.of_all(operands).map(Tensor.float).scan(backend="torch")
        check_close(f"{label}, y", part.of("y", y), expected)


def check_gradients(
    label: str, operands: Operands, grad_y: Tensor, gradients: dict[str, Tensor]
) -> None:
    """As :func:`check_result`, for the gradients of `operands` by name.

    Those of the logits sum over their channels, so they are compared where few channels share them.

    Raises:
        GateError: it is not so.
    """
    for name, gradient in gradients.items():
        check_finite(f"{label}, gradient of {name}", gradient)
    shared_by = operands.x.shape[1] // operands.logits.shape[2]
    for part in _ends(operands):
        leaves = part.of_all(operands).map(Tensor.float).leaves()
        wanted = leaves.tensors()
        if shared_by > CHECKED_CHANNELS:
            del wanted["logits"]
        y = leaves.scan(backend="torch")
        found = torch.autograd.grad(y, list(wanted.values()), part.of("y", grad_y).float())
        for name, expected in zip(wanted, found, strict=True):
            check_close(f"{label}, gradient of {name}", part.of(name, gradients[name]), expected)


@dataclass(frozen=True)
class _Part:
    """Some channels of one group of one image; parts of a scan do not depend on each other."""

    image: slice
    channels: slice
    group: slice

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """This part of an operand, of y, or of the gradient of one."""
        if name in ("x", "y"):
            return tensor[self.image, self.channels]
        return tensor[self.image, :, self.group if name == "logits" else self.channels]

    def of_all(self, operands: Operands) -> Operands:
        """This part of all operands."""
        parts = {name: self.of(name, tensor) for name, tensor in operands.tensors().items()}
        return replace(operands, **parts)


def _ends(operands: Operands) -> tuple[_Part, _Part]:
    """Parts at the first and at the last element."""
    channels, groups = operands.x.shape[1], operands.logits.shape[2]
    count = min(CHECKED_CHANNELS, channels // groups)
    first, last = slice(0, 1), slice(-1, None)
    return _Part(first, slice(0, count), first), _Part(last, slice(-count, None), last)
