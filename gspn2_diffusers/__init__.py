"""GSPN-2 blocks in place of self-attention in Hugging Face diffusers models."""

from .lazy import lazy_getattr

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


__getattr__ = lazy_getattr(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
