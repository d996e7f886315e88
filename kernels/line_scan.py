"""The recurrence over the lines of a map and its gradients, in place, in plain torch.

A buffer of lines is contiguous, ``[orientations, 2, batch, lines, length, groups, channels]``. The
second dimension is the sense of the scan: 0 visits line 0 first, 1 the last line first. Both keep
their lines in image order, so that no map is ever flipped. Weights are ``[3, ..., groups, 1]`` with
the tap first and otherwise the dimensions of the buffer that they belong to.

One line is little work, so the number of calls per line decides: three, for all directions that
the buffer holds, on views made once. A map is much memory, so nothing is allocated per line.
"""

import torch
from torch import Tensor

LEFT, CENTER, RIGHT = range(3)
SENSE, LINE, POSITION = -6, -4, -3  # dimensions of a buffer of lines


def normalize_(logits: Tensor) -> Tensor:
    """Turn logits into row-stochastic weights, in place.

    ``w_k = sigmoid(l_k) / sum of sigmoid(l_k')`` over the taps that exist: at the ends of a line
    the neighbour outside is left out of the sum, so these rows also sum to one.

    Returns:
        the sums, for :func:`normalize_backward_`.
    """
    logits[LEFT].select(POSITION, 0).fill_(-torch.inf)
    logits[RIGHT].select(POSITION, -1).fill_(-torch.inf)
    # Below -40 sigmoid(l) is exp(l) to the last digit, and shifting a whole row by as much leaves
    # the quotient as it is: this saves the rows whose every sigmoid would underflow.
    largest = torch.maximum(torch.maximum(logits[LEFT], logits[CENTER]), logits[RIGHT])
    logits.sub_(largest.add_(40).clamp_(max=0)).sigmoid_()
    total = torch.add(logits[LEFT], logits[CENTER], out=largest).add_(logits[RIGHT])
    logits.div_(total)
    return total


def normalize_backward_(grad_w: Tensor, w: Tensor, total: Tensor) -> Tensor:
    """Turn the gradient of the weights `w` into that of their logits, in place:
    ``w_k (1 - sigmoid(l_k)) (grad_k - sum of w_k' grad_k')``."""
    scratch = (grad_w[LEFT] * w[LEFT]).addcmul_(grad_w[CENTER], w[CENTER])
    scratch.addcmul_(grad_w[RIGHT], w[RIGHT])
    grad_w.sub_(scratch).mul_(w)
    for grad, weight in zip(grad_w, w, strict=True):
        sigmoid = torch.mul(weight, total, out=scratch)
        grad.addcmul_(grad, sigmoid, value=-1)
    return grad_w


def scan_(h: Tensor, w: Tensor, chunk_size: int | None) -> Tensor:
    """Turn gated input into the hidden state, in place::

        h[i, j] += w_left[i, j] h[i-1, j-1] + w_center[i, j] h[i-1, j] + w_right[i, j] h[i-1, j+1]

    with i counted in the sense of the scan. It starts anew every `chunk_size` lines.
    """
    taps = _taps(h, w)
    for i in _continuing_steps(h, chunk_size):
        for here, weight, neighbour in taps:
            here[i].addcmul_(weight[i], neighbour[i - 1])
    return h


def scan_backward_(g: Tensor, w: Tensor, chunk_size: int | None) -> Tensor:
    """Turn the gradient that reaches each line of h from outside into the whole gradient of h, in
    place: the scan in reverse, every tap carrying the gradient of line i to the line before."""
    taps = _taps(g, w)
    for i in reversed(_continuing_steps(g, chunk_size)):
        for here, weight, neighbour in taps:
            neighbour[i - 1].addcmul_(weight[i], here[i])
    return g


def weight_gradient(g: Tensor, h: Tensor, chunk_size: int | None) -> Tensor:
    """Gradient of the weights, given the hidden state `h` and its gradient `g`."""
    grad_w = h.new_zeros(len((LEFT, CENTER, RIGHT)), *h.shape[:-1], 1)
    products = torch.empty_like(h.select(SENSE, 0))
    number = h.shape[LINE] - 1
    for sense, line, line_before in ((0, 1, 0), (1, 0, 1)):
        g_line = g.select(SENSE, sense).narrow(LINE, line, number)
        h_before = h.select(SENSE, sense).narrow(LINE, line_before, number)
        for grad, (own, neighbour) in zip(grad_w, _reach(h), strict=True):
            factors = g_line.narrow(POSITION, *own), h_before.narrow(POSITION, *neighbour)
            product = products.narrow(LINE, 0, number).narrow(POSITION, *own)
            torch.mul(*factors, out=product)
            out = grad.select(SENSE, sense).narrow(LINE, line, number).narrow(POSITION, *own)
            torch.sum(product, -1, keepdim=True, out=out)
    for start in range(0, number + 1, chunk_size or number + 1):
        grad_w.select(SENSE, 0).select(LINE, start).zero_()
        grad_w.select(SENSE, 1).select(LINE, number - start).zero_()
    return grad_w


def _continuing_steps(h: Tensor, chunk_size: int | None) -> list[int]:
    return [i for i in range(1, h.shape[LINE]) if chunk_size is None or i % chunk_size]


Span = tuple[int, int]  # first position in a line, number of positions


def _reach(h: Tensor) -> tuple[tuple[Span, Span], ...]:
    """For each tap the positions that have this neighbour, and those of the neighbours."""
    length = h.shape[POSITION]
    head, tail, whole = (0, length - 1), (1, length - 1), (0, length)
    return (tail, head), (whole, whole), (head, tail)


def _taps(h: Tensor, w: Tensor) -> list[tuple[list[Tensor], ...]]:
    """For each tap what it writes, its weights and what it reads, each by step of the scan."""
    steps = {own: _steps(h.narrow(POSITION, *own)) for own, _ in _reach(h)}
    return [
        (steps[own], _steps(weight.narrow(POSITION, *own)), steps[neighbour])
        for weight, (own, neighbour) in zip(w, _reach(h), strict=True)
    ]


def _steps(buffer: Tensor) -> list[Tensor]:
    """What the scans visit at each step, as one view: line i in one sense and the i-th from the
    end in the other, whose distance in memory shrinks by two lines a step."""
    first = buffer.select(LINE, 0)
    orientation, sense, *rest = first.stride()
    line, last = buffer.stride(LINE), buffer.shape[LINE] - 1
    return [
        first.as_strided(
            first.shape,
            (orientation, sense + (last - 2 * i) * line, *rest),
            first.storage_offset() + i * line,
        )
        for i in range(last + 1)
    ]
