"""The scan in plain torch as opaque operators, for every device that the kernels cannot serve.

Opaque, because a loop over lines is thousands of graph nodes for a compiler that traces it, and
because autograd would keep every intermediate of every line; the gradients need only the inputs.
There are two, as in cuda_scan.py: of maps and of tokens. Taking the parameters of a token apart
inside the operator spares the backward pass a copy of their gradient, the largest tensor there is.
"""

import torch
from torch import Tensor

from .directions import DIRECTIONS, Maps, backward, forward
from .layout import TokenLayout

__all__ = ["DIRECTIONS", "scan_reference", "scan_tokens_reference"]


# ---- maps


@torch.library.custom_op("gspn2_diffusers::torch_scan", mutates_args=())
def scan_reference(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    skip: Tensor | None,
    chunk_size: int | None,
) -> Tensor:
    """Shapes, dtypes and meaning as in :func:`gspn2_diffusers.kernels.gspn2_scan`; no checks.

    The result is channels last in memory.
    """
    return forward(Maps(x, logits, lam, u, skip), chunk_size)


@torch.library.custom_op("gspn2_diffusers::torch_scan_backward", mutates_args=())
def scan_reference_backward(
    grad_y: Tensor,
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    skip: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, logits, lam, u and skip; the last is empty if skip is None."""
    inputs = Maps(x, logits, lam, u, skip)
    grads = Maps(*_empty_gradients(inputs))
    backward(grad_y, inputs, grads, chunk_size)
    return tuple(grads)


def _empty_gradients(inputs: Maps) -> tuple[Tensor, ...]:
    empty = inputs.x.new_empty(0)
    return tuple(empty if t is None else _empty_channels_last(t) for t in inputs)


def _empty_channels_last(like: Tensor) -> Tensor:
    batch, *channels, height, width = like.shape
    return like.new_empty(batch, height, width, *channels).movedim((1, 2), (-2, -1))


@scan_reference.register_fake
def _(x, logits, lam, u, skip, chunk_size):
    return _empty_channels_last(x)


@scan_reference_backward.register_fake
def _(grad_y, x, logits, lam, u, skip, chunk_size):
    return _empty_gradients(Maps(x, logits, lam, u, skip))


def _setup(ctx, inputs, output):
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad_y):
    inputs = ctx.saved_tensors
    *grads, grad_skip = scan_reference_backward(grad_y, *inputs, ctx.chunk_size)
    return *grads, None if inputs[-1] is None else grad_skip, None


scan_reference.register_autograd(_gradient, setup_context=_setup)


# ---- tokens


@torch.library.custom_op("gspn2_diffusers::torch_scan_tokens", mutates_args=())
def scan_tokens_reference(
    x: Tensor, params: Tensor, height: int, width: int, groups: int, chunk_size: int | None
) -> Tensor:
    """As :func:`gspn2_diffusers.kernels.gspn2_scan_tokens`, without checks."""
    y = forward(_maps(x, params, height, width, groups), chunk_size)
    return y.movedim(1, -1).flatten(1, 2)


@torch.library.custom_op("gspn2_diffusers::torch_scan_tokens_backward", mutates_args=())
def scan_tokens_reference_backward(
    grad_y: Tensor,
    x: Tensor,
    params: Tensor,
    height: int,
    width: int,
    groups: int,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and params; columns that nobody reads have gradient zero."""
    grad_x, grad_params = x.new_empty(x.shape), params.new_empty(params.shape)
    grad_params[..., TokenLayout(x.shape[-1], groups).gates :].zero_()
    inputs = _maps(x, params, height, width, groups)
    grads = _maps(grad_x, grad_params, height, width, groups)
    backward(_map(grad_y, height, width), inputs, grads, chunk_size)
    return grad_x, grad_params


def _maps(x: Tensor, params: Tensor, height: int, width: int, groups: int) -> Maps:
    """Views of the tokens as maps."""
    tensors = (x, *TokenLayout(x.shape[-1], groups).split(params))
    return Maps(*(_map(t, height, width) for t in tensors))


def _map(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.movedim(1, -1).unflatten(-1, (height, width))


@scan_tokens_reference.register_fake
def _(x, params, height, width, groups, chunk_size):
    return x.new_empty(x.shape)


@scan_tokens_reference_backward.register_fake
def _(grad_y, x, params, height, width, groups, chunk_size):
    return x.new_empty(x.shape), params.new_empty(params.shape)


def _setup_tokens(ctx, inputs, output):
    x, params, *ctx.sizes = inputs
    ctx.save_for_backward(x, params)


def _gradient_tokens(ctx, grad_y):
    grads = scan_tokens_reference_backward(grad_y, *ctx.saved_tensors, *ctx.sizes)
    return *grads, *(None for _ in ctx.sizes)


scan_tokens_reference.register_autograd(_gradient_tokens, setup_context=_setup_tokens)
