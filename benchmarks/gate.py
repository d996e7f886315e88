"""What must hold before anything is timed: the operator computes GSPN-2, outputs are finite."""

from collections.abc import Callable

import torch
from torch import Tensor

from gspn2_diffusers import gspn2_scan

# Root-mean-square error over root-mean-square value; inputs are rounded to the dtype beforehand.
RELATIVE_RMS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# Row and column offset from a pixel to its centre tap, in the order of the operator's directions,
# and from the centre tap to the right one.
PREVIOUS_LINE = ((-1, 0), (1, 0), (0, -1), (0, 1))
ALONG_LINE = ((0, 1), (0, 1), (1, 0), (1, 0))


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
    expected = dense_scan(*(tensor.double() for tensor in inputs))
    actual = scan(*(tensor.to(device) for tensor in inputs)).cpu().double()
    error = ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()
    if not error <= RELATIVE_RMS[dtype]:  # so that NaN fails
        raise GateError(
            f"the scan is wrong, nothing was timed: expected a relative error of at most "
            f"{RELATIVE_RMS[dtype]:.0e} to the dense affinity, got {error:.1e}"
        )


def check_finite(label: str, output: Tensor) -> None:
    """Raises GateError if an element of `output` is infinite or NaN."""
    if not torch.isfinite(output).all():
        raise GateError(f"{label}: expected finite outputs, got infinities or NaN")


def dense_scan(x: Tensor, logits: Tensor, lam: Tensor, u: Tensor, skip: Tensor) -> Tensor:
    """`gspn2_scan` by linear algebra: h = T h + lam * x, so h = (I - T)^-1 (lam * x).

    T ``[B, G, N, N]`` carries one step of a direction between the N = H * W pixels.
    """
    batch, _, height, width = x.shape
    groups = logits.shape[2]
    identity = torch.eye(height * width, dtype=x.dtype)
    y = torch.zeros_like(x)
    for direction in range(4):
        step = _step_matrix(direction, logits[:, direction])
        gated = (lam[:, direction] * x).reshape(batch, groups, -1, height * width)
        h = torch.linalg.solve(identity - step, gated.mT).mT.reshape(x.shape)
        y += u[:, direction] * h + skip[:, direction] * x
    return y


def _step_matrix(direction: int, logits: Tensor) -> Tensor:
    """One step of a direction as a matrix ``[B, G, N, N]``, from logits ``[B, G, 3, H, W]``."""
    batch, groups, _, height, width = logits.shape
    rows, columns = PREVIOUS_LINE[direction]
    down, right = ALONG_LINE[direction]
    step = logits.new_zeros(batch, groups, height, width, height, width)
    for i in range(height):
        for j in range(width):
            taps = [k for k in range(3) if _inside(i + (k - 1) * down, j + (k - 1) * right, logits)]
            gates = logits[:, :, :, i, j].sigmoid()
            for k in taps:
                row, column = i + rows + (k - 1) * down, j + columns + (k - 1) * right
                if _inside(row, column, logits):
                    weight = gates[..., k] / gates[..., taps].sum(-1)
                    step[:, :, i, j, row, column] = weight
    return step.reshape(batch, groups, height * width, height * width)


def _inside(row: int, column: int, image: Tensor) -> bool:
    return 0 <= row < image.shape[-2] and 0 <= column < image.shape[-1]
