"""The one table of tolerances: root-mean-square error over root-mean-square value, by dtype."""

import torch
from torch import Tensor

RELATIVE_RMS = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Hold `actual` to a float64 reference; `dtype` is the precision it was computed in."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all(), "not every element was written with a finite value"
    error = (actual.double() - expected.double()).square().mean().sqrt()
    scale = expected.double().square().mean().sqrt().clamp_min(1e-30)
    limit = RELATIVE_RMS[dtype or actual.dtype]
    assert error <= limit * scale, f"relative error {error / scale:.2e}, allowed {limit:.0e}"
