"""The model card that goes with trained blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import accelerate
import diffusers
import torch

import gspn2_diffusers

from ..hardware import device_name

_HEADER = """\
---
library_name: diffusers
{base_model}tags:
- gspn2
- text-to-image
- distillation
---
"""
_USE = """\
```py
from diffusers import DiffusionPipeline
from gspn2_diffusers import apply_gspn2

pipe = DiffusionPipeline.from_pretrained("{teacher}")
apply_gspn2(pipe, "{weights}")
```
"""


def write_card(
    folder: Path,
    *,
    teacher: str,
    teacher_is_public: bool,
    data: Mapping[str, object],
    settings: Mapping[str, object],
    results: Mapping[str, float],
    device: torch.device,
    processes: int,
    seconds: float,
    repo_id: str | None = None,
) -> None:
    """Write ``README.md``: what was distilled from what, how, on what, and how well it went.

    Args:
        teacher: hub id, or the pipeline's name.
        teacher_is_public: whether `teacher` is a hub id; local paths are not printed.
        data: facts about the training data, by name.
        settings: arguments that differ from their defaults.
        results: numbers of the last validation.
        seconds: of training.
    """
    shown = teacher if teacher_is_public else Path(teacher).name
    header = _HEADER.format(base_model=f"base_model: {teacher}\n" if teacher_is_public else "")
    sections = [
        header,
        f"# GSPN-2 blocks for {shown}\n",
        "Line scans in place of self-attention ([arXiv 2512.07884](https://arxiv.org/abs/2512.07884)"
        f"), distilled from {shown} itself with gspn2_diffusers {gspn2_diffusers.__version__}.\n",
        _USE.format(teacher=shown, weights=repo_id or folder.name),
        _table("Data", data),
        _table("Settings that differ from the defaults", settings),
        _table("Last validation, on examples that were not trained on", results),
        _table("Made with", _hardware(device, processes, seconds)),
    ]
    (folder / "README.md").write_text("\n".join(sections))


def _hardware(device: torch.device, processes: int, seconds: float) -> dict[str, object]:
    return {
        "hardware": f"{processes} x {device_name(device)}",
        "minutes of training": f"{seconds / 60:.1f}",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__,
    }


def _table(title: str, rows: Mapping[str, object]) -> str:
    lines = [f"## {title}\n", "| | |", "|---|---|"]
    for name, value in rows.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"| {name.replace('_', ' ')} | {shown.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"
