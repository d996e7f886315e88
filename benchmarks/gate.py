"""What must hold before anything is timed: the operator computes GSPN-2, outputs are finite."""

from collections.abc import Callable

import torch
from torch import Tensor

from gspn2_diffusers import gspn2_scan
from gspn2_diffusers.kernels.dense import RELATIVE_RMS, dense_scan, relative_error


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
    error = relative_error(actual, dense_scan(*inputs))
    if not error <= RELATIVE_RMS[dtype]:  # so that NaN fails
        raise GateError(
            f"the scan is wrong, nothing was timed: expected a relative error of at most "
            f"{RELATIVE_RMS[dtype]:.0e} to the dense affinity, got {error:.1e}"
        )


def check_finite(label: str, output: Tensor) -> None:
    """Raises GateError if an element of `output` is infinite or NaN."""
    if not torch.isfinite(output).all():
        raise GateError(f"{label}: expected finite outputs, got infinities or NaN")
