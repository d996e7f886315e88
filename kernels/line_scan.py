"""The recurrence over lines, with its hand-written gradient, as an opaque torch operator.

Opaque, because a loop over lines is thousands of graph nodes for a compiler that traces it, and
because autograd would keep every intermediate of every line; the gradient needs only w and h.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEFT, CENTER, RIGHT = range(3)


@torch.library.custom_op("gspn2_diffusers::line_scan", mutates_args=())
def line_scan(w: Tensor, b: Tensor) -> Tensor:
    """Hidden state of a scan that visits the lines in order, starting from zero::

        h[i, j] = w_left[i, j] h[i-1, j-1] + w_center[i, j] h[i-1, j] + w_right[i, j] h[i-1, j+1]
                + b[i, j]

    Args:
        w: weights of the left, center and right tap, ``[lines, 3, batch, groups, 1, length]``.
        b: gated input, ``[lines, batch, groups, channels, length]``, of the same dtype.

    Returns:
        h, shaped like b and contiguous. Neighbours outside the line count as zero.
    """
    return _solve(w, b).contiguous()


@torch.library.custom_op("gspn2_diffusers::line_scan_backward", mutates_args=())
def line_scan_backward(w: Tensor, h: Tensor, grad_h: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`line_scan` for w and b, given its result h and the gradient of h.

    The gradient of b is itself a scan: over the lines in reverse, with transposed weights.
    """
    grad_b = _solve(_adjoint_weights(w), grad_h.flip(0)).flip(0).contiguous()
    neighbours = F.pad(h[:-1], (1, 1)).unfold(-1, 3, 1)
    grad_w = torch.zeros_like(w, memory_format=torch.contiguous_format)
    for tap in (LEFT, CENTER, RIGHT):
        torch.sum(grad_b[1:] * neighbours[..., tap], -2, keepdim=True, out=grad_w[1:, tap])
    return grad_w, grad_b


def _solve(w: Tensor, b: Tensor) -> Tensor:
    padded = F.pad(b, (1, 1))
    w_left, w_center, w_right = (w[:, tap].unbind() for tap in (LEFT, CENTER, RIGHT))
    # Views of every line, once: indexing inside the loop would cost more than its arithmetic.
    left, h, right = (padded[..., k : k + b.shape[-1]].unbind() for k in range(3))
    for i in range(1, len(h)):
        h[i].addcmul_(w_left[i], left[i - 1])
        h[i].addcmul_(w_center[i], h[i - 1])
        h[i].addcmul_(w_right[i], right[i - 1])
    return padded[..., 1:-1]


def _adjoint_weights(w: Tensor) -> Tensor:
    """Weights that carry a gradient from line i + 1 to line i, in the order of that visit."""
    to_right = F.pad(w[:, RIGHT, ..., :-1], (1, 0))  # what position j - 1 read from j
    to_left = F.pad(w[:, LEFT, ..., 1:], (0, 1))  # what position j + 1 read from j
    return torch.stack((to_right, w[:, CENTER], to_left), dim=1).flip(0).roll(1, 0)


@line_scan.register_fake
def _(w: Tensor, b: Tensor) -> Tensor:
    return b.new_empty(b.shape)


@line_scan_backward.register_fake
def _(w: Tensor, h: Tensor, grad_h: Tensor) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape), h.new_empty(h.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx, grad_h: Tensor) -> tuple[Tensor, Tensor]:
    return line_scan_backward(*ctx.saved_tensors, grad_h)


line_scan.register_autograd(_backward, setup_context=_save_for_backward)
