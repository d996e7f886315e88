"""The scan of a map in four directions, forward and backward, in plain torch.

Works on views ``[B, ..., H, W]`` with any strides, best with channels last. Directions whose lines
are equally many share a buffer of lines and with it the calls of line_scan.py: all four on a square
map, two and two on any other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .line_scan import normalize_, normalize_backward_, scan_, scan_backward_, weight_gradient

DIRECTIONS = ("top_to_bottom", "bottom_to_top", "left_to_right", "right_to_left")


class Maps(NamedTuple):
    """The inputs of :func:`gspn2_diffusers.kernels.gspn2_scan`, or their gradients."""

    x: Tensor
    logits: Tensor
    lam: Tensor
    u: Tensor
    skip: Tensor | None


def forward(inputs: Maps, chunk_size: int, *native_grid: int) -> Tensor:
    """y ``[B, P, H, W]``, channels last in memory, in the dtype of x.

    A `chunk_size` of 0 scans the whole map, a native size of 0 leaves lam as it is.
    """
    # To scale lam is to scale h, and h is scaled where it is read.
    x, scales = _accumulable(inputs.x), _scales(inputs.x, native_grid)
    chunk_size = chunk_size or None
    y = torch.zeros_like(x)
    if inputs.skip is not None:
        for skip in inputs.skip.unbind(1):
            y.addcmul_(skip, x)
    for directions in _directions_by_line_count(x):
        w = _logits_by_line(inputs.logits, directions, x.dtype)
        normalize_(w)
        h = scan_(_gated(inputs.lam, x, directions, w), w, chunk_size)
        for d, h_d in _each(directions, h):
            _by_line(y, d, w).addcmul_(_by_line(inputs.u[:, d], d, w), h_d, value=scales[d])
    return y.to(inputs.x.dtype)


def backward(
    grad_y: Tensor, inputs: Maps, grads: Maps, chunk_size: int, *native_grid: int
) -> None:
    """Write the gradients of all inputs into `grads`. The hidden state is computed again."""
    x, grad_y, scales = *map(_accumulable, (inputs.x, grad_y)), _scales(inputs.x, native_grid)
    chunk_size = chunk_size or None
    grad_x = torch.zeros_like(x)
    if inputs.skip is not None:
        for skip, grad_skip in zip(inputs.skip.unbind(1), grads.skip.unbind(1), strict=True):
            grad_x.addcmul_(skip, grad_y)
            torch.mul(grad_y, x, out=grad_skip)
    for directions in _directions_by_line_count(x):
        w = _logits_by_line(inputs.logits, directions, x.dtype)
        total = normalize_(w)
        h = scan_(_gated(inputs.lam, x, directions, w), w, chunk_size)
        g = scan_backward_(_gated(inputs.u, grad_y, directions, w), w, chunk_size)
        for d, h_d in _each(directions, h):
            _scale(h_d, scales[d])
            torch.mul(h_d, _by_line(grad_y, d, w), out=_by_line(grads.u[:, d], d, w))
        grad_w = weight_gradient(g, h, chunk_size)
        for d, g_d in _each(directions, g):
            _scale(g_d, scales[d])
            torch.mul(g_d, _by_line(x, d, w), out=_by_line(grads.lam[:, d], d, w))
            _by_line(grad_x, d, w).addcmul_(_by_line(inputs.lam[:, d], d, w), g_d)
        normalize_backward_(grad_w, w, total)
        for k, d in enumerate(directions):
            _taps_by_line(grads.logits[:, d], d).copy_(grad_w.flatten(1, 2)[:, k])
    grads.x.copy_(grad_x)


def _scales(x: Tensor, native_grid: tuple[int, int]) -> list[float]:
    """What lam is multiplied by in each direction."""
    pairs = zip(native_grid, x.shape[-2:], strict=True)
    upright, sideways = (native / lines if native else 1.0 for native, lines in pairs)
    return [upright, upright, sideways, sideways]


def _scale(tensor: Tensor, scale: float) -> None:
    if scale != 1:
        tensor.mul_(scale)


def _accumulable(x: Tensor) -> Tensor:
    """`x` in at least float32, channels last in memory."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _directions_by_line_count(x: Tensor) -> list[range]:
    square = x.shape[-2] == x.shape[-1]
    return [range(4)] if square else [range(0, 2), range(2, 4)]


def _each(directions: range, buffer: Tensor):
    """Pairs of a direction and its part of a buffer of lines."""
    return zip(directions, buffer.flatten(0, 1), strict=True)


def _gated(gate: Tensor, x: Tensor, directions: range, w: Tensor) -> Tensor:
    """``gate * x`` as a buffer of lines, with the groups of `w`."""
    factors = [(_by_line(gate[:, d], d, w), _by_line(x, d, w)) for d in directions]
    buffer = x.new_empty(len(directions), *factors[0][1].shape)
    for part, (gate_d, x_d) in zip(buffer, factors, strict=True):
        torch.mul(gate_d, x_d, out=part)
    return buffer.unflatten(0, (-1, 2))


def _logits_by_line(logits: Tensor, directions: range, dtype: torch.dtype) -> Tensor:
    """A copy of the logits in the dimensions of a buffer's weights."""
    taps = [_taps_by_line(logits[:, d], d).to(dtype) for d in directions]
    return torch.stack(taps, dim=1).unflatten(1, (-1, 2))


def _by_line(image: Tensor, direction: int, w: Tensor) -> Tensor:
    """``[B, P, H, W]`` as ``[B, lines, length, groups, channels]``, with the groups of `w`."""
    grouped = image.unflatten(1, (w.shape[-2], -1))
    return grouped.permute(0, 3, 4, 1, 2) if direction < 2 else grouped.permute(0, 4, 3, 1, 2)


def _taps_by_line(logits: Tensor, direction: int) -> Tensor:
    """``[B, G, 3, H, W]`` as ``[3, B, lines, length, G, 1]``."""
    order = (2, 0, 3, 4, 1) if direction < 2 else (2, 0, 4, 3, 1)
    return logits.permute(order).unsqueeze(-1)
