"""The GSPN-2 scan in plain torch: the definition that every faster kernel is held to.

One direction of the scan visits the map line by line (arXiv 2512.07884, section 3)::

    h[i, j] = w_left[i, j]   * h[i-1, j-1]
            + w_center[i, j] * h[i-1, j  ]
            + w_right[i, j]  * h[i-1, j+1]
            + lam[i, j] * x[i, j]                  h[-1, :] = 0
    y[i, j] = u[i, j] * h[i, j] + skip[i, j] * x[i, j]

with i the line, counted in the direction of the scan, and j the position inside the line, in
image order: the left tap is the neighbour of smaller row or column index in every direction.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .line_scan import line_scan

DIRECTIONS = ("top_to_bottom", "bottom_to_top", "left_to_right", "right_to_left")


def scan_reference(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    skip: Tensor | None,
    chunk_size: int | None,
) -> Tensor:
    """Shapes, dtypes and meaning as in :func:`gspn2_diffusers.kernels.gspn2_scan`; no checks."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(dtype)[:, None]
    gated = lam.to(dtype) * x_wide

    # Maps with as many rows as columns take all four directions through one loop over lines.
    square = x.shape[-2] == x.shape[-1]
    batches = [range(4)] if square else [range(0, 2), range(2, 4)]
    h = torch.cat([_scan(logits.to(dtype), gated, batch, chunk_size) for batch in batches], dim=1)

    y = u.to(dtype) * h
    if skip is not None:
        y = y + skip.to(dtype) * x_wide
    return y.sum(dim=1).to(x.dtype)


def propagation_weights(logits: Tensor) -> Tensor:
    """Row-stochastic weights from logits, both ``[..., 3, lines, length]`` in line order.

    ``w_k = sigmoid(l_k) / sum of sigmoid(l_k')`` over the taps that exist: at the ends of a line
    the neighbour outside is left out of the sum, so these rows also sum to one.
    """
    outside = torch.zeros(3, 1, logits.shape[-1], dtype=torch.bool, device=logits.device)
    outside[0, :, 0] = True
    outside[2, :, -1] = True
    # softmax of the log is the same quotient, and survives logits whose sigmoid underflows
    log_sigmoid = F.logsigmoid(logits).masked_fill(outside, -torch.inf)
    return log_sigmoid.softmax(dim=-3)


def _scan(logits: Tensor, gated: Tensor, directions: range, chunk_size: int | None) -> Tensor:
    """Hidden state ``[B, len(directions), P, H, W]`` of directions that have equal line counts."""
    groups = logits.shape[2]
    logits = torch.stack([_to_lines(logits[:, d], d) for d in directions])  # [D, B, G, 3, i, j]
    b = torch.stack([_to_lines(gated[:, d], d) for d in directions])  # [D, B, P, i, j]

    w = propagation_weights(logits).flatten(0, 1).permute(3, 2, 0, 1, 4).unsqueeze(-2)
    if chunk_size is not None:
        # A line that takes nothing from the line before it is where a local scan restarts.
        starts = torch.arange(w.shape[0], device=w.device) % chunk_size == 0
        w = w.masked_fill(starts.view(-1, 1, 1, 1, 1, 1), 0)
    b = b.flatten(0, 1).unflatten(1, (groups, -1)).permute(3, 0, 1, 2, 4)

    h = line_scan(w.contiguous(), b.contiguous())
    h = h.permute(1, 2, 3, 0, 4).flatten(1, 2).unflatten(0, (len(directions), -1))
    return torch.stack([_to_image(h[k], d) for k, d in enumerate(directions)], dim=1)


def _to_lines(image: Tensor, direction: int) -> Tensor:
    """``[..., H, W]`` as ``[..., lines, length]``, lines in the order the direction visits them."""
    name = DIRECTIONS[direction]
    lines = image if name in ("top_to_bottom", "bottom_to_top") else image.transpose(-2, -1)
    return lines.flip(-2) if name in ("bottom_to_top", "right_to_left") else lines


def _to_image(lines: Tensor, direction: int) -> Tensor:
    """The inverse of :func:`_to_lines`."""
    name = DIRECTIONS[direction]
    image = lines.flip(-2) if name in ("bottom_to_top", "right_to_left") else lines
    return image if name in ("top_to_bottom", "bottom_to_top") else image.transpose(-2, -1)
