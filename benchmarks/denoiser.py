"""Time one denoiser forward: softmax attention, GSPN-2, and no self-attention at all.

python benchmarks/denoiser.py --model tiny --latents 16 32 64 128
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from gate import GateError, check_finite, check_operator
from measuring import RESULTS, describe_environment, median_ms, peak_mib, write_results
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from unets import BUILDERS, build, random_inputs

from gspn2_diffusers import GSPN2Adapter, GSPN2Config, apply_gspn2, gspn2_sites, remove_gspn2
from gspn2_diffusers.pipelines.loading import DTYPES, resolve_device, resolve_dtype
from gspn2_diffusers.terminal import quiet_libraries


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=BUILDERS, default="tiny")
    add("--latents", type=parse_size, nargs="+", default=[(32, 32), (64, 64)], metavar="SIZE",
        help="latent pixels: 64, or 104x152 for height x width")  # fmt: skip
    add("--batch-sizes", type=int, nargs="+", default=[1], metavar="N")
    add("--proxy-ratio", type=int, default=8, help="channels per proxy channel")
    add("--parameters-from", choices=("proxy", "tokens"), default="proxy")
    add("--repeats", type=int, default=10, help="timed runs, of which the median is reported")
    add("--warmup", type=int, default=2, help="runs before them")
    add("--device", help="default: the first of cuda, mps and cpu")
    add("--dtype", choices=DTYPES, help="default: by device")
    add("--threads", type=int, help="CPU threads; default: torch's choice")
    add("--output", type=Path, help="default: results/denoiser-MODEL-DEVICE.json here")
    args = parser.parse_args(argv)
    if min(args.repeats, *args.batch_sizes) < 1 or args.warmup < 0:
        parser.error("expected at least one repeat and image, and no negative warm-up")
    return args


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from ``64`` or ``104x152``."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"expected a size such as 64 or 104x152, got {text!r}")
    return int(sides[0]), int(sides[-1])


def random_adapter(unet: UNet2DConditionModel, config: GSPN2Config) -> GSPN2Adapter:
    """Blocks for every layer with random gates: fresh ones multiply everything by zero."""
    layers = [{"name": site.name, "channels": site.channels} for site in gspn2_sites(unet)]
    adapter = GSPN2Adapter(type(unet).__name__, layers, config.to_dict())
    for block in adapter.blocks:
        nn.init.normal_(block.to_params.weight, std=0.02)
    return adapter.requires_grad_(False)


@contextmanager
def gspn2_blocks(unet: UNet2DConditionModel, adapter: GSPN2Adapter) -> Iterator[None]:
    """While inside, the UNet holds these blocks; outside they take no device memory."""
    apply_gspn2(unet, adapter)
    try:
        yield
    finally:
        remove_gspn2(unet)
        adapter.cpu()


@contextmanager
def no_self_attention(unet: UNet2DConditionModel) -> Iterator[None]:
    """While inside, self-attention only writes zeros: the floor for whatever replaces it."""
    own = dict(unet.attn_processors)
    removed = {f"{site.name}.processor": ZeroProcessor() for site in gspn2_sites(unet)}
    unet.set_attn_processor(own | removed)
    try:
        yield
    finally:
        unet.set_attn_processor(own)


class ZeroProcessor:
    """An attention processor that returns zeros shaped like its input."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return torch.zeros_like(hidden_states)


@torch.no_grad()
def measure(
    unet: UNet2DConditionModel,
    adapter: GSPN2Adapter,
    batch: int,
    size: tuple[int, int],
    repeats: int,
    warmup: int,
) -> list[dict]:
    """One result per variant, all of one size and run back to back.

    Raises:
        GateError: a variant's output is not finite.
    """
    variants = {
        "softmax": nullcontext(),
        "gspn2": gspn2_blocks(unet, adapter),
        "removed": no_self_attention(unet),
    }
    inputs = random_inputs(unet, batch, *size)
    forward = partial(unet, **inputs, return_dict=False)
    rows = []
    for name, variant in variants.items():
        with variant:
            check_finite(f"{name} at {size[0]}x{size[1]}", forward()[0])
            ms = median_ms(forward, unet.device, repeats, warmup)
            peak = peak_mib(forward, unet.device)
        rows.append({"variant": name, "ms": ms, "peak_mib": peak})
    softmax, _, removed = (row["ms"] for row in rows)
    tokens = max(site.grid[0] * site.grid[1] for site in gspn2_sites(unet, *size))
    shape = {"latent": list(size), "batch": batch, "tokens": tokens}
    return [
        {**shape, **row, "speedup": softmax / row["ms"], "over_floor": row["ms"] / removed}
        for row in rows
    ]


def results_table(title: str, rows: Sequence[dict]) -> Table:
    """One row per result, a section per size."""
    table = Table(title=title, title_justify="left")
    for heading in ("latent", "batch", "tokens", "variant"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for heading in ("ms", "speed-up", "over floor", "peak MiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            "x".join(map(str, row["latent"])),
            str(row["batch"]),
            str(row["tokens"]),
            row["variant"],
            f"{row['ms']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['over_floor']:.2f}",
            "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            end_section=row["variant"] == rows[-1]["variant"],
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print a table and write the results.

    Raises:
        GateError: the operator or an output is wrong; nothing was written.
        ValueError: an option does not fit this machine or the model.
    """
    args = parse_args(argv)
    quiet_libraries()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    check_operator(device, dtype)

    unet = build(args.model, device, dtype)
    config = GSPN2Config(proxy_ratio=args.proxy_ratio, parameters_from=args.parameters_from)
    adapter = random_adapter(unet, config)
    rows = []
    for batch in args.batch_sizes:
        for size in args.latents:
            rows += measure(unet, adapter, batch, size, args.repeats, args.warmup)

    environment = describe_environment(device)
    dtype_name = str(dtype).removeprefix("torch.")
    title = f"One forward of the {args.model} UNet, {environment['device']}, {dtype_name}"
    Console().print(results_table(title, rows))
    output = args.output or RESULTS / f"denoiser-{args.model}-{device.type}.json"
    arguments = vars(args) | {"device": str(device), "dtype": dtype_name, "output": output.name}
    write_results(output, environment, arguments, rows)


if __name__ == "__main__":
    try:
        main()
    except (GateError, ValueError) as error:
        sys.exit(f"error: {error}")
