"""Layers of a UNet computed piece by piece: maps in strips of rows, tokens in chunks.

Every function computes what the module's own forward pass computes, up to rounding, and holds no
piece of more than `limit` elements, except where a single row of a map or a single token has
more. A module whose widest tensor fits in `limit` runs as it is.

Child modules are called, their weights never read, so that quantised, offloaded and LoRA layers
work; only the affine parameters of a GroupNorm are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from gspn2_diffusers.attention import GSPN2Attention

# Statistics are taken of float32 copies; pieces of this size stay in a large GPU's cache.
STATISTICS_ELEMENTS = 2**23
# The widest tensor inside a transformer block, GEGLU's projection, in widths of a token.
FEED_FORWARD_WIDTH = 8

Rows = Callable[[int, int], Tensor]  # (start, stop) to these rows of a map


# ---- pieces


def spans(size: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces of `step`, the last one shorter, that cover `size`."""
    for start in range(0, size, step):
        yield start, min(start + step, size)


def rows_within(limit: int, row: int, height: int, halo: int = 0) -> int:
    """Rows of `row` elements a strip may have beside its `halo`; all rows if the map fits."""
    return height if row * height <= limit else max(1, limit // row - halo)


def put(whole: Tensor | None, piece: Tensor, dim: int, start: int, size: int) -> Tensor:
    """Write `piece` at `start` of a tensor that is `size` long in `dim`.

    The tensor is made when its first piece arrives; a piece that covers all of it becomes it.
    """
    if piece.shape[dim] == size:
        return piece
    if whole is None:
        shape = list(piece.shape)
        shape[dim] = size
        whole = _empty(shape, piece)
    whole.narrow(dim, start, piece.shape[dim]).copy_(piece)
    return whole


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of this shape in the memory format of `like`."""
    # By the strides alone: a strip of a map is contiguous in neither format.
    last = like.ndim == 4 and like.shape[1] > 1 and like.stride(1) == 1
    order = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=order)


# ---- group norm


class Moments:
    """Mean and variance of every channel of a map, from its pieces."""

    def __init__(self, limit: int):
        self._limit = min(limit, STATISTICS_ELEMENTS)
        self._pieces: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by their sizes

    def add(self, strip: Tensor) -> Moments:
        """Count in a strip ``[B, C, rows, W]``."""
        batch, channels, height, width = strip.shape
        dtype = torch.promote_types(strip.dtype, torch.float32)
        step = rows_within(self._limit, batch * channels * width, height)
        for start, stop in spans(height, step):
            wide = strip[:, :, start:stop].to(dtype)
            variance, mean = torch.var_mean(wide, dim=(2, 3), correction=0)
            self._pieces.setdefault((stop - start) * width, []).append((mean, variance))
        return self

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and variance ``[B, C]``, in float32 at least.

        Squares are taken of deviations only (Chan et al., 1983): a mean that is large against
        the deviation costs no precision.
        """
        total = sum(count * len(pieces) for count, pieces in self._pieces.items())
        means, variances = {}, {}
        for count, pieces in self._pieces.items():
            means[count], variances[count] = map(torch.stack, zip(*pieces, strict=True))
        first = next(iter(means.values()))[0]
        mean = first + sum((count / total) * (m - first).sum(0) for count, m in means.items())
        variance = sum(
            (count / total) * (variances[count] + (m - mean).square()).sum(0)
            for count, m in means.items()
        )
        return mean, variance


class Normalisation:
    """A GroupNorm by the statistics of a whole map, and the activation that follows it.

    Args:
        norm: its groups may straddle the parts.
        moments: of the parts that, side by side, are the map.
    """

    def __init__(
        self,
        norm: nn.GroupNorm,
        moments: Sequence[Moments],
        activation: nn.Module | None = None,
    ):
        mean, variance = (
            torch.cat(parts, dim=1).unflatten(1, (norm.num_groups, -1))
            for parts in zip(*(part.result() for part in moments), strict=True)
        )
        group_mean = mean.mean(-1, keepdim=True)
        variance = (variance + (mean - group_mean).square()).mean(-1, keepdim=True)
        scale = torch.rsqrt(variance + norm.eps).expand_as(mean).flatten(1)
        group_mean = group_mean.expand_as(mean).flatten(1)
        if norm.affine:
            with _weights_on_device(norm):
                scale = scale * norm.weight.to(scale.dtype)
                shift = norm.bias.to(scale.dtype) - group_mean * scale
        else:
            shift = -group_mean * scale
        self._scale, self._shift = scale[:, :, None, None], shift[:, :, None, None]
        self._activation = activation

    def modulate(self, scale: Tensor, shift: Tensor) -> None:
        """Multiply the normalised channels by 1 + scale and add shift, both ``[B, C, 1, 1]``."""
        self._scale = self._scale * (1 + scale)
        self._shift = self._shift * (1 + scale) + shift

    def rows(
        self, parts: Sequence[Tensor], start: int, stop: int, above: Tensor | None = None
    ) -> Tensor:
        """Rows of the parts side by side, normalised and activated, below the rows `above`."""
        batch, _, _, width = parts[0].shape
        first = 0 if above is None else above.shape[2]
        out = _empty((batch, self._scale.shape[1], first + stop - start, width), parts[0])
        if first:
            self._write([above], out[:, :, :first])
        self._write([part[:, :, start:stop] for part in parts], out[:, :, first:])
        if self._activation is None:
            return out
        if type(self._activation) is nn.SiLU:
            return F.silu(out, inplace=True)
        return self._activation(out)

    def _write(self, parts: Sequence[Tensor], out: Tensor) -> None:
        start = 0
        for part in parts:
            here = slice(start, start + part.shape[1])
            torch.addcmul(self._shift[:, here], part, self._scale[:, here], out=out[:, here])
            start = here.stop


@contextlib.contextmanager
def _weights_on_device(module: nn.Module) -> Iterator[None]:
    """Run a module's offload hooks, accelerate's or diffusers', around a read of its weights."""
    hooks = [module._hf_hook] if hasattr(module, "_hf_hook") else []
    if hasattr(module, "_diffusers_hook"):
        hooks += module._diffusers_hook.hooks.values()
    for hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in reversed(hooks):
            hook.post_forward(module, None)


# ---- convolutions of 3 x 3 with padding 1


def convolve(conv: nn.Module, rows: Rows, height: int, step: int, stride: int = 1) -> Tensor:
    """`conv` over a map of `height` rows, `step` rows of the result at a time."""
    result, size = None, -(-height // stride)
    for start, stop in spans(size, step):
        piece = convolve_rows(conv, rows, height, start, stop, stride)
        result = put(result, piece, 2, start, size)
        del piece  # or it would stay while the next one is computed
    return result


def convolve_rows(
    conv: nn.Module, rows: Rows, height: int, start: int, stop: int, stride: int = 1
) -> Tensor:
    """Rows `start` to `stop` of what `conv` makes of a map of `height` rows.

    A strip gets a halo, from which the module's own padding keeps away; only at the true edges of
    the map does the padding count. With stride 2 the halo starts at an even row, where the
    strip's own result then has a row too many. Dilated convolutions get a wider halo.
    """
    reach = _reach(conv)
    if stride == 1:
        first, last = max(0, start - reach), min(height, stop + reach)
    else:
        first, last = max(0, stride * (start - 1)), min(height, stride * (stop - 1) + 2)
    result = conv(rows(first, last))
    return result.narrow(2, min(start, reach), stop - start)


def _reach(conv: nn.Module) -> int:
    """Rows above and below that a row of the result depends on: more than 1 if dilated."""
    return max((m.dilation[0] for m in conv.modules() if isinstance(m, nn.Conv2d)), default=1)


def _raw_rows(x: Tensor) -> Rows:
    return lambda start, stop: x[:, :, start:stop]


def convolve_in(conv: nn.Module, x: Tensor, out_channels: int, limit: int) -> Tensor:
    """A UNet's `conv_in` over ``[B, C, H, W]``."""
    batch, channels, height, width = x.shape
    step = rows_within(limit, batch * max(channels, out_channels) * width, height, halo=2)
    return convolve(conv, _raw_rows(x), height, step)


def convolve_out(
    norm: nn.GroupNorm | None, activation: nn.Module, conv: nn.Module, x: Tensor, limit: int
) -> Tensor:
    """The end of a UNet, over ``[B, C, H, W]``: `conv_norm_out` if there, `conv_out`."""
    batch, channels, height, width = x.shape
    rows = _raw_rows(x)
    if norm is not None and x.numel() <= limit:
        rows = _raw_rows(activation(norm(x)))
    elif norm is not None:
        normalisation = Normalisation(norm, [Moments(limit).add(x)], activation)
        rows = partial(normalisation.rows, [x])
    step = rows_within(limit, batch * channels * width, height, halo=2)
    return convolve(conv, rows, height, step)


def downsample(module: Downsample2D, x: Tensor, limit: int) -> Tensor:
    """``[B, C, H, W]`` to ``[B, C', ceil(H / 2), ceil(W / 2)]``."""
    batch, channels, height, width = x.shape
    row = batch * max(2 * channels, module.out_channels) * width
    step = rows_within(limit, row, -(-height // 2), halo=1)
    return convolve(module.conv, _raw_rows(x), height, step, stride=2)


def upsample(module: Upsample2D, x: Tensor, size: tuple[int, int], limit: int) -> Tensor:
    """``[B, C, H, W]`` to ``[B, C', *size]``, `size` being twice that of x or one less.

    For one less, nearest neighbours are those of twice the size without the last line.
    """
    batch, channels, _, _ = x.shape
    height, width = size

    def rows(start: int, stop: int) -> Tensor:
        source = x[:, :, start // 2 : -(-stop // 2)]
        twice = F.interpolate(source, scale_factor=2.0, mode="nearest")
        return twice[:, :, start % 2 :, :width].narrow(2, 0, stop - start)

    row = batch * max(channels, module.out_channels) * 2 * x.shape[3]
    return convolve(module.conv, rows, height, rows_within(limit, row, height, halo=4))


# ---- resnets


def resnet(module: ResnetBlock2D, parts: list[Tensor], temb: Tensor, limit: int) -> Tensor:
    """The parts ``[B, C_i, H, W]`` side by side to ``[B, C', H, W]``.

    Args:
        parts: a hidden state, in up blocks followed by its skip connection. The list may be
            emptied, so that the parts need not outlive their copy.
    """
    batch, _, height, width = parts[0].shape
    widest = max(sum(part.shape[1] for part in parts), module.out_channels)
    row = batch * widest * width
    if row * height <= limit:
        x = _side_by_side(parts)
        parts.clear()
        return module(x, temb)

    step = rows_within(limit, row, height, halo=2)
    if not module.skip_time_act:
        temb = module.nonlinearity(temb)
    temb = module.time_emb_proj(temb)[:, :, None, None]
    modulated = module.time_embedding_norm == "scale_shift"

    hidden, moments = _first_half(module, parts, None if modulated else temb, step, limit)
    norm = Normalisation(module.norm2, [moments], module.nonlinearity)
    if modulated:
        norm.modulate(*temb.chunk(2, dim=1))
    above = hidden[:, :, :0]
    for start, stop in spans(height, step):
        # The result takes the place of `hidden`, whose last rows the next strip needs as well.
        last = hidden[:, :, max(start, stop - _reach(module.conv2)) : stop]
        below = torch.cat([above, last], dim=2)[:, :, -_reach(module.conv2) :]
        _second_half(module, hidden, parts, norm, start, stop, above)
        above = below
    return hidden


def _first_half(
    module: ResnetBlock2D, parts: list[Tensor], temb: Tensor | None, step: int, limit: int
) -> tuple[Tensor, Moments]:
    """What conv1 makes, plus the time embedding, and its moments."""
    height = parts[0].shape[2]
    norm = Normalisation(
        module.norm1, [Moments(limit).add(part) for part in parts], module.nonlinearity
    )
    hidden, moments = None, Moments(limit)
    for start, stop in spans(height, step):
        piece = convolve_rows(module.conv1, partial(norm.rows, parts), height, start, stop)
        if temb is not None:
            piece += temb
        moments.add(piece)
        hidden = put(hidden, piece, 2, start, height)
        del piece
    return hidden, moments


def _second_half(
    module: ResnetBlock2D,
    hidden: Tensor,
    parts: list[Tensor],
    norm: Normalisation,
    start: int,
    stop: int,
    above: Tensor,
) -> None:
    """Replace rows of `hidden` by conv2's result plus the shortcut; `above` are rows before."""
    end = min(stop + _reach(module.conv2), hidden.shape[2])
    piece = module.conv2(norm.rows([hidden], start, end, above))
    piece = piece.narrow(2, above.shape[2], stop - start)
    shortcut = _side_by_side([part[:, :, start:stop] for part in parts])
    if module.conv_shortcut is not None:
        shortcut = module.conv_shortcut(shortcut)
    result = torch.add(shortcut, piece, out=hidden[:, :, start:stop])
    if module.output_scale_factor != 1:
        result /= module.output_scale_factor


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


# ---- transformers


def transformer(module: Transformer2DModel, x: Tensor, text: Tensor | tuple, limit: int) -> Tensor:
    """``[B, C, H, W]`` to the same shape; x may be overwritten with the result.

    Args:
        text: `encoder_hidden_states` as the blocks expect them.
    """
    grid = x.shape[2:]
    if x.numel() * FEED_FORWARD_WIDTH <= limit:
        return module(x, encoder_hidden_states=text, return_dict=False)[0]
    tokens = _to_tokens(module, x, limit)
    for block in module.transformer_blocks:
        _transform(block, tokens, text, grid, limit)
    _add_tokens(module, tokens, x, limit)
    return x


def _to_tokens(module: Transformer2DModel, x: Tensor, limit: int) -> Tensor:
    """Tokens ``[B, H * W, inner width]``: norm and proj_in."""
    _, _, height, width = x.shape
    norm = Normalisation(module.norm, [Moments(limit).add(x)])
    tokens = None
    for start, stop in spans(height, _transformer_rows(module, x, limit)):
        piece = norm.rows([x], start, stop)
        if module.use_linear_projection:
            piece = module.proj_in(_as_tokens(piece))
        else:
            piece = _as_tokens(module.proj_in(piece))
        tokens = put(tokens, piece, 1, start * width, height * width)
        del piece
    return tokens


def _transform(
    block: BasicTransformerBlock,
    tokens: Tensor,
    text: Tensor | tuple,
    grid: Sequence[int],
    limit: int,
) -> None:
    """A transformer block, in place. Only self-attention needs all tokens at once."""
    options = {"grid": tuple(grid)} if isinstance(block.attn1, GSPN2Attention) else {}
    if block.only_cross_attention:
        options["encoder_hidden_states"] = text
    tokens += block.attn1(_layer_norm(block.norm1, tokens, limit), **options)

    batch, count, width = tokens.shape
    for start, stop in spans(count, max(1, limit // (batch * FEED_FORWARD_WIDTH * width))):
        chunk = tokens[:, start:stop]
        if block.attn2 is not None:
            chunk += block.attn2(block.norm2(chunk), encoder_hidden_states=text)
        chunk += block.ff(block.norm3(chunk))


def _layer_norm(norm: nn.LayerNorm, tokens: Tensor, limit: int) -> Tensor:
    batch, count, width = tokens.shape
    result = None
    for start, stop in spans(count, max(1, limit // (batch * width))):
        result = put(result, norm(tokens[:, start:stop]), 1, start, count)
    return result


def _add_tokens(module: Transformer2DModel, tokens: Tensor, x: Tensor, limit: int) -> None:
    """Add what proj_out makes of the tokens to the map x."""
    _, _, height, width = x.shape
    for start, stop in spans(height, _transformer_rows(module, x, limit)):
        piece = tokens[:, start * width : stop * width]
        if module.use_linear_projection:
            piece = _as_map(module.proj_out(piece), width)
        else:
            piece = module.proj_out(_as_map(piece, width).contiguous())
        x[:, :, start:stop] += piece
        del piece


def _transformer_rows(module: Transformer2DModel, x: Tensor, limit: int) -> int:
    batch, channels, height, width = x.shape
    return rows_within(limit, batch * max(channels, module.inner_dim) * width, height)


def _as_tokens(strip: Tensor) -> Tensor:
    return strip.permute(0, 2, 3, 1).flatten(1, 2)


def _as_map(tokens: Tensor, width: int) -> Tensor:
    return tokens.unflatten(1, (-1, width)).permute(0, 3, 1, 2)
