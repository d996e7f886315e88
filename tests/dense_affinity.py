"""GSPN-2 by its other definition: the dense affinity matrix of each direction, in float64.

Shares no code with the package. With A_i the tridiagonal matrix of line i, the scan is
y = u * (G (lam * x)), G block lower-triangular with G_ij = A_i A_(i-1) ... A_(j+1).
"""

import numpy as np
import torch
from torch import Tensor


def dense_scan(x, logits, lam, u, skip=None, chunk_size=None) -> Tensor:
    """Arguments of `gspn2_scan`; every channel of every image is one matrix product."""
    x, logits, lam, u = (np.asarray(t.detach().double()) for t in (x, logits, lam, u))
    skip = np.zeros_like(lam) if skip is None else np.asarray(skip.detach().double())
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
    rotate = _turn_into_lines(direction)
    lines, length = rotate(x).shape
    affinity = _affinity(np.stack([rotate(tap) for tap in taps]), chunk_size)
    h = (affinity @ rotate(lam * x).reshape(-1)).reshape(lines, length)
    return u * _turn_back(direction, h) + skip * x


def _affinity(taps, chunk_size):
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


def _turn_into_lines(direction):
    return (
        lambda m: m,
        lambda m: m[::-1],
        lambda m: m.T,
        lambda m: m.T[::-1],
    )[direction]


def _turn_back(direction, h):
    return (h, h[::-1], h.T, h[::-1].T)[direction]
