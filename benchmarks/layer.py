"""Time a whole self-attention layer: softmax, GSPN-2 as it is and fused, linear attention, and one
linear map.

python benchmarks/layer.py                                 C = 640 and 1280, 64² to 1024² tokens
python benchmarks/layer.py --channels 640 --grids 512 --softmax-max 262144
"""

import argparse
import copy
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from gate import check_close, check_finite, check_operator
from measuring import Timer, capturing_stream, input_sets, peak_memory
from mixers import linear_attention
from options import at_least, parser, prepare, run_script, size
from report import number, show, table, write_results
from rich.table import Table
from torch import Tensor, nn

from gspn2_diffusers import GSPN2Block, GSPN2Config
from gspn2_diffusers.attention import PATCHED_CLASSES
from gspn2_diffusers.fuse import fuse_block

GSPN2_LAYERS = ("gspn2", "gspn2, fused")
HEAD_DIM = 64
CHECKED_GRID = (12, 20)
LAYER_ROUNDINGS = 4  # results that a layer rounds one after the other
GOALS_MS = {
    (640, 4096): 0.30,
    (640, 16384): 0.35,
    (640, 65536): 0.40,
    (640, 262144): 1.0,
    (640, 1048576): 4.5,
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    args = parser(__doc__, repeats=15)
    add = args.add_argument
    add("--channels", type=at_least(HEAD_DIM), nargs="+", default=[640, 1280], metavar="C")
    add("--grids", type=size, nargs="+", metavar="SIZE",
        default=[(side, side) for side in (64, 128, 256, 512, 1024)],
        help="tokens along each side: 64, or 104x152 for height x width")  # fmt: skip
    add("--softmax-max", type=at_least(0), default=65536, metavar="TOKENS",
        help="no softmax attention for more tokens than that (65536)")  # fmt: skip
    add("--proxy-ratio", type=at_least(1), default=8, metavar="N",
        help="channels per proxy channel (8)")  # fmt: skip
    return args.parse_args(argv)


class LinearAttention(nn.Module):
    """Multi-head linear attention with random weights."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = channels // HEAD_DIM
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(channels, channels, bias=False) for _ in range(3)
        )
        self.to_out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C]``."""
        q, k, v = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(linear_attention(q, k, v).transpose(1, 2).flatten(2))


def softmax_layer(channels: int) -> Attention:
    """diffusers' attention layer with its stock processor."""
    return Attention(query_dim=channels, heads=channels // HEAD_DIM, dim_head=HEAD_DIM)


def gspn2_layer(attention: Attention, config: GSPN2Config) -> Attention:
    """A copy of `attention`, patched as `apply_gspn2` would, with random gates."""
    layer = copy.deepcopy(attention)
    layer.gspn2 = GSPN2Block(layer.query_dim, config)
    nn.init.normal_(layer.gspn2.to_params.weight, std=0.02)
    layer.__class__ = PATCHED_CLASSES[type(layer)]
    return layer


def fused(layer: Attention) -> Attention:
    """A copy of `layer` after what `fuse_gspn2` does to a model."""
    layer = copy.deepcopy(layer)
    fuse_block(layer.gspn2)
    return layer


def build_layers(
    channels: int, config: GSPN2Config, device: torch.device, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """The layers that are compared, by name."""
    torch.manual_seed(0)
    attention = softmax_layer(channels)
    patched = gspn2_layer(attention, config)
    layers = {
        "softmax": attention,
        "gspn2": patched,
        "gspn2, fused": fused(patched),
        "linear attention": LinearAttention(channels),
        "one linear map": nn.Linear(channels, channels),
    }
    return {
        name: layer.to(device, dtype).eval().requires_grad_(False) for name, layer in layers.items()
    }


def run_on(name: str, layer: nn.Module, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """One call of a layer; only GSPN-2 has to know the grid."""
    return layer(tokens, grid=grid) if name in GSPN2_LAYERS else layer(tokens)


def check_layers(layers: dict[str, nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Hold each layer to itself in float64 on the CPU, and linear attention to its formula.

    Raises:
        GateError: a layer is wrong.
    """
    channels = layers["one linear map"].in_features
    tokens = torch.randn(1, CHECKED_GRID[0] * CHECKED_GRID[1], channels, dtype=dtype)
    for name, layer in layers.items():
        exact = copy.deepcopy(layer).cpu().double()
        expected = run_on(name, exact, tokens.double(), CHECKED_GRID)
        if name == "linear attention":
            check_close(name, expected, _by_its_formula(exact, tokens.double()))
        actual = run_on(name, layer, tokens.to(device), CHECKED_GRID)
        check_close(f"{name} layer, C = {channels}", actual, expected, LAYER_ROUNDINGS)


def _by_its_formula(layer: LinearAttention, tokens: Tensor) -> Tensor:
    """Linear attention with its matrix of weights written out."""
    heads = []
    for project in zip(*(m.weight.chunk(layer.heads) for m in _projections(layer)), strict=True):
        q, k, v = (tokens @ weight.mT for weight in project)
        affinity = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
        heads.append(affinity / affinity.sum(-1, keepdim=True) @ v)
    return layer.to_out(torch.cat(heads, dim=-1))


def _projections(layer: LinearAttention) -> tuple[nn.Linear, ...]:
    return layer.to_q, layer.to_k, layer.to_v


@torch.no_grad()
def measure(
    layers: dict[str, nn.Module],
    grid: tuple[int, int],
    softmax_max: int,
    timer: Timer,
    dtype: torch.dtype,
) -> Iterator[dict]:
    """One result per layer at one size.

    Raises:
        GateError: an output is not finite.
    """
    channels, count = layers["one linear map"].in_features, grid[0] * grid[1]
    shape = (1, count, channels)
    sets = input_sets(count * channels * dtype.itemsize, timer.device)
    inputs = [torch.randn(shape, device=timer.device, dtype=dtype) for _ in range(sets)]
    for name, layer in layers.items():
        if name == "softmax" and count > softmax_max:
            continue
        runs = [partial(run_on, name, layer, tokens, grid) for tokens in inputs]
        check_finite(f"{name} at {count} tokens", runs[0]())
        with peak_memory(timer.device) as peak:
            runs[0]()
        yield {
            "channels": channels,
            "grid": list(grid),
            "tokens": count,
            "layer": name,
            "ms": timer.in_turn_ms(runs),
            "graph_ms": timer.in_turn_ms(runs, graph=True) if _on_cuda(timer) else None,
            "goal_ms": GOALS_MS.get((channels, count)) if name in GSPN2_LAYERS else None,
            "peak_extra_mib": peak.extra,
            "input_sets": sets,
        }


def _on_cuda(timer: Timer) -> bool:
    return timer.device.type == "cuda"


def results_table(title: str, rows: Sequence[dict]) -> Table:
    """One row per result, a section per size."""
    columns = ("C", "tokens", "layer", "ms eager", "ms graph", "goal", "peak MiB")
    grid = table(title, columns, left=("layer",))
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        grid.add_row(
            str(row["channels"]),
            str(row["tokens"]),
            row["layer"],
            number(row["ms"]),
            number(row["graph_ms"]),
            number(row["goal_ms"]),
            number(row["peak_extra_mib"]),
            end_section=following is not None and following["tokens"] != row["tokens"],
        )
    return grid


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print a table and write the results.

    Raises:
        GateError: an output is wrong; nothing was written.
        ValueError: an option does not fit this machine.
    """
    args = parse_args(argv)
    if any(channels % HEAD_DIM for channels in args.channels):
        raise ValueError(f"channels: expected multiples of {HEAD_DIM}, got {args.channels}")
    device, dtype = prepare(args)
    timer = Timer(device, args.repeats, args.warmup)
    config = GSPN2Config(proxy_ratio=args.proxy_ratio)
    rows = []
    with capturing_stream(device):
        check_operator(device, dtype)
        for channels in args.channels:
            layers = build_layers(channels, config, device, dtype)
            check_layers(layers, device, dtype)
            for grid in args.grids:
                rows += measure(layers, grid, args.softmax_max, timer, dtype)
    show(results_table(f"One self-attention layer, batch 1, {args.dtype}", rows))
    write_results(args, "layer", device, rows)


if __name__ == "__main__":
    run_script(main)
