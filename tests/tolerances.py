"""Comparison with a float64 reference, by the tolerances of the package's own table."""

import torch
from torch import Tensor

from gspn2_diffusers.kernels.dense import RELATIVE_RMS, relative_error


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Hold `actual` to a float64 reference; `dtype` is the precision it was computed in."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all(), "not every element was written with a finite value"
    error, limit = relative_error(actual, expected), RELATIVE_RMS[dtype or actual.dtype]
    assert error <= limit, f"relative error {error:.2e}, allowed {limit:.0e}"
