"""Where the weights that come with the package are."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

# Folder -> the file without which it is not complete.
SHIPPED_FOLDERS = {
    "pipeline": "model_index.json",
    "gspn2": "config.json",
    "pixart": "model_index.json",
    "pixart_gspn2": "config.json",
    "probe": "config.json",
}


def shipped_folder(name: str) -> Path:
    """Folder of a Tiny Scenes pipeline (``pipeline``: a UNet, or ``pixart``), of its GSPN-2 weights
    (``gspn2``, ``pixart_gspn2``) or of the ``probe``.

    Raises:
        FileNotFoundError: this installation lacks it.
    """
    folder = _folder(name)
    if not is_shipped(name):
        raise FileNotFoundError(
            f"the Tiny Scenes weights are incomplete: expected {folder / SHIPPED_FOLDERS[name]}"
        )
    return folder


def is_shipped(name: str) -> bool:
    """Whether a folder of `SHIPPED_FOLDERS` came with this installation."""
    return (_folder(name) / SHIPPED_FOLDERS[name]).is_file()


def _folder(name: str) -> Path:
    return Path(str(files("gspn2_diffusers.tiny_scenes"))) / "weights" / name
