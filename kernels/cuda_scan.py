"""The CUDA scan as torch operators: fake kernels, gradients and autocast for what launch.py runs.

`scan_lines` scans the lines of a LineLayout, and `pack_tokens` makes them from the matrices that
the projections of a block write. `hidden` is h for the backward pass, or empty: it is then
computed again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import launch
from .launch import Sizes
from .lines import SIZES

NAMESPACE = "gspn2_diffusers"
SCHEMAS = (
    f"scan_lines(Tensor rows, Tensor columns, {SIZES}, bool store_hidden) -> (Tensor, Tensor)",
    "scan_lines_backward(Tensor grad_y, Tensor rows, Tensor columns, Tensor hidden, "
    f"{SIZES}) -> (Tensor, Tensor)",
    "pack_tokens(Tensor x, Tensor params, SymInt height, SymInt width, SymInt groups) "
    "-> (Tensor, Tensor)",
    "unpack_tokens(Tensor rows, Tensor columns, SymInt height, SymInt width, SymInt channels, "
    "SymInt groups, SymInt params_width) -> (Tensor, Tensor)",
)
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # its registrations live as long as it


# ---- lines


def scan_lines_cuda(rows, columns, *sizes_and_store):
    """y ``[B, N, P]`` and `hidden`."""
    *sizes, store_hidden = sizes_and_store
    sizes = Sizes(len(rows), *sizes)
    y, hidden = launch.run_forward((rows, columns), sizes, result=True, hidden=store_hidden)
    return y, rows.new_empty(0, dtype=torch.float32) if hidden is None else hidden


def scan_lines_now(rows, columns, *sizes) -> Tensor:
    """y ``[B, N, P]`` of CUDA tensors without a gradient, past torch's dispatcher."""
    sizes = Sizes(len(rows), *sizes)
    return launch.run_forward((rows, columns), sizes, result=True, hidden=False)[0]


def scan_lines_backward_cuda(grad_y, rows, columns, hidden, *sizes):
    """Gradients of rows and columns."""
    sizes, lines = Sizes(len(rows), *sizes), (rows, columns)
    if not hidden.numel():
        _, hidden = launch.run_forward(lines, sizes, result=False, hidden=True)
    *grad_lines, _ = launch.pack(grad_y.contiguous(), None, sizes)
    return launch.run_backward(lines, grad_lines, hidden, sizes)


def _scan_lines_fake(rows, columns, *sizes_and_store):
    *sizes, store_hidden = sizes_and_store
    sizes = Sizes(rows.shape[0], *sizes)
    count = sizes.workspace_size(sizes.channels, rows.dtype.itemsize) if store_hidden else 0
    y = rows.new_empty((sizes.batch, sizes.tokens, sizes.channels))
    return y, rows.new_empty((count,), dtype=torch.float32)


def _scan_lines_backward_fake(grad_y, rows, columns, hidden, *sizes):
    return rows.new_empty(rows.shape), columns.new_empty(columns.shape)


def _scan_lines_setup(ctx, inputs, output):
    rows, columns, *ctx.sizes, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(rows, columns, output[1])


def _scan_lines_gradient(ctx, grad_y, _):
    rest = (None,) * (len(ctx.sizes) + 1)
    if grad_y is None:
        return None, None, *rest
    operator = torch.ops.gspn2_diffusers.scan_lines_backward
    return *operator(grad_y, *ctx.saved_tensors, *ctx.sizes), *rest


# ---- tokens


def pack_tokens_cuda(x, params, height, width, groups):
    """The lines of tokens, by axis."""
    x, params = _with_columns_together(x, params)
    *lines, _ = launch.pack(x, params, _token_sizes(x, height, width, groups))
    return tuple(lines)


def unpack_tokens_cuda(rows, columns, height, width, channels, groups, params_width):
    """The adjoint of pack_tokens."""
    sizes = Sizes(len(rows), height, width, channels, groups, 0, True)
    return launch.unpack((rows.contiguous(), columns.contiguous()), sizes, params_width)


def scan_tokens_now(x, params, height, width, groups, chunk_size, native_grid) -> Tensor:
    """y ``[B, N, P]`` of CUDA tensors without a gradient, past torch's dispatcher."""
    x, params = _with_columns_together(x, params)
    sizes = _token_sizes(x, height, width, groups, chunk_size, *native_grid)
    *lines, arrivals = launch.pack(x, params, sizes, arrivals=True)
    y, _ = launch.run_forward(lines, sizes, result=True, hidden=False, arrivals=arrivals)
    return y


def _with_columns_together(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _token_sizes(x, height, width, groups, chunk_size=0, *native_grid) -> Sizes:
    return Sizes(x.shape[0], height, width, x.shape[2], groups, chunk_size, True, *native_grid)


def _pack_tokens_fake(x, params, height, width, groups):
    sizes = _token_sizes(x, height, width, groups)
    shapes = (sizes.lines_shape(axis, sizes.rows, x.dtype.itemsize) for axis in (0, 1))
    return tuple(x.new_empty(shape) for shape in shapes)


def _unpack_tokens_fake(rows, columns, height, width, channels, groups, params_width):
    tokens = (rows.shape[0], height * width)
    return rows.new_empty((*tokens, channels)), rows.new_empty((*tokens, params_width))


def _pack_tokens_setup(ctx, inputs, output):
    x, params, height, width, groups = inputs
    ctx.arguments = (height, width, x.shape[2], groups, params.shape[2])


def _pack_tokens_gradient(ctx, grad_rows, grad_columns):
    grads = torch.ops.gspn2_diffusers.unpack_tokens(grad_rows, grad_columns, *ctx.arguments)
    return *grads, None, None, None


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
        "scan_lines": (scan_lines_cuda, _scan_lines_fake),
        "scan_lines_backward": (scan_lines_backward_cuda, _scan_lines_backward_fake),
        "pack_tokens": (pack_tokens_cuda, _pack_tokens_fake),
        "unpack_tokens": (unpack_tokens_cuda, _unpack_tokens_fake),
    }
    for name, (kernel, fake) in kernels.items():
        _library.impl(name, kernel, "CUDA")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    gradients = {
        "scan_lines": (_scan_lines_gradient, _scan_lines_setup),
        "pack_tokens": (_pack_tokens_gradient, _pack_tokens_setup),
    }
    for name, (gradient, setup) in gradients.items():
        operator = getattr(torch.ops.gspn2_diffusers, name).default
        torch.library.register_autograd(operator, gradient, setup_context=setup, lib=_library)
    # Lines have been padded for the width of their numbers: only what is packed can be cast.
    packing = torch.ops.gspn2_diffusers.pack_tokens.default
    _library.impl("pack_tokens", lambda *a: _with_autocast(packing, a), "AutocastCUDA")


# A checkout's root on sys.path makes this folder importable as `kernels` too, the name of a Hugging
# Face package that other libraries look for: the operators are registered once all the same.
if not hasattr(torch.ops.gspn2_diffusers, "scan_lines"):
    _register()
