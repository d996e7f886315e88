"""The steps from one launch per line to one fused launch, for one direction (ladder.cu)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from cases import Case, Operands
from gate import check_close, check_finite
from measuring import Timer
from report import number, table
from rich.table import Table
from torch import Tensor

THREADS = 1024
PLANES_PER_BLOCK = (2, 4, 8)
SOURCE = Path(__file__).with_suffix(".cu")


@dataclass(frozen=True)
class Problem:
    """One direction, top_to_bottom: x, lam, u ``[N, C, H, W]``, logits ``[N, G, 3, H, W]``."""

    x: Tensor
    logits: Tensor
    lam: Tensor
    u: Tensor

    @classmethod
    def random(cls, case: Case, device: torch.device) -> "Problem":
        """Normal operands in bfloat16, planar."""
        batch, channels, height, width = case.batch, case.proxy_dim, case.height, case.width
        gate = (batch, channels, height, width)
        shapes = (gate, (batch, case.groups, 3, height, width), gate, gate)
        return cls(*(torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes))

    @property
    def shared_by(self) -> int:
        """Channels that share one set of weights."""
        return self.x.shape[1] // self.logits.shape[1]

    def across(self) -> "Problem":
        """The same with the map transposed in memory: positions of a line lie apart."""
        return Problem(*(tensor.mT.contiguous().mT for tensor in vars(self).values()))

    def part(self, image: int) -> "Problem":
        """The channels of the first group of one image."""
        channels = slice(0, self.shared_by)
        x, lam, u = (tensor[image, channels][None] for tensor in (self.x, self.lam, self.u))
        return Problem(x, self.logits[image, :1][None], lam, u)


def reference(problem: Problem, dtype: torch.dtype) -> Tensor:
    """y of a problem, computed in `dtype`, line by line as the equations say."""
    x, logits, lam, u = (tensor.to(dtype) for tensor in vars(problem).values())
    weights = logits.sigmoid()
    weights[:, :, 0, :, 0] = 0
    weights[:, :, 2, :, -1] = 0
    weights = weights / weights.sum(dim=2, keepdim=True)
    weights = weights.repeat_interleave(problem.shared_by, dim=1)  # [N, C, 3, H, W]
    h = lam * x
    for i in range(1, h.shape[2]):
        left, center, right = weights[:, :, :, i].unbind(2)
        before = h[:, :, i - 1]
        h[:, :, i] += center * before
        h[:, :, i, 1:] += left[..., 1:] * before[..., :-1]
        h[:, :, i, :-1] += right[..., :-1] * before[..., 1:]
    return u * h


@cache
def kernel(name: str):
    """A kernel of ladder.cu, compiled."""
    return _module().get_function(name)


@cache
def _module():
    import cupy

    return cupy.RawModule(code=SOURCE.read_text(), options=("-std=c++17",))


def launch(
    name: str, blocks: int, block: tuple[int, int], args: Sequence[Tensor | int], shared: int = 0
) -> None:
    """Launch a kernel on torch's current stream; `shared` is its shared memory in bytes."""
    import cupy

    compiled = kernel(name)
    if shared > 48 * 1024:  # what a kernel gets without asking
        compiled.max_dynamic_shared_size_bytes = shared
    # CuPy passes an integer as 64 bits, which is what ladder.cu takes throughout.
    plain = tuple(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args)
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        compiled((blocks,), block, plain, shared_mem=shared)


def _geometry(problem: Problem) -> tuple[int, ...]:
    *_, lines, length = problem.x.shape
    line_stride, position_stride = problem.x.stride()[-2:]
    return lines, length, problem.shared_by, line_stride, position_stride


def _tensors(problem: Problem) -> tuple[Tensor, ...]:
    return problem.x, problem.logits, problem.lam, problem.u


def launch_per_line(problem: Problem) -> Tensor:
    """GSPN-1's manner: the host launches a kernel for every line."""
    y, h = torch.empty_like(problem.x), torch.empty_like(problem.x, dtype=torch.float32)
    batch, channels, lines, length = problem.x.shape
    blocks = -(-batch * channels * length // 256)
    args = (*_tensors(problem), h, y, *_geometry(problem), batch * channels)
    for i in range(lines):
        launch("one_line", blocks, (256, 1), (*args, i))
    return y


def one_launch(problem: Problem) -> Tensor:
    """The same arithmetic and accesses in one launch, a block per channel and image."""
    y, h = torch.empty_like(problem.x), torch.empty_like(problem.x, dtype=torch.float32)
    batch, channels, _, length = problem.x.shape
    args = (*_tensors(problem), h, y, *_geometry(problem))
    launch("all_lines", batch * channels, (_threads(length, 1), 1), args)
    return y


def on_chip(problem: Problem, planes: int, share_weights: bool = False) -> Tensor:
    """The hidden state in shared memory, `planes` channels to a block."""
    y = torch.empty_like(problem.x)
    batch, channels, _, length = problem.x.shape
    shared = 4 * (2 * planes * (length + 2) + (6 * length if share_weights else 0))
    name = "shared_weights" if share_weights else "state_on_chip"
    block = (_threads(length, planes), planes)
    args = (*_tensors(problem), y, *_geometry(problem))
    launch(name, batch * channels // planes, block, args, shared)
    return y


def _threads(length: int, planes: int) -> int:
    """Threads along a line, in whole warps."""
    return min(THREADS // planes, 32 * -(-length // 32))


@dataclass(frozen=True)
class Rung:
    """A step of the ladder; `across` runs it on the map transposed in memory."""

    name: str
    run: Callable[[Problem], Tensor]
    across: bool = False


def rungs(shared_by: int) -> list[Rung]:
    """The ladder for weights that `shared_by` channels share."""
    planes = [count for count in PLANES_PER_BLOCK if shared_by % count == 0]
    return [
        Rung("1 launch per line", launch_per_line, across=True),
        Rung("1 launch", one_launch, across=True),
        Rung("+ coalesced", one_launch),
        Rung("+ h on chip", partial(on_chip, planes=1)),
        *(Rung(f"+ 2-D blocks, {n} channels", partial(on_chip, planes=n)) for n in planes),
        *(
            Rung(f"+ shared weights, {n} channels", partial(on_chip, planes=n, share_weights=True))
            for n in planes
        ),
    ]


def check_rung(rung: Rung, problem: Problem, dtype: torch.dtype) -> None:
    """Hold a rung to :func:`reference` in `dtype`, on the first group of the first and last image.

    Raises:
        GateError: it is wrong.
    """
    y = rung.run(problem.across() if rung.across else problem)
    label = f"{rung.name} at {tuple(problem.x.shape)}"
    check_finite(label, y)
    for image in (0, len(y) - 1):
        expected = reference(problem.part(image), dtype)
        check_close(label, y[image, : problem.shared_by][None], expected)


def measure_ladder(case: Case, timer: Timer, copy: float) -> list[dict]:
    """One result per rung, and the operator's own share of one direction.

    The problem must be larger than the cache. `copy` is the device's bandwidth in bytes per second.

    Raises:
        GateError: a rung is wrong.
    """
    problem = Problem.random(case, timer.device)
    small = Problem.random(Case(3, 2 * min(8, case.shared_by), 19, 45, 2), timer.device)
    nbytes = 2 * (4 + 3 / case.shared_by) * case.elements  # x, lam, u, y and logits, once
    rows = []

    def add(name: str, timing: str, ms: float) -> None:
        rows.append(
            {"shape": case.label, "groups": case.groups, "step": name, "timing": timing, "ms": ms,
             "speedup": rows[0]["ms"] / ms if rows else 1.0,
             "floor_gb_per_s": nbytes / ms / 1e6, "floor_of_copy": 1000 * nbytes / ms / copy}
        )  # fmt: skip

    for rung in rungs(case.shared_by):
        check_rung(rung, small, torch.float64)
        check_rung(rung, problem, torch.float32)
        run = partial(rung.run, problem.across() if rung.across else problem)
        if rung.run is launch_per_line:
            add(f"{rung.name}, from Python", "events", timer.in_turn_ms([run]))
        add(rung.name, "graph", timer.in_turn_ms([run], graph=True))
    del problem, run
    operands = Operands.random(case, "lines", False, timer.device, torch.bfloat16)
    with torch.no_grad():
        ms, timing = timer.on_device_ms([partial(operands.scan, backend="cuda")])
    add("this package, 1/4 of four directions", timing, ms / 4)
    return rows


def ladder_table(title: str, rows: Sequence[dict]) -> Table:
    """One row per result."""
    columns = ("N x C x area", "G", "step", "timed by", "ms", "speed-up", "floor GB/s", "% of copy")
    grid = table(title, columns, left=("N x C x area", "step", "timed by"))
    for row in rows:
        grid.add_row(
            row["shape"],
            str(row["groups"]),
            row["step"],
            row["timing"],
            number(row["ms"]),
            number(row["speedup"]),
            number(row["floor_gb_per_s"]),
            number(100 * row["floor_of_copy"], 2),
        )
    return grid
