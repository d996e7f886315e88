"""The public scan operators: they check their arguments and run a backend."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from .backends import resolve_backend
from .cuda_scan import scan_lines_now, scan_tokens_now
from .layout import LineLayout, TokenLayout, pad
from .lines import pack_maps
from .reference import DIRECTIONS, scan_lines_reference, scan_reference, scan_tokens_reference

AS_IT_IS = (0, 0)  # native grid of a scan that leaves lam alone


def gspn2_scan(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    skip: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    native_grid: Sequence[int] | None = None,
    backend: str = "auto",
    store_hidden: bool = False,
) -> Tensor:
    """Scan a feature map in four directions and merge the results (arXiv 2512.07884).

    Args:
        x: proxy features, ``[B, P, H, W]``.
        logits: propagation weights before normalisation, ``[B, 4, G, 3, H, W]``: per direction (in
            the order of ``DIRECTIONS``), weight group and tap (left, center, right). The G groups
            share their weights among P / G neighbouring channels each.
        lam: input gate, ``[B, 4, P, H, W]``.
        u: output gate, ``[B, 4, P, H, W]``.
        skip: direct path from x, ``[B, 4, P, H, W]``, or None for none.
        chunk_size: lines after which the scan restarts from zero (a local scan); None scans the
            whole map.
        native_grid: (H, W) of a map at which lam counts as it is. At another size it is multiplied
            by native H / H in the two directions that go over the rows, by native W / W in the
            other two. None: as it is at every size.
        backend: "auto" runs the CUDA kernels where they can run and torch elsewhere; "cuda" and
            "torch" run just that.
        store_hidden: the CUDA kernels keep h, 4 P H W float32 numbers an image, from the forward
            for the backward pass, instead of computing it again. The torch backend never keeps it.

    The CUDA kernels scan lines whose positions are neighbours in memory, so the inputs are copied
    first: :func:`gspn2_scan_lines` takes them as they are.

    Returns:
        ``[B, P, H, W]`` in the dtype of x (on CUDA under autocast, in its dtype): the sum over
        directions of ``u * h + skip * x``, each direction back in image order. h is accumulated in
        float32 (float64 for float64 input).

    Raises:
        ValueError: a shape, the number of groups, chunk_size or the backend's name does not fit.
        TypeError: a tensor is not of floating point.
        RuntimeError: the backend that was asked for cannot run here.
    """
    _check(x, logits, lam, u, skip)
    chunk_size, native_grid = _check_options(chunk_size, native_grid)
    tensors = [x, logits, lam, u] + ([] if skip is None else [skip])
    dtype = _common_dtype(tensors)
    if resolve_backend(backend, x, dtype) == "torch":
        return scan_reference(x, logits, lam, u, skip, chunk_size, *native_grid)
    computed = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else dtype
    same = [tensor.to(computed) for tensor in tensors] + ([None] if skip is None else [])
    height, width = x.shape[-2:]
    sizes = height, width, x.shape[1], logits.shape[2], chunk_size, skip is not None, *native_grid
    y, _ = torch.ops.gspn2_diffusers.scan_lines(*pack_maps(*same), *sizes, store_hidden)
    y = y.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return y if dtype == x.dtype else y.to(x.dtype)  # autocast may have chosen another one


def gspn2_scan_tokens(
    x: Tensor,
    params: Tensor,
    grid: Sequence[int],
    *,
    groups: int = 1,
    chunk_size: int | None = None,
    native_grid: Sequence[int] | None = None,
    backend: str = "auto",
    store_hidden: bool = False,
) -> Tensor:
    """:func:`gspn2_scan` of tokens that lie row by row on a grid, as a block's projections write
    them.

    Args:
        x: proxy features, ``[B, N, P]``.
        params: ``[B, N, params_width(P, groups)]``, in a row: lam, u, skip ``[4, P]`` each and
            logits ``[4, G, 3]``, those of a group in four columns if channels share it (G < P) and
            in three if not. The fourth, and what is left of the row, are not read.
        grid: H and W, N = H * W.
        groups: G, the number of weight groups.
        chunk_size, native_grid, backend, store_hidden: as in :func:`gspn2_scan`.

    Returns:
        ``[B, N, P]`` in the dtype of x.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`gspn2_scan`.
    """
    height, width = grid
    _check_tokens(x, params, height, width, groups)
    chunk_size, native_grid = _check_options(chunk_size, native_grid)
    dtype = _common_dtype([x, params])
    if resolve_backend(backend, x, dtype) == "torch":
        sizes = height, width, groups, chunk_size, *native_grid
        return scan_tokens_reference(x, params, *sizes)
    tokens = x.to(dtype), params.to(dtype)
    if _runs_at_once(*tokens):
        y = scan_tokens_now(*tokens, height, width, groups, chunk_size, native_grid)
    else:
        lines = torch.ops.gspn2_diffusers.pack_tokens(*tokens, height, width, groups)
        sizes = height, width, x.shape[2], groups, chunk_size, True, *native_grid
        y, _ = torch.ops.gspn2_diffusers.scan_lines(*lines, *sizes, store_hidden)
    return y if dtype == x.dtype else y.to(x.dtype)


def _runs_at_once(*tensors: Tensor) -> bool:
    """Whether nobody has to hear of the operators: no gradient, compiler, autocast or kind of
    tensor. Telling torch's dispatcher takes longer than a small scan."""
    return (
        not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not torch.is_autocast_enabled("cuda")
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    )


def gspn2_scan_lines(
    rows: Tensor,
    columns: Tensor,
    grid: Sequence[int],
    *,
    proxy_dim: int,
    groups: int = 1,
    skip: bool = True,
    chunk_size: int | None = None,
    native_grid: Sequence[int] | None = None,
    backend: str = "auto",
    store_hidden: bool = False,
) -> Tensor:
    """:func:`gspn2_scan` of inputs that lie in memory as the CUDA kernels read them.

    Args:
        rows: x and parameters of the rows of a map, ``[B, H, R, padded]``: what a
            :class:`~gspn2_diffusers.kernels.layout.LineLayout` says. W positions and zeros.
        columns: the same of its columns, ``[B, W, R, padded]``: H positions and zeros.
            Both may have any strides; the CUDA kernels copy them if positions are not neighbours
            or a row does not begin at a multiple of 16 bytes.
        grid: H and W.
        proxy_dim: P.
        groups: G, the number of weight groups.
        skip: whether there are rows of skip.
        chunk_size, native_grid, backend, store_hidden: as in :func:`gspn2_scan`.

    Returns:
        ``[B, N, P]`` in the dtype of rows.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`gspn2_scan`.
    """
    height, width = grid
    layout = LineLayout(proxy_dim, groups, skip)
    _check_lines(rows, columns, height, width, layout)
    chunk_size, native_grid = _check_options(chunk_size, native_grid)
    sizes = height, width, proxy_dim, groups, chunk_size, skip, *native_grid
    if resolve_backend(backend, rows, rows.dtype) == "torch":
        return scan_lines_reference(rows, columns, *sizes)
    if _runs_at_once(rows, columns):
        return scan_lines_now(rows, columns, *sizes)
    y, _ = torch.ops.gspn2_diffusers.scan_lines(rows, columns, *sizes, store_hidden)
    return y


def params_width(proxy_dim: int, groups: int) -> int:
    """K: how many parameters :func:`gspn2_scan_tokens` takes for each token."""
    return TokenLayout(proxy_dim, groups).width


def _common_dtype(tensors: list[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _check(x, logits, lam, u, skip) -> None:
    _check_floating("x", x)
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x: expected a non-empty [B, P, H, W] tensor, got {tuple(x.shape)}")
    batch, proxy_dim, height, width = x.shape

    groups = logits.shape[2] if logits.ndim == 6 else 1
    _check_shape("logits", logits, (batch, len(DIRECTIONS), groups, 3, height, width))
    _check_groups("logits", groups, proxy_dim)
    for name, gate in (("lam", lam), ("u", u), ("skip", skip)):
        if gate is not None:
            _check_shape(name, gate, (batch, len(DIRECTIONS), proxy_dim, height, width))


def _check_tokens(x, params, height, width, groups) -> None:
    _check_floating("x", x)
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x: expected a non-empty [B, N, P] tensor, got {tuple(x.shape)}")
    batch, tokens, proxy_dim = x.shape
    if height * width != tokens:
        raise ValueError(
            f"x: expected {height * width} tokens for a grid of {height} x {width}, got {tokens}"
        )
    _check_groups("groups", groups, proxy_dim)
    _check_shape("params", params, (batch, tokens, params_width(proxy_dim, groups)))


def _check_lines(rows, columns, height, width, layout) -> None:
    _check_floating("rows", rows)
    if columns.dtype != rows.dtype:
        raise TypeError(f"columns: expected the dtype of rows, {rows.dtype}, got {columns.dtype}")
    if rows.ndim != 4 or 0 in rows.shape:
        raise ValueError(f"rows: expected a non-empty [B, H, R, W] tensor, got {tuple(rows.shape)}")
    _check_groups("groups", layout.groups, layout.proxy_dim)
    batch, itemsize = rows.shape[0], rows.element_size()
    _check_shape("rows", rows, (batch, height, layout.rows, pad(width, itemsize)))
    _check_shape("columns", columns, (batch, width, layout.rows, pad(height, itemsize)))


def _check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def _check_groups(name: str, groups: int, proxy_dim: int) -> None:
    if groups < 1 or proxy_dim % groups:
        raise ValueError(
            f"{name}: expected a number of groups that divides the {proxy_dim} channels of x, "
            f"got {groups}"
        )


def _check_options(chunk_size, native_grid) -> tuple[int, tuple[int, int]]:
    """Both as the operators take them, with 0 for none."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected None or at least 1 line, got {chunk_size}")
    if native_grid is None:
        return chunk_size or 0, AS_IT_IS
    if len(native_grid) != 2 or min(native_grid) < 1:
        raise ValueError(
            f"native_grid: expected None or a height and a width of at least 1, got {native_grid}"
        )
    return chunk_size or 0, tuple(native_grid)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
