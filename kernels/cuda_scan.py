"""The CUDA scan as torch operators: fake kernels, gradients and autocast for what launch.py runs.

Two operators compute the same scan from different memory: `scan` from five tensors with any
strides, `scan_tokens` from the two matrices that the projections of a block write. `hidden` is h
``[B, 4, N, P]`` for the backward pass, or empty: it is then computed again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import launch
from .layout import TokenLayout

NAMESPACE = "gspn2_diffusers"
SCHEMAS = (
    "scan(Tensor x, Tensor logits, Tensor lam, Tensor u, Tensor? skip, SymInt chunk_size, "
    "bool store_hidden) -> (Tensor, Tensor)",
    "scan_backward(Tensor grad_y, Tensor x, Tensor logits, Tensor lam, Tensor u, Tensor? skip, "
    "Tensor hidden, SymInt chunk_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "scan_tokens(Tensor x, Tensor params, SymInt height, SymInt width, SymInt groups, "
    "SymInt chunk_size, bool store_hidden) -> (Tensor, Tensor)",
    "scan_tokens_backward(Tensor grad_y, Tensor x, Tensor params, Tensor hidden, SymInt height, "
    "SymInt width, SymInt groups, SymInt chunk_size) -> (Tensor, Tensor)",
)
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # its registrations live as long as it


# ---- five tensors


def scan_cuda(x, logits, lam, u, skip, chunk_size, store_hidden):
    """y ``[B, P, H, W]``, channels last in memory, and `hidden`."""
    tensors, inputs, sizes = _prepare(x, logits, lam, u, skip, chunk_size)
    y, hidden = launch.run_forward(inputs, sizes, x, result=True, hidden=store_hidden)
    return _to_map(y, sizes), hidden


def scan_backward_cuda(grad_y, x, logits, lam, u, skip, hidden, chunk_size):
    """Gradients of x, logits, lam, u and skip (empty if skip is None)."""
    tensors, inputs, sizes = _prepare(x, logits, lam, u, skip, chunk_size)
    if not hidden.numel():
        _, hidden = launch.run_forward(inputs, sizes, x, result=False, hidden=True)
    grads = [_empty_channels_last(t) for t in (logits, lam, u)]
    grad_skip = x.new_empty(0) if skip is None else _empty_channels_last(skip)
    views = launch.Inputs(
        launch.ABSENT,
        *(_view(grad) for grad in grads),
        launch.ABSENT if skip is None else _view(grad_skip),
    )
    grad_tokens = grad_y.permute(0, 2, 3, 1).contiguous()
    grad_x, grad_logits = launch.run_backward(inputs, views, sizes, grad_tokens, hidden)
    if grad_logits is not None:
        grad_map = grad_logits.unflatten(2, (sizes.height, sizes.width))
        grads[0].copy_(grad_map.permute(0, 1, 4, 5, 2, 3))
    return _to_map(grad_x, sizes), *grads, grad_skip


def _prepare(x, logits, lam, u, skip, chunk_size):
    """The tensors as the kernels can read them (copies stay alive in the first result)."""
    tensors = [None if t is None else _channels_last(t) for t in (x, logits, lam, u, skip)]
    views = (launch.ABSENT if t is None else _view(t) for t in tensors)
    batch, channels, height, width = x.shape
    group_stride = 3 if logits.shape[2] == 1 else tensors[1].stride(2)
    sizes = launch.Sizes(
        batch, height, width, channels, logits.shape[2], chunk_size, group_stride
    )
    return tensors, launch.Inputs(*views), sizes


# Order of the axes in memory: [B, (4,) H, W, channels] or [B, 4, H, W, G, 3].
_MEMORY_ORDER = {4: (0, 2, 3, 1), 5: (0, 1, 3, 4, 2), 6: (0, 1, 4, 5, 2, 3)}
_FROM_MEMORY_ORDER = {4: (0, 3, 1, 2), 5: (0, 1, 4, 2, 3), 6: (0, 1, 4, 5, 2, 3)}


def _channels_last(tensor: Tensor) -> Tensor:
    """The tensor itself if its channels are neighbours in memory, else a copy where they are."""
    if tensor.ndim == 6:
        groups, taps = tensor.shape[2:4]
        fits = tensor.stride(3) == 1 and (groups == 1 or tensor.stride(2) == taps)
    else:
        channels = tensor.ndim - 3
        fits = tensor.shape[channels] == 1 or tensor.stride(channels) == 1
    if fits:
        return tensor
    memory = tensor.permute(_MEMORY_ORDER[tensor.ndim]).contiguous()
    return memory.permute(_FROM_MEMORY_ORDER[tensor.ndim])


def _empty_channels_last(like: Tensor) -> Tensor:
    order = _MEMORY_ORDER[like.ndim]
    memory = launch.allocate(tuple(like.shape[axis] for axis in order), like.dtype, like.device)
    return memory.permute(_FROM_MEMORY_ORDER[like.ndim])


def _view(tensor: Tensor) -> launch.View:
    strides = tensor.stride()
    direction = 0 if tensor.ndim == 4 else strides[1]
    return launch.View(tensor.data_ptr(), strides[0], direction, strides[-2], strides[-1])


def _to_map(tokens: Tensor, sizes: launch.Sizes) -> Tensor:
    return tokens.unflatten(1, (sizes.height, sizes.width)).permute(0, 3, 1, 2)


def _scan_fake(x, logits, lam, u, skip, chunk_size, store_hidden):
    return _empty_channels_last(x), _hidden_fake(x, lam.shape if store_hidden else None)


def _scan_backward_fake(grad_y, x, logits, lam, u, skip, hidden, chunk_size):
    grads = [_empty_channels_last(t) for t in (x, logits, lam, u)]
    return *grads, x.new_empty(0) if skip is None else _empty_channels_last(skip)


def _hidden_fake(x, planes):
    shape = (0,) if planes is None else (planes[0], 4, planes[3] * planes[4], planes[2])
    return x.new_empty(shape, dtype=torch.float32)


def _scan_setup(ctx, inputs, output):
    *tensors, ctx.chunk_size, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _scan_gradient(ctx, grad_y, _):
    if grad_y is None:
        return (None,) * 7
    *tensors, hidden = ctx.saved_tensors
    operator = torch.ops.gspn2_diffusers.scan_backward
    *grads, grad_skip = operator(grad_y, *tensors, hidden, ctx.chunk_size)
    return *grads, None if tensors[-1] is None else grad_skip, None, None


# ---- tokens and their parameters


def scan_tokens_cuda(x, params, height, width, groups, chunk_size, store_hidden):
    """y ``[B, N, P]`` and `hidden`."""
    tensors, inputs, sizes = _prepare_tokens(x, params, height, width, groups, chunk_size)
    return launch.run_forward(inputs, sizes, x, result=True, hidden=store_hidden)


def scan_tokens_backward_cuda(grad_y, x, params, hidden, height, width, groups, chunk_size):
    """Gradients of x and params."""
    tensors, inputs, sizes = _prepare_tokens(x, params, height, width, groups, chunk_size)
    if not hidden.numel():
        _, hidden = launch.run_forward(inputs, sizes, x, result=False, hidden=True)
    grad_params = launch.allocate(tuple(params.shape), params.dtype, params.device)
    layout = TokenLayout(sizes.channels, sizes.groups)
    grad_params[..., layout.gates :].zero_()  # the kernel skips the columns nobody reads
    grads = _token_views(grad_params, layout, width)
    grad_x, grad_logits = launch.run_backward(
        inputs, launch.Inputs(launch.ABSENT, *grads), sizes, grad_y.contiguous(), hidden
    )
    if grad_logits is not None:
        layout.split(grad_params)[0].copy_(grad_logits.movedim(1, 2))
    return grad_x, grad_params


def _prepare_tokens(x, params, height, width, groups, chunk_size):
    """The matrices as the kernels can read them (copies stay alive in the first result)."""
    tensors = x, params = [t if t.stride(-1) == 1 else t.contiguous() for t in (x, params)]
    batch, _, channels = x.shape
    layout = TokenLayout(channels, groups)
    sizes = launch.Sizes(batch, height, width, channels, groups, chunk_size, layout.group_stride)
    image, token, _ = x.stride()
    x_view = launch.View(x.data_ptr(), image, 0, width * token, token)
    return tensors, launch.Inputs(x_view, *_token_views(params, layout, width)), sizes


def _token_views(params: Tensor, layout: TokenLayout, width: int) -> list[launch.View]:
    """Views of logits, lam, u and skip in a ``[B, N, K]`` matrix."""
    address, itemsize = params.data_ptr(), params.element_size()
    image, token, _ = params.stride()
    return [
        launch.View(address + column * itemsize, image, direction, width * token, token)
        for column, direction in layout.positions
    ]


def _scan_tokens_fake(x, params, height, width, groups, chunk_size, store_hidden):
    batch, tokens, channels = x.shape
    shape = (batch, 4, tokens, channels) if store_hidden else (0,)
    y = x.new_empty((batch, tokens, channels))
    return y, x.new_empty(shape, dtype=torch.float32)


def _scan_tokens_backward_fake(grad_y, x, params, hidden, height, width, groups, chunk_size):
    return x.new_empty(x.shape), params.new_empty(params.shape)


def _scan_tokens_setup(ctx, inputs, output):
    x, params, *ctx.sizes, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, params, output[1])


def _scan_tokens_gradient(ctx, grad_y, _):
    if grad_y is None:
        return (None,) * 7
    operator = torch.ops.gspn2_diffusers.scan_tokens_backward
    grads = operator(grad_y, *ctx.saved_tensors, *ctx.sizes)
    return *grads, None, None, None, None, None


# ---- registration


def _with_autocast(operator: Callable, arguments: tuple) -> tuple:
    """Run `operator` on tensors cast to the dtype of the surrounding autocast region."""
    dtype = torch.get_autocast_dtype("cuda")
    cast = [
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments
    ]
    with torch.autocast("cuda", enabled=False):
        return operator(*cast)


def _register() -> None:
    for schema in SCHEMAS:
        _library.define(schema)
    kernels = {
        "scan": (scan_cuda, _scan_fake),
        "scan_backward": (scan_backward_cuda, _scan_backward_fake),
        "scan_tokens": (scan_tokens_cuda, _scan_tokens_fake),
        "scan_tokens_backward": (scan_tokens_backward_cuda, _scan_tokens_backward_fake),
    }
    for name, (kernel, fake) in kernels.items():
        _library.impl(name, kernel, "CUDA")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    gradients = {
        "scan": (_scan_gradient, _scan_setup),
        "scan_tokens": (_scan_tokens_gradient, _scan_tokens_setup),
    }
    for name, (gradient, setup) in gradients.items():
        operator = getattr(torch.ops.gspn2_diffusers, name).default
        torch.library.register_autograd(operator, gradient, setup_context=setup, lib=_library)
        _library.impl(name, lambda *a, op=operator: _with_autocast(op, a), "AutocastCUDA")


# A checkout's root on sys.path makes this folder importable as `kernels` too, the name of a Hugging
# Face package that other libraries look for: the operators are registered once all the same.
if not hasattr(torch.ops.gspn2_diffusers, "scan_tokens"):
    _register()
