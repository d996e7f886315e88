"""Devices: their names, which of them computes, and waiting for it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

# Memory that can grow in place leaves no gaps, and several threads pin CPU memory faster.
ALLOCATOR_SETTINGS = (
    "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
)


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's name as Linux tells it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def execution_device(pipe_or_model: DiffusionPipeline | nn.Module) -> torch.device:
    """Where a pipeline or model computes: not its `device`, which is the CPU while offloaded."""
    return getattr(pipe_or_model, "_execution_device", None) or pipe_or_model.device


def prefer_growing_memory() -> None:
    """Have torch's CUDA allocator work as large pictures want it to, unless ``PYTORCH_ALLOC_CONF``
    or ``PYTORCH_CUDA_ALLOC_CONF`` says how. For programs, before they use the GPU; not on Windows,
    where memory cannot grow in place."""
    if "PYTORCH_ALLOC_CONF" not in os.environ and platform.system() != "Windows":
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", ALLOCATOR_SETTINGS)


def synchronize() -> None:
    """Wait until the GPU's queue is empty, if there is a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
