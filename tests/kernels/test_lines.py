"""The scan of inputs that lie in lines, as the CUDA kernels read them; here in plain torch."""

import pytest
import torch
from scan_cases import Case
from tolerances import assert_close

from gspn2_diffusers.kernels import gspn2_scan, gspn2_scan_lines, launch
from gspn2_diffusers.kernels.layout import LineLayout, pad
from gspn2_diffusers.kernels.lines import pack_maps, split_lines

CASE = Case(batch=2, channels=6, groups=3, height=5, width=9, layout="planar")
GRID = (CASE.height, CASE.width)


def lines_of(case, inputs):
    return pack_maps(*inputs, *(() if case.skip else (None,)))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lines_scan_to_what_their_maps_scan_to(dtype, skip):
    case = Case(batch=2, channels=6, groups=3, height=5, width=9, dtype=dtype, skip=skip)
    inputs = case.draw("cpu")
    options = {"proxy_dim": 6, "groups": 3, "skip": skip, "chunk_size": 3}
    y = gspn2_scan_lines(*lines_of(case, inputs), (5, 9), **options)
    exact = Case(height=5, width=9, chunk_size=3).reference(inputs)
    assert_close(y, exact.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("skip", [False, True])
def test_gradients_of_lines_are_those_of_their_maps(skip):
    case = Case(batch=2, channels=6, groups=3, height=5, width=9, dtype=torch.float64, skip=skip)
    maps = [t.requires_grad_() for t in case.draw("cpu")]
    options = {"chunk_size": 3, "native_grid": (7, 4)}
    lines = [t.detach().requires_grad_() for t in lines_of(case, maps)]
    y = gspn2_scan_lines(*lines, (5, 9), proxy_dim=6, groups=3, skip=skip, **options)
    weight = torch.randn_like(y)
    torch.autograd.backward(lines_of(case, maps), torch.autograd.grad(y, lines, weight))
    leaves = [t.detach().requires_grad_() for t in maps]
    expected = torch.autograd.grad(
        gspn2_scan(*leaves, **options), leaves, weight.mT.unflatten(2, GRID)
    )
    torch.testing.assert_close([t.grad for t in maps], list(expected))


def test_the_operator_of_lines_passes_opcheck():
    lines = [t.requires_grad_() for t in lines_of(CASE, CASE.draw("cpu"))]
    sizes = CASE.height, CASE.width, CASE.channels, CASE.groups, 2, True, 3, 0
    torch.library.opcheck(torch.ops.gspn2_diffusers.torch_scan_lines, (*lines, *sizes))


def test_lines_may_have_any_strides():
    rows, columns = lines_of(CASE, CASE.draw("cpu"))
    options = {"proxy_dim": 6, "groups": 3}
    y = gspn2_scan_lines(rows, columns, GRID, **options)
    turned = columns.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    assert torch.equal(gspn2_scan_lines(rows, turned, GRID, **options), y)


@pytest.mark.parametrize(
    "lines, copied",
    [
        (torch.randn(2, 5, 60, 8).half(), False),
        (torch.randn(2, 8, 60, 8).half()[:, 1:6], False),
        (torch.randn(8, 60, 2, 8).half().permute(2, 0, 1, 3), False),
        (torch.randn(2 * 5 * 60 * 8 + 1).half()[1:].view(2, 5, 60, 8), True),  # not at 16 bytes
        (torch.randn(2, 5, 60, 12).half()[..., :8], True),  # rows are not
        (torch.randn(2, 5, 8, 60).half().mT, True),  # positions apart
    ],
)
def test_the_kernels_read_lines_where_they_are_if_vectors_are_aligned(lines, copied):
    read = launch._readable(lines)
    assert torch.equal(read, lines)
    assert (read is not lines) == copied
    assert not read.data_ptr() % 16 and read.stride(-1) == 1
    assert not any(stride % 8 for stride in read.stride()[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_maps_come_back_from_their_lines_and_padding_is_zero(dtype):
    inputs = [t.to(dtype) for t in CASE.draw("cpu")]
    rows, columns = lines_of(CASE, inputs)
    layout = LineLayout(6, 3, True)
    for mine, maps in zip(split_lines(rows, columns, GRID, layout), inputs, strict=True):
        assert torch.equal(mine, maps)
    assert rows.shape == (2, 5, layout.rows, pad(9, dtype.itemsize))
    assert columns.shape == (2, 9, layout.rows, pad(5, dtype.itemsize))
    assert not rows[..., 9:].any() and not columns[..., 5:].any()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda r, c: (r[:, :4], c), ValueError, r"rows: expected shape \(2, 5, 60, 12\)"),
        (lambda r, c: (r, c[..., :5]), ValueError, r"columns: expected shape \(2, 9, 60, 8\)"),
        (lambda r, c: (r, c.double()), TypeError, "columns: expected the dtype of rows"),
        (lambda r, c: (r.int(), c), TypeError, "rows: expected a floating-point tensor"),
        (lambda r, c: (r[0], c), ValueError, "rows: expected a non-empty"),
    ],
)
def test_lines_that_do_not_fit_are_refused(change, error, message):
    rows, columns = change(*lines_of(CASE, CASE.draw("cpu")))
    with pytest.raises(error, match=message):
        gspn2_scan_lines(rows, columns, GRID, proxy_dim=6, groups=3)
