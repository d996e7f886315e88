"""Chooses, compiles and launches the CUDA kernels of ``scan.cu`` on torch tensors.

CuPy compiles a variant on its first use, with NVRTC, and caches the binary on disk. Tensors,
workspaces and streams are torch's; CuPy only gets addresses.
"""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SOURCE = "\n".join(
    Path(__file__).with_name(name).read_text() for name in ("device.cuh", "scan.cuh", "scan.cu")
)
OPTIONS = ("--std=c++17",)
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

_lock = threading.Lock()


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
        return CLUSTERS if self.capability >= (9, 0) else (1,)


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


@cache
def load(variant: Variant, device_index: int):
    """The compiled kernel, as a `cupy.cuda.Function`. Thread-safe; call it through `launch`."""
    import cupy

    with cupy.cuda.Device(device_index):
        module = cupy.RawModule(
            code=SOURCE, options=OPTIONS, backend="nvrtc", name_expressions=(variant.name,)
        )
        kernel = module.get_function(variant.name)
        kernel.max_dynamic_shared_size_bytes = (
            Device.of(device_index).shared_bytes - RESERVED_BYTES
        )
        return kernel.kernel


@lru_cache(maxsize=256)
def _stream(address: int):
    import cupy

    return cupy.cuda.ExternalStream(address) if address else cupy.cuda.Stream.null


def launch(plan: Plan, arguments: list[int], device: torch.device) -> None:
    """Run a plan on the current stream of `device` with the members of `Arguments` in order."""
    index = device.index
    with _lock:
        function = load(plan.variant, index)
    stream = _stream(torch.cuda.current_stream(index).cuda_stream)
    packed = np.array(arguments, dtype=np.int64).view(f"V{8 * len(arguments)}")  # one struct
    if index == torch.cuda.current_device():
        function((plan.blocks,), (plan.threads,), (packed,), plan.shared_bytes, stream)
    else:
        with torch.cuda.device(index):
            function((plan.blocks,), (plan.threads,), (packed,), plan.shared_bytes, stream)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every output and workspace comes from here, uninitialised."""
    return torch.empty(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class View:
    """Address and strides, in elements, of a tensor whose channels are neighbours in memory."""

    address: int
    image: int
    direction: int
    row: int
    column: int

    @property
    def fields(self) -> tuple[int, ...]:
        return self.address, self.image, self.direction, self.row, self.column


ABSENT = View(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Inputs:
    """The five inputs of a scan (or their gradients), wherever they lie."""

    x: View
    logits: View
    lam: View
    u: View
    skip: View


@dataclass(frozen=True)
class Sizes:
    """The sizes of a scan."""

    batch: int
    height: int
    width: int
    channels: int
    groups: int
    chunk_size: int  # 0: the whole map
    group_stride: int  # elements between the logits of neighbouring groups, 3 or more

    @property
    def tokens(self) -> int:
        return self.height * self.width


def run_forward(
    inputs: Inputs, sizes: Sizes, like: Tensor, *, result: bool, hidden: bool
) -> tuple[Tensor, Tensor]:
    """y ``[B, N, P]`` and h ``[B, 4, N, P]``, each empty where it is not wanted."""
    if not result:
        inputs = Inputs(inputs.x, inputs.logits, inputs.lam, inputs.u, ABSENT)
    plan = _plan(FORWARD, inputs, sizes, like)
    planes = (sizes.batch, 4, sizes.tokens, sizes.channels)
    tokens = (sizes.batch, sizes.tokens, sizes.channels)
    device, dtype = like.device, like.dtype
    y = allocate(tokens if result else (0,), dtype, device)
    partial = allocate(planes if result else (0,), dtype, device)
    h = allocate(planes if hidden else (0,), torch.float32, device)
    arrivals = _arrivals(plan, device) if result else None
    lines = _line_buffers(plan, sizes, 2, device)
    arguments = [
        *_input_fields(inputs),
        *4 * ABSENT.fields,
        *_addresses(y, partial, h, None, None, arrivals, lines),
        *_size_fields(sizes, plan, inputs, dtype.itemsize),
    ]
    launch(plan, arguments, device)
    return y, h


def run_backward(
    inputs: Inputs,
    grads: Inputs,
    sizes: Sizes,
    grad_y: Tensor,
    hidden: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of x ``[B, N, P]``, and of the logits where `grads` could not take it.

    The gradients of lam, u and skip are written where `grads` points to. So is that of the logits
    if one block sees all channels of a group; else its sum over blocks, ``[B, 4, N, G, 3]`` in
    float32, is returned. `grad_y` ``[B, N, P]`` is contiguous, `hidden` is h from run_forward.
    """
    device, dtype = grad_y.device, grad_y.dtype
    plan = _plan(BACKWARD, inputs, sizes, grad_y, grads)
    planes = (sizes.batch, 4, sizes.tokens, sizes.channels)
    grad_x = allocate((sizes.batch, sizes.tokens, sizes.channels), dtype, device)
    partial = allocate(planes, dtype, device)
    parts = _parts(plan, sizes)
    shape = (parts, sizes.batch, 4, sizes.tokens, sizes.groups, 3)
    shares = allocate(shape, torch.float32, device) if parts > 1 else None
    arrivals = _arrivals(plan, device)
    lines = _line_buffers(plan, sizes, 6, device)
    arguments = [
        *_input_fields(inputs),
        *grads.logits.fields,
        *grads.lam.fields,
        *grads.u.fields,
        *grads.skip.fields,
        *_addresses(grad_x, partial, hidden, grad_y, shares, arrivals, lines),
        *_size_fields(sizes, plan, inputs, dtype.itemsize),
    ]
    launch(plan, arguments, device)
    return grad_x, None if shares is None else shares.sum(0)


def _plan(
    kernel: str, inputs: Inputs, sizes: Sizes, like: Tensor, grads: Inputs | None = None
) -> Plan:
    vector = _vector_width(sizes, like.dtype.itemsize, *filter(None, (inputs, grads)))
    problem = Problem(
        kernel,
        like.dtype,
        sizes.batch,
        sizes.height,
        sizes.width,
        sizes.channels,
        sizes.groups,
        vector,
        inputs.skip is not ABSENT,
    )
    return make_plan(problem, Device.of(like.device.index))


def _vector_width(sizes: Sizes, itemsize: int, *tensors: Inputs) -> int:
    """Channels that can be moved at once: a power of two up to 16 bytes."""
    share = sizes.channels // sizes.groups
    width = math.gcd(16 // itemsize, sizes.channels if share == 1 else share)
    for inputs in tensors:
        views = [inputs.x, inputs.lam, inputs.u, inputs.skip]
        if share == 1:  # a thread's logits are vectors too
            views.append(inputs.logits)
        for view in views:
            width = math.gcd(
                width, view.address // itemsize, view.image, view.direction, view.row, view.column
            )
    return width


def _lanes(plan: Plan, sizes: Sizes) -> int:
    """Neighbouring vectors that always share a weight group: their threads add up its gradient."""
    if plan.variant.per_channel or not plan.variant.stages:
        return 1
    if sizes.groups == 1:
        return plan.chunk // plan.variant.vector
    share = sizes.channels // sizes.groups
    return math.gcd(plan.chunk // plan.variant.vector, share // plan.variant.vector)


def _parts(plan: Plan, sizes: Sizes) -> int:
    """Into how many shares of different threads the gradient of a group's logits falls."""
    if plan.variant.per_channel:
        return 1
    share = sizes.channels // sizes.groups
    return -(-share // (plan.variant.vector * _lanes(plan, sizes)))


def _arrivals(plan: Plan, device: torch.device) -> Tensor:
    """Counters with which the blocks of a chunk wait for one another."""
    chunks = plan.blocks // (4 * plan.variant.cluster)
    return torch.zeros(chunks, dtype=torch.int32, device=device)


def _line_buffers(plan: Plan, sizes: Sizes, count: int, device: torch.device) -> Tensor | None:
    if plan.variant.stages:
        return None
    length = max(sizes.height, sizes.width)
    shape = (plan.blocks, count, length * plan.chunk)
    return allocate(shape, torch.float32, device)


def _input_fields(inputs: Inputs) -> tuple[int, ...]:
    views = (inputs.x, inputs.logits, inputs.lam, inputs.u, inputs.skip)
    return tuple(field for view in views for field in view.fields)


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None or not tensor.numel() else tensor.data_ptr() for tensor in tensors]


def _size_fields(sizes: Sizes, plan: Plan, inputs: Inputs, itemsize: int) -> tuple[int, ...]:
    return (
        sizes.batch,
        sizes.height,
        sizes.width,
        sizes.channels,
        sizes.groups,
        sizes.chunk_size,
        plan.chunk,
        plan.segment,
        sizes.group_stride,
        _padded(inputs.logits, sizes, itemsize),
        _lanes(plan, sizes),
    )


def _padded(logits: View, sizes: Sizes, itemsize: int) -> bool:
    """Whether three logits can be copied as four, the fourth being padding."""
    strides = (logits.image, logits.direction, logits.row, logits.column, sizes.group_stride)
    return not any(stride % 4 for stride in (logits.address // itemsize, *strides))
