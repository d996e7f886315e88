"""What surrounds the launches of the CUDA kernels, where there is no GPU."""

import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from gspn2_diffusers.kernels import launch


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for CuPy's, which takes `seconds` for a kernel."""
    found = SimpleNamespace(seconds=0.0, kernel=SimpleNamespace(kernel="compiled"))

    def get_function(name):
        time.sleep(found.seconds)
        return found.kernel

    module = SimpleNamespace(get_function=get_function)
    device = lambda index: nullcontext()  # noqa: E731
    cupy = SimpleNamespace(RawModule=lambda **_: module, cuda=SimpleNamespace(Device=device))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(launch.Device, "of", lambda _: SimpleNamespace(shared_bytes=0))
    monkeypatch.setattr(launch, "SECONDS_TO_LOAD", 0.05)
    monkeypatch.setattr(launch, "_functions", {})
    launch._say_that_kernels_are_compiled.cache_clear()
    return found


def test_kernels_that_have_to_be_compiled_are_announced_once(compiler, caplog):
    compiler.seconds = 0.5
    assert launch.load("first<int>", 0) == launch.load("second<int>", 0) == "compiled"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "Compiling the CUDA kernels" in record.message


def test_kernels_from_the_cache_are_not(compiler, caplog):
    assert launch.load("first<int>", 0) == "compiled"
    time.sleep(0.2)
    assert not caplog.records


def test_a_kernel_is_compiled_once_for_each_device(compiler):
    first = launch.load("first<int>", 0)
    compiler.kernel = SimpleNamespace(kernel="compiled again")
    assert launch.load("first<int>", 0) is first
    assert launch.load("first<int>", 1) == "compiled again"


@pytest.mark.parametrize(
    "channels, width, in_rows", [(1, 16, True), (1, 12, False), (2, 16, False)]
)
def test_one_channel_is_not_packed_along_its_rows(channels, width, in_rows, monkeypatch):
    launched = []
    monkeypatch.setattr(launch, "launch", lambda *call: launched.append(call))
    sizes = launch.Sizes(2, 8, width, channels, 1, 0, False)
    x = torch.randn(2, 8 * width, channels).half()
    rows, columns, _ = launch.pack(x, None, sizes)
    assert (rows.shape, columns.shape) == ((2, 8, channels, 16), (2, width, channels, 8))
    assert (rows.data_ptr() == x.data_ptr()) == in_rows
    ((_, blocks, _, _, arguments, _),) = launched
    assert arguments[3:5] == (0 if in_rows else rows.data_ptr(), columns.data_ptr())
    assert blocks == 2 * (1 if in_rows else 2)  # a tile of 64 by 64 for each image and wanted axis
