"""Time one UNet forward: softmax attention, GSPN-2, GSPN-2 fused, and no self-attention at all.

python benchmarks/unet.py --model tiny --sizes 128 256 512 1024
python benchmarks/unet.py --model sdxl --sizes 1024 2048 4096 8192 16384 --softmax-max 4096
python benchmarks/unet.py --model sdxl --sizes 1024 2048 --graph
python benchmarks/unet.py --model sdxl --sizes 1024 4096 --compile --channels-last
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from gate import check_finite, check_operator
from measuring import SLOW_MS, Timer, capturing_stream, peak_memory
from models import BUILDERS, PIXELS_PER_LATENT, build, random_inputs
from options import at_least, parser, prepare, run_script, size
from report import device_name, number, show, table, write_results
from rich.table import Table
from torch import Tensor, nn

from gspn2_diffusers import (
    GSPN2Adapter,
    GSPN2Config,
    apply_gspn2,
    fuse_gspn2,
    gspn2_sites,
    remove_gspn2,
    unfuse_gspn2,
)

VARIANTS = ("softmax", "gspn2", "gspn2, fused", "removed")
DEFAULT_SIZES = {"tiny": (256, 512), "sdxl": (1024, 2048, 4096)}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = parser(__doc__, repeats=10)
    add = args.add_argument
    add("--model", choices=BUILDERS, default="tiny")
    add("--sizes", type=image_size, nargs="+", metavar="SIZE",
        help=f"image pixels, multiples of {PIXELS_PER_LATENT}: 1024, or 832x1216 for height x "
        "width; default: by model")  # fmt: skip
    add("--rounds", type=at_least(1), default=3, metavar="N",
        help="times to go over the variants, as a host's speed drifts; once if compiled or if a "
        "forward takes over a second (3)")  # fmt: skip
    add("--batch-sizes", type=at_least(1), nargs="+", default=[1], metavar="N")
    add("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    add("--softmax-max", type=at_least(0), metavar="SIDE",
        help="no softmax attention for images of more than SIDE² pixels")  # fmt: skip
    mode = args.add_mutually_exclusive_group()
    mode.add_argument("--compile", action="store_true",
                      help="torch.compile the UNet, anew for every size")  # fmt: skip
    mode.add_argument("--graph", action="store_true",
                      help="replay a CUDA graph: no time for launching from Python")  # fmt: skip
    add("--channels-last", action="store_true", help="keep weights and maps in that layout")
    add("--proxy-ratio", type=at_least(1), default=8, metavar="N",
        help="channels per proxy channel (8)")  # fmt: skip
    add("--parameters-from", choices=("proxy", "tokens"), default="proxy")
    return args.parse_args(argv)


def image_size(text: str) -> tuple[int, int]:
    """(height, width) of an image that has whole latent pixels."""
    height, width = size(text)
    if height % PIXELS_PER_LATENT or width % PIXELS_PER_LATENT:
        raise argparse.ArgumentTypeError(
            f"expected multiples of {PIXELS_PER_LATENT} pixels, got {text!r}"
        )
    return height, width


def random_adapter(unet: UNet2DConditionModel, config: GSPN2Config) -> GSPN2Adapter:
    """Blocks for every layer with random gates: fresh ones multiply everything by zero."""
    adapter = GSPN2Adapter.for_model(unet, config, inherit=False)
    for block in adapter.blocks:
        nn.init.normal_(block.to_params.weight, std=0.02)
    return adapter.requires_grad_(False)


@contextmanager
def gspn2_blocks(
    unet: UNet2DConditionModel, adapter: GSPN2Adapter, fused: bool = False
) -> Iterator[None]:
    """While inside, the UNet holds these blocks; outside they take no device memory."""
    apply_gspn2(unet, adapter)
    if fused:
        fuse_gspn2(unet)
    try:
        yield
    finally:
        unfuse_gspn2(unet)
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


@contextmanager
def runner(
    unet: UNet2DConditionModel, compiled: bool
) -> Iterator[Callable[..., tuple[Tensor, ...]]]:
    """The UNet as a function, compiled or not; what was compiled is forgotten afterwards."""
    if not compiled:
        yield unet
        return
    torch.compiler.reset()
    try:
        yield torch.compile(unet, dynamic=False)
    finally:
        torch.compiler.reset()


def contexts(
    unet: UNet2DConditionModel, adapter: GSPN2Adapter
) -> dict[str, AbstractContextManager]:
    """What makes each variant of the UNet."""
    return {
        "softmax": nullcontext(),
        "gspn2": gspn2_blocks(unet, adapter),
        "gspn2, fused": gspn2_blocks(unet, adapter, fused=True),
        "removed": no_self_attention(unet),
    }


@torch.no_grad()
def measure(
    unet: UNet2DConditionModel,
    adapter: GSPN2Adapter,
    variants: Sequence[str],
    batch: int,
    latent: tuple[int, int],
    timer: Timer,
    compiled: bool = False,
    channels_last: bool = False,
    graph: bool = False,
    rounds: int = 1,
) -> list[dict]:
    """One result per variant, all of one latent size and run in turn: medians over `rounds`.

    Raises:
        GateError: a variant's output is not finite.
    """
    inputs = random_inputs(unet, batch, *latent)
    if channels_last:
        inputs["sample"] = inputs["sample"].to(memory_format=torch.channels_last)
    tokens = max(site.grid[0] * site.grid[1] for site in gspn2_sites(unet, *latent))
    rounds = 1 if compiled else rounds
    ms, peaks = {name: [] for name in variants}, {}
    for number_of_round in range(rounds):
        for name in variants:
            if number_of_round and ms[name][0] > SLOW_MS:
                continue
            with contexts(unet, adapter)[name], runner(unet, compiled) as model:
                forward = partial(model, **inputs, return_dict=False)
                check_finite(f"{name} at {latent[0]}x{latent[1]}", forward()[0])
                with peak_memory(unet.device) as peaks[name]:
                    ms[name].append(timer.in_turn_ms([forward], graph=graph))
    rows = [
        {"image": [PIXELS_PER_LATENT * side for side in latent], "latent": list(latent),
         "batch": batch, "tokens": tokens, "variant": name, "ms": statistics.median(ms[name]),
         "rounds_ms": ms[name], "peak_mib": peaks[name].total}
        for name in variants
    ]  # fmt: skip
    times = {row["variant"]: row["ms"] for row in rows}
    for row in rows:
        row["speedup"] = times["softmax"] / row["ms"] if "softmax" in times else None
        row["over_floor"] = row["ms"] / times["removed"] if "removed" in times else None
    return rows


def results_table(title: str, rows: Sequence[dict]) -> Table:
    """One row per result, a section per size."""
    columns = ("image", "batch", "tokens", "variant", "ms", "speed-up", "over floor", "peak MiB")
    grid = table(title, columns, left=("variant",))
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        grid.add_row(
            "x".join(map(str, row["image"])),
            str(row["batch"]),
            str(row["tokens"]),
            row["variant"],
            number(row["ms"]),
            number(row["speedup"]),
            number(row["over_floor"]),
            number(row["peak_mib"]),
            end_section=following is not None and following["latent"] != row["latent"],
        )
    return grid


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print a table and write the results.

    Raises:
        GateError: the operator or an output is wrong; nothing was written.
        ValueError: an option does not fit this machine or the model.
    """
    args = parse_args(argv)
    device, dtype = prepare(args)
    if args.graph and device.type != "cuda":
        raise ValueError(f"--graph: expected a CUDA device, got {device.type!r}")
    with capturing_stream(device) if args.graph else nullcontext():
        time_unets(args, device, dtype)


def time_unets(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Check, measure, print a table and write the results."""
    check_operator(device, dtype)
    unet = build(args.model, device, dtype)
    if args.channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    config = GSPN2Config(proxy_ratio=args.proxy_ratio, parameters_from=args.parameters_from)
    adapter = random_adapter(unet, config)
    timer = Timer(device, args.repeats, args.warmup)
    rows = []
    for batch in args.batch_sizes:
        for image in args.sizes or [(side, side) for side in DEFAULT_SIZES[args.model]]:
            latent = tuple(side // PIXELS_PER_LATENT for side in image)
            fits = args.softmax_max is None or image[0] * image[1] <= args.softmax_max**2
            variants = [name for name in args.variants if fits or name != "softmax"]
            rows += measure(
                unet, adapter, variants, batch, latent, timer, args.compile, args.channels_last,
                args.graph, args.rounds,
            )  # fmt: skip

    mode = "compiled" if args.compile else "from a CUDA graph" if args.graph else "eager"
    title = f"The {args.model} UNet, one forward, {mode}, {device_name(device)}, {args.dtype}"
    show(results_table(title, rows))
    suffix = "-compiled" if args.compile else "-graph" if args.graph else ""
    write_results(args, f"unet-{args.model}{suffix}", device, rows)


if __name__ == "__main__":
    run_script(main)
