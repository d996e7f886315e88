"""Which variant of a kernel runs a scan, and how it divides the work among blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

import torch

NUMBER_FORMATS = {
    torch.float32: "float",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
FORWARD, BACKWARD = "scan_forward", "scan_backward"
STAGES = (8, 4, 2)  # depths of the ring of lines that are copied ahead
CLUSTERS = (1, 2, 4, 8)  # blocks that share a line; every device with clusters takes 8
VECTORS = (4, 2, 1)  # vectors of channels that a block takes side by side
RESERVED_BYTES = 64  # shared memory that the kernels declare themselves, rounded up


@dataclass(frozen=True)
class Variant:
    """One instance of a kernel template; everything else is an argument at run time."""

    kernel: str
    number_format: str
    vector: int = 1  # channels of a thread
    per_channel: bool = False  # every channel has its own propagation weights
    stages: int = 0  # depth of the ring; 0: the kernel for lines of any length, which has none
    cluster: int = 1  # blocks that share a line
    threads: int = 512  # most threads of a block

    @property
    def name(self) -> str:
        """The C++ name expression, such as ``scan_forward<bfloat16, 8, false, 4, 1, 512>``."""
        if not self.stages:
            return f"{self.kernel}_any_length<{self.number_format}>"
        per_channel = str(self.per_channel).lower()
        return (
            f"{self.kernel}<{self.number_format}, {self.vector}, {per_channel}, {self.stages}, "
            f"{self.cluster}, {self.threads}>"
        )


@dataclass(frozen=True)
class Device:
    """What the choice of a variant depends on."""

    capability: tuple[int, int]
    processors: int
    shared_bytes: int  # most shared memory of a block
    cache_bytes: int  # of the L2 cache

    @classmethod
    @cache
    def of(cls, index: int) -> "Device":
        found = torch.cuda.get_device_properties(index)
        return cls(
            (found.major, found.minor),
            found.multi_processor_count,
            found.shared_memory_per_block_optin,
            found.L2_cache_size,
        )

    @property
    def clusters(self) -> tuple[int, ...]:
        """Blocks that may share a line: the four directions of a chunk wait for one another at the
        end, so all of their blocks have to fit on the device together, with room to spare."""
        if self.capability < (9, 0):
            return (1,)
        return tuple(blocks for blocks in CLUSTERS if blocks == 1 or 8 * blocks <= self.processors)


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
    vector: int  # most channels that all tensors' addresses and strides allow to move at once
    skip: bool

    @property
    def per_channel(self) -> bool:
        return self.groups == self.channels

    @property
    def input_bytes(self) -> int:
        """Size of the inputs of all directions, roughly."""
        tokens = self.batch * self.height * self.width
        return tokens * 4 * (3 * self.channels + 3 * self.groups) * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """How a scan is run: a variant and the sizes that go with it."""

    variant: Variant
    chunk: int  # channels of a block
    segment: int  # positions of a block
    blocks: int
    threads: int
    shared_bytes: int


@lru_cache(maxsize=1024)
def make_plan(problem: Problem, device: Device) -> Plan:
    """The plan that should be fastest: the widest vectors, then the least :func:`_cost`."""
    vector = problem.vector
    while vector * problem.dtype.itemsize >= 4:
        plans = list(ring_plans(problem, device, vector))
        if plans:
            return min(plans, key=lambda plan: _cost(plan, problem, device))
        vector //= 2
    return _plan_any_length(problem)


def ring_plans(problem: Problem, device: Device, vector: int) -> Iterator[Plan]:
    """Every division of the work that fits the device, each with its deepest ring."""
    length = max(problem.height, problem.width)
    per_channel = problem.per_channel and vector > 1
    itemsize = problem.dtype.itemsize
    number_format = NUMBER_FORMATS[problem.dtype]
    for vectors, cluster in product(VECTORS, device.clusters):
        segment = -(-length // cluster)
        if vectors > 1 and (vectors - 1) * vector >= problem.channels:
            continue
        threads = 32 * -(-segment * vectors // 32)
        bound = most_threads(problem.kernel, vector, itemsize, per_channel, cluster)
        if threads > bound:
            continue
        chunks = -(-problem.channels // (vectors * vector))
        blocks = problem.batch * 4 * chunks * cluster
        sizes = {
            stages: shared_bytes(problem, vector, vectors, segment, threads, stages)
            for stages in ring_depths(cluster)
        }
        stages = _deepest_ring(sizes, blocks, device)
        if stages is None:
            continue
        variant = Variant(
            problem.kernel, number_format, vector, per_channel, stages, cluster, bound
        )
        yield Plan(variant, vectors * vector, segment, blocks, threads, sizes[stages])


def most_threads(kernel: str, vector: int, itemsize: int, per_channel: bool, cluster: int) -> int:
    """Threads of a block at which the kernel's registers suffice."""
    if kernel == FORWARD and vector * itemsize == 4 and cluster == 1:
        return 1024
    return 256 if kernel == BACKWARD and per_channel and vector > 4 else 512


def ring_depths(cluster: int) -> tuple[int, ...]:
    """Depths of the ring, the best first; blocks that share a line need no very shallow one."""
    return STAGES if cluster == 1 else STAGES[:-1]


def _deepest_ring(sizes: dict[int, int], blocks: int, device: Device) -> int | None:
    """Stages that leave room for a second block on a multiprocessor, if there are so many."""
    available = device.shared_bytes - RESERVED_BYTES
    share = available // 2 - 1024 if blocks > device.processors else available
    comfortable = (s for s, size in sizes.items() if s >= 4 and size <= share)
    possible = (s for s, size in sizes.items() if size <= available)
    return next(comfortable, None) or next(possible, None)


def _cost(plan: Plan, problem: Problem, device: Device) -> tuple:
    """What decides between plans, most important first; the smaller the better.

    A scan larger than the L2 cache is bound by device memory, which is read in pieces of 64 bytes:
    wide chunks first. A smaller one is bound by the threads of the busiest multiprocessor, and,
    where these are few, by messages between blocks.
    """
    load = -(-plan.blocks // device.processors) * plan.threads
    width = -plan.chunk * problem.dtype.itemsize
    shallow = plan.variant.stages < 4
    if problem.input_bytes > device.cache_bytes:
        return shallow, width, load, plan.variant.cluster
    return shallow, max(load, 64), plan.variant.cluster, width


def shared_bytes(problem, vector, vectors, segment, threads, stages) -> int:
    """Size of the ring and the line buffers, as the kernels divide it."""
    size = vector * problem.dtype.itemsize
    logits = 3 * size if problem.per_channel and vector > 1 else 4 * problem.dtype.itemsize
    planes = 4 if problem.kernel == FORWARD else 5
    slot = (-(-(planes * size + logits) // size) | 1) * size  # as Slot::BYTES
    line = (segment + 2) * vectors * vector * 4
    total = stages * threads * slot
    if problem.kernel == FORWARD:
        return total + 2 * line
    return total + stages * line + 4 * line


def _plan_any_length(problem: Problem) -> Plan:
    chunk = min(8, problem.channels)
    blocks = problem.batch * 4 * -(-problem.channels // chunk)
    variant = Variant(problem.kernel, NUMBER_FORMATS[problem.dtype])
    return Plan(variant, chunk, max(problem.height, problem.width), blocks, 512, 0)


def variants(capability: tuple[int, int]) -> list[Variant]:
    """Every variant that a plan can name on devices of this compute capability."""
    clusters = CLUSTERS if capability >= (9, 0) else (1,)
    found = []
    for kernel, dtype in product((FORWARD, BACKWARD), NUMBER_FORMATS):
        name, itemsize = NUMBER_FORMATS[dtype], dtype.itemsize
        found.append(Variant(kernel, name))
        widths = [vector for vector in (1, 2, 4, 8) if 4 <= vector * itemsize <= 16]
        for vector, per_channel, cluster in product(widths, (False, True), clusters):
            if vector == 1 and per_channel:
                continue
            threads = most_threads(kernel, vector, itemsize, per_channel, cluster)
            found += [
                Variant(kernel, name, vector, per_channel, stages, cluster, threads)
                for stages in ring_depths(cluster)
            ]
    return found
