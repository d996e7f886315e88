"""What a run leaves behind: a description of the machine, results as JSON, tables."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import gspn2_diffusers
from gspn2_diffusers.doctor import CUPY_DISTRIBUTIONS
from gspn2_diffusers.hardware import device_name

RESULTS = Path(__file__).parent / "results"
LIBRARIES = {
    "torch": ("torch",),
    "cupy": CUPY_DISTRIBUTIONS,
    "diffusers": ("diffusers",),
    "transformers": ("transformers",),
    "accelerate": ("accelerate",),
}
COMMIT_VARIABLE = "GSPN2_COMMIT"
TABLE_WIDTH = 100


def describe_environment(device: torch.device) -> dict:
    """Device, versions, date and commit: what somebody needs to judge or repeat a figure."""
    on_cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "threads": None if on_cuda else torch.get_num_threads(),
        "cuda": torch.version.cuda if on_cuda else None,
        "driver": driver_version() if on_cuda else None,
        "python": platform.python_version(),
        "gspn2-diffusers": gspn2_diffusers.__version__,
        **{name: installed_version(*packages) for name, packages in LIBRARIES.items()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
    }


def installed_version(*packages: str) -> str | None:
    """Version of the first of `packages` that is installed."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            pass
    return None


def driver_version() -> str | None:
    """Version of the NVIDIA driver, as nvidia-smi tells it."""
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0] if answer else None


def git_commit() -> str | None:
    """The checkout's commit, ending in ``-dirty`` if tracked files differ. Without git: what the
    environment variable GSPN2_COMMIT says, or None."""
    described = _output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return described or os.environ.get(COMMIT_VARIABLE)


def write_results(
    args: argparse.Namespace, name: str, device: torch.device, rows: list[dict], **figures: object
) -> Path:
    """Write one run to ``--output``, or as `name` and the device's type into results/.

    `figures` are measurements of the whole run, such as the copy bandwidth.
    """
    path = args.output or RESULTS / f"{name}-{device.type}.json"
    arguments = vars(args) | {"device": str(device), "output": path.name}
    content = {"environment": describe_environment(device), "arguments": arguments}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | figures | {"rows": rows}, indent=2, default=str) + "\n")
    return path


def results_to_keep(path: Path, settings: Mapping[str, object]) -> dict:
    """What ``--resume`` goes on from: a results file less the rows that failed.

    Args:
        settings: arguments that must be those of the file.

    Raises:
        ValueError: the file is of other settings.
    """
    found = json.loads(path.read_text())
    for name, own in json.loads(json.dumps(settings, default=str, sort_keys=True)).items():
        if found["arguments"].get(name) != own:
            raise ValueError(
                f"--resume: expected the settings of {path.name}, got --{name} {own} instead of "
                f"{found['arguments'].get(name)}"
            )
    return found | {"rows": [row for row in found["rows"] if "error" not in row]}


def table(title: str, columns: Sequence[str], left: Sequence[str] = ()) -> Table:
    """An empty table of numbers; the columns named in `left` hold text."""
    grid = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in columns:
        grid.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return grid


def number(value: float | None, digits: int = 3) -> str:
    """A table cell: `digits` significant ones, plain where there are more, "-" for None."""
    if value is None:
        return "-"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, digits - whole)}f}"


def show(shown: Table) -> None:
    """Print a table, 100 columns wide at most where the output is no terminal."""
    Console(width=None if sys.stdout.isatty() else TABLE_WIDTH, highlight=False).print(shown)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
