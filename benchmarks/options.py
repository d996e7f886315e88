"""Command-line options that the benchmarks share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from gate import GateError

from gspn2_diffusers.pipelines.loading import DTYPES, resolve_device, resolve_dtype
from gspn2_diffusers.terminal import quiet_libraries


def parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--repeats", type=at_least(1), default=repeats, metavar="N",
        help=f"timed runs, of which the median is reported ({repeats})")  # fmt: skip
    add("--warmup", type=at_least(0), default=2, metavar="N", help="runs before them (2)")
    add("--device", help="default: the first of cuda, mps and cpu")
    add("--dtype", choices=DTYPES, help="default: by device")
    add("--threads", type=at_least(1), metavar="N", help="CPU threads; default: torch's choice")
    add("--output", type=Path, metavar="FILE", help="default: a file in results/ here")
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """A parser of integers that are not smaller than `least`."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text!r}")
        return int(text)

    return integer


def size(text: str) -> tuple[int, int]:
    """(height, width) from ``64`` or ``104x152``."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"expected a size such as 64 or 104x152, got {text!r}")
    return int(sides[0]), int(sides[-1])


def prepare(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The run's device and dtype, which is then written down in `args`, too.

    Raises:
        ValueError: this machine does not have the device.
    """
    quiet_libraries()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    args.dtype = str(dtype).removeprefix("torch.")
    return device, dtype


def run_script(main: Callable[[], None]) -> None:
    """Run a benchmark; what is wrong with its input or its results becomes one line."""
    try:
        main()
    except (GateError, ValueError) as error:
        sys.exit(f"error: {error}")
