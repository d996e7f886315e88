"""What this installation has, what it will use, and why."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gspn2_diffusers.kernels.backends import why_not_cuda
from gspn2_diffusers.pipelines.loading import available_devices, default_dtype
from gspn2_diffusers.shipped import SHIPPED_FOLDERS, is_shipped

LIBRARIES = (
    "gspn2-diffusers",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
)
CUPY_DISTRIBUTIONS = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, and whether that is as it should
    be (True), a problem (False) or only information (None)."""

    topic: str
    found: str
    good: bool | None = None


def examine() -> list[Finding]:
    """Look at versions, devices, the scan operator's backend and the shipped weights."""
    return [*_versions(), *_devices(), *_operator(), *_weights()]


def _versions() -> list[Finding]:
    return [
        Finding("python", platform.python_version()),
        *(_installed(library) for library in LIBRARIES),
    ]


def _installed(library: str) -> Finding:
    try:
        return Finding(library, version(library))
    except PackageNotFoundError:
        return Finding(library, "not installed", good=False)


def _devices() -> list[Finding]:
    device = torch.device(available_devices()[0])
    dtype = str(default_dtype(device)).removeprefix("torch.")
    return [
        Finding("CUDA", _cuda()),
        Finding("CPU", f"{torch.get_num_threads()} threads"),
        Finding("device in use", f"{device.type} in {dtype}, without --device and --dtype"),
    ]


def _cuda() -> str:
    if torch.version.cuda is None:
        return "none: this build of torch has no CUDA"
    if not torch.cuda.is_available():
        return f"none: torch is built for CUDA {torch.version.cuda} but finds no usable GPU"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}, {', '.join(names)}"


def _operator() -> list[Finding]:
    device = torch.device(available_devices()[0])
    on_cuda = device.type == "cuda"
    obstacle = why_not_cuda(device, default_dtype(device))
    if obstacle is None:
        kernels = Finding("CUDA kernels", f"compute capability {_capability(device)}", good=True)
        chosen = "backend 'auto' is 'cuda'"
    else:
        kernels = Finding("CUDA kernels", f"cannot run: {obstacle}")
        chosen = f"backend 'auto' is 'torch' on {device.type}"
    return [
        Finding("CuPy", _cupy(needed=on_cuda)),
        *(_compiler() if on_cuda else []),
        kernels,
        Finding("line scan", chosen),
    ]


def _cupy(needed: bool) -> str:
    for distribution in CUPY_DISTRIBUTIONS:
        try:
            return f"{version(distribution)} ({distribution})"
        except PackageNotFoundError:
            continue
    return "not installed" if needed else "not installed, not needed without a CUDA GPU"


def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def _compiler() -> list[Finding]:
    """CuPy loads NVRTC when it first compiles, so that its absence would show only then."""
    try:
        import cupy
    except ImportError:
        return []
    try:
        major, minor = cupy.cuda.nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        return [Finding("CUDA compiler", f"CuPy cannot load NVRTC: {error}", good=False)]
    found = f"NVRTC {major}.{minor}; first use compiles, then {_kernel_cache()} keeps the binaries"
    return [Finding("CUDA compiler", found, good=True)]


def _kernel_cache() -> str:
    """Where CuPy keeps what it compiled, by its documented environment variables."""
    if os.environ.get("CUPY_CACHE_IN_MEMORY", "0") == "1":
        return "memory (CUPY_CACHE_IN_MEMORY)"
    return os.environ.get("CUPY_CACHE_DIR") or str(Path("~/.cupy/kernel_cache").expanduser())


def _weights() -> list[Finding]:
    findings = []
    for name in SHIPPED_FOLDERS:
        there = is_shipped(name)
        found = "there" if there else "missing: gspn2 demo needs it"
        findings.append(Finding(f"Tiny Scenes {name}", found, good=there))
    return findings
