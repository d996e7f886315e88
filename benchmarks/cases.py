"""The shapes of the scan that are timed, operands for them, and the bytes they have to move."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gspn2_diffusers import gspn2_scan
from gspn2_diffusers.kernels import gspn2_scan_lines
from gspn2_diffusers.kernels.layout import LineLayout
from gspn2_diffusers.kernels.lines import pack_maps, split_lines

DIRECTIONS = 4
TAPS = 3
LAYOUTS = ("lines", "channels-last", "tokens", "planar")


@dataclass(frozen=True)
class Case:
    """A map of `batch` images with `proxy_dim` channels, whose weights come in `groups`.

    Goal and what GSPN-1's official kernel took on an H200 are ms per direction.
    """

    batch: int
    proxy_dim: int
    height: int
    width: int
    groups: int = 1
    goal_ms: float | None = None
    gspn1_ms: float | None = None

    @property
    def label(self) -> str:
        """Such as 1x80x1024² or 1x8x24x40."""
        square = self.height == self.width
        area = f"{self.height}²" if square else f"{self.height}x{self.width}"
        return f"{self.batch}x{self.proxy_dim}x{area}"

    @property
    def shared_by(self) -> int:
        """Channels that share one set of weights."""
        return self.proxy_dim // self.groups

    def input_elements(self, skip: bool) -> float:
        """Elements of lam, u, skip and logits for each element of x."""
        gates = 3 if skip else 2
        return DIRECTIONS * (gates + TAPS / self.shared_by)

    def floor_bytes(self, skip: bool, backward: bool, itemsize: int) -> float:
        """Every input read once, every result written once."""
        inputs = 1 + self.input_elements(skip)
        elements = inputs + 1 + inputs if backward else inputs + 1
        return elements * self.elements * itemsize

    def moved_bytes(self, skip: bool, itemsize: int) -> float:
        """Forward pass with every direction on its own: x is read by each, and each writes a
        result, which a last step reads and adds up."""
        elements = DIRECTIONS + self.input_elements(skip) + 2 * DIRECTIONS + 1
        return elements * self.elements * itemsize

    @property
    def elements(self) -> int:
        """Elements of x."""
        return self.batch * self.proxy_dim * self.height * self.width


GOAL_CASES = (
    Case(16, 8, 1024, 1024, 1, goal_ms=0.24, gspn1_ms=33.2),
    Case(256, 1, 1024, 1024, 1, goal_ms=0.80, gspn1_ms=72.4),
    Case(8, 64, 256, 256, 8, goal_ms=0.065, gspn1_ms=7.33),
    Case(1, 80, 1024, 1024, 10, goal_ms=0.15, gspn1_ms=21.1),
    Case(1, 128, 512, 512, 16, goal_ms=0.075, gspn1_ms=6.11),
    Case(1, 1152, 64, 64, 144, goal_ms=0.015, gspn1_ms=0.861),
)
LAYER_CASES = (
    Case(1, 80, 1024, 1024),
    Case(1, 160, 512, 512),
    Case(1, 80, 256, 256),
    Case(1, 160, 128, 128),
    Case(1, 160, 32, 32),
)


def parse_case(text: str) -> Case:
    """A case from ``NxPxHxW`` or ``NxPxHxW/groups``, such as ``1x80x256x256/10``."""
    shape, _, groups = text.partition("/")
    sizes = [*shape.split("x"), groups or "1"]
    if len(sizes) != 5 or not all(part.isdecimal() and int(part) for part in sizes):
        raise argparse.ArgumentTypeError(f"expected NxPxHxW or NxPxHxW/groups, got {text!r}")
    case = Case(*map(int, sizes))
    if case.proxy_dim % case.groups:
        raise argparse.ArgumentTypeError(f"expected groups that divide P, got {text!r}")
    return next((known for known in GOAL_CASES if _same_shape(known, case)), case)


def _same_shape(case: Case, other: Case) -> bool:
    return replace(case, goal_ms=None, gspn1_ms=None) == other


@dataclass(frozen=True)
class Operands:
    """Arguments of :func:`gspn2_scan`."""

    x: Tensor
    logits: Tensor
    lam: Tensor
    u: Tensor
    skip: Tensor | None

    @classmethod
    def random(
        cls, case: Case, layout: str, skip: bool, device: torch.device, dtype: torch.dtype
    ) -> "Operands | LineOperands":
        """Normal ones. `layout` is how they lie in memory: ``lines`` as the kernels read them,
        ``channels-last`` puts the channels of a position beside each other, ``tokens`` all
        parameters of a position too (as a layer's projection writes them), ``planar`` the positions
        of a channel."""
        if layout == "lines":
            return LineOperands.of(cls.random(case, "planar", skip, device, dtype), case)
        batch, proxy_dim, height, width = case.batch, case.proxy_dim, case.height, case.width
        logits = (case.groups, TAPS)
        gates = 3 if skip else 2

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        if layout == "planar":
            x = randn(batch, proxy_dim, height, width)
            parts = [randn(batch, DIRECTIONS, proxy_dim, height, width) for _ in range(gates)]
            return cls._with(x, randn(batch, DIRECTIONS, *logits, height, width), parts)
        x = randn(batch, height, width, proxy_dim).permute(0, 3, 1, 2)
        if layout == "channels-last":
            planes = [randn(batch, DIRECTIONS, height, width, proxy_dim) for _ in range(gates)]
            parts = [plane.permute(0, 1, 4, 2, 3) for plane in planes]
            taps = randn(batch, DIRECTIONS, height, width, *logits).permute(0, 1, 4, 5, 2, 3)
            return cls._with(x, taps, parts)
        widths = [DIRECTIONS * proxy_dim] * gates + [DIRECTIONS * case.groups * TAPS]
        padded = -sum(widths) % 16
        params = randn(batch, height, width, sum(widths) + padded).permute(0, 3, 1, 2)
        *parts, taps, _ = params.split([*widths, padded], dim=1)
        parts = [part.unflatten(1, (DIRECTIONS, -1)) for part in parts]
        return cls._with(x, taps.unflatten(1, (DIRECTIONS, *logits)), parts)

    @classmethod
    def _with(cls, x: Tensor, logits: Tensor, gates: list[Tensor]) -> "Operands":
        return cls(x, logits, *gates, *[None] * (3 - len(gates)))

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def map(self, change: Callable[[Tensor], Tensor]) -> "Operands":
        """The same after `change` of each tensor."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors().items()})

    def leaves(self) -> "Operands":
        """The same memory, as tensors that gradients are wanted for."""
        return self.map(lambda tensor: tensor.detach().requires_grad_())

    def scan(self, **options: object) -> Tensor:
        """Run :func:`gspn2_scan`; `options` are its keyword arguments."""
        return gspn2_scan(self.x, self.logits, self.lam, self.u, self.skip, **options)

    def maps(self) -> "Operands":
        """The same as arguments of :func:`gspn2_scan`."""
        return self

    def gradients_of_maps(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of :meth:`maps` from those of :meth:`tensors`."""
        return gradients


@dataclass(frozen=True)
class LineOperands:
    """Arguments of :func:`gspn2_scan_lines`, with the interface of :class:`Operands`."""

    rows: Tensor
    columns: Tensor
    case: Case
    skip: bool

    @classmethod
    def of(cls, maps: Operands, case: Case) -> "LineOperands":
        """Those of the same scan."""
        lines = pack_maps(maps.x, maps.logits, maps.lam, maps.u, maps.skip)
        return cls(*lines, case, maps.skip is not None)

    @property
    def x(self) -> Tensor:
        """As much of the memory as x takes."""
        return self.rows[:, :, : self.case.proxy_dim]

    def tensors(self) -> dict[str, Tensor]:
        """Both of them, by name."""
        return {"rows": self.rows, "columns": self.columns}

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.rows.nbytes + self.columns.nbytes

    def leaves(self) -> "LineOperands":
        """The same memory, as tensors that gradients are wanted for."""
        leaves = (tensor.detach().requires_grad_() for tensor in (self.rows, self.columns))
        return replace(self, **dict(zip(("rows", "columns"), leaves, strict=True)))

    def scan(self, **options: object) -> Tensor:
        """Run :func:`gspn2_scan_lines`, to a map ``[B, P, H, W]``."""
        grid, case = (self.case.height, self.case.width), self.case
        sizes = {"proxy_dim": case.proxy_dim, "groups": case.groups, "skip": self.skip}
        y = gspn2_scan_lines(self.rows, self.columns, grid, **sizes, **options)
        return y.unflatten(1, grid).permute(0, 3, 1, 2)

    def maps(self) -> Operands:
        """The same as arguments of :func:`gspn2_scan`."""
        return Operands._with(*self._split(self.rows, self.columns))

    def gradients_of_maps(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of :meth:`maps` from those of :meth:`tensors`: both hold a part of x's."""
        x, logits, gates = self._split(**gradients)
        sideways = self._layout.split(gradients["columns"][..., : self.case.height])[0]
        x = x + sideways.transpose(-1, -2)
        return Operands._with(x, logits, gates).tensors()

    @property
    def _layout(self) -> LineLayout:
        return LineLayout(self.case.proxy_dim, self.case.groups, self.skip)

    def _split(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        grid = (self.case.height, self.case.width)
        x, logits, *gates = split_lines(rows, columns, grid, self._layout)
        return x, logits, gates
