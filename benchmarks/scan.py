"""Time the scan operator, forward and backward: milliseconds, bandwidth, time per line.

python benchmarks/scan.py                                  the goal's shapes and the layer's
python benchmarks/scan.py --ladder                         from a launch per line to these kernels
python benchmarks/scan.py --experiments                    launches, channel compression
python benchmarks/scan.py --backend torch --shapes 1x8x32x32 --device cpu
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from cases import GOAL_CASES, LAYER_CASES, LAYOUTS, Case, Operands, parse_case
from experiments import compare_launches, compare_proxy_sizes, launches_table, proxy_table
from gate import check_gradients, check_operator, check_result
from ladder import ladder_table, measure_ladder
from measuring import Timer, capturing_stream, input_sets
from options import parser, prepare, run_script
from report import number, show, table, write_results
from rich.table import Table
from torch import Tensor

from gspn2_diffusers import gspn2_scan
from gspn2_diffusers.kernels.backends import why_not_cuda

PASSES = ("forward", "backward", "backward-stored")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = parser(__doc__, repeats=21)
    add = args.add_argument
    add("--shapes", type=parse_case, nargs="+", metavar="NxPxHxW[/G]",
        help="images x channels x height x width / weight groups; default: the goal's and the "
        "layer's own")  # fmt: skip
    add("--passes", choices=PASSES, nargs="+", default=list(PASSES),
        help="backward recomputes h, backward-stored kept it")  # fmt: skip
    add("--skip", choices=("with", "without", "both"), default="both", help="operand skip (both)")
    add("--layout", choices=LAYOUTS, default=LAYOUTS[0],
        help=f"how the operands lie in memory ({LAYOUTS[0]})")  # fmt: skip
    add("--backend", choices=("auto", "cuda", "torch"), default="cuda", help="(cuda)")
    which = args.add_mutually_exclusive_group()
    which.add_argument("--ladder", action="store_true", help="time the steps to one fused launch")
    which.add_argument("--experiments", action="store_true",
                       help="time one launch against many, and proxy sizes")  # fmt: skip
    return args.parse_args(argv)


def measure(
    case: Case,
    layout: str,
    skip: bool,
    passes: Sequence[str],
    backend: str,
    dtype: torch.dtype,
    timer: Timer,
) -> Iterator[dict]:
    """One result per pass, each checked before it is timed.

    Raises:
        GateError: a result is wrong.
    """
    label = f"{case.label}, groups {case.groups}"
    draw = partial(Operands.random, case, layout, skip, timer.device, dtype)
    first = draw()
    rest = [draw() for _ in range(input_sets(first.nbytes, timer.device) - 1)]
    prepare_pass = {
        "forward": partial(forward_run, backend=backend),
        "backward": partial(backward_run, backend=backend, store_hidden=False),
        "backward-stored": partial(backward_run, backend=backend, store_hidden=True),
    }
    for name in passes:
        prepared = prepare_pass[name]
        runs = [prepared(first, label)] + [prepared(operands) for operands in rest]
        ms, timing = timer.on_device_ms(runs)
        yield {"pass": name, "ms": ms, "timing": timing, "input_sets": len(runs)}
        del runs  # and what they hold, before the next pass needs memory


def forward_run(operands: Operands, label: str | None = None, *, backend: str) -> Callable:
    """The forward pass on these operands; checked, if it gets a label."""
    run = torch.no_grad()(partial(operands.scan, backend=backend))
    if label is not None:
        poison(operands.x)
        check_result(label, operands.maps(), run())
    return run


def backward_run(
    operands: Operands, label: str | None = None, *, backend: str, store_hidden: bool
) -> Callable:
    """The backward pass alone, for every operand; checked, if it gets a label."""
    leaves = operands.leaves()
    y = leaves.scan(backend=backend, store_hidden=store_hidden)
    grad_y = torch.randn_like(y)
    wanted = leaves.tensors()
    run = partial(torch.autograd.grad, y, list(wanted.values()), grad_y, retain_graph=True)
    if label is not None:
        poison(*wanted.values())
        gradients = operands.gradients_of_maps(dict(zip(wanted, run(), strict=True)))
        check_gradients(label, operands.maps(), grad_y, gradients)
    return run


def poison(*like: Tensor) -> None:
    """Leave NaN in the memory that results of these shapes are likely to get."""
    together = [torch.full_like(tensor, torch.nan) for tensor in like]
    together.clear()


def describe(case: Case, skip: bool, row: dict, itemsize: int, copy: float) -> dict:
    """A measurement with what it means: `copy` is the device's bandwidth in bytes per second."""
    seconds = row["ms"] / 1000
    floor = case.floor_bytes(skip, row["pass"] != "forward", itemsize) / seconds
    moved = case.moved_bytes(skip, itemsize) / seconds if row["pass"] == "forward" else None
    forward = row["pass"] == "forward"
    return {
        "shape": case.label,
        "size": [case.batch, case.proxy_dim, case.height, case.width],
        "groups": case.groups,
        "skip": skip,
        **row,
        "ms_per_direction": row["ms"] / 4,
        "goal_ms_per_direction": case.goal_ms if forward else None,
        "gspn1_ms_per_direction": case.gspn1_ms if forward else None,
        "floor_gb_per_s": floor / 1e9,
        "floor_of_copy": floor / copy,
        "moved_gb_per_s": None if moved is None else moved / 1e9,
        "moved_of_copy": None if moved is None else moved / copy,
        "ns_per_line": 1e6 * row["ms"] / max(case.height, case.width),
    }


def results_table(title: str, rows: Sequence[dict]) -> Table:
    """One row per result."""
    columns = ("N x P x area", "G", "skip", "pass", "ms", "ms/dir", "goal", "GSPN-1")
    columns += ("floor GB/s", "%", "moved", "%", "ns/line")
    grid = table(title, columns, left=("N x P x area", "skip", "pass"))
    for row in rows:
        grid.add_row(
            row["shape"],
            str(row["groups"]),
            "yes" if row["skip"] else "no",
            {"forward": "fwd", "backward": "bwd", "backward-stored": "bwd, h kept"}[row["pass"]],
            number(row["ms"]),
            number(row["ms_per_direction"]),
            number(row["goal_ms_per_direction"]),
            number(row["gspn1_ms_per_direction"]),
            number(row["floor_gb_per_s"]),
            number(100 * row["floor_of_copy"], 2),
            number(row["moved_gb_per_s"]),
            "-" if row["moved_of_copy"] is None else number(100 * row["moved_of_copy"], 2),
            number(row["ns_per_line"]),
        )
    return grid


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print tables and write the results.

    Raises:
        GateError: a result is wrong; nothing was written.
        ValueError: an option does not fit this machine.
    """
    args = parse_args(argv)
    device, dtype = prepare(args)
    needs_kernels = args.ladder or args.experiments or args.backend == "cuda"
    if needs_kernels and (obstacle := why_not_cuda(device, dtype)):
        raise ValueError(
            f"the CUDA kernels cannot run here: {obstacle}; "
            "anywhere: --backend torch with small --shapes, such as 1x8x32x32"
        )
    timer = Timer(device, args.repeats, args.warmup)
    with capturing_stream(device):
        check_operator(device, dtype, partial(gspn2_scan, backend=args.backend))
        copy = timer.copy_bandwidth()
        if args.ladder:
            time_ladder(args, timer, copy)
        elif args.experiments:
            time_experiments(args, timer, copy, dtype)
        else:
            time_operator(args, timer, copy, dtype)


def time_operator(args: argparse.Namespace, timer: Timer, copy: float, dtype: torch.dtype) -> None:
    """Forward and backward over the shapes."""
    skips = {"with": (True,), "without": (False,), "both": (False, True)}[args.skip]
    rows = []
    for case in args.shapes or GOAL_CASES + LAYER_CASES:
        for skip in skips:
            measured = measure(case, args.layout, skip, args.passes, args.backend, dtype, timer)
            rows += [describe(case, skip, row, dtype.itemsize, copy) for row in measured]
    title = f"gspn2_scan, {args.backend}, {args.layout}, {args.dtype}; copy {copy / 1e9:.0f} GB/s"
    show(results_table(title, rows))
    name = "scan" if args.layout == LAYOUTS[0] else f"scan-{args.layout}"
    write_results(args, name, timer.device, rows, copy_gb_per_s=copy / 1e9)


def time_ladder(args: argparse.Namespace, timer: Timer, copy: float) -> None:
    """The steps from a launch per line to the operator."""
    rows = [
        row
        for case in args.shapes or (GOAL_CASES[0], GOAL_CASES[3])
        for row in measure_ladder(case, timer, copy)
    ]
    show(ladder_table(f"One direction, bfloat16; copy {copy / 1e9:.0f} GB/s", rows))
    write_results(args, "ladder", timer.device, rows, copy_gb_per_s=copy / 1e9)


def time_experiments(
    args: argparse.Namespace, timer: Timer, copy: float, dtype: torch.dtype
) -> None:
    """One launch against many, and proxy sizes."""
    launches = compare_launches(timer)
    show(launches_table("One direction of 8 channels, bfloat16, h in global memory", launches))
    proxies = compare_proxy_sizes(timer, copy, dtype)
    show(proxy_table(f"gspn2_scan, {args.dtype}; copy {copy / 1e9:.0f} GB/s", proxies))
    write_results(args, "experiments", timer.device, launches + proxies, copy_gb_per_s=copy / 1e9)


if __name__ == "__main__":
    run_script(main)
