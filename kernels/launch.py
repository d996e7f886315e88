"""Compiles the CUDA kernels of ``scan.cu`` and launches them on torch tensors.

CuPy compiles a variant on its first use, with NVRTC, and caches the binary on disk. Tensors,
workspaces and streams are torch's; CuPy only gets addresses. What depends on sizes and strides
alone is worked out once: a small scan is over before Python has done much.
"""

import math
import threading
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .plans import BACKWARD, FORWARD, RESERVED_BYTES, Device, Plan, Problem, Variant, make_plan

SOURCE = "\n".join(
    Path(__file__).with_name(name).read_text() for name in ("device.cuh", "scan.cuh", "scan.cu")
)
OPTIONS = ("--std=c++17",)
ALIGNMENT = 16  # bytes of the widest access
TAPS_AND_PADDING = 4

_lock = threading.Lock()


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


class View(NamedTuple):
    """Address and strides, in elements, of a tensor whose channels are neighbours in memory."""

    address: int
    image: int
    direction: int
    row: int
    column: int


ABSENT = View(0, 0, 0, 0, 0)


class Inputs(NamedTuple):
    """The five inputs of a scan (or their gradients), wherever they lie."""

    x: View
    logits: View
    lam: View
    u: View
    skip: View


class Sizes(NamedTuple):
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
        inputs = inputs._replace(skip=ABSENT)
    device, dtype = like.device, like.dtype
    work = _divide(FORWARD, sizes, dtype, device.index, *_shape_in_memory(inputs))
    tokens = (sizes.batch, sizes.tokens, sizes.channels)
    planes = (sizes.batch, 4, sizes.tokens, sizes.channels)
    y = allocate(tokens if result else (0,), dtype, device)
    partial = allocate(planes, dtype, device) if result else None
    h = allocate(planes if hidden else (0,), torch.float32, device)
    arrivals = work.arrivals(device) if result else None
    lines = work.line_buffers(2, device)
    outputs = (y if result else None, partial, h if hidden else None, None, None, arrivals, lines)
    arguments = [*chain(*inputs, *4 * (ABSENT,)), *map(_address, outputs), *work.size_fields]
    launch(work.plan, arguments, device)
    return y, h


def run_backward(
    inputs: Inputs, grads: Inputs, sizes: Sizes, grad_y: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradient of x ``[B, N, P]``, and of the logits where `grads` could not take it.

    The gradients of lam, u and skip are written where `grads` points to. So is that of the logits
    if one block sees all channels of a group; else its sum over blocks, ``[B, 4, N, G, 3]`` in
    float32, is returned. `grad_y` ``[B, N, P]`` is contiguous, `hidden` is h from run_forward.
    """
    device, dtype = grad_y.device, grad_y.dtype
    work = _divide(BACKWARD, sizes, dtype, device.index, *_shape_in_memory(inputs, grads))
    grad_x = allocate((sizes.batch, sizes.tokens, sizes.channels), dtype, device)
    partial = allocate((sizes.batch, 4, sizes.tokens, sizes.channels), dtype, device)
    shape = (work.parts, sizes.batch, 4, sizes.tokens, sizes.groups, 3)
    shares = allocate(shape, torch.float32, device) if work.parts > 1 else None
    arrivals, lines = work.arrivals(device), work.line_buffers(6, device)
    outputs = (grad_x, partial, hidden, grad_y, shares, arrivals, lines)
    arguments = [*chain(*inputs, *grads[1:]), *map(_address, outputs), *work.size_fields]
    launch(work.plan, arguments, device)
    return grad_x, None if shares is None else shares.sum(0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _shape_in_memory(*tensors: Inputs) -> tuple:
    """What of these tensors' places decides how a scan is run: their strides, the alignment of
    their addresses in bytes (of the logits apart), and whether there is a skip."""
    gates, logits = 0, 0
    for inputs in tensors:
        gates |= inputs.x.address | inputs.lam.address | inputs.u.address | inputs.skip.address
        logits |= inputs.logits.address
    strides = tuple(view[1:] for inputs in tensors for view in inputs)
    return strides, gates % ALIGNMENT, logits % ALIGNMENT, tensors[0].skip is not ABSENT


@lru_cache(maxsize=1024)
def _divide(
    kernel: str,
    sizes: Sizes,
    dtype: torch.dtype,
    device_index: int,
    strides: tuple[tuple[int, ...], ...],
    gates: int,
    logits: int,
    skip: bool,
) -> "Division":
    """The plan of a scan and what follows from it."""
    vector = _vector_width(sizes, dtype.itemsize, strides, gates, logits)
    shape = (sizes.batch, sizes.height, sizes.width, sizes.channels, sizes.groups)
    plan = make_plan(Problem(kernel, dtype, *shape, vector, skip), Device.of(device_index))
    # Three logits can be copied as four where the fourth is padding.
    steps = (logits // dtype.itemsize, *strides[1], sizes.group_stride)
    return Division(plan, sizes, padded=not any(step % TAPS_AND_PADDING for step in steps))


@dataclass(frozen=True)
class Division:
    """A plan, applied to a scan."""

    plan: Plan
    sizes: Sizes
    padded: bool

    @cached_property
    def size_fields(self) -> tuple[int, ...]:
        """The members of `Arguments` from `batch` on."""
        plan = (self.plan.chunk, self.plan.segment, self.sizes.group_stride)
        return (*self.sizes[:-1], *plan, int(self.padded), self.lanes)

    @cached_property
    def lanes(self) -> int:
        """Neighbouring vectors that always share a weight group: their threads add up its
        gradient."""
        variant = self.plan.variant
        if variant.per_channel or not variant.stages:
            return 1
        vectors = self.plan.chunk // variant.vector
        if self.sizes.groups == 1:
            return vectors
        return math.gcd(vectors, self.share // variant.vector)

    @cached_property
    def parts(self) -> int:
        """Into how many shares of different threads the gradient of a group's logits falls."""
        if self.plan.variant.per_channel:
            return 1
        return -(-self.share // (self.plan.variant.vector * self.lanes))

    @property
    def share(self) -> int:
        """Channels of a weight group."""
        return self.sizes.channels // self.sizes.groups

    def arrivals(self, device: torch.device) -> Tensor:
        """Counters with which the blocks of a chunk wait for one another."""
        chunks = self.plan.blocks // (4 * self.plan.variant.cluster)
        return torch.zeros(chunks, dtype=torch.int32, device=device)

    def line_buffers(self, count: int, device: torch.device) -> Tensor | None:
        """Lines in global memory for the kernels that keep none on chip."""
        if self.plan.variant.stages:
            return None
        length = max(self.sizes.height, self.sizes.width)
        return allocate((self.plan.blocks, count, length * self.plan.chunk), torch.float32, device)


def _vector_width(sizes: Sizes, itemsize: int, strides, gates: int, logits: int) -> int:
    """Channels that can be moved at once: a power of two up to 16 bytes."""
    share = sizes.channels // sizes.groups
    width = math.gcd(ALIGNMENT // itemsize, gates // itemsize)
    if share > 1:
        width = math.gcd(width, share)
    else:  # a thread's logits are vectors too
        width = math.gcd(width, sizes.channels, logits // itemsize)
    for index, view in enumerate(strides):
        if share == 1 or index % 5 != 1:
            width = math.gcd(width, *view)
    return width
