"""Maps to the lines of a LineLayout and back, with torch's own copies."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import LineLayout, pad

# What operators of lines take beside rows and columns, as torch.library writes it: a chunk_size of
# 0 scans the whole map, a native size of 0 leaves lam as it is.
SIZES = (
    "SymInt height, SymInt width, SymInt channels, SymInt groups, SymInt chunk_size, bool skip, "
    "SymInt native_height, SymInt native_width"
)


def pack_maps(
    x: Tensor, logits: Tensor, lam: Tensor, u: Tensor, skip: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The lines, by axis, of the inputs of :func:`gspn2_diffusers.kernels.gspn2_scan`."""
    gates = (lam, u) if skip is None else (lam, u, skip)
    axes = []
    for axis in (0, 1):
        directions = slice(2 * axis, 2 * axis + 2)
        parts = [x, *(gate[:, directions].flatten(1, 2) for gate in gates)]
        together = torch.cat([*parts, logits[:, directions].flatten(1, 3)], dim=1)
        lines = together.permute(0, 2, 1, 3) if axis == 0 else together.permute(0, 3, 1, 2)
        length = lines.shape[-1]
        axes.append(F.pad(lines, (0, pad(length, x.element_size()) - length)).contiguous())
    return tuple(axes)


def split_lines(rows: Tensor, columns: Tensor, grid, layout: LineLayout) -> tuple[Tensor, ...]:
    """The inverse of :func:`pack_maps`; x is that of the rows."""
    height, width = grid
    x, *upright = layout.split(rows[..., :width])
    _, *sideways = layout.split(columns[..., :height])
    pairs = zip(upright, sideways, strict=True)
    return x, *(torch.cat([a, b.transpose(-1, -2)], dim=1) for a, b in pairs)
