"""The scan of inputs that lie in lines, as the CUDA kernels read them; here in plain torch."""

import pytest
import torch
from scan_cases import Case
from tolerances import assert_close

from gspn2_diffusers.kernels import gspn2_scan_lines
from gspn2_diffusers.kernels.cuda_scan import pack_maps, split_lines
from gspn2_diffusers.kernels.layout import LineLayout, pad

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
