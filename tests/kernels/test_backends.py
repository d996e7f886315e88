"""Which implementation runs, what an explicit choice refuses, and the operator on tokens."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from scan_cases import LOW_PRECISION, Case, pack_tokens, unpack_tokens
from tolerances import assert_close

from gspn2_diffusers.kernels import backends, gspn2_scan, gspn2_scan_tokens, params_width

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A function that sets up a machine with a CUDA build of torch, a GPU and a `cupy` module."""

    def pretend(cupy, capability=(9, 0), hip=None):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        backends._examine.cache_clear()

    yield pretend
    backends._examine.cache_clear()


class FakeCuPy:
    """As much of CuPy as the decision asks for: how many GPUs it sees, or why none, and NVRTC."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, gpus, nvrtc=True):
        self.cuda = self.runtime = self.nvrtc = self
        self.gpus = gpus
        self.has_nvrtc = nvrtc

    def getDeviceCount(self):
        if isinstance(self.gpus, str):
            raise self.CUDARuntimeError(self.gpus)
        return self.gpus

    def getVersion(self):
        if not self.has_nvrtc:
            raise RuntimeError("libnvrtc.so not found")
        return 13, 0


@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float64])
def test_auto_runs_torch_on_the_cpu_and_gives_the_same(dtype):
    case = Case(batch=2, groups=2, dtype=dtype, layout="planar")
    inputs = case.draw(CPU)
    y = case.scan(inputs, "auto")
    assert torch.equal(y, case.scan(inputs, "torch"))
    assert torch.equal(y, gspn2_scan(*inputs))
    assert_close(y, case.reference(inputs))


@pytest.mark.parametrize("layout", ["planar", "tokens"])
def test_cuda_is_refused_for_tensors_on_the_cpu_not_replaced(layout):
    case = Case(layout=layout)
    with pytest.raises(RuntimeError, match="backend='cuda': expected .* CUDA device, .*'cpu'"):
        case.scan(case.draw(CPU), "cuda")


@pytest.mark.parametrize("layout", ["planar", "tokens"])
def test_an_unknown_backend_is_named_with_those_there_are(layout):
    case = Case(layout=layout)
    message = "backend: expected one of auto, cuda, torch, got 'triton'"
    with pytest.raises(ValueError, match=message):
        case.scan(case.draw(CPU), "triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_dtypes_without_kernels_are_named(dtype, pretended_gpu):
    pretended_gpu(FakeCuPy(gpus=1))
    reason = backends.why_not_cuda(GPU, dtype)
    assert "float32" in reason and str(dtype).removeprefix("torch.") in reason


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_kernels_are_chosen_where_they_can_run(dtype, pretended_gpu):
    pretended_gpu(FakeCuPy(gpus=1))
    assert backends.why_not_cuda(GPU, dtype) is None


@pytest.mark.parametrize(
    "cupy, options, message",
    [
        (None, {}, r"CuPy cannot be imported.*pip install gspn2-diffusers\[cuda13\]"),
        (FakeCuPy("driver too old"), {}, "no usable GPU.*driver too old"),
        (FakeCuPy(gpus=0), {}, "CuPy sees 0 GPUs"),
        (FakeCuPy(gpus=1, nvrtc=False), {}, r"no NVRTC \(libnvrtc.so not found\): pip install"),
        (FakeCuPy(gpus=1), {"capability": (7, 0)}, "7.5 or newer, got 7.0"),
        (FakeCuPy(gpus=1), {"hip": "6.4"}, "ROCm"),
    ],
)
def test_what_is_missing_for_the_kernels_is_said(cupy, options, message, pretended_gpu):
    pretended_gpu(cupy, **options)
    reason = backends.why_not_cuda(GPU, torch.float32)
    assert reason is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(reason)


def test_importing_the_operator_does_not_import_cupy(tmp_path):
    program = "import sys, gspn2_diffusers.kernels; sys.exit('cupy' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize(
    "batch, channels, groups, height, width",
    [(1, 1, 1, 1, 1), (2, 6, 1, 5, 7), (1, 6, 3, 7, 4), (2, 5, 5, 1, 9), (1, 4, 2, 8, 1)],
)
def test_tokens_are_the_maps_they_hold_with_equal_gradients(
    batch, channels, groups, height, width, chunk_size
):
    case = Case(batch, channels, groups, height, width, layout="tokens", chunk_size=chunk_size)
    tokens = [t.double().requires_grad_() for t in case.draw(CPU)]
    again = [t.detach().clone().requires_grad_() for t in tokens]
    y = case.scan(tokens, "auto")
    maps = unpack_tokens(*again, (height, width), groups)
    expected = gspn2_scan(*maps, chunk_size=chunk_size)
    torch.testing.assert_close(y, expected)

    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, tokens, grad)
    for mine, reference in zip(grads, torch.autograd.grad(expected, again, grad), strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_tokens_in_low_precision_match_float64_and_keep_their_dtype(dtype):
    case = Case(batch=2, channels=6, groups=3, dtype=dtype, layout="tokens_of_one_projection")
    tokens = case.draw(CPU)
    y = case.scan(tokens, "auto")
    assert y.dtype == dtype
    assert_close(y, case.reference(tokens))


@pytest.mark.parametrize("grid", [(6, 5), [6, 5], torch.Size((6, 5))])
def test_the_grid_may_be_any_sequence(grid):
    x, params = Case(layout="tokens").draw(CPU)
    assert gspn2_scan_tokens(x, params, grid).shape == x.shape


@pytest.mark.parametrize(
    "proxy_dim, groups, width", [(1, 1, 32), (4, 1, 64), (80, 1, 976), (8, 8, 192), (16, 2, 224)]
)
def test_params_width_has_room_for_all_and_is_a_multiple_of_16(proxy_dim, groups, width):
    assert params_width(proxy_dim, groups) == width
    x, logits, *gates = Case(channels=proxy_dim, groups=groups).draw(CPU)
    assert pack_tokens(x, logits, *gates)[1].shape[-1] == width


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(30, 8)}, r"x: expected a non-empty \[B, N, P\] tensor, got \(30, 8\)"),
        ({"x": torch.zeros(1, 0, 8)}, "x: expected a non-empty"),
        ({"grid": (5, 5)}, "expected 25 tokens for a grid of 5 x 5, got 30"),
        ({"params": torch.zeros(1, 30, 100)}, r"params: expected .*30, 112\), got \(1, 30, 100\)"),
        ({"params": torch.zeros(1, 29, 112)}, "params: expected"),
        ({"groups": 3}, "groups that divides the 8 channels.*got 3"),
        ({"groups": 0}, "groups"),
        ({"groups": 4}, r"params: expected .*30, 160\), got \(1, 30, 112\)"),
        ({"chunk_size": 0}, "chunk_size: expected None or at least 1 line, got 0"),
    ],
)
def test_arguments_of_tokens_that_do_not_fit_are_named_with_what_was_expected(change, message):
    x, params = Case(layout="tokens").draw(CPU)
    with pytest.raises(ValueError, match=message):
        gspn2_scan_tokens(**{"x": x, "params": params, "grid": (6, 5)} | change)


def test_integer_tokens_are_refused():
    x, params = Case(layout="tokens").draw(CPU)
    with pytest.raises(TypeError, match="floating-point"):
        gspn2_scan_tokens(x.long(), params, (6, 5))


@pytest.mark.parametrize("store_hidden", [False, True])
def test_store_hidden_changes_nothing_but_memory(store_hidden):
    case = Case(store_hidden=store_hidden)
    inputs = [t.requires_grad_() for t in case.draw(CPU)]
    y = case.scan(inputs, "torch")
    plain = replace(case, store_hidden=False).scan(inputs, "torch")
    assert torch.equal(y, plain)
    for one, other in zip(
        torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(plain.sum(), inputs), strict=True
    ):
        assert torch.equal(one, other)
