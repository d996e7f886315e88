"""GSPN-2 blocks in place of self-attention in Hugging Face diffusers models."""

import importlib

__version__ = "0.1.0"

# Names are resolved on first use: `gspn2 --help` should not wait for torch.
_HOME = {
    "GSPN2Adapter": "adapter",
    "GSPN2AttnProcessor": "attention",
    "GSPN2Block": "block",
    "GSPN2Config": "config",
    "Site": "sites",
    "UntrainedBlocksWarning": "patch",
    "apply_gspn2": "patch",
    "checkpoint_with_grid": "grid",
    "fuse_gspn2": "fuse",
    "gspn2_scan": "kernels",
    "gspn2_scan_tokens": "kernels",
    "gspn2_sites": "sites",
    "remove_gspn2": "patch",
    "save_gspn2": "adapter",
    "softmax_attention": "patch",
    "unfuse_gspn2": "fuse",
}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
