"""The scan in plain torch as opaque operators, for every device that the kernels cannot serve.

Opaque, because a loop over lines is thousands of graph nodes for a compiler that traces it, and
because autograd would keep every intermediate of every line; the gradients need only the inputs.
There are three: of maps, of tokens and of lines. Taking the parameters of a token apart inside the
operator spares the backward pass a copy of their gradient, the largest tensor there is.
A chunk_size of 0 scans the whole map, a native size of 0 leaves lam as it is.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .directions import DIRECTIONS, Maps, backward, forward
from .layout import LineLayout, TokenLayout
from .lines import SIZES, pack_maps, split_lines

__all__ = ["DIRECTIONS", "scan_lines_reference", "scan_reference", "scan_tokens_reference"]


# ---- maps


@torch.library.custom_op("gspn2_diffusers::torch_scan", mutates_args=())
def scan_reference(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    skip: Tensor | None,
    chunk_size: int,
    native_height: int,
    native_width: int,
) -> Tensor:
    """Shapes, dtypes and meaning as in :func:`gspn2_diffusers.kernels.gspn2_scan`; no checks.

    The result is channels last in memory.
    """
    return forward(Maps(x, logits, lam, u, skip), chunk_size, native_height, native_width)


@torch.library.custom_op("gspn2_diffusers::torch_scan_backward", mutates_args=())
def scan_reference_backward(
    grad_y: Tensor,
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    skip: Tensor | None,
    chunk_size: int,
    native_height: int,
    native_width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, logits, lam, u and skip; the last is empty if skip is None."""
    inputs = Maps(x, logits, lam, u, skip)
    grads = Maps(*_empty_gradients(inputs))
    backward(grad_y, inputs, grads, chunk_size, native_height, native_width)
    return tuple(grads)


def _empty_gradients(inputs: Maps) -> tuple[Tensor, ...]:
    empty = inputs.x.new_empty(0)
    return tuple(empty if t is None else _empty_channels_last(t) for t in inputs)


def _empty_channels_last(like: Tensor) -> Tensor:
    batch, *channels, height, width = like.shape
    return like.new_empty(batch, height, width, *channels).movedim((1, 2), (-2, -1))


@scan_reference.register_fake
def _(x, logits, lam, u, skip, *options):
    return _empty_channels_last(x)


@scan_reference_backward.register_fake
def _(grad_y, x, logits, lam, u, skip, *options):
    return _empty_gradients(Maps(x, logits, lam, u, skip))


def _setup(ctx, inputs, output):
    tensors, ctx.options = inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad_y):
    inputs = ctx.saved_tensors
    *grads, grad_skip = scan_reference_backward(grad_y, *inputs, *ctx.options)
    return *grads, None if inputs[-1] is None else grad_skip, *(None for _ in ctx.options)


scan_reference.register_autograd(_gradient, setup_context=_setup)


# ---- tokens

TOKEN_SIZES = (
    "SymInt height, SymInt width, SymInt groups, SymInt chunk_size, "
    "SymInt native_height, SymInt native_width"
)


@torch.library.custom_op(
    "gspn2_diffusers::torch_scan_tokens",
    mutates_args=(),
    schema=f"(Tensor x, Tensor params, {TOKEN_SIZES}) -> Tensor",
)
def scan_tokens_reference(x, params, height, width, groups, *options):
    """As :func:`gspn2_diffusers.kernels.gspn2_scan_tokens`, without checks."""
    return _tokens(forward(_maps(x, params, height, width, groups), *options))


@torch.library.custom_op(
    "gspn2_diffusers::torch_scan_tokens_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor x, Tensor params, {TOKEN_SIZES}) -> (Tensor, Tensor)",
)
def scan_tokens_reference_backward(grad_y, x, params, height, width, groups, *options):
    """Gradients of x and params; columns that nobody reads have gradient zero."""
    grad_x, grad_params = x.new_empty(x.shape), params.new_empty(params.shape)
    grad_params[..., TokenLayout(x.shape[-1], groups).gates :].zero_()
    inputs = _maps(x, params, height, width, groups)
    grads = _maps(grad_x, grad_params, height, width, groups)
    backward(_map(grad_y, height, width), inputs, grads, *options)
    return grad_x, grad_params


def _maps(x: Tensor, params: Tensor, height: int, width: int, groups: int) -> Maps:
    """Views of the tokens as maps."""
    tensors = (x, *TokenLayout(x.shape[-1], groups).split(params))
    return Maps(*(_map(t, height, width) for t in tensors))


def _map(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.movedim(1, -1).unflatten(-1, (height, width))


def _tokens(image: Tensor) -> Tensor:
    return image.movedim(1, -1).flatten(1, 2)


@scan_tokens_reference.register_fake
def _(x, params, *sizes):
    return x.new_empty(x.shape)


# ---- lines


@torch.library.custom_op(
    "gspn2_diffusers::torch_scan_lines",
    mutates_args=(),
    schema=f"(Tensor rows, Tensor columns, {SIZES}) -> Tensor",
)
def scan_lines_reference(rows, columns, height, width, channels, groups, chunk_size, skip, *native):
    """As :func:`gspn2_diffusers.kernels.gspn2_scan_lines`, without checks."""
    maps = _maps_of_lines(rows, columns, height, width, LineLayout(channels, groups, skip))
    return _tokens(forward(maps, chunk_size, *native))


@torch.library.custom_op(
    "gspn2_diffusers::torch_scan_lines_backward",
    mutates_args=(),
    schema=f"(Tensor grad_y, Tensor rows, Tensor columns, {SIZES}) -> (Tensor, Tensor)",
)
def scan_lines_reference_backward(
    grad_y, rows, columns, height, width, channels, groups, chunk_size, skip, *native
):
    """Gradients of rows and columns; that of x is all in those of the rows."""
    inputs = _maps_of_lines(rows, columns, height, width, LineLayout(channels, groups, skip))
    grads = Maps(*(None if t is None else torch.empty_like(t) for t in inputs))
    backward(_map(grad_y, height, width), inputs, grads, chunk_size, *native)
    grad_rows, grad_columns = pack_maps(*grads)
    grad_columns[:, :, :channels].zero_()
    return grad_rows, grad_columns


def _maps_of_lines(rows, columns, height, width, layout: LineLayout) -> Maps:
    maps = split_lines(rows, columns, (height, width), layout)
    return Maps(*maps, *(() if layout.skip else (None,)))


@scan_lines_reference.register_fake
def _(rows, columns, height, width, channels, *sizes):
    return rows.new_empty((rows.shape[0], height * width, channels))


# ---- gradients of both


def _register_gradient(operator: Callable, gradient: Callable) -> None:
    """Autograd for an operator of two tensors and sizes, whose `gradient` takes grad_y before."""

    def setup(ctx, inputs, output):
        first, second, *ctx.sizes = inputs
        ctx.save_for_backward(first, second)

    def differentiate(ctx, grad_y):
        grads = gradient(grad_y, *ctx.saved_tensors, *ctx.sizes)
        return *grads, *(None for _ in ctx.sizes)

    def fake(grad_y, first, second, *sizes):
        return first.new_empty(first.shape), second.new_empty(second.shape)

    gradient.register_fake(fake)
    operator.register_autograd(differentiate, setup_context=setup)


_register_gradient(scan_tokens_reference, scan_tokens_reference_backward)
_register_gradient(scan_lines_reference, scan_lines_reference_backward)
