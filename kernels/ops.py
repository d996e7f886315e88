"""The public scan operator: checks its arguments, then runs the implementation for the device."""

from torch import Tensor

from .reference import DIRECTIONS, scan_reference


def gspn2_scan(
    x: Tensor,
    logits: Tensor,
    lam: Tensor,
    u: Tensor,
    skip: Tensor | None = None,
    *,
    chunk_size: int | None = None,
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

    Returns:
        ``[B, P, H, W]`` in the dtype of x: the sum over directions of ``u * h + skip * x``, each
        direction back in image order. h is accumulated in float32 (float64 for float64 input).

    Raises:
        ValueError: a shape, the number of groups or chunk_size does not fit.
        TypeError: x is not a floating-point tensor.
    """
    _check(x, logits, lam, u, skip, chunk_size)
    return scan_reference(x, logits, lam, u, skip, chunk_size)


def _check(x, logits, lam, u, skip, chunk_size) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x: expected a non-empty [B, P, H, W] tensor, got {tuple(x.shape)}")
    batch, proxy_dim, height, width = x.shape

    groups = logits.shape[2] if logits.ndim == 6 else 1
    _check_shape("logits", logits, (batch, len(DIRECTIONS), groups, 3, height, width))
    if groups == 0 or proxy_dim % groups:
        raise ValueError(
            f"logits: expected a number of groups that divides the {proxy_dim} channels of x, "
            f"got {groups}"
        )
    for name, gate in (("lam", lam), ("u", u), ("skip", skip)):
        if gate is not None:
            _check_shape(name, gate, (batch, len(DIRECTIONS), proxy_dim, height, width))
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected None or at least 1 line, got {chunk_size}")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
