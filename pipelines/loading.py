"""Load a diffusers pipeline from a folder or from the hub, with GSPN-2 weights if wanted."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.constants import HF_HUB_OFFLINE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_pipeline(
    model: str | Path,
    *,
    weights: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    fuse: bool = False,
    **from_pretrained: object,
) -> DiffusionPipeline:
    """Load a pipeline, put it on a device and apply GSPN-2 weights to it if any are named.

    Args:
        model: folder written by ``save_pretrained``, or a hub id such as ``"owner/name"``.
        weights: GSPN-2 sidecar, folder or hub id; None leaves the pipeline as it is.
        dtype: of all models in the pipeline; None picks by device, see `default_dtype`.
        device: None picks the first of cuda, mps and cpu that is there.
        backend: of the GSPN-2 scan if weights are named, see `apply_gspn2`.
        fuse: fuse the blocks for inference, see `fuse_gspn2`, if the CUDA kernels will run them.
        from_pretrained: further keywords of ``DiffusionPipeline.from_pretrained``, such as
            ``revision`` and ``variant``.

    Raises:
        ValueError: a folder that does not exist or holds no pipeline, an unknown dtype, device
            or backend, weights that do not fit.
        OSError: the hub has no such model, or cannot be reached.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    source = resolve_model(model)
    try:
        pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype, **from_pretrained)
    except OSError as error:
        raise OSError(load_failure(source, error)) from error
    if weights is not None:
        # Here, because applying imports every model family while loading alone does not.
        from gspn2_diffusers import apply_gspn2, fuse_gspn2
        from gspn2_diffusers.kernels import backends

        apply_gspn2(pipe, str(weights), backend=backend)
        if fuse and backend != "torch" and backends.why_not_cuda(device, dtype) is None:
            fuse_gspn2(pipe)
    return pipe.to(device)


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The named device, or the first of cuda, mps and cpu that is there.

    Raises:
        ValueError: an unknown device, or one that this machine or build of torch does not have.
    """
    present = available_devices()
    if device is None:
        return torch.device(present[0])
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"expected one of {', '.join(present)}; got device {device!r}") from error
    missing_index = resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count()
    if resolved.type not in present or missing_index:
        raise ValueError(
            f"device {str(device)!r} is not there; this build of torch sees: {', '.join(present)}"
        )
    return resolved


def available_devices() -> list[str]:
    """Device types that can run a pipeline here, the preferred one first; ends with cpu."""
    accelerators = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    return [name for name, there in accelerators.items() if there] + ["cpu"]


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The named dtype, or `default_dtype` of the device.

    Raises:
        ValueError: not one of float32, float16 and bfloat16.
    """
    if dtype is None:
        return default_dtype(device)
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in DTYPES.values():
        raise ValueError(f"expected one of {', '.join(DTYPES)}; got dtype {str(dtype)!r}")
    return resolved


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a CUDA device that computes in it, float16 on an older one, else float32.

    bfloat16 comes first because some VAEs overflow in float16 and then return black images.
    """
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def resolve_model(model: str | Path) -> str:
    """The pipeline's folder if there is one, else the hub id as it was given.

    Raises:
        ValueError: a local path that holds no pipeline; names what was expected and what is there.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(f"expected a pipeline folder with model_index.json; {path} has none")
        return str(path)
    if path.exists():
        raise ValueError(f"expected a pipeline folder; {path} is a file")
    if _is_path(model):
        raise ValueError(f"expected a pipeline folder; {path} does not exist")
    return str(model)


def _is_path(model: str | Path) -> bool:
    """Whether a name can only mean a local path: hub ids are ``name`` or ``owner/name``."""
    text = str(model)
    return isinstance(model, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1


def load_failure(source: str, error: OSError) -> str:
    """One sentence on why a model did not load from its folder or from the hub."""
    if Path(source).is_dir():
        return f"cannot load the pipeline in {source}: {error}"
    reason = "HF_HUB_OFFLINE is set and it is not in the cache" if HF_HUB_OFFLINE else error
    return f"{source!r} is no local folder and did not come from the hub: {reason}"
