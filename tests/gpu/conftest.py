"""What the GPU tests share: a device, and memory in which everything unwritten is NaN."""

import pytest
import torch
from torch import Tensor

from gspn2_diffusers.kernels import launch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs and workspaces of the kernels hold NaN before they are written.

    Yields the list of their shapes, to see that the kernels allocated at all.
    """
    allocate, shapes = launch.allocate, []

    def allocate_poisoned(*args, **kwargs):
        allocated = allocate(*args, **kwargs)
        for tensor in [allocated] if isinstance(allocated, Tensor) else allocated:
            poison(tensor)
            shapes.append(tuple(tensor.shape))
        return allocated

    monkeypatch.setattr(launch, "allocate", allocate_poisoned)
    return shapes


def poison(tensor: Tensor) -> None:
    """Overwrite with NaN, or with bytes of ones where the dtype has none."""
    if tensor.is_floating_point():
        tensor.fill_(torch.nan)
    else:
        tensor.view(torch.uint8).fill_(0xFF)
