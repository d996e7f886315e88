"""Tensors past 2**31 elements: offsets must not wrap."""

import pytest
import torch
from scan_cases import Case, unpack_tokens
from tolerances import assert_close

from gspn2_diffusers.kernels import gspn2_scan_tokens, params_width

pytestmark = pytest.mark.gpu

HEIGHT, WIDTH, CHANNELS, CHUNK = 2048, 1100, 80, 8
ROWS = 64  # of the crop; a multiple of CHUNK, so that chunks begin where they do in the whole map
NEEDED_BYTES = 40 * 2**30


@pytest.fixture
def tokens(device):
    """x and params of one map in bfloat16, and the gradient of its result."""
    free, _ = torch.cuda.mem_get_info(device)
    if free < NEEDED_BYTES:
        pytest.skip(f"needs {NEEDED_BYTES >> 30} GiB of free GPU memory, has {free >> 30}")
    generator = torch.Generator(device).manual_seed(0)
    kind = {"generator": generator, "device": device, "dtype": torch.bfloat16}
    count, width = HEIGHT * WIDTH, params_width(CHANNELS, 1)
    assert count * width > 2**31
    x, params = torch.randn(1, count, CHANNELS, **kind), torch.randn(1, count, width, **kind)
    yield x, params, torch.randn(1, count, CHANNELS, **kind)
    torch.cuda.empty_cache()


def last_rows(tokens, rows=ROWS):
    return tokens[:, -rows * WIDTH :]


def test_the_last_rows_of_a_huge_map_are_those_of_a_small_one(tokens, device):
    """Chunks cut the influence of what was cropped away: it reaches less than CHUNK rows, and
    twice that in gradients."""
    x, params, grad = tokens
    x, params = x.requires_grad_(), params.requires_grad_()
    options = {"chunk_size": CHUNK, "backend": "cuda"}
    y = gspn2_scan_tokens(x, params, (HEIGHT, WIDTH), **options)
    grads = torch.autograd.grad(y, (x, params), grad)

    crop = [last_rows(t).detach().clone().requires_grad_() for t in (x, params)]
    case = Case(height=ROWS, width=WIDTH, chunk_size=CHUNK, channels=CHANNELS, layout="tokens")
    exact = case.reference(crop)
    exact_tokens = exact.flatten(2).transpose(1, 2)
    exact_grads = torch.autograd.grad(exact_tokens, crop, last_rows(grad).double())

    assert_close(last_rows(y, ROWS - CHUNK), last_rows(exact_tokens, ROWS - CHUNK))
    for mine, reference in zip(grads, exact_grads, strict=True):
        rows = ROWS - 2 * CHUNK
        assert_close(last_rows(mine, rows), last_rows(reference, rows))


def test_planar_inputs_past_two_to_the_31_elements_are_scanned(tokens, device):
    """The same through `gspn2_scan`: views whose offsets between directions and rows are large."""
    x, params, _ = tokens
    grid = (HEIGHT, WIDTH)
    inputs = unpack_tokens(x, params, grid, 1)
    case = Case(chunk_size=CHUNK)
    y = case.scan(list(inputs), "cuda")
    crop = [t[..., -ROWS:, :].float() for t in inputs]
    expected = case.reference(crop)
    assert_close(y[..., CHUNK - ROWS :, :], expected[..., CHUNK:, :])
