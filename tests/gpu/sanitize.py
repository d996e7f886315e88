"""Runs every family of kernels on small maps, for a memory or race checker to watch.

    compute-sanitizer --tool memcheck  python tests/gpu/sanitize.py
    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py

Results are held to the torch implementation on the CPU: the checkers slow every launch down.
"""

import argparse
import os
from collections.abc import Iterator
from itertools import product

# An allocation of its own for each tensor, or reads past one would hit the next unnoticed.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from gspn2_diffusers.kernels import gspn2_scan, gspn2_scan_tokens, params_width  # noqa: E402
from gspn2_diffusers.kernels.dense import RELATIVE_RMS, relative_error  # noqa: E402

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
# (channels, groups): 1, 2 and 4 channels to a thread, weights shared, by group, and own.
CHANNELS = [(1, 1), (6, 1), (16, 1), (16, 4), (16, 16), (20, 10)]
# Parts of a warp, whole ones, strips of 2, 4 and 8 positions to a thread, longer than a block.
MAPS = [(5, 7), (1, 33), (70, 3), (3, 260), (2, 1100), (2, 2500), (9, 4100)]
# chunk_size, store_hidden, skip
OPTIONS = [(None, False, True), (3, True, True), (None, False, False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--forward-only", action="store_true", help="skip the gradients")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = parser.parse_args()

    count = 0
    for dtype in (DTYPES[name] for name in arguments.dtypes):
        for shape, options in cases():
            check(dtype, *shape, *options, gradients=not arguments.forward_only)
            count += 1
    torch.cuda.synchronize()
    print(f"{count} scans as expected")


def cases() -> Iterator[tuple]:
    """Every number of channels and every map with some partner: not their whole product."""
    for index, (channels, grid) in enumerate(product(CHANNELS, MAPS)):
        small = grid[0] * grid[1] < 2000
        if small or index % 3 == 0:
            yield (*channels, *grid), OPTIONS[index % len(OPTIONS)]


def check(
    dtype, channels, groups, height, width, chunk_size, store_hidden, skip, *, gradients
) -> None:
    """One scan of maps and one of tokens, with gradients if wanted, against the CPU."""
    torch.manual_seed(0)
    batch, grid = 2, (height, width)
    maps = [
        torch.randn(batch, channels, *grid),
        torch.randn(batch, 4, groups, 3, *grid),
        *(torch.randn(batch, 4, channels, *grid) for _ in range(3 if skip else 2)),
    ]
    tokens = [
        torch.randn(batch, height * width, channels),
        torch.randn(batch, height * width, params_width(channels, groups)),
    ]

    def scan_maps(inputs, backend):
        return gspn2_scan(
            *inputs,
            chunk_size=chunk_size,
            native_grid=(3, 100),
            backend=backend,
            store_hidden=store_hidden,
        )

    def scan_tokens(inputs, backend):
        return gspn2_scan_tokens(
            *inputs,
            grid,
            groups=groups,
            chunk_size=chunk_size,
            backend=backend,
            store_hidden=store_hidden,
        )

    for scan, inputs in ((scan_maps, maps), (scan_tokens, tokens)):
        inputs = [t.to(dtype) for t in inputs]
        on_gpu = run(lambda t, scan=scan: scan(t, "cuda"), [t.cuda() for t in inputs], gradients)
        on_cpu = run(lambda t, scan=scan: scan(t, "torch"), [t.float() for t in inputs], gradients)
        for mine, expected in zip(on_gpu, on_cpu, strict=True):
            # Wrong values mean a wrong kernel, not rounding: that is for the tests to measure.
            if expected.abs().max() > 1e-5:
                error = relative_error(mine, expected)
                case = (dtype, channels, groups, grid, chunk_size, store_hidden, skip)
                assert error < 20 * RELATIVE_RMS[dtype], f"{scan.__name__} {case}: {error:.1e}"


def run(scan, inputs: list[Tensor], gradients: bool) -> list[Tensor]:
    """The result and, if wanted, the gradients of its sum."""
    inputs = [t.requires_grad_(gradients) for t in inputs]
    y = scan(inputs)
    return [y.detach(), *torch.autograd.grad(y.sum(), inputs)] if gradients else [y]


if __name__ == "__main__":
    main()
