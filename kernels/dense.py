"""GSPN-2 by its other definition: the dense affinity matrix of each direction, in float64.

What tests and benchmarks hold every implementation to; it shares no code with them. With A_i the
tridiagonal matrix of line i, one direction is y = u * (G (lam * x)) + skip * x, where G is block
lower-triangular with G_ij = A_i A_(i-1) ... A_(j+1). For small maps: G has (H * W)^2 elements.
"""

import numpy as np
import torch
from torch import Tensor

RELATIVE_RMS = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}
"""The one table of tolerances: largest :func:`relative_error` by the dtype of the result."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root-mean-square error over root-mean-square value; NaN where `actual` holds one."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    error = (actual - expected).square().mean() / expected.square().mean().clamp_min(1e-60)
    return error.sqrt().item()


def dense_scan(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    skip: Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """:func:`gspn2_diffusers.kernels.gspn2_scan` in float64 on the CPU, a channel at a time."""
    if skip is None:
        skip = torch.zeros_like(lam)
    x, logits, lam, u, skip = (t.detach().cpu().double().numpy() for t in (x, logits, lam, u, skip))
    batch, channels = x.shape[:2]
    shared_by = channels // logits.shape[2]
    y = np.zeros_like(x)
    for n in range(batch):
        for c in range(channels):
            for d in range(4):
                maps = (x[n, c], lam[n, d, c], u[n, d, c], skip[n, d, c])
                taps = logits[n, d, c // shared_by]
                y[n, c] += _one_direction(d, taps, *maps, chunk_size)
    return torch.from_numpy(y)


def _one_direction(direction, taps, x, lam, u, skip, chunk_size):
    def lines(image):
        turned = image if direction < 2 else image.T
        return turned[::-1] if direction % 2 else turned

    gated = lines(lam * x)
    affinity = _affinity(np.stack([lines(tap) for tap in taps]), chunk_size)
    h = (affinity @ gated.reshape(-1)).reshape(gated.shape)
    h = h[::-1] if direction % 2 else h
    return u * (h if direction < 2 else h.T) + skip * x


def _affinity(taps, chunk_size):
    """G ``[lines * length, lines * length]`` from logits ``[3, lines, length]``."""
    _, lines, length = taps.shape
    gates = 1 / (1 + np.exp(-taps))
    blocks = np.zeros((lines, length, lines, length))
    for i in range(lines):
        step = np.zeros((length, length))
        for j in range(length):
            for k, offset in enumerate((-1, 0, 1)):
                if 0 <= j + offset < length:
                    step[j, j + offset] = gates[k, i, j]
            step[j] /= step[j].sum()
        blocks[i, :, i, :] = np.eye(length)
        if i and not (chunk_size and i % chunk_size == 0):
            blocks[i, :, :i, :] = np.einsum("ab,bcd->acd", step, blocks[i - 1, :, :i, :])
    return blocks.reshape(lines * length, lines * length)
