"""The scan operator against a dense float64 affinity, impulses, and numerical gradients."""

import random

import pytest
import torch
from tolerances import assert_close

from gspn2_diffusers.kernels import DIRECTIONS, gspn2_scan
from gspn2_diffusers.kernels.dense import dense_scan
from gspn2_diffusers.kernels.layout import TokenLayout
from gspn2_diffusers.kernels.line_scan import normalize_
from gspn2_diffusers.kernels.reference import scan_tokens_reference


def random_inputs(batch, channels, groups, height, width, *, dtype=torch.float64, seed=0):
    """x, logits, lam, u, skip with values that exercise every term."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    gates = [draw(batch, 4, channels, height, width) for _ in range(3)]
    return (
        draw(batch, channels, height, width),
        2 * draw(batch, 4, groups, 3, height, width),
        *gates,
    )


def propagation_weights(logits):
    """Weights from logits, both ``[..., 3, lines, length]``."""
    taps_first = logits.movedim(-3, 0)[..., None, None].clone()
    normalize_(taps_first)
    return taps_first[..., 0, 0].movedim(0, -3)


def random_case(seed):
    """One of the 200 random combinations of shape and options."""
    rng = random.Random(seed)
    channels = rng.choice([1, 2, 3, 4, 6])
    groups = rng.choice([g for g in range(1, channels + 1) if channels % g == 0])
    height, width = rng.choice([(1, 1), (1, 7), (6, 1), (5, 7), (4, 4), (7, 5), (3, 8), (9, 2)])
    return {
        "shape": (rng.choice([1, 2, 3]), channels, groups, height, width),
        "chunk_size": rng.choice([None, None, 1, 2, 3, 4, 100]),
        "skip": rng.random() < 0.7,
        "dtype": rng.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    }


@pytest.mark.parametrize("seed", range(200))
def test_matches_the_dense_affinity_for_any_shape_and_option(seed):
    case = random_case(seed)
    x, logits, lam, u, skip = random_inputs(*case["shape"], dtype=case["dtype"], seed=seed)
    skip = skip if case["skip"] else None
    y = gspn2_scan(x, logits, lam, u, skip, chunk_size=case["chunk_size"])
    assert y.dtype == case["dtype"]
    assert_close(y, dense_scan(x, logits, lam, u, skip, chunk_size=case["chunk_size"]))


@pytest.mark.parametrize("direction", range(4), ids=DIRECTIONS)
def test_an_impulse_travels_only_in_the_direction_of_its_scan(direction):
    height, width, row, column = 5, 7, 2, 3
    x, logits, _, _, _ = random_inputs(1, 1, 1, height, width)
    x = torch.zeros_like(x)
    x[..., row, column] = 1
    only = torch.zeros(1, 4, 1, height, width, dtype=torch.float64)
    only[:, direction] = 1
    reached = gspn2_scan(x, logits, only, only)[0, 0] > 0

    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width)[None].expand(height, width)
    ahead = (rows - row, row - rows, columns - column, column - columns)[direction]
    aside = (columns - column if direction < 2 else rows - row).abs()
    assert torch.equal(reached, (ahead >= 0) & (aside <= ahead))


@pytest.mark.parametrize("direction", range(4), ids=DIRECTIONS)
@pytest.mark.parametrize("tap", range(3), ids=["left", "center", "right"])
def test_each_tap_reads_its_own_neighbour(direction, tap):
    size, row, column = 5, 2, 2
    x = torch.zeros(1, 1, size, size, dtype=torch.float64)
    x[..., row, column] = 1
    only = torch.zeros(1, 4, 1, size, size, dtype=torch.float64)
    only[:, direction] = 1
    logits = torch.full((1, 4, 1, 3, size, size), -60.0, dtype=torch.float64)
    logits[:, :, :, tap] = 60
    y = gspn2_scan(x, logits, only, only)[0, 0]
    # A left tap reads position j - 1, so the impulse moves to j + 1 on the next line.
    step, shift = (1, -1, 1, -1)[direction], (1, 0, -1)[tap]
    reached = (row + step, column + shift) if direction < 2 else (row + shift, column + step)
    assert y[reached] == pytest.approx(1.0)


def test_propagation_weights_sum_to_one_on_every_row_and_leave_out_what_does_not_exist():
    logits = 200 * torch.randn(2, 3, 4, 6)
    weights = propagation_weights(logits)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 4, 6))
    assert (weights[:, 0, :, 0] == 0).all() and (weights[:, 2, :, -1] == 0).all()


def test_a_line_of_one_element_propagates_by_the_center_tap_alone():
    weights = propagation_weights(torch.randn(3, 4, 1))
    assert torch.equal(weights[:, :, 0], torch.tensor([[0.0], [1.0], [0.0]]).expand(3, 4))


def test_weights_stay_finite_where_every_sigmoid_underflows():
    weights = propagation_weights(torch.full((3, 2, 5), -500.0))
    torch.testing.assert_close(weights.sum(0), torch.ones(2, 5))


def test_a_constant_map_stays_constant_along_lines():
    """The Stability-Context Condition: with lam only on the first line, h carries it through."""
    _, logits, *_ = random_inputs(1, 2, 1, 6, 6)
    x = torch.ones(1, 2, 6, 6, dtype=torch.float64)
    lam = torch.zeros(1, 4, 2, 6, 6, dtype=torch.float64)
    lam[:, 0, :, 0] = 1
    only_down = torch.zeros_like(lam)
    only_down[:, 0] = 1
    torch.testing.assert_close(gspn2_scan(x, logits, lam, only_down), x)


@pytest.mark.parametrize(
    "shape, chunk_size",
    [((2, 4, 2, 3, 4), None), ((1, 2, 1, 4, 4), 2), ((1, 2, 2, 1, 5), None), ((1, 3, 1, 5, 1), 3)],
)
def test_gradients_of_every_input_match_finite_differences(shape, chunk_size):
    inputs = [t.requires_grad_() for t in random_inputs(*shape)]
    assert torch.autograd.gradcheck(lambda *a: gspn2_scan(*a, chunk_size=chunk_size), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_in_low_precision_match_float64(dtype):
    exact = [t.requires_grad_() for t in random_inputs(2, 4, 2, 9, 6)]
    rough = [t.detach().to(dtype).requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in rough]
    grad = torch.randn(2, 4, 9, 6).to(dtype)
    gspn2_scan(*exact).backward(grad.double())
    gspn2_scan(*rough).backward(grad)
    for fine, coarse in zip(exact, rough, strict=True):
        assert_close(coarse.grad, fine.grad)


def test_float32_accumulation_keeps_small_inputs_over_many_lines_in_bfloat16():
    lines = 512  # a bfloat16 sum of ones stops growing at 256
    x = torch.ones(1, 1, lines, 1, dtype=torch.bfloat16)
    logits = torch.zeros(1, 4, 1, 3, lines, 1, dtype=torch.bfloat16)
    only_down = torch.zeros(1, 4, 1, lines, 1, dtype=torch.bfloat16)
    only_down[:, 0] = 1
    assert gspn2_scan(x, logits, only_down, only_down)[0, 0, -1, 0] == lines


def test_non_contiguous_inputs_give_the_same_result():
    inputs = random_inputs(2, 4, 2, 6, 5)
    strided = [t.movedim(-1, 0).contiguous().movedim(0, -1) for t in inputs]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(gspn2_scan(*strided), gspn2_scan(*inputs))


def test_gradients_of_non_contiguous_inputs_are_the_same():
    inputs = random_inputs(2, 4, 2, 6, 6)
    strided = [t.movedim(-1, 0).contiguous().movedim(0, -1) for t in inputs]
    grads = [
        torch.autograd.grad(gspn2_scan(*leaves).square().sum(), leaves)
        for leaves in ([t.requires_grad_() for t in inputs], [t.requires_grad_() for t in strided])
    ]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("height, width", [(5, 5), (4, 7)])
def test_what_is_not_finite_in_one_image_stays_out_of_the_others(height, width):
    inputs = random_inputs(3, 2, 1, height, width)
    expected = gspn2_scan(*inputs)
    inputs[0][1] = torch.nan
    y = gspn2_scan(*inputs)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], expected[[0, 2]])


def random_tokens(batch, channels, groups, height, width):
    """x and params as the projections of a block write them."""
    layout = TokenLayout(channels, groups)
    generator = torch.Generator().manual_seed(0)
    sizes = (batch, height * width)
    x = torch.randn(*sizes, channels, generator=generator, dtype=torch.float64)
    params = torch.randn(*sizes, layout.width, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), params.requires_grad_()


@pytest.mark.parametrize("shape", [(2, 3, 1, 4, 4), (1, 4, 2, 3, 5), (1, 2, 2, 1, 6)])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_tokens_give_the_values_and_gradients_of_the_maps_they_hold(shape, chunk_size):
    _, channels, groups, height, width = shape
    x, params = random_tokens(*shape)
    y = scan_tokens_reference(x, params, height, width, groups, chunk_size or 0, 0, 0)
    maps = [
        t.movedim(1, -1).unflatten(-1, (height, width))
        for t in (x, *TokenLayout(channels, groups).split(params))
    ]
    expected = gspn2_scan(*maps, chunk_size=chunk_size).flatten(2).transpose(1, 2)
    torch.testing.assert_close(y, expected)
    grads, expected_grads = (
        torch.autograd.grad(result.square().sum(), (x, params)) for result in (y, expected)
    )
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("height, width", [(4, 4), (3, 5)])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_native_grid_scales_lam_by_axis(height, width, chunk_size):
    x, logits, lam, u, skip = (t.requires_grad_() for t in random_inputs(2, 4, 2, height, width))
    options = {"chunk_size": chunk_size}
    y = gspn2_scan(x, logits, lam, u, skip, native_grid=(6, 2), **options)
    scales = torch.tensor([6 / height, 6 / height, 2 / width, 2 / width], dtype=torch.float64)
    scaled = lam * scales[:, None, None, None]
    expected = gspn2_scan(x, logits, scaled, u, skip, **options)
    torch.testing.assert_close(y, expected)
    grads, expected_grads = (
        torch.autograd.grad(result.square().sum(), (x, logits, lam, u, skip))
        for result in (y, expected)
    )
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("height, width", [(4, 4), (4, 5)])
def test_operators_pass_opcheck_and_compile_without_graph_breaks(height, width):
    inputs = [t.float().requires_grad_() for t in random_inputs(1, 2, 1, height, width)]
    operators = torch.ops.gspn2_diffusers
    torch.library.opcheck(operators.torch_scan, (*inputs, 3, 0, 0))
    torch.library.opcheck(operators.torch_scan, (*inputs[:-1], None, 0, 7, 2))
    tokens = random_tokens(1, 2, 1, height, width)
    torch.library.opcheck(operators.torch_scan_tokens, (*tokens, height, width, 1, 0, 8, 3))
    compiled = torch.compile(gspn2_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), gspn2_scan(*inputs))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 4, 5)}, r"x: expected a non-empty \[B, P, H, W\]"),
        ({"x": torch.zeros(2, 4, 0, 5)}, "x: expected a non-empty"),
        ({"logits": torch.zeros(2, 4, 3, 3, 6, 5)}, "groups that divides the 4 channels.*got 3"),
        ({"logits": torch.zeros(2, 4, 2, 3, 5, 6)}, r"logits: expected shape .*6, 5\), got"),
        ({"lam": torch.zeros(2, 4, 4, 5, 6)}, r"lam: expected shape \(2, 4, 4, 6, 5\), got"),
        ({"u": torch.zeros(2, 2, 4, 6, 5)}, "u: expected shape"),
        ({"skip": torch.zeros(1)}, "skip: expected shape"),
        ({"chunk_size": 0}, "chunk_size: expected None or at least 1 line, got 0"),
        ({"native_grid": (0, 5)}, r"native_grid: expected None or a height and .* got \(0, 5\)"),
        ({"native_grid": (5,)}, "native_grid: expected None or a height and a width"),
    ],
)
def test_arguments_that_do_not_fit_are_named_with_what_was_expected(change, message):
    names = ("x", "logits", "lam", "u", "skip")
    arguments = dict(zip(names, random_inputs(2, 4, 2, 6, 5), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        gspn2_scan(**arguments)


def test_integer_features_are_refused():
    x, *rest = random_inputs(1, 1, 1, 2, 2)
    with pytest.raises(TypeError, match="floating-point"):
        gspn2_scan(x.long(), *rest)
