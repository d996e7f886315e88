"""Folders ``checkpoint-N``: written whole or not at all, the oldest deleted, the newest found."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

_PARTIAL = "partial-"


def find_checkpoints(folder: Path) -> list[Path]:
    """The ``checkpoint-N`` folders, the oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def choose_checkpoint(folder: Path, name: str) -> Path | None:
    """The checkpoint to resume: the newest for 'latest' (None without any), else that folder.

    Raises:
        ValueError: the named folder does not exist; also looked for below `folder`.
    """
    if name == "latest":
        return next(reversed(find_checkpoints(folder)), None)
    for candidate in (Path(name), folder / name):
        if candidate.is_dir():
            return candidate
    raise ValueError(f"expected 'latest' or the folder of a checkpoint, got {name!r}")


def write_checkpoint(
    folder: Path,
    step: int,
    save: Callable[[Path], None],
    *,
    wait: Callable[[], None],
    is_main: bool,
    limit: int | None,
) -> None:
    """Write ``checkpoint-<step>`` below `folder`, by all processes together.

    Args:
        save: writes the calling process's part into a folder; called by every process.
        wait: returns when every process has called it.
        limit: of checkpoints to keep, the new one included; None keeps all.
    """
    final = folder / f"checkpoint-{step}"
    partial = folder / f"{_PARTIAL}{final.name}"
    save(partial)
    wait()
    if is_main:
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        if limit is not None:
            for old in find_checkpoints(folder)[:-limit]:
                shutil.rmtree(old)
    wait()


def clear_partial(folder: Path) -> None:
    """Delete what a killed run left half written."""
    for partial in folder.glob(f"{_PARTIAL}checkpoint-*"):
        shutil.rmtree(partial)
