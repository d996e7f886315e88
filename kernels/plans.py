"""Which variant of a kernel runs a scan, and how it divides the work among blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import product
from math import inf

import torch

from .layout import TAPS, VECTOR_BYTES, LineLayout, pad

NUMBER_FORMATS = {
    torch.float32: "float",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
FORWARD, BACKWARD = "scan_forward", "scan_backward"
WARP = 32
STRIP = 30  # threads of a warp that have positions of their own, where a line is cut into strips
CHANNELS = (4, 2, 1)  # of a thread
READY_TAPS = 2  # of a position that are made ready: the third is what they leave of one
READY_SHARE = 16  # channels of a group from which on that is worth a launch
LONGEST_WHOLE = 64  # positions of a line up to which it is not cut into strips
WHOLE_STAGES = 4  # depth of the ring of lines that are copied ahead
STRIP_STAGES = {FORWARD: (4, 2), BACKWARD: (2,)}  # the same, of lines in strips, 4 positions
LIGHT_WARPS, LIGHT_THREADS = 10, 128  # of a multiprocessor, a block: a scan of short lines so small
BUSY_WARPS = {  # of a multiprocessor, by positions of a thread: what more would bring is lost
    FORWARD: {2: 15, 4: 18, 8: 18},
    BACKWARD: {2: 10, 4: inf, 8: inf},
}
LARGEST_PARTY = 16
TILE_BYTES = 4 * max(party * side * (side + 1) for party, side in ((1, 64), (4, 32), (16, 16)))
SECTOR_BYTES = 32  # of device memory
MOST_THREADS = {  # by positions and channels of a thread: as many as spill no register
    FORWARD: {
        (2, 1): 896, (2, 2): 640, (2, 4): 512, (4, 1): 640, (4, 2): 512, (4, 4): 384, (8, 1): 512,
    },
    BACKWARD: {
        (2, 1): 512, (2, 2): 512, (2, 4): 384, (4, 1): 512, (4, 2): 384, (4, 4): 384, (8, 1): 256,
    },
}  # fmt: skip
ANY_LENGTH_THREADS, ANY_LENGTH_CHANNELS = 512, 8


@dataclass(frozen=True)
class Variant:
    """One instance of a kernel template; everything else is an argument at run time."""

    kernel: str
    number_format: str
    vector: int = 1  # positions of a thread
    channels: int = 1  # of a thread; they share their weights
    strips: bool = False  # several warps to a line
    stages: int = 0  # depth of the ring; 0: the kernel for lines of any length, which has none
    threads: int = ANY_LENGTH_THREADS  # most threads of a block
    ready: bool = False  # weights are made ready before the scan, once for all channels of a group

    @cached_property
    def name(self) -> str:
        """The C++ name expression, such as ``scan_backward<bfloat16, 4, 2, true, 2, 384>``."""
        if not self.stages:
            return f"{self.kernel}_any_length<{self.number_format}>"
        options = [self.vector, self.channels, self.strips, self.stages, self.threads]
        options += [self.ready] if self.kernel == FORWARD else []
        return f"{self.kernel}<{', '.join([self.number_format, *map(_cpp, options)])}>"


def _cpp(value: int | bool) -> str:
    return str(value).lower()


@dataclass(frozen=True)
class Device:
    """What the choice of a variant depends on."""

    capability: tuple[int, int]
    processors: int
    shared_bytes: int  # most shared memory of a block

    @classmethod
    @cache
    def of(cls, index: int) -> "Device":
        found = torch.cuda.get_device_properties(index)
        return cls(
            (found.major, found.minor),
            found.multi_processor_count,
            found.shared_memory_per_block_optin,
        )


@dataclass(frozen=True)
class Problem:
    """The sizes of a scan, as far as they decide how it is run."""

    kernel: str
    dtype: torch.dtype
    batch: int
    height: int
    width: int
    channels: int
    groups: int
    skip: bool

    @property
    def share(self) -> int:
        """Channels of a weight group."""
        return self.channels // self.groups

    @property
    def longest(self) -> int:
        """Positions of the longer lines, with their padding."""
        return pad(max(self.height, self.width), self.dtype.itemsize)

    @property
    def line_bytes(self) -> int:
        """Bytes of the longest line of the inputs, with all its rows."""
        rows = LineLayout(self.channels, self.groups, self.skip).rows
        return rows * self.longest * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """How a scan is run: a variant and the sizes that go with it."""

    variant: Variant
    party: int  # channels whose four directions are added up by the same threads
    lanes: int  # threads to a line, where a warp takes whole lines
    blocks: int
    threads: int
    shared_bytes: int
    counters: int  # of blocks that arrive and wait for the others of their party


@lru_cache(maxsize=1024)
def make_plan(problem: Problem, device: Device) -> Plan:
    """The plan that should be fastest: the least :func:`_cost`."""
    plans = list(ring_plans(problem, device))
    if plans:
        return min(plans, key=lambda plan: _cost(plan, problem, device))
    return _plan_any_length(problem)


def ring_plans(problem: Problem, device: Device) -> Iterator[Plan]:
    """Every division of the work that fits the device."""
    if problem.line_bytes >= 2**31:  # the kernels count the bytes of a line in 32 bits
        return
    whole = problem.longest <= LONGEST_WHOLE
    divide = _whole_line_plans if whole else _strip_plans
    for vector, channels in shapes_of_a_thread(problem.dtype.itemsize, strips=not whole):
        if problem.share % channels == 0:
            yield from divide(problem, device, vector, channels)


def shapes_of_a_thread(itemsize: int, *, strips: bool) -> list[tuple[int, int]]:
    """Positions and channels that a thread may own; its vectors have 4 to 16 bytes."""
    shapes = list(product((2, 4), CHANNELS))
    longer = 8 * itemsize <= VECTOR_BYTES  # twice the reach, for lines that are too long otherwise
    return [*shapes, (8, 1)] if strips and longer else shapes


def strip_ways(kernel: str, vector: int) -> list[tuple[int, bool]]:
    """Depths of the ring of lines in strips, and whether weights are made ready: more than one only
    where it pays."""
    stages = STRIP_STAGES[kernel] if vector > 2 else STRIP_STAGES[kernel][:1]
    return list(product(stages, (False, True) if kernel == FORWARD and vector < 8 else (False,)))


def most_threads(kernel: str, vector: int, channels: int, capability: tuple[int, int]) -> int:
    """Threads of a block at which the kernel's registers suffice."""
    threads = MOST_THREADS[kernel][vector, channels]
    # For 12.x the assembler needs some more registers.
    return threads - 128 if capability >= (12, 0) and threads > 384 else threads


def _whole_line_plans(problem, device, vector, channels) -> Iterator[Plan]:
    """A block takes the four directions of a party, a line of each in a part of a warp."""
    threads_needed = -(-problem.longest // vector)
    lanes = 1 << (threads_needed - 1).bit_length()
    bound = most_threads(problem.kernel, vector, channels, device.capability)
    for chunks in (1, 2, 4, 8, 16):
        party = chunks * channels
        threads = WARP * -(-4 * chunks * lanes // WARP)
        variant = _variant(problem, vector, channels, False, WHOLE_STAGES, bound)
        size = shared_bytes(problem, variant, threads)
        crowded = chunks > 1 and party >= 2 * problem.channels
        if threads > bound or crowded or party > LARGEST_PARTY or size > device.shared_bytes:
            continue
        blocks = problem.batch * -(-problem.channels // party)
        yield Plan(variant, party, lanes, blocks, threads, size, counters=0)


def _strip_plans(problem, device, vector, channels) -> Iterator[Plan]:
    """A block takes one direction, its line in strips of a warp each."""
    threads = WARP * -(-problem.longest // (STRIP * vector))
    bound = most_threads(problem.kernel, vector, channels, device.capability)
    party = channels
    # Tokens are written in whole sectors, by blocks that the device holds at the same time.
    while (
        party * problem.dtype.itemsize < SECTOR_BYTES
        and party < problem.channels
        and 8 * party // channels <= device.processors
    ):
        party *= 2
    for stages, ready in strip_ways(problem.kernel, vector):
        variant = _variant(problem, vector, channels, True, stages, bound, ready)
        size = shared_bytes(problem, variant, threads)
        if threads > bound or size > device.shared_bytes:
            continue
        parties = problem.batch * -(-problem.channels // party)
        blocks = parties * 4 * party // channels
        yield Plan(variant, party, WARP, blocks, threads, size, counters=parties)


def _variant(problem, vector, channels, strips, stages, bound, ready=False) -> Variant:
    number_format = NUMBER_FORMATS[problem.dtype]
    return Variant(problem.kernel, number_format, vector, channels, strips, stages, bound, ready)


def _cost(plan: Plan, problem: Problem, device: Device) -> tuple:
    """What decides between plans, most important first; the smaller the better.

    The order and the numbers are those that timing every plan on an H100 suggested. Where lines are
    short, or there is a gradient, threads with many channels do the least work, if there are still
    four warps to a multiprocessor; in strips, few positions are then best. A small scan of short
    lines needs all the warps it can have. Long lines go forward best with as many warps as a
    multiprocessor has use for, in one wave of blocks. Where even the fewest are more than that, two
    channels to a thread are best, unless the blocks of the last wave leave most of the device idle.
    """
    variant, processors = plan.variant, device.processors
    warps = plan.blocks * plan.threads // WARP
    missing = max(0, 4 * processors - warps)
    if not variant.strips:
        work = variant.vector * variant.channels
        # All the warps there can be, with the least work to each.
        few = problem.kernel == FORWARD and warps * work <= 2 * LIGHT_WARPS * processors
        if few:
            return work, abs(plan.threads - LIGHT_THREADS)
        return missing, warps, 2 * plan.blocks < processors, -plan.party
    last_resort = variant.vector == 8, variant.ready != (problem.share >= READY_SHARE)
    crowded = warps > BUSY_WARPS[problem.kernel][variant.vector] * processors
    if problem.kernel == BACKWARD:
        return *last_resort, missing, -variant.channels, crowded, variant.vector
    resident = min(device.shared_bytes // plan.shared_bytes, variant.threads // plan.threads)
    at_once = processors * max(1, resident)
    waves = -(-plan.blocks // at_once)
    wasteful = waves > 1 and plan.blocks < 0.75 * waves * at_once
    if not (crowded or wasteful):
        used = min(plan.blocks, processors)
        return *last_resort, 0, -warps, -variant.stages, -used, -variant.channels
    order = variant.vector != 4, -variant.stages, wasteful, (2, 4, 1).index(variant.channels)
    return *last_resort, 1, *order


def shared_bytes(problem: Problem, variant: Variant, threads: int) -> int:
    """Size of the ring, the boards and the tile of the merge, as the kernels divide it."""
    backward, channels = problem.kernel == BACKWARD, variant.channels
    numbers = (3 + problem.skip + backward) * channels + (0 if variant.ready else TAPS)
    floats = channels if backward else READY_TAPS if variant.ready else 0
    slot = variant.vector * (numbers * problem.dtype.itemsize + floats * 4)
    boards = 2 * threads // WARP * 2 * channels * variant.vector * 4 if variant.strips else 0
    tile = 0 if backward else TILE_BYTES
    return max(variant.stages * threads * slot + boards, tile)


def _plan_any_length(problem: Problem) -> Plan:
    party = min(ANY_LENGTH_CHANNELS, problem.channels)
    parties = problem.batch * -(-problem.channels // party)
    variant = Variant(problem.kernel, NUMBER_FORMATS[problem.dtype])
    return Plan(variant, party, WARP, 4 * parties, ANY_LENGTH_THREADS, TILE_BYTES, counters=parties)


def variants(capability: tuple[int, int]) -> list[Variant]:
    """Every variant that a plan can name on devices of this compute capability."""
    found = []
    for kernel, (dtype, name) in product((FORWARD, BACKWARD), NUMBER_FORMATS.items()):
        found.append(Variant(kernel, name))
        for strips in (False, True):
            for shape in shapes_of_a_thread(dtype.itemsize, strips=strips):
                threads = most_threads(kernel, *shape, capability)
                ways = strip_ways(kernel, shape[0]) if strips else [(WHOLE_STAGES, False)]
                for stages, ready in ways:
                    found.append(Variant(kernel, name, *shape, strips, stages, threads, ready))
    return found
