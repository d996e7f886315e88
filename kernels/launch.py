"""Compiles the CUDA kernels and launches them on torch tensors.

CuPy compiles a kernel on its first use, with NVRTC, and caches the binary on disk. Tensors,
workspaces and streams are torch's; CuPy only gets addresses. What depends on sizes alone is worked
out once: a small scan is over before Python has done much.
"""

import logging
import threading
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import TAPS, VECTOR_BYTES, LineLayout, TokenLayout, pad
from .plans import BACKWARD, FORWARD, READY_TAPS, Device, Plan, Problem, make_plan

SOURCE = "\n".join(
    Path(__file__).with_name(name).read_text()
    for name in ("device.cuh", "scan.cuh", "scan.cu", "pack.cu")
)
OPTIONS = ("--std=c++17",)
PACK_THREADS, TILE_POSITIONS = 256, 64
QUAD_THREADS, QUAD = 256, 4  # of a block; positions of a thread, before and after a scan
PACK_SHARED_BYTES = 64 * 33 * 4
SECONDS_TO_LOAD = 1.0  # of a kernel from CuPy's cache: what takes longer is being compiled

_logger = logging.getLogger(__name__)
_lock = threading.Lock()
_this_thread = threading.local()
_functions: dict[tuple[str, int], object] = {}  # compiled kernels by name and device


class Sizes(NamedTuple):
    """The sizes of a scan."""

    batch: int
    height: int
    width: int
    channels: int
    groups: int
    chunk_size: int  # 0: the whole map
    skip: bool
    native_height: int = 0  # 0: lam as it is
    native_width: int = 0

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def rows(self) -> int:
        """Of a line of the inputs."""
        return LineLayout(self.channels, self.groups, self.skip).rows

    @property
    def ready_rows(self) -> int:
        """Of a line of the weights that are made ready before a scan."""
        return READY_TAPS * self.groups

    def lines_shape(self, axis: int, rows: int, itemsize: int) -> tuple[int, int, int, int]:
        """``[B, lines, rows, padded]`` of the rows (axis 0) or the columns (1) of the map."""
        lines, length = (self.height, self.width) if axis == 0 else (self.width, self.height)
        return self.batch, lines, rows, pad(length, itemsize)

    def workspace_size(self, rows: int, itemsize: int) -> int:
        """Elements for `rows` rows in each line of all four directions."""
        shapes = (self.lines_shape(axis, rows, itemsize) for axis in (0, 1))
        return sum(2 * batch * lines * rows * padded for batch, lines, _, padded in shapes)


# ---- launching


def load(name: str, device_index: int):
    """The compiled kernel, as a `cupy.cuda.Function`. Thread-safe."""
    function = _functions.get((name, device_index))
    if function is None:
        with _lock:
            function = _functions.get((name, device_index)) or _compile(name, device_index)
            _functions[name, device_index] = function
    return function


def _compile(name: str, device_index: int):
    import cupy

    with cupy.cuda.Device(device_index), _said_if_it_takes_long():
        module = cupy.RawModule(
            code=SOURCE, options=OPTIONS, backend="nvrtc", name_expressions=(name,)
        )
        kernel = module.get_function(name)
        kernel.max_dynamic_shared_size_bytes = Device.of(device_index).shared_bytes
        return kernel.kernel


@contextmanager
def _said_if_it_takes_long() -> Iterator[None]:
    """Tell the user why nothing happens, while kernels are compiled."""
    timer = threading.Timer(SECONDS_TO_LOAD, _say_that_kernels_are_compiled)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@cache
def _say_that_kernels_are_compiled() -> None:
    _logger.warning(
        "Compiling the CUDA kernels of GSPN-2 for this GPU: some seconds for each that a model or "
        "size needs, and only once, as CuPy keeps them on disk."
    )


def launch(
    name: str,
    blocks: int,
    threads: int,
    shared_bytes: int,
    arguments: Sequence[int],
    device: torch.device,
) -> None:
    """Run a kernel on the current stream of `device`; `arguments` are the members of its struct."""
    index = device.index
    if not hasattr(_this_thread, "launch_kernel"):
        from cupy.cuda import driver, runtime

        runtime.setDevice(torch.cuda.current_device())  # the driver makes no context by itself
        _this_thread.launch_kernel = driver.launchKernel
    function, launch_kernel = load(name, index), _this_thread.launch_kernel
    struct = array("q", arguments)
    pointers = array("Q", (struct.buffer_info()[0],))
    sizes = (blocks, 1, 1, threads, 1, 1, shared_bytes)
    # The raw handle: making a torch.cuda.Stream of it takes as long as the launch.
    stream = torch._C._cuda_getCurrentRawStream(index)
    call = function.ptr, *sizes, stream, pointers.buffer_info()[0], 0
    if index == torch.cuda.current_device():
        launch_kernel(*call)
    else:
        with torch.cuda.device(index):
            launch_kernel(*call)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every output and workspace comes from here, uninitialised."""
    return torch.empty(shape, dtype=dtype, device=device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# ---- the scan


def run_forward(
    lines: Sequence[Tensor],
    sizes: Sizes,
    *,
    result: bool,
    hidden: bool,
    arrivals: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """y ``[B, N, P]``, and h of every line in all directions, each None where it is not wanted.

    `lines` are the inputs by axis, as a :class:`LineLayout` says, copied if the kernels cannot read
    them where they are; `arrivals` are counters from :func:`pack`, which set them to zero.
    """
    lines = [_readable(tensor) for tensor in lines]
    device, dtype = lines[0].device, lines[0].dtype
    plan = plan_for(FORWARD, sizes, dtype, device.index, result)
    count = _workspace_size(sizes.channels, sizes, dtype.itemsize)
    y = partial = h = weights = None
    if result:
        y = allocate((sizes.batch, sizes.tokens, sizes.channels), dtype, device)
        partial = allocate((count,), dtype, device)
    if hidden:
        h = allocate((count,), torch.float32, device)
    if plan.variant.ready:
        count = _workspace_size(sizes.ready_rows, sizes, dtype.itemsize)
        weights = allocate((count,), torch.float32, device)
        if arrivals is None:
            arrivals = allocate((plan.counters,), torch.int32, device)
    elif result and arrivals is None:
        arrivals = _zero_counters(plan, device)
    buffers = _line_buffers(plan, 2, sizes, dtype, device)
    outputs = (y, partial, h, weights, None, arrivals, buffers)
    _run(plan, lines, None, None, outputs, sizes, device)
    return y, h


def _readable(lines: Tensor) -> Tensor:
    """The same lines where the kernels can read them: rows of neighbours, each at the beginning of
    a vector, and offsets within a line that fit 32 bits."""
    vector = VECTOR_BYTES // lines.element_size()
    *outer, row, position = lines.stride()
    fits = position == 1 and not any(stride % vector for stride in (*outer, row))
    small = row * lines.shape[2] * lines.element_size() < 2**31
    if fits and small and not lines.data_ptr() % VECTOR_BYTES:
        return lines
    return lines.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=1024)
def _workspace_size(rows: int, sizes: Sizes, itemsize: int) -> int:
    """:meth:`Sizes.workspace_size`, looked up."""
    return sizes.workspace_size(rows, itemsize)


def run_backward(
    lines: Sequence[Tensor], grad_y: Sequence[Tensor], hidden: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """The gradients of `lines`, by axis; `grad_y` is that of y in lines of P rows, `hidden` h from
    :func:`run_forward`."""
    lines = [_readable(tensor.contiguous()) for tensor in lines]
    like = lines[0]
    device, dtype = like.device, like.dtype
    plan = plan_for(BACKWARD, sizes, dtype, device.index)
    grads = tuple(allocate(tuple(t.shape), dtype, device) for t in lines)
    count = _workspace_size(sizes.channels, sizes, dtype.itemsize)
    partial = allocate((count,), dtype, device)
    parts = _parts(plan, sizes)
    shares = None
    if parts > 1:
        count = sizes.workspace_size(TAPS * sizes.groups, dtype.itemsize)
        shares = allocate((parts, count), torch.float32, device)
    arrivals, buffers = _zero_counters(plan, device), _line_buffers(plan, 6, sizes, dtype, device)
    outputs = (None, partial, hidden, None, shares, arrivals, buffers)
    _run(plan, lines, grad_y, grads, outputs, sizes, device)
    return grads


def plan_for(
    kernel: str, sizes: Sizes, dtype: torch.dtype, device_index: int, result: bool = True
) -> Plan:
    """The plan of a scan on a device."""
    return _plan(kernel, sizes[:5], sizes.skip, result, dtype, device_index)


@lru_cache(maxsize=1024)
def _plan(kernel, shape: tuple[int, ...], skip: bool, result: bool, dtype, index: int) -> Plan:
    return make_plan(Problem(kernel, dtype, *shape, skip, result), Device.of(index))


def _run(plan, lines, grad_y, grads, outputs, sizes, device) -> None:
    """A scan, with what comes before or after it."""
    arguments = []
    for pair in (lines, grad_y, grads):
        for tensor in pair or (None, None):
            strides = (0, 0, 0) if tensor is None else tensor.stride()[:3]
            arguments += (_address(tensor), *strides)
    *_, weights, shares, _, _ = outputs
    parts, variant = 0 if shares is None else len(shares), plan.variant
    arguments += map(_address, outputs)
    arguments += (*sizes, parts, plan.party, plan.lanes)

    def beside(kernel: str, rows: int) -> None:
        blocks = _blocks_of_quads(rows, plan.counters, sizes, lines[0].element_size())
        launch(f"{kernel}<{variant.number_format}>", blocks, QUAD_THREADS, 0, arguments, device)

    if weights is not None:
        beside("ready_weights", sizes.groups)
    launch(variant.name, plan.blocks, plan.threads, plan.shared_bytes, arguments, device)
    if shares is not None:
        beside("add_shares", TAPS * sizes.groups)


@lru_cache(maxsize=1024)
def _blocks_of_quads(rows: int, counters: int, sizes: Sizes, itemsize: int) -> int:
    """Blocks whose threads take four positions each of `rows` rows of all lines, and a counter."""
    return -(-max(counters, sizes.workspace_size(rows, itemsize) // QUAD) // QUAD_THREADS)


def _zero_counters(plan: Plan, device: torch.device) -> Tensor | None:
    """Counters with which the blocks of a party wait for one another."""
    if not plan.counters:
        return None
    return torch.zeros(plan.counters, dtype=torch.int32, device=device)


def _line_buffers(plan, count, sizes, dtype, device) -> Tensor | None:
    """Lines in global memory for the kernels that keep none on chip."""
    if plan.variant.stages:
        return None
    length = pad(max(sizes.height, sizes.width), dtype.itemsize)
    return allocate((plan.blocks, count, length * plan.party), torch.float32, device)


def _parts(plan: Plan, sizes: Sizes) -> int:
    """Into how many shares of different threads the gradient of a group's logits falls."""
    share = sizes.channels // sizes.groups
    return share // plan.variant.channels


# ---- between tokens and lines


def pack(
    x: Tensor, params: Tensor | None, sizes: Sizes, *, arrivals: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The lines, by axis, of tokens `x` ``[B, N, P]`` and `params` ``[B, N, K]``; without params,
    of x alone, which is contiguous then. With `arrivals` also the zeroed counters of the forward
    scan that comes next."""
    device, dtype = x.device, x.dtype
    rows = sizes.channels if params is None else sizes.rows
    shapes = [sizes.lines_shape(axis, rows, dtype.itemsize) for axis in (0, 1)]
    counters = None
    if arrivals:
        count = plan_for(FORWARD, sizes, dtype, device.index).counters
        counters = allocate((count,), torch.int32, device) if count else None
    # One channel, alone and without padding, lies in rows already.
    in_rows = params is None and sizes.channels == 1 and x.numel() == prod(shapes[0])
    upright = _readable(x.view(shapes[0])) if in_rows else allocate(shapes[0], dtype, device)
    sideways = allocate(shapes[1], dtype, device)
    packed = None if in_rows else upright, sideways
    _move("pack_tokens", (x, x), params, packed, sizes, counters)
    return upright, sideways, counters


def unpack(lines: Sequence[Tensor], sizes: Sizes, params_width: int) -> tuple[Tensor, Tensor]:
    """The adjoint of :func:`pack`: gradients of x and params from those of the lines."""
    like = lines[0]
    shape = (sizes.batch, sizes.tokens)
    both = allocate((2, *shape, sizes.channels), like.dtype, like.device)
    params = allocate((*shape, params_width), like.dtype, like.device)
    layout = TokenLayout(sizes.channels, sizes.groups)
    params[..., layout.gates :].zero_()  # columns that nobody reads
    _move("unpack_tokens", both.unbind(), params, lines, sizes, None)
    return both[0] + both[1], params


def _move(kernel, x, params, lines, sizes, counters) -> None:
    itemsize, layout = x[0].element_size(), TokenLayout(sizes.channels, sizes.groups)
    tokens = x[0] if params is None else params
    strides = (*x[0].stride()[:2], *tokens.stride()[:2])
    addresses = (_address(x[0]), _address(x[1]), _address(params))
    misalignments = tuple(address % 4 for address in addresses)
    upright = (sizes.channels, *strides)
    # Without params x is contiguous: the columns of a map lie beside each other.
    sideways = (sizes.width * sizes.channels, strides[0]) if params is None else upright
    paired = [_paired(numbers, misalignments) for numbers in (upright, sideways)]
    count = 0 if counters is None else counters.numel()
    buffers = (*addresses, *map(_address, lines), _address(counters))
    arguments = (*buffers, *strides, *sizes[:5], layout.group_stride, *paired, count)
    wanted = tuple(tensor is not None for tensor in lines)
    blocks = _tiles(sizes[:5], itemsize, params is not None, wanted)
    name = f"{kernel}<{itemsize}>"
    launch(name, blocks, PACK_THREADS, PACK_SHARED_BYTES, arguments, x[0].device)


@lru_cache(maxsize=1024)
def _paired(numbers: tuple[int, ...], misalignments: tuple[int, ...]) -> int:
    """Whether two columns of 16 bits always lie in one word."""
    return int(not any(number % 2 for number in numbers) and not any(misalignments))


@lru_cache(maxsize=1024)
def _tiles(
    shape: tuple[int, ...], itemsize: int, with_params: bool, wanted: tuple[bool, bool]
) -> int:
    """Blocks that move the wanted axes of all images, as the kernels divide them."""
    batch, height, width, channels, groups = shape
    stride = TokenLayout(channels, groups).group_stride
    tiles = 0
    for lines, length, axis_wanted in zip((height, width), (width, height), wanted, strict=True):
        if with_params:
            columns = 7 * channels + 2 * groups * stride
        else:
            lines, columns = 1, lines * channels
        across = -(-columns // (128 // itemsize))
        along = -(-pad(length, itemsize) // TILE_POSITIONS)
        tiles += axis_wanted * lines * across * along
    return batch * tiles
