"""What one launch and what a compact proxy space bring: the method's two claims, on their own."""

from collections.abc import Sequence
from functools import partial

import torch
from cases import Case, Operands
from gate import check_result
from ladder import Problem, Rung, check_rung, launch_per_line, one_launch
from measuring import Timer, input_sets
from report import number, table
from rich.table import Table

LAUNCH_SIDES = (64, 128, 256, 512, 1024, 2048)
PROXY_SIDES = (256, 512)
PROXY_RATIOS = (1, 2, 4, 8, 16, 32)
CHANNELS = 640


def compare_launches(timer: Timer, sides: Sequence[int] = LAUNCH_SIDES) -> list[dict]:
    """The same coalesced kernel body, launched once per line and once for all lines."""
    rows = []
    for side in sides:
        problem = Problem.random(Case(1, 8, side, side), timer.device)
        many, one = Rung("1 launch per line", launch_per_line), Rung("1 launch", one_launch)
        for rung in (many, one):
            check_rung(rung, problem, torch.float32)
        times = {
            "python_ms": timer.in_turn_ms([partial(many.run, problem)]),
            "graph_ms": timer.in_turn_ms([partial(many.run, problem)], graph=True),
            "one_launch_ms": timer.in_turn_ms([partial(one.run, problem)], graph=True),
        }
        rows.append({"experiment": "launches", "side": side, "lines": side, **times})
    return rows


def launches_table(title: str, rows: Sequence[dict]) -> Table:
    """One row per size."""
    columns = ("lines x length", "per line, from Python", "per line, graph", "one launch", "ratio")
    grid = table(f"{title}: milliseconds", columns)
    for row in rows:
        many, one = row["graph_ms"], row["one_launch_ms"]
        cells = (number(row["python_ms"]), number(many), number(one), number(many / one))
        grid.add_row(f"{row['side']}²", *cells)
    return grid


def compare_proxy_sizes(
    timer: Timer,
    copy: float,
    dtype: torch.dtype,
    sides: Sequence[int] = PROXY_SIDES,
    ratios: Sequence[int] = PROXY_RATIOS,
    backend: str = "cuda",
) -> list[dict]:
    """The operator on C / ratio channels that share their weights; ratio 1 is no compression."""
    rows = []
    for side in sides:
        for ratio in ratios:
            case = Case(1, CHANNELS // ratio, side, side)
            draw = partial(Operands.random, case, "lines", True, timer.device, dtype)
            first = draw()
            sets = [first, *(draw() for _ in range(input_sets(first.nbytes, timer.device) - 1))]
            with torch.no_grad():
                check_result(case.label, first.maps(), first.scan(backend=backend))
                runs = [partial(operands.scan, backend=backend) for operands in sets]
                ms, timing = timer.on_device_ms(runs)
            floor = case.floor_bytes(True, False, dtype.itemsize)
            rows.append(
                {"experiment": "proxy", "side": side, "ratio": ratio, "proxy_dim": case.proxy_dim,
                 "ms": ms, "timing": timing, "floor_gb_per_s": floor / ms / 1e6,
                 "floor_of_copy": 1000 * floor / ms / copy}
            )  # fmt: skip
    return rows


def proxy_table(title: str, rows: Sequence[dict]) -> Table:
    """One row per size and ratio."""
    columns = ("map", "C / P", "P", "ms", "to no compression", "floor GB/s", "% of copy")
    grid = table(title, columns)
    whole = {row["side"]: row["ms"] for row in rows if row["ratio"] == 1}
    for row in rows:
        grid.add_row(
            f"{row['side']}²",
            str(row["ratio"]),
            str(row["proxy_dim"]),
            number(row["ms"]),
            number(row["ms"] / whole[row["side"]]),
            number(row["floor_gb_per_s"]),
            number(100 * row["floor_of_copy"], 2),
        )
    return grid
