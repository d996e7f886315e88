"""What a computation needs, found by running it on tensors without data.

A function that runs on meta tensors allocates nothing, but makes and drops the same tensors in the
same order as on a device. :func:`trace` follows them: the births and deaths of storages give the
peak of memory, the shapes that every operator meets give its work.

The numbers are those of a CUDA device: scans count as what the CUDA kernels do, and attention as
what a fused kernel does, which never writes a matrix of N x N. Elsewhere both may need more.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gspn2_diffusers.kernels.launch import Sizes
from gspn2_diffusers.kernels.layout import pad
from gspn2_diffusers.kernels.plans import FORWARD, NUMBER_FORMATS, Device, Problem, make_plan

GRAIN = 512  # torch's CUDA allocator rounds every tensor up to a multiple of it, in bytes
# The division of a scan depends on the device, its memory hardly: that of an H100.
SCAN_DEVICE = Device(capability=(9, 0), processors=132, shared_bytes=232_448)

Kind = Literal["matmul", "conv", "attention", "plain", "pack", "scan", "transfer"]


@dataclass(frozen=True)
class Rates:
    """How fast a device is at what denoisers do.

    Args:
        matmul, conv, attention: flops a second with numbers of 16 bits.
        bandwidth: bytes a second, read and written, of operators that only pass over memory.
        launch: seconds from one operator to the next where the device waits for Python.
        wide: share of `matmul`, `conv` and `attention` that is left with numbers of 32 bits.
        pack, scan: shares of `bandwidth` that packing the lines of a scan and the scan reach.
        line: seconds that a scan takes at least for every line.
        transfer: bytes a second between the device and CPU memory.
    """

    matmul: float
    conv: float
    attention: float
    bandwidth: float
    launch: float = 45e-6
    wide: float = 0.1
    pack: float = 0.5
    scan: float = 0.75
    line: float = 0.6e-6
    transfer: float = 20e9


class Work(NamedTuple):
    """What one operator does.

    Args:
        kind: which rate bounds it.
        flops: floating-point operations of its products; 0 where only memory counts.
        moved: bytes read and written.
        wide: whether its numbers have 32 bits or more.
        lines: of a scan, one after the other.
    """

    kind: Kind
    flops: int
    moved: int
    wide: bool = False
    lines: int = 0

    def seconds(self, rates: Rates) -> float:
        """The longest of its products, its memory traffic and its launch."""
        if self.kind == "transfer":
            return max(rates.launch, self.moved / rates.transfer)
        share = getattr(rates, self.kind) if self.kind in ("pack", "scan") else 1
        bounds = [rates.launch, self.moved / (rates.bandwidth * share), self.lines * rates.line]
        if self.flops:
            rate = getattr(rates, self.kind) * (rates.wide if self.wide else 1)
            bounds.append(self.flops / rate)
        return max(bounds)


@dataclass(frozen=True)
class Cost:
    """What a computation needs besides its inputs and weights.

    Args:
        peak_bytes: most memory held at once by what it made, workspaces of the kernels that this
            package knows included.
        kept_bytes: memory still held at its end, by its result above all.
        largest_elements: elements of the largest tensor that an operator read or wrote.
        works: how often it does what.
    """

    peak_bytes: int
    kept_bytes: int
    largest_elements: int
    works: Counter[Work]

    @property
    def flops(self) -> int:
        return sum(work.flops * count for work, count in self.works.items())

    @property
    def moved_bytes(self) -> int:
        return sum(work.moved * count for work, count in self.works.items())

    @property
    def launches(self) -> int:
        """Operators that run on the device."""
        return self.works.total()

    def seconds(self, rates: Rates) -> float:
        """Time on a device, one operator after the other."""
        return sum(work.seconds(rates) * count for work, count in self.works.items())


def trace(run: Callable[[], object], device: str = "meta") -> Cost:
    """The cost of `run`, which is called once, without gradients.

    Args:
        run: takes nothing; what it returns is taken to be its result.
        device: type of the device whose memory counts. Other than "meta", `run` computes in
            earnest, and is followed in the same way.
    """
    follower = _Follower(device)
    with torch.no_grad(), follower, _FusedAttention(follower):
        result = run()
    cost = follower.cost()
    del result  # not before its memory was seen to be kept
    return cost


class _Effect(NamedTuple):
    """What an operator did, and does again to inputs of the same shapes.

    Args:
        results: for each of its results the input that it is, by number, or the shape, strides and
            dtype of a new tensor.
        alone: whether it returned a tensor and no sequence.
        works, workspace, largest: what it does, bytes that it holds meanwhile, and elements of its
            largest input or result.
    """

    results: tuple[int | tuple, ...]
    alone: bool
    works: tuple[Work, ...]
    workspace: int
    largest: int

    def repeat(self, inputs: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The results for meta tensors, without the operator."""
        results = tuple(
            inputs[known] if isinstance(known, int) else _without_data(*known)
            for known in self.results
        )
        return results[0] if self.alone else results


class _Follower(TorchDispatchMode):
    """Keeps count of living storages and of work, from one operator to the next.

    Pieces of a map meet the same operators again and again. In torch, working out a result's shape
    takes long, so it is done once.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.living = self.peak = self.largest = 0
        self.works: Counter[Work] = Counter()
        self._storages: dict[int, weakref.ref] = {}
        self._effects: dict[tuple, _Effect] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        leaves = list(_flat((*args, *kwargs.values())))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        # Elsewhere than on the meta device operators have to compute.
        repeats = self.device == "meta" and all(t.is_meta or not t.ndim for t in inputs)
        shapes = (func, *kwargs, *map(_shape_of, leaves)) if repeats else None
        effect = self._effects.get(shapes)
        if effect is None:
            away = _copied_to_host(func, args, kwargs)
            output = func(*args, **kwargs) if away is None else away
            effect = _effect(func, args, kwargs, inputs, output)
            if repeats and None not in effect.results:
                self._effects[shapes] = effect
        else:
            output = effect.repeat(inputs)
        for tensor, known in zip(_flat([output]), effect.results, strict=True):
            if not isinstance(known, int) and isinstance(tensor, Tensor):
                self._watch(tensor, inputs)
        if effect.works:
            self.does(*effect.works)
            self.need(effect.workspace)
            self.largest = max(self.largest, effect.largest)
        return output

    def need(self, workspace: int) -> None:
        """So many bytes more for the time of an operator."""
        self.peak = max(self.peak, self.living + workspace)

    def does(self, *works: Work) -> None:
        self.works.update(works)

    def cost(self) -> Cost:
        """What was counted; nothing is followed any more."""
        self._storages.clear()
        return Cost(self.peak, self.living, self.largest, self.works)

    def _watch(self, tensor: Tensor, inputs: Sequence[Tensor]) -> None:
        """Count the storage of `tensor`, unless it is that of an input, until it dies."""
        storage, key = tensor.untyped_storage(), _key(tensor)
        elsewhere = tensor.device.type != self.device or key in self._storages
        if elsewhere or any(_key(other) == key for other in inputs):
            return
        size = -(-storage.nbytes() // GRAIN) * GRAIN

        def forget(_: weakref.ref) -> None:
            del self._storages[key]
            self.living -= size

        self._storages[key] = weakref.ref(storage, forget)
        self.living += size
        self.need(0)


def _effect(func, args, kwargs, inputs: Sequence[Tensor], output: object) -> _Effect:
    """What `func` did; its results hold None for what cannot be repeated."""
    name = func._overloadpacket.__name__
    known = {_key(tensor) for tensor in inputs}
    outputs = [leaf for leaf in _flat([output]) if isinstance(leaf, Tensor)]
    results = tuple(_result(leaf, inputs, known) for leaf in _flat([output]))
    idle = name in UNWRITTEN or not (
        func._schema.is_mutable or any(_key(tensor) not in known for tensor in outputs)
    )
    if idle:  # memory that nothing is written to, or a view
        works = ()
    elif name in SCANS:
        works = SCANS[name](*args)
    else:
        works = (_work(func, args, kwargs, output, inputs, outputs),)
    workspace = WORKSPACES[name](*args) if name in WORKSPACES else 0
    largest = max((tensor.numel() for tensor in (*inputs, *outputs)), default=0)
    return _Effect(results, isinstance(output, Tensor), works, workspace, largest)


def _copied_to_host(func, args, kwargs) -> Tensor | None:
    """For a copy of a tensor without data to CPU memory, which torch refuses, a tensor there whose
    memory nobody has touched; None for all else."""
    if func is not torch.ops.aten._to_copy.default or not args[0].is_meta:
        return None
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    if device is None or torch.device(device).type != "cpu":
        return None
    return torch.empty(args[0].shape, dtype=dtype or args[0].dtype)


def _result(leaf: object, inputs: Sequence[Tensor], known: set[int]) -> int | tuple | None:
    """A result as an `_Effect` has it; None for no tensor and for part of another one."""
    if not isinstance(leaf, Tensor):
        return None
    for number, tensor in enumerate(inputs):
        if tensor is leaf:
            return number
    if not leaf.is_meta or leaf.storage_offset() or _key(leaf) in known:
        return None
    return leaf.shape, leaf.stride(), leaf.dtype


def _without_data(shape, stride, dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _flat(values: Iterable[object]) -> Iterator[object]:
    """The values, lists and tuples among them opened."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def _shape_of(leaf: object) -> tuple:
    """What of an argument decides on the results' shapes."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf


class _FusedAttention(TorchFunctionMode):
    """Has attention between tensors without data counted as what a fused kernel does."""

    def __init__(self, follower: _Follower):
        super().__init__()
        self.follower = follower

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and (kwargs.get("query", *args[:1])).is_meta:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(self, query, key, value, *_, **__) -> Tensor:
        """`query` ``[..., N, D]``, `key` ``[..., M, D]``, `value` ``[..., M, E]``."""
        *batch, queries, _ = query.shape
        # The kernels write the heads of a token beside each other.
        heads = batch.pop() if batch else 1
        output = query.new_empty(*batch, queries, heads, value.shape[-1]).transpose(-3, -2)
        output = output if query.ndim > 2 else output[0]
        pairs = prod(query.shape[:-1]) * key.shape[-2]
        flops = 2 * pairs * (query.shape[-1] + value.shape[-1])
        moved = sum(map(_bytes, (query, key, value, output)))
        self.follower.need(4 * prod(query.shape[:-1]))  # the logarithm of every row's sum
        self.follower.does(Work("attention", flops, moved, query.itemsize >= 4))
        return output


def _work(func, args, kwargs, output, inputs, outputs) -> Work:
    name = func._overloadpacket.__name__
    unread = args[:1] if name in OVERWRITES else [kwargs["out"]] if "out" in kwargs else []
    read = [tensor for tensor in inputs if not any(tensor is other for other in unread)]
    moved = sum(map(_bytes, (*read, *outputs)))
    if len({tensor.device.type == "cpu" for tensor in (*inputs, *outputs) if tensor.ndim}) > 1:
        return Work("transfer", 0, moved // 2)
    count_flops = flop_registry.get(func._overloadpacket)
    if count_flops is None:
        return Work("plain", 0, moved)
    kind = "conv" if "conv" in name else "matmul"
    flops = count_flops(*args, **kwargs, out_val=output)
    return Work(kind, flops, moved, outputs[0].itemsize >= 4)


# ---- scans


def _token_scan_works(x, params, *arguments) -> tuple[Work, Work]:
    """The two launches of :func:`gspn2_diffusers.kernels.cuda_scan.scan_tokens_now`."""
    sizes = _sizes_of_tokens(x, *arguments)
    packed = Work("pack", 0, _bytes(x) + _bytes(params) + _line_bytes(sizes, x.itemsize))
    return packed, _scan_work(sizes, x.itemsize)


def _line_scan_works(rows, columns, *arguments) -> tuple[Work]:
    """The launch of :func:`gspn2_diffusers.kernels.cuda_scan.scan_lines_now`."""
    return (_scan_work(_sizes_of_lines(rows, *arguments), rows.itemsize),)


def _scan_work(sizes: Sizes, itemsize: int) -> Work:
    y = itemsize * sizes.batch * sizes.tokens * sizes.channels
    moved = _line_bytes(sizes, itemsize) + 2 * _partial_bytes(sizes, itemsize) + y
    return Work("scan", 0, moved, lines=max(sizes.height, sizes.width))


def _token_scan_workspace(x, params, *arguments) -> int:
    """Bytes of the lines, and of what scanning them takes."""
    sizes = _sizes_of_tokens(x, *arguments)
    return _line_bytes(sizes, x.itemsize) + _scan_workspace(sizes, x.dtype)


def _line_scan_workspace(rows, columns, *arguments) -> int:
    return _scan_workspace(_sizes_of_lines(rows, *arguments), rows.dtype)


def _scan_workspace(sizes: Sizes, dtype: torch.dtype) -> int:
    """Bytes of the partial results, of weights made ready and of what the kernel for any length
    keeps."""
    total = _partial_bytes(sizes, dtype.itemsize)
    if dtype in NUMBER_FORMATS:
        plan = make_plan(Problem(FORWARD, dtype, *sizes[:5], sizes.skip), SCAN_DEVICE)
        if plan.variant.ready:
            total += 4 * sizes.workspace_size(sizes.ready_rows, dtype.itemsize)
        if not plan.variant.stages:
            length = pad(max(sizes.height, sizes.width), dtype.itemsize)
            total += 8 * plan.blocks * length * plan.party
    return total


def _sizes_of_tokens(x: Tensor, height, width, groups, chunk_size, *native_grid) -> Sizes:
    return Sizes(x.shape[0], height, width, x.shape[2], groups, chunk_size, True, *native_grid)


def _sizes_of_lines(rows: Tensor, *arguments) -> Sizes:
    return Sizes(rows.shape[0], *arguments)


def _line_bytes(sizes: Sizes, itemsize: int) -> int:
    shapes = (sizes.lines_shape(axis, sizes.rows, itemsize) for axis in (0, 1))
    return itemsize * sum(map(prod, shapes))


def _partial_bytes(sizes: Sizes, itemsize: int) -> int:
    return itemsize * sizes.workspace_size(sizes.channels, itemsize)


# ---- what operators allocate without torch's dispatcher being told


def _copy_if_scattered(x: Tensor, *_: object) -> int:
    """Kernels for maps and normalisation read contiguous tensors only and copy others."""
    maps = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return 0 if maps or x.is_contiguous() else x.numel() * x.itemsize


def _copies_for_products(*arguments: object) -> int:
    """cuBLAS reads matrices whose rows or columns are contiguous; others are copied."""
    matrices = (m for m in arguments if isinstance(m, Tensor) and m.ndim >= 2)
    return sum(m.numel() * m.itemsize for m in matrices if 1 not in m.stride()[-2:])


WORKSPACES: dict[str, Callable[..., int]] = {
    "convolution": _copy_if_scattered,
    "native_layer_norm": _copy_if_scattered,
    "upsample_nearest2d": _copy_if_scattered,
    "mm": _copies_for_products,
    "addmm": _copies_for_products,
    "bmm": _copies_for_products,
    "baddbmm": _copies_for_products,
    "torch_scan_tokens": _token_scan_workspace,
    "torch_scan_lines": _line_scan_workspace,
}
SCANS: dict[str, Callable[..., tuple[Work, ...]]] = {
    "torch_scan_tokens": _token_scan_works,
    "torch_scan_lines": _line_scan_works,
}
OVERWRITES = {"copy_", "fill_", "zero_"}
UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def _key(tensor: Tensor) -> int:
    """The address of a tensor's storage object: storages without data have none of their own."""
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    """Bytes that have to be read or written, however often an expanded tensor repeats them."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * prod(size for size, stride in sizes if stride)
