"""Which variant of a kernel runs a scan, and how it divides the work among blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import product

import torch

from .layout import TAPS, VECTOR_BYTES, LineLayout, pad

NUMBER_FORMATS = {
    torch.float32: "float",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
FORWARD, BACKWARD = "scan_forward", "scan_backward"
HIDDEN, RESULT, RESULT_WITH_SKIP = "HIDDEN", "RESULT", "RESULT_WITH_SKIP"  # what goes forward
WARP = 32
HALO = 2  # threads at each end of a strip that belong to the strips beside
STRIP = WARP - 2 * HALO  # threads of a strip that have positions of their own
CHANNELS = (4, 2, 1)  # of a thread
READY_TAPS = 2  # of a position that are made ready: the third is what they leave of one
READY_SHARE = 16  # channels of a group from which on that is worth a launch
LONGEST_WHOLE = 64  # positions of a line up to which it is not cut into strips
STRIP_STAGES = {  # depth of a forward scan's ring, by positions and channels of a thread
    (2, 1): 6, (2, 2): 6, (2, 4): 6, (4, 1): 4, (4, 2): 6, (4, 4): 4, (8, 1): 2,
}  # fmt: skip
LEAST_STAGES = 2  # for lines that are too long otherwise
READY_SHAPES = ((2, 1), (2, 2), (4, 1), (8, 1))  # of threads, in strips, to make weights ready for
LIGHT_WARPS, LIGHT_THREADS = 10, 128  # of a multiprocessor, a block: a scan of short lines so small
# Warps of a multiprocessor beyond which more are of no use, where lines are in strips: forward with
# weights made ready and without, backward with 2 positions to a thread.
READY_WARPS, BUSY_WARPS, BACKWARD_WARPS = 20, 15, 10
FILLED = 0.6  # least share of the positions of all strips that a line should have
HEAVY_WARPS, LONGEST_BUSY = 30, 512  # if threads had 4 positions; positions of a line
LARGEST_PARTY = 16
TILE_BYTES = 4 * max(party * side * (side + 1) for party, side in ((1, 64), (4, 32), (16, 16)))
SECTOR_BYTES = 32  # of device memory
# Threads of a block, by positions and channels of a thread: as many as spill no register.
MOST_THREADS = {
    FORWARD: {
        (2, 1): 640, (2, 2): 512, (2, 4): 384, (4, 1): 512, (4, 2): 384, (4, 4): 384, (8, 1): 512,
    },
    BACKWARD: {
        (2, 1): 512, (2, 2): 512, (2, 4): 384, (4, 1): 384, (4, 2): 384, (4, 4): 384, (8, 1): 256,
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
    output: str = ""  # of a forward scan

    @cached_property
    def name(self) -> str:
        """The C++ name expression, such as ``scan_backward<bfloat16, 4, 2, true, 2, 384>``."""
        if not self.stages:
            return f"{self.kernel}_any_length<{self.number_format}>"
        sizes = f"{self.number_format}, {self.vector}, {self.channels}, {_cpp(self.strips)}"
        sizes += f", {self.stages}, {self.threads}"
        forward = f", {_cpp(self.ready)}, {self.output}" if self.kernel == FORWARD else ""
        return f"{self.kernel}<{sizes}{forward}>"


def _cpp(value: bool) -> str:
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
    result: bool = True  # of a forward scan: y is wanted, not h alone

    @property
    def output(self) -> str:
        """What a forward scan writes."""
        if self.kernel != FORWARD:
            return ""
        return HIDDEN if not self.result else RESULT_WITH_SKIP if self.skip else RESULT

    @property
    def share(self) -> int:
        """Channels of a weight group."""
        return self.channels // self.groups

    @property
    def longest(self) -> int:
        """Positions of the longer lines, with their padding."""
        return pad(max(self.height, self.width), self.dtype.itemsize)

    @property
    def work(self) -> int:
        """Warps of a forward scan in strips, were threads to own four positions of one channel."""
        return 4 * self.batch * self.channels * -(-self.longest // (4 * STRIP))

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
    shapes = shapes_of_a_thread(problem.kernel, problem.dtype.itemsize, strips=not whole)
    for vector, channels in shapes:
        if problem.share % channels == 0:
            yield from divide(problem, device, vector, channels)


def shapes_of_a_thread(kernel: str, itemsize: int, *, strips: bool) -> list[tuple[int, int]]:
    """Positions and channels that a thread may own; its vectors have 4 to 16 bytes."""
    shapes = list(product((2, 4), CHANNELS))
    if strips and 8 * itemsize <= VECTOR_BYTES:
        return [*shapes, (8, 1)]  # twice the reach, for lines that are too long otherwise
    if strips and kernel == FORWARD:
        shapes.remove((4, 4))  # of 32-bit numbers: too many registers for lines of a useful length
    return shapes


def ring_ways(
    kernel: str, vector: int, channels: int, *, strips: bool
) -> list[tuple[int, bool]]:
    """Depths of the ring of lines that are copied ahead, and whether weights are made ready."""
    if kernel == BACKWARD:
        return [(LEAST_STAGES if strips else 4, False)]
    if not strips:
        return [(6 if channels < 4 else 4, False)]
    ways = [(STRIP_STAGES[vector, channels], False)]
    if (vector, channels) in READY_SHAPES:
        ways.append((STRIP_STAGES[vector, channels], True))
    if (vector, channels) == (4, 1):
        ways.append((LEAST_STAGES, False))
    return ways


def most_threads(
    kernel: str, vector: int, channels: int, capability: tuple[int, int], *, strips: bool
) -> int:
    """Threads of a block at which the kernel's registers suffice."""
    threads = MOST_THREADS[kernel][vector, channels]
    if not strips and (vector, channels) == (4, 4):
        threads = 256  # as many as short lines need; 384 spill
    # For 12.x the assembler needs some more registers.
    return threads - 128 if capability >= (12, 0) and threads > 384 else threads


def _whole_line_plans(problem, device, vector, channels) -> Iterator[Plan]:
    """A block takes the four directions of a party, a line of each in a part of a warp."""
    ((stages, _),) = ring_ways(problem.kernel, vector, channels, strips=False)
    threads_needed = -(-problem.longest // vector)
    lanes = 1 << (threads_needed - 1).bit_length()
    bound = most_threads(problem.kernel, vector, channels, device.capability, strips=False)
    for chunks in (1, 2, 4, 8, 16):
        party = chunks * channels
        threads = WARP * -(-4 * chunks * lanes // WARP)
        variant = _variant(problem, vector, channels, False, stages, bound)
        size = shared_bytes(problem, variant, threads)
        crowded = chunks > 1 and party >= 2 * problem.channels
        if threads > bound or crowded or party > LARGEST_PARTY or size > device.shared_bytes:
            continue
        blocks = problem.batch * -(-problem.channels // party)
        yield Plan(variant, party, lanes, blocks, threads, size, counters=0)


def _strip_plans(problem, device, vector, channels) -> Iterator[Plan]:
    """A block takes one direction, its line in strips of a warp each."""
    threads = WARP * -(-problem.longest // (STRIP * vector))
    bound = most_threads(problem.kernel, vector, channels, device.capability, strips=True)
    party = channels
    # Tokens are written in whole sectors, by blocks that the device holds at the same time.
    while (
        party * problem.dtype.itemsize < SECTOR_BYTES
        and party < problem.channels
        and 8 * party // channels <= device.processors
    ):
        party *= 2
    for stages, ready in ring_ways(problem.kernel, vector, channels, strips=True):
        variant = _variant(problem, vector, channels, True, stages, bound, ready)
        size = shared_bytes(problem, variant, threads)
        if threads > bound or size > device.shared_bytes:
            continue
        parties = problem.batch * -(-problem.channels // party)
        blocks = parties * 4 * party // channels
        yield Plan(variant, party, WARP, blocks, threads, size, counters=parties)


def _variant(problem, vector, channels, strips, stages, bound, ready=False) -> Variant:
    number_format = NUMBER_FORMATS[problem.dtype]
    shape = vector, channels, strips, stages, bound
    return Variant(problem.kernel, number_format, *shape, ready, problem.output)


def _cost(plan: Plan, problem: Problem, device: Device) -> tuple:
    """What decides between plans, most important first; the smaller the better.

    The order and the numbers are those that timing every plan on an H100 suggested.
    """
    if problem.kernel == BACKWARD:
        return _cost_backward(plan, device)
    if not plan.variant.strips:
        return _cost_of_whole_lines(plan, device)
    return _cost_of_strips(plan, problem, device)


def _cost_backward(plan: Plan, device: Device) -> tuple:
    """Threads with many channels do the least work, if there are still four warps to a
    multiprocessor; in strips, few positions are then best, while warps are few."""
    variant, warps = plan.variant, _warps(plan)
    missing = max(0, 4 * device.processors - warps)
    if not variant.strips:
        return missing, warps, 2 * plan.blocks < device.processors, -plan.party
    crowded = variant.vector == 2 and warps > BACKWARD_WARPS * device.processors
    return variant.vector == 8, missing, -variant.channels, crowded, variant.vector


def _cost_of_whole_lines(plan: Plan, device: Device) -> tuple:
    """A small scan needs all the warps that it can have, with the least work to each; others take
    threads with many channels, if there are still four warps to a multiprocessor."""
    work, warps = plan.variant.vector * plan.variant.channels, _warps(plan)
    if warps * work <= 2 * LIGHT_WARPS * device.processors:
        return work, abs(plan.threads - LIGHT_THREADS)
    missing = max(0, 4 * device.processors - warps)
    few_blocks = 2 * plan.blocks < device.processors
    return missing, warps, few_blocks, -plan.party, -plan.variant.vector


def _cost_of_strips(plan: Plan, problem: Problem, device: Device) -> tuple:
    """As many warps as a multiprocessor has use for, in strips that the lines fill well.

    Where weights are made ready, there is nothing for the channels of a thread to share: one is
    best, or where warps are too many, the most work to each. Where they are not, and work is
    plenty, two channels are best.
    """
    variant, warps = plan.variant, _warps(plan)
    ready = problem.share >= READY_SHARE
    if ready and variant.ready:
        positions = plan.threads // WARP * STRIP * variant.vector
        unfilled = problem.longest < FILLED * positions
        if warps <= READY_WARPS * device.processors:
            return 0, unfilled, 0, -warps, variant.channels
        return 0, unfilled, 1, -variant.vector * variant.channels, -variant.vector
    last_resort = 2 if variant.vector == 8 else 3 if variant.stages == LEAST_STAGES else 1
    unwanted = last_resort, variant.ready > ready
    if max(problem.work / HEAVY_WARPS, warps / BUSY_WARPS) > device.processors:
        vector = 2 if problem.longest <= LONGEST_BUSY else 4
        return *unwanted, 1, variant.vector != vector, (2, 4, 1).index(variant.channels)
    return *unwanted, 0, _last_wave_is_idle(plan, device), -warps, variant.vector


def _warps(plan: Plan) -> int:
    return plan.blocks * plan.threads // WARP


def _last_wave_is_idle(plan: Plan, device: Device) -> bool:
    """Whether blocks come in waves, the last of which leaves most of the device idle."""
    resident = min(device.shared_bytes // plan.shared_bytes, plan.variant.threads // plan.threads)
    at_once = device.processors * max(1, resident)
    waves = -(-plan.blocks // at_once)
    return waves > 1 and plan.blocks < 0.75 * waves * at_once


def shared_bytes(problem: Problem, variant: Variant, threads: int) -> int:
    """Size of the ring, the boards and the tile of the merge, as the kernels divide it."""
    backward, channels = problem.kernel == BACKWARD, variant.channels
    gates = 4 + problem.skip if backward else 2 + problem.result * (1 + problem.skip)
    numbers = gates * channels + (0 if variant.ready else TAPS)
    floats = channels if backward else READY_TAPS if variant.ready else 0
    slot = variant.vector * (numbers * problem.dtype.itemsize + floats * 4)
    boards = 2 * threads // WARP * 2 * HALO * channels * variant.vector * 4 * variant.strips
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
            for shape in shapes_of_a_thread(kernel, dtype.itemsize, strips=strips):
                threads = most_threads(kernel, *shape, capability, strips=strips)
                ways = ring_ways(kernel, *shape, strips=strips)
                outputs = (HIDDEN, RESULT, RESULT_WITH_SKIP) if kernel == FORWARD else ("",)
                for (stages, ready), output in product(ways, outputs):
                    how = strips, stages, threads, ready, output
                    found.append(Variant(kernel, name, *shape, *how))
    return found
