"""Which implementation of the scan runs: the one place where that is decided."""

from functools import cache

import torch

from .plans import NUMBER_FORMATS

BACKENDS = ("auto", "cuda", "torch")
OLDEST_CAPABILITY = (7, 5)


def resolve_backend(backend: str, tensor: torch.Tensor, common_dtype: torch.dtype) -> str:
    """``"cuda"`` or ``"torch"`` for inputs like `tensor` of `common_dtype`.

    "auto" takes the CUDA kernels where they can run and torch elsewhere; the other two are taken
    at their word.

    Raises:
        ValueError: no such backend.
        RuntimeError: "cuda" was asked for and cannot run here; the message says why.
    """
    check_backend(backend)
    if backend == "torch":
        return backend
    obstacle = why_not_cuda(tensor.device, common_dtype)
    if obstacle is None:
        return "cuda"
    if backend == "cuda":
        raise RuntimeError(f"backend='cuda': {obstacle}")
    return "torch"


def check_backend(backend: str) -> None:
    """Raises ValueError if there is no backend of this name."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def why_not_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the CUDA kernels cannot serve tensors of `dtype` on `device`; None if they can."""
    if device.type != "cuda":
        return f"expected tensors on a CUDA device, got them on {device.type!r}"
    if dtype not in NUMBER_FORMATS:
        expected = ", ".join(str(known).removeprefix("torch.") for known in NUMBER_FORMATS)
        return f"expected one of {expected}, got {str(dtype).removeprefix('torch.')}"
    return _why_not_here(device.index or 0)


@torch.compiler.assume_constant_result
def _why_not_here(index: int) -> str | None:
    return _examine(index)


@cache
def _examine(index: int) -> str | None:
    """What keeps CuPy from running kernels on GPU `index` of this machine."""
    if torch.version.hip is not None:
        return "this build of torch is for ROCm; the kernels are CUDA"
    extra = f"cuda{torch.version.cuda.split('.')[0]}"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        needed, got = (f"{major}.{minor}" for major, minor in (OLDEST_CAPABILITY, capability))
        return f"expected compute capability {needed} or newer, got {got}"
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error}): pip install gspn2-diffusers[{extra}]"
    try:
        seen = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no usable GPU ({error}): is it built for this CUDA version ({extra})?"
    if index >= seen:
        return f"CuPy sees {seen} GPUs, torch GPU {index} is not among them"
    try:
        cupy.cuda.nvrtc.getVersion()
    except (ImportError, RuntimeError, OSError) as error:
        return f"CuPy finds no NVRTC ({error}): pip install gspn2-diffusers[{extra}]"
    return None
