"""Time and memory of work on a device, and the fastest this device copies."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

SLOW_MS = 1000.0
SLOW_REPEATS = 3
GRAPH_BELOW_MS = 1.0


@dataclass(frozen=True)
class Timer:
    """Takes times on `device`: the median of `repeats` after `warmup` runs that do not count."""

    device: torch.device
    repeats: int
    warmup: int

    def median_ms(self, run: Callable[[], object]) -> float:
        """Duration of `run` in milliseconds: device events on CUDA, a clock elsewhere.

        A run of more than a second is warmed up once and timed `SLOW_REPEATS` times at most.
        """
        time_once = _time_by_events if self.device.type == "cuda" else _time_by_clock
        for _ in range(self.warmup):
            if time_once(run) > SLOW_MS:
                break
        times = [time_once(run)]
        repeats = self.repeats if times[0] <= SLOW_MS else min(self.repeats, SLOW_REPEATS)
        times += [time_once(run) for _ in range(repeats - 1)]
        return statistics.median(times)

    def in_turn_ms(self, runs: Sequence[Callable[[], object]], graph: bool = False) -> float:
        """Duration of one of `runs`, called one after the other without a pause.

        Runs on different inputs keep each other's data out of the cache. With `graph` they are
        replayed from one CUDA graph, so that launching them from Python takes no time; the first
        of them must have run before.
        """

        def all_runs() -> None:
            for run in runs:
                run()

        return self.median_ms(_captured(all_runs) if graph else all_runs) / len(runs)

    def on_device_ms(self, runs: Sequence[Callable[[], object]]) -> tuple[float, str]:
        """:meth:`in_turn_ms` and how it was taken: short runs by "graph" on CUDA."""
        ms = self.in_turn_ms(runs)
        if self.device.type != "cuda":
            return ms, "clock"
        if ms >= GRAPH_BELOW_MS:
            return ms, "events"
        return self.in_turn_ms(runs, graph=True), "graph"

    def copy_bandwidth(self) -> float:
        """Bytes per second, read plus written, of a large copy within the device's memory."""
        size = 2**31 if self.device.type == "cuda" else 2**26
        source = torch.randint(256, (size,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / (self.median_ms(lambda: target.copy_(source)) / 1000)


def input_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many sets of inputs, used in turn, exceed three times the device's L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return math.ceil(3 * cache / bytes_per_set)


def capturing_stream(device: torch.device) -> AbstractContextManager:
    """A context with a stream of its own, because CUDA's default stream cannot be captured."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


@dataclass
class PeakMemory:
    """Device memory at the peak, in MiB: `total`, and `extra` to what was held before. None where
    torch keeps no count."""

    total: float | None = None
    extra: float | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Watch what is held inside the `with` block; the figures are there after it."""
    peak = PeakMemory()
    if device.type != "cuda":
        yield peak
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield peak
    torch.cuda.synchronize(device)
    most = torch.cuda.max_memory_allocated(device)
    peak.total, peak.extra = most / 2**20, (most - before) / 2**20


def _captured(run: Callable[[], object]) -> Callable[[], None]:
    """A function that replays `run` from a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    return graph.replay


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
