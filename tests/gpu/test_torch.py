"""The CUDA operators inside torch: registration, compilation, graphs, streams, threads, devices."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from scan_cases import LOW_PRECISION, Case
from tolerances import assert_close
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from gspn2_diffusers import GSPN2Config
from gspn2_diffusers.block import GSPN2Block
from gspn2_diffusers.kernels import gspn2_scan_tokens

pytestmark = pytest.mark.gpu

TOKENS = Case(batch=2, channels=8, groups=2, height=9, width=7, layout="tokens")
MAPS = Case(batch=2, channels=8, groups=2, height=9, width=7)


class RecordOperators(TorchDispatchMode):
    """Keeps the calls of this package's operators: (operator, args, kwargs)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gspn2_diffusers":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def leaves_of(case, device):
    return [t.requires_grad_() for t in case.draw(device)]


def forward_and_gradients(function, inputs):
    """y, then the gradients of all inputs for a gradient of y that is y itself."""
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, y.detach())


def assert_all_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("store_hidden", [False, True])
@pytest.mark.parametrize("case", [TOKENS, MAPS], ids=["scan_tokens", "scan"])
def test_operators_pass_opcheck(case, store_hidden, device):
    case = replace(case, store_hidden=store_hidden)
    with RecordOperators() as record:
        forward_and_gradients(lambda *t: case.scan(t, "cuda"), leaves_of(case, device))
    names = {func.name().partition("::")[2] for func, _, _ in record.calls}
    assert len(names) >= 2 and any("backward" in name for name in names)
    for func, args, kwargs in record.calls:
        differentiable = "backward" not in func.name()
        args = [
            arg.detach().clone().requires_grad_(differentiable)
            if isinstance(arg, torch.Tensor) and arg.is_floating_point()
            else arg
            for arg in args
        ]
        torch.library.opcheck(func, tuple(args), kwargs)


@pytest.mark.parametrize("case", [TOKENS, MAPS], ids=["tokens", "maps"])
def test_compiles_as_one_graph_forward_and_backward(case, device):
    def function(*inputs):
        return 2 * case.scan([inputs[0] + 1, *inputs[1:]], "cuda")

    inputs = leaves_of(case, device)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    actual = forward_and_gradients(compiled, inputs)
    for one, other in zip(actual, forward_and_gradients(function, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_auto_compiles_as_one_graph(device):
    inputs = leaves_of(TOKENS, device)
    torch.compiler.reset()
    compiled = torch.compile(lambda *t: TOKENS.scan(t, "auto"), fullgraph=True)
    assert_all_equal([compiled(*inputs)], [TOKENS.scan(inputs, "cuda")])


def test_changing_sizes_are_compiled_at_most_twice(device):
    def function(x, params, height, width):
        return gspn2_scan_tokens(x, params, (height, width), groups=2, backend="cuda")

    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for height, width in [(4, 6), (8, 5), (10, 12), (7, 3), (16, 9)]:
        case = replace(TOKENS, height=height, width=width)
        inputs = case.draw(device)
        y = compiled(*inputs, height, width)
        assert_all_equal([y], [function(*inputs, height, width)])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("store_hidden", [False, True])
@pytest.mark.parametrize("case", [TOKENS, MAPS], ids=["tokens", "maps"])
def test_a_captured_graph_replays_with_new_inputs(case, store_hidden, device):
    case = replace(case, store_hidden=store_hidden)

    def function(*inputs):
        return case.scan(inputs, "cuda")

    inputs = leaves_of(case, device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_and_gradients(function, inputs)  # compiles, which a capture must not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_gradients(function, inputs)

    for seed in (1, 2, 3):
        with torch.no_grad():
            for static, fresh in zip(inputs, replace(case, seed=seed).draw(device), strict=True):
                static.copy_(fresh)
        graph.replay()
        assert_all_equal(captured, forward_and_gradients(function, inputs))


@pytest.mark.parametrize("case", [TOKENS, MAPS], ids=["tokens", "maps"])
def test_work_is_queued_on_the_current_stream(case, device):
    """The inputs appear late on a side stream: a launch on another stream would miss them."""
    leaves = leaves_of(case, device)
    expected = forward_and_gradients(lambda *t: case.scan(t, "cuda"), leaves)
    late = [torch.zeros_like(t).requires_grad_() for t in leaves]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for empty, full in zip(late, leaves, strict=True):
                empty.copy_(full)
        actual = forward_and_gradients(lambda *t: case.scan(t, "cuda"), late)
    stream.synchronize()
    assert_all_equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_scans_in_its_dtype(dtype, device):
    torch.manual_seed(0)
    block = GSPN2Block(32, GSPN2Config(proxy_dim=8, groups=2)).to(device)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.randn(2, 63, 32, device=device, requires_grad=True)
    exact = block.double()(tokens.double(), (9, 7))
    block.float()
    with torch.autocast("cuda", dtype):
        mixed = block(tokens, (9, 7))
    assert mixed.dtype == dtype
    error = (mixed.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.03  # projections and scan, each rounded
    mixed.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in block.parameters())


@pytest.mark.parametrize("case", [TOKENS, MAPS], ids=["tokens", "maps"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_float32_inputs(dtype, case, device):
    inputs = case.draw(device)
    with torch.autocast("cuda", dtype):
        y = case.scan(inputs, "cuda")
    assert_close(y, case.reference([t.to(dtype) for t in inputs]), dtype)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("case", [TOKENS, MAPS], ids=["tokens", "maps"])
def test_tensors_on_a_device_that_is_not_the_current_one(case, device):
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    inputs = leaves_of(case, device)
    expected = forward_and_gradients(lambda *t: case.scan(t, "cuda"), inputs)
    away = [t.detach().to(other).requires_grad_() for t in inputs]
    actual = forward_and_gradients(lambda *t: case.scan(t, "cuda"), away)
    assert torch.cuda.current_device() == device.index
    assert_all_equal([t.to(device) for t in actual], expected)


MANY_THREADS = """
import threading
from itertools import product

import torch
from scan_cases import Case, LOW_PRECISION
from tolerances import assert_close

THREADS = 8
barrier, failures = threading.Barrier(THREADS), []
cases = [
    Case(channels=channels, height=height, width=9, dtype=dtype, layout="tokens")
    for dtype, (channels, height) in product(LOW_PRECISION, [(8, 12), (3, 5)])
]


def work():
    try:
        for case in cases:
            inputs = case.draw("cuda")
            expected = case.reference(inputs)
            barrier.wait(60)
            assert_close(case.scan(inputs, "cuda"), expected)
    except BaseException as error:
        failures.append(error)
        barrier.abort()


threads = [threading.Thread(target=work) for _ in range(THREADS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
if failures:
    raise failures[0]
"""


def test_threads_may_make_the_first_call_at_the_same_time(tmp_path):
    """In a fresh process with an empty cache, so that every variant is compiled there."""
    here = os.path.dirname(os.path.dirname(__file__))
    path = os.pathsep.join([here, *filter(None, sys.path)])
    cache = tmp_path / "cache"
    environment = os.environ | {"CUPY_CACHE_DIR": str(cache), "PYTHONPATH": path}
    command = [sys.executable, "-c", MANY_THREADS]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run(command, env=environment, **options)
    assert done.returncode == 0, done.stderr
    assert any(cache.iterdir()), "nothing was compiled"


def test_threads_on_streams_of_their_own_do_not_share_workspaces(device):
    cases = [
        Case(batch=2, channels=32, height=64, width=48, dtype=dtype) for dtype in LOW_PRECISION
    ]
    drawn = [(case, case.draw(device)) for case in cases]
    expected = [case.scan(inputs, "cuda") for case, inputs in drawn]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(device) for _ in range(4)]
    results = []
    for _ in range(25):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append([case.scan(inputs, "cuda") for case, inputs in drawn])
    torch.cuda.synchronize()
    for result in results:
        assert_all_equal(result, expected)
