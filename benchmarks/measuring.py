"""What all benchmarks share: timing, a description of the machine, results as JSON."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("gspn2-diffusers", "torch", "diffusers", "transformers", "accelerate")


def median_ms(run: Callable[[], object], device: torch.device, repeats: int, warmup: int) -> float:
    """Median duration of `run` in milliseconds: device events on CUDA, a clock elsewhere."""
    for _ in range(warmup):
        run()
    time_once = _time_by_events if device.type == "cuda" else _time_by_clock
    return statistics.median(time_once(run) for _ in range(repeats))


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """Most device memory held during `run` in MiB, weights included; None where torch keeps no
    count."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def describe_environment(device: torch.device) -> dict:
    """Device, versions, date and commit: what somebody needs to judge or repeat a figure."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else cpu_name(),
        "threads": None if on_cuda else torch.get_num_threads(),
        "cuda": torch.version.cuda if on_cuda else None,
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
    }


def cpu_name() -> str:
    """The processor's name as Linux tells it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The checkout's commit, ending in ``-dirty`` if tracked files differ; None without git."""
    command = ("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_results(path: Path, environment: dict, arguments: dict, rows: list[dict]) -> None:
    """Write one run as JSON; `arguments` may hold anything that has a readable `str`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "arguments": arguments, "rows": rows}
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")


def _time_by_events(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _time_by_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)
