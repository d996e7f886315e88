"""Random scans for tests: inputs in every memory layout, and a float64 reference for them.

The reference is a loop over lines in plain torch, differentiable and fast enough on a GPU for
thousands of cases. It shares no code with the package; `tests/kernels/test_scan_cases.py` holds it
to the dense affinity.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn2_diffusers.kernels import gspn2_scan, gspn2_scan_tokens, params_width

INPUTS = ("x", "logits", "lam", "u", "skip")
TOKEN_INPUTS = ("x", "params")
LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


def scan_float64(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    skip: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """What `gspn2_scan` computes, ``[B, P, H, W]`` in float64, on the device of x."""
    x, logits, lam, u = (t.double() for t in (x, logits, lam, u))
    total = torch.zeros_like(x) if skip is None else (skip.double() * x[:, None]).sum(1)
    gated = lam * x[:, None]
    for first, turned in ((0, False), (2, True)):

        def as_lines(maps, first=first, turned=turned):
            """Two opposite directions of maps, lines in the order of their visit."""
            pair = maps[:, first : first + 2]
            pair = pair.transpose(-2, -1) if turned else pair
            return torch.stack((pair[:, 0], pair[:, 1].flip(-2)), dim=1)

        h = _hidden(as_lines(logits), as_lines(gated), chunk_size)
        there, back = (as_lines(u) * h).unbind(1)
        both = there + back.flip(-2)
        total = total + (both.transpose(-2, -1) if turned else both)
    return total


def _hidden(logits: Tensor, b: Tensor, chunk_size: int | None) -> Tensor:
    """h ``[..., P, lines, length]`` from logits ``[..., G, 3, lines, length]`` and b = lam x."""
    groups, count, length = logits.shape[-4], *b.shape[-2:]
    exists = torch.ones(3, 1, length, dtype=torch.float64, device=b.device)
    exists[0, :, 0] = exists[2, :, -1] = 0
    gates = logits.sigmoid() * exists
    w = gates / gates.sum(-3, keepdim=True)
    w = w.movedim((-2, -3), (0, -1)).unsqueeze(-3).unbind()  # per line [..., G, 1, length, tap]
    b = b.unflatten(-3, (groups, -1)).movedim(-2, 0).unbind()  # per line [..., G, P / G, length]
    h = [b[0]]
    for i in range(1, count):
        if chunk_size and i % chunk_size == 0:
            h.append(b[i])
        else:
            h.append((F.pad(h[-1], (1, 1)).unfold(-1, 3, 1) * w[i]).sum(-1) + b[i])
    return torch.stack(h, dim=-2).flatten(-4, -3)


def unpack_tokens(
    x: Tensor, params: Tensor, grid: tuple[int, int], groups: int
) -> tuple[Tensor, ...]:
    """x, logits, lam, u, skip as `gspn2_scan` takes them, from the tokens of a projection."""
    channels = x.shape[-1]
    columns = 3 if groups == channels else 4  # shared logits have a fourth that is not read
    sizes = (4 * channels, 4 * channels, 4 * channels, 4 * groups * columns)
    lam, u, skip, logits = params[..., : sum(sizes)].split(sizes, dim=-1)

    def as_maps(tokens, *channels):
        return tokens.transpose(1, 2).unflatten(2, grid).unflatten(1, channels)

    gates = (as_maps(gate, 4, -1) for gate in (lam, u, skip))
    return as_maps(x, -1), as_maps(logits, 4, groups, columns)[:, :, :, :3], *gates


def pack_tokens(x: Tensor, logits: Tensor, lam: Tensor, u: Tensor, skip: Tensor):
    """The inverse of :func:`unpack_tokens`: x ``[B, N, P]`` and params, unused columns NaN."""

    def as_tokens(maps):
        return maps.flatten(1, -3).flatten(2).transpose(1, 2)

    if logits.shape[2] < x.shape[1]:
        logits = F.pad(logits, (0, 0, 0, 0, 0, 1), value=torch.nan)
    params = torch.cat([as_tokens(t) for t in (lam, u, skip, logits)], dim=-1)
    unused = params_width(x.shape[1], logits.shape[2]) - params.shape[-1]
    return as_tokens(x).contiguous(), F.pad(params, (0, unused), value=torch.nan)


def _in_order(tensor: Tensor, order: list[int]) -> Tensor:
    """The same tensor with its dimensions in memory from outermost to innermost as in `order`."""
    inverse = [order.index(dim) for dim in range(tensor.ndim)]
    return tensor.permute(order).contiguous().permute(inverse)


def _dims(tensor: Tensor) -> tuple[list[int], list[int], list[int]]:
    """The dimensions of batch (and direction), of channels (or groups and taps), and of the map."""
    lead = 1 if tensor.ndim == 4 else 2
    dims = list(range(tensor.ndim))
    return dims[:lead], dims[lead:-2], dims[-2:]


def planar(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def channels_last(tensor: Tensor) -> Tensor:
    lead, channels, image = _dims(tensor)
    return _in_order(tensor, lead + image + channels)


def columns_first(tensor: Tensor) -> Tensor:
    """Channels last, but neighbours in memory are below each other in the image."""
    lead, channels, image = _dims(tensor)
    return _in_order(tensor, lead + image[::-1] + channels)


def batch_last(tensor: Tensor) -> Tensor:
    lead, channels, image = _dims(tensor)
    return _in_order(tensor, image + channels + lead)


def sliced(tensor: Tensor) -> Tensor:
    """The inside of a larger channels-last buffer of NaN: reading next to it shows."""
    buffer = tensor.new_full([size + 2 for size in tensor.shape], torch.nan)
    inside = channels_last(buffer)[tuple(slice(1, -1) for _ in tensor.shape)]
    return inside.copy_(tensor)


def every_second(tensor: Tensor) -> Tensor:
    """Every second channel of a channels-last buffer, NaN in between."""
    lead, _, _ = _dims(tensor)
    dim = len(lead)
    shape = [*tensor.shape[:dim], 2 * tensor.shape[dim], *tensor.shape[dim + 1 :]]
    buffer = channels_last(tensor.new_full(shape, torch.nan))
    return buffer[(slice(None),) * dim + (slice(None, None, 2),)].copy_(tensor)


def expanded(tensor: Tensor) -> Tensor:
    """One batch item and one row for all, without copies: their strides are zero."""
    return channels_last(tensor[:1, ..., :1, :]).expand(tensor.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    layout.__name__: layout
    for layout in (
        planar,
        channels_last,
        columns_first,
        batch_last,
        sliced,
        every_second,
        expanded,
    )
}
TOKEN_LAYOUTS = ("tokens", "tokens_of_one_projection")


@dataclass(frozen=True)
class Case:
    """A scan to run: shapes, options, memory layout and the seed of its values."""

    batch: int = 1
    channels: int = 8
    groups: int = 1
    height: int = 6
    width: int = 5
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    chunk_size: int | None = None
    native_grid: tuple[int, int] | None = None
    skip: bool = True
    store_hidden: bool = False
    seed: int = field(default=0, compare=False)

    @property
    def is_tokens(self) -> bool:
        """Whether inputs are x and params of `gspn2_scan_tokens`, not those of `gspn2_scan`."""
        return self.layout in TOKEN_LAYOUTS

    def draw(self, device: torch.device | str) -> list[Tensor]:
        """The inputs, on `device` in the case's dtype and layout."""
        generator = torch.Generator(device).manual_seed(self.seed)
        image, channels = (self.height, self.width), (4, self.channels)

        def values(*shape):
            kind = {"dtype": torch.float32, "device": device}
            return torch.randn(self.batch, *shape, *image, generator=generator, **kind)

        shapes = [(self.channels,), (4, self.groups, 3), channels, channels, channels]
        maps = [values(*shape) for shape in shapes]
        maps[1] *= 2
        maps = [t.to(self.dtype) for t in maps]
        if self.is_tokens:
            x, params = pack_tokens(*maps)
            return [x, params] if self.layout == "tokens" else _of_one_projection(x, params)
        maps = maps if self.skip else maps[:-1]
        return [LAYOUTS[self.layout](t) for t in maps]

    def scan(self, inputs: list[Tensor], backend: str) -> Tensor:
        """The operator's result, ``[B, P, H, W]``."""
        options = {
            "chunk_size": self.chunk_size,
            "native_grid": self.native_grid,
            "backend": backend,
            "store_hidden": self.store_hidden,
        }
        if not self.is_tokens:
            return gspn2_scan(*inputs, **options)
        grid = (self.height, self.width)
        y = gspn2_scan_tokens(*inputs, grid, groups=self.groups, **options)
        return y.transpose(1, 2).unflatten(2, grid)

    def reference(self, inputs: list[Tensor]) -> Tensor:
        """The same in float64."""
        if self.is_tokens:
            inputs = unpack_tokens(*inputs, (self.height, self.width), self.groups)
        if self.native_grid is not None:
            x, logits, lam, *rest = inputs
            native_height, native_width = self.native_grid
            scales = native_height / self.height, native_width / self.width
            by_direction = lam.new_tensor([s for s in scales for _ in (0, 1)], dtype=torch.float64)
            inputs = [x, logits, lam * by_direction[:, None, None, None], *rest]
        return scan_float64(*inputs, chunk_size=self.chunk_size)


def _of_one_projection(x: Tensor, params: Tensor) -> list[Tensor]:
    """x and params side by side in a buffer of NaN, at odd offsets, between other tokens."""
    batch, tokens, channels = x.shape
    width = params.shape[-1]
    buffer = x.new_full((batch, tokens + 2, channels + width + 5), torch.nan)
    first, second = buffer[:, 1:-1, 3 : 3 + channels], buffer[:, 1:-1, 4 + channels :][..., :width]
    return [first.copy_(x), second.copy_(params)]


def random_case(rng: random.Random, *, largest: tuple[int, int] = (70, 50)) -> Case:
    """A case anywhere in the space of options; its map is at most `largest` = (H, W)."""
    height, width = _random_map(rng, *largest)
    channels = _random_channels(rng, height * width)
    divisors = [g for g in range(1, channels + 1) if channels % g == 0]
    return Case(
        batch=rng.choice([1, 1, 2, 3]),
        channels=channels,
        groups=rng.choice([1, channels, *divisors]),
        height=height,
        width=width,
        dtype=rng.choice(LOW_PRECISION),
        layout=rng.choice([*LAYOUTS, *TOKEN_LAYOUTS, "channels_last", "tokens"]),
        chunk_size=rng.choice([None, None, None, 1, 2, 4, 7, 16, 33, 1000]),
        native_grid=rng.choice([None, None, (height, 2 * width), (1 + height // 2, width)]),
        skip=rng.random() < 0.7,
        store_hidden=rng.random() < 0.5,
        seed=rng.randrange(2**31),
    )


def _random_map(rng: random.Random, highest: int, widest: int) -> tuple[int, int]:
    kind = rng.choice(["any", "any", "any", "small", "one line", "one column", "even"])
    if kind == "one line":
        return 1, rng.randint(1, 5 * widest)
    if kind == "one column":
        return rng.randint(1, 5 * highest), 1
    if kind == "small":
        return rng.randint(1, 9), rng.randint(1, 9)
    if kind == "even":
        sizes = [size for size in (8, 16, 32, 48, 64) if size <= min(highest, widest)]
        return rng.choice(sizes), rng.choice(sizes)
    return rng.randint(1, highest), rng.randint(1, widest)


def _random_channels(rng: random.Random, positions: int) -> int:
    if positions <= 1000 and rng.random() < 0.15:
        return rng.choice([48, 64, 80, 96, 160])
    return rng.randint(1, 40)
