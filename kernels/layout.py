"""Where the inputs of a scan lie: in the row that a projection writes for a token, and in the lines
that the CUDA kernels read."""

from dataclasses import dataclass

import torch
from torch import Tensor

DIRECTION_COUNT = 4
TAPS = 3
ROW_MULTIPLE = 16  # of the row's length: rows of 16-bit numbers then begin on a 32-byte sector
VECTOR_BYTES = 16


@dataclass(frozen=True)
class TokenLayout:
    """Columns of a ``[B, N, K]`` parameter matrix: lam, u and skip, ``[4, P]`` each, then logits
    ``[4, G, 3]``, then columns that nobody reads and that fill up the last memory sector of a row.

    lam comes first and K is a multiple of 16, so that vectors of channels are aligned. For the same
    reason three logits that several channels share take four columns; the fourth is not read.
    """

    proxy_dim: int
    groups: int

    @property
    def group_stride(self) -> int:
        """Columns from the logits of one group to those of the next."""
        return TAPS if self.groups == self.proxy_dim else TAPS + 1

    @property
    def gates(self) -> int:
        """Columns of lam, u and skip together: the first ones."""
        return 3 * DIRECTION_COUNT * self.proxy_dim

    @property
    def width(self) -> int:
        """K."""
        used = self.gates + DIRECTION_COUNT * self.groups * self.group_stride
        return -(-used // ROW_MULTIPLE) * ROW_MULTIPLE

    def split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of `params` ``[..., K]``: logits ``[..., 4, G, 3]``, then lam, u and skip
        ``[..., 4, P]``."""
        logits = params[..., self.gates :][
            ..., : DIRECTION_COUNT * self.groups * self.group_stride
        ].unflatten(-1, (DIRECTION_COUNT, self.groups, self.group_stride))
        gates = params[..., : self.gates].unflatten(-1, (3, DIRECTION_COUNT, -1))
        return logits[..., :TAPS], *gates.unbind(-3)

    def by_line(self) -> tuple[Tensor, Tensor, Tensor]:
        """Columns in the order of the rows of a :class:`LineLayout` that follow x: those of the
        rows of the map, those of its columns, and those that nobody reads."""
        columns = torch.arange(self.width)
        logits, *gates = self.split(columns)
        of_axes = [
            torch.cat([part[axis : axis + 2].flatten() for part in (*gates, logits)])
            for axis in (0, 2)
        ]
        unread = columns[~torch.isin(columns, torch.cat(of_axes))]
        return *of_axes, unread


@dataclass(frozen=True)
class LineLayout:
    """Rows of the buffers ``[B, lines, R, padded]`` that the CUDA kernels scan, one for the rows of
    a map and one for its columns: x ``[P]``, then for the two directions along the axis lam, u and
    skip, ``[2, P]`` each, and logits ``[2, G, 3]``.

    The positions of a line are neighbours in memory. `padded` is their number rounded up to whole
    vectors of 16 bytes; what is past the length is zero.
    """

    proxy_dim: int
    groups: int
    skip: bool

    @property
    def gates(self) -> int:
        """How many there are of lam, u and skip."""
        return 3 if self.skip else 2

    @property
    def rows(self) -> int:
        """R."""
        return (1 + 2 * self.gates) * self.proxy_dim + 2 * self.groups * TAPS

    def split(self, lines: Tensor) -> tuple[Tensor, ...]:
        """Views of `lines` ``[B, lines, R, length]``: x ``[B, P, lines, length]``, logits
        ``[B, 2, G, 3, lines, length]``, then lam, u and perhaps skip ``[B, 2, P, lines, length]``.
        """
        pair = 2 * self.proxy_dim
        sizes = (self.proxy_dim, *self.gates * [pair], 2 * self.groups * TAPS)
        x, *gates, logits = lines.transpose(1, 2).split(sizes, dim=1)
        logits = logits.unflatten(1, (2, self.groups, TAPS))
        return x, logits, *(gate.unflatten(1, (2, -1)) for gate in gates)


def pad(length: int, itemsize: int) -> int:
    """`length` rounded up to whole vectors of 16 bytes."""
    vector = VECTOR_BYTES // itemsize
    return -(-length // vector) * vector
