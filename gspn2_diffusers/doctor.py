"""What this installation has, what it will use, and why."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

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
    cupy = importlib.util.find_spec("cupy") is not None
    return [
        Finding(
            "line scan",
            "PyTorch reference on every device: this version has no CUDA kernel",
        ),
        Finding(
            "CuPy",
            "installed, not used by this version" if cupy else "not installed, not needed",
        ),
    ]


def _weights() -> list[Finding]:
    findings = []
    for name in SHIPPED_FOLDERS:
        there = is_shipped(name)
        found = "there" if there else "missing: gspn2 demo needs it"
        findings.append(Finding(f"Tiny Scenes {name}", found, good=there))
    return findings
