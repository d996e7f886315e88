"""Latents of finished stages on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class StageStore:
    """A folder with one file for each finished stage, and ``run.json`` that tells what they are.

    A file is only used again by a run in which everything up to its stage is the same: a later
    stage may change.

    Args:
        folder: made if it is not there.
        request: what all stages depend on, plain values.
        stages: the settings of each stage, plain values.

    Raises:
        OSError: the folder cannot be made or written to.
    """

    def __init__(
        self, folder: str | os.PathLike, request: Mapping[str, object], stages: Sequence[Mapping]
    ):
        self.folder = Path(folder)
        self.keys = [_key(request, stages[: count + 1]) for count in range(len(stages))]
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**request, "stages": list(stages)}, indent=2, default=str)
        _replace(self.folder / "run.json", lambda path: path.write_text(text + "\n"))

    def latest(self) -> int | None:
        """The last stage whose latents are here and belong to this run."""
        for index in reversed(range(len(self.keys))):
            if self._belongs(index):
                return index
        return None

    def load(self, index: int) -> Tensor:
        """Latents ``[n, c, h, w]`` of a stage, on the CPU."""
        with safe_open(self._path(index), framework="pt") as file:
            return file.get_tensor("latents")

    def save(self, index: int, latents: Tensor) -> None:
        """Keep a stage's latents; a file of this name is replaced when the new one is complete.

        Raises:
            OSError: they could not be written.
        """
        tensors = {"latents": latents.detach().cpu().contiguous()}
        metadata = {"key": self.keys[index]}
        _replace(self._path(index), lambda path: save_file(tensors, path, metadata))

    def _belongs(self, index: int) -> bool:
        path = self._path(index)
        if not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("key") == self.keys[index]

    def _path(self, index: int) -> Path:
        return self.folder / f"stage-{index}.safetensors"


def _key(request: Mapping, stages: Sequence[Mapping]) -> str:
    text = json.dumps([request, list(stages)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a file beside `path`, which then takes its place."""
    unfinished = path.with_name(f".{path.name}.part")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
