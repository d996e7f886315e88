"""Results and gradients of the CUDA kernels against float64, over random and extreme cases."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from math import sqrt

import pytest
import torch
from scan_cases import INPUTS, LOW_PRECISION, TOKEN_INPUTS, Case, random_case
from tolerances import assert_close
from torch import Tensor

from gspn2_diffusers.kernels import gspn2_scan_lines, launch, plans
from gspn2_diffusers.kernels.dense import RELATIVE_RMS, relative_error
from gspn2_diffusers.kernels.lines import pack_maps

pytestmark = pytest.mark.gpu

FORWARD_BATCHES, CASES_PER_BATCH = 40, 54
BACKWARD_BATCHES, GRADIENTS_PER_BATCH = 8, 45


def check_result(case: Case, device: torch.device) -> None:
    """One forward pass against float64, in recycled memory full of NaN."""
    inputs = case.draw(device)
    fill_free_memory_with_nan(inputs)
    y = case.scan(inputs, backend="cuda")
    check("result", y, case.reference(inputs), case)


def check_gradients(case: Case, device: torch.device, layout_of_grad: Callable) -> None:
    """The gradients of all inputs against those of the float64 reference."""
    inputs = case.draw(device)
    generator = torch.Generator(device).manual_seed(case.seed + 1)
    shape = (case.batch, case.channels, case.height, case.width)
    grad = torch.randn(shape, generator=generator, device=device).to(case.dtype)
    grad = layout_of_grad(grad)
    fill_free_memory_with_nan(inputs)
    actual = gradients(lambda *t: case.scan(t, backend="cuda"), inputs, grad)
    exact_inputs = [t.double() for t in inputs]
    expected = gradients(lambda *t: case.reference(t), exact_inputs, grad.double())
    names = TOKEN_INPUTS if case.is_tokens else INPUTS
    for name, mine, exact in zip(names, actual, expected, strict=False):
        check(f"gradient of {name}", mine, exact, case)


def check(what: str, actual: Tensor, exact: Tensor, case: Case) -> None:
    """Hold a tensor to float64; a failure names the case.

    Rounding errors of the lines add up like a random walk: past 100 lines the tolerance grows with
    the root of their number. (In float64 too, a gradient that is zero comes out as rounding.)
    """
    assert actual.dtype == case.dtype and actual.shape == exact.shape, f"{what} of {case}"
    assert torch.isfinite(actual).all(), f"{what}: not all written with finite values: {case}"
    lines = max(case.height, case.width, 100)
    limit = RELATIVE_RMS[case.dtype] * sqrt(lines / 100)
    if exact.abs().max() < 1e-10:
        assert actual.abs().max() <= limit * lines, f"{what}: expected zero: {case}"
    else:
        error = relative_error(actual, exact)
        assert error <= limit, f"{what}: error {error:.2e}, allowed {limit:.1e}: {case}"


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor):
    leaves = [t.detach().requires_grad_() for t in inputs]
    # (Where a map has a single line, or chunks have, no result depends on the logits.)
    return torch.autograd.grad(function(*leaves), leaves, grad, materialize_grads=True)


def fill_free_memory_with_nan(like: list[Tensor]) -> None:
    """Leave NaN in the blocks that torch hands out next for tensors of these sizes."""
    waste = [torch.full((t.numel(),), torch.nan, dtype=t.dtype, device=t.device) for t in like]
    waste += [torch.full((4 * like[0].numel(),), torch.nan, device=like[0].device)]
    del waste


@pytest.mark.parametrize("batch", range(FORWARD_BATCHES))
def test_random_cases_match_float64(batch, device, poisoned):
    rng = random.Random(batch)
    for _ in range(CASES_PER_BATCH):
        check_result(random_case(rng), device)
    assert len(poisoned) >= CASES_PER_BATCH


@pytest.mark.parametrize("batch", range(BACKWARD_BATCHES))
def test_random_gradients_match_float64(batch, device, poisoned):
    rng = random.Random(1000 + batch)
    layouts_of_grad = (
        Tensor.contiguous,
        lambda grad: grad.to(memory_format=torch.channels_last),
        lambda grad: grad[:1, :1, :1, :1].expand_as(grad),  # of a sum
    )
    for _ in range(GRADIENTS_PER_BATCH):
        case = random_case(rng, largest=(40, 40))
        check_gradients(case, device, rng.choice(layouts_of_grad))
    assert len(poisoned) >= GRADIENTS_PER_BATCH


LONG_MAPS = [
    (1, 1500),
    (1500, 1),
    (3, 1501),
    (1502, 2),
    (40, 1500),
    (1030, 33),
    (1, 3000),
    (3001, 1),
    (2, 4097),
    (5000, 3),
    (1, 9000),
    (9000, 1),
]


@pytest.mark.parametrize("height, width", LONG_MAPS)
def test_long_lines_and_many_lines_match_float64(height, width, device, poisoned):
    shape = {"height": height, "width": width}
    for dtype, (channels, groups) in product(LOW_PRECISION, [(1, 1), (10, 2)]):
        case = Case(channels=channels, groups=groups, dtype=dtype, seed=height, **shape)
        check_result(case, device)
    check_result(Case(channels=16, chunk_size=100, layout="tokens", **shape), device)


@pytest.mark.parametrize("kernel", [plans.FORWARD, plans.BACKWARD])
@pytest.mark.parametrize("groups", [2, 16])
@pytest.mark.parametrize("width", [50, 250])
def test_every_division_of_the_work_is_right(width, groups, kernel, device, poisoned, monkeypatch):
    """All plans that fit a scan, not only the one that is expected to be the fastest."""
    case = Case(batch=2, channels=16, groups=groups, height=37, width=width, dtype=torch.bfloat16)
    make_plan, problems = launch.make_plan, []

    def run(planner):
        monkeypatch.setattr(launch, "make_plan", planner)
        launch._plan.cache_clear()
        check_result(case, device)
        check_gradients(case, device, Tensor.contiguous)

    def planned(plan, problem, gpu):
        if problem.kernel != kernel:
            return make_plan(problem, gpu)
        return replace(plan, variant=replace(plan.variant, output=problem.output))

    run(lambda *a: problems.append(a) or make_plan(*a))
    (problem, gpu), *_ = [args for args in problems if args[0].kernel == kernel]
    possible = list(plans.ring_plans(problem, gpu))
    assert len(possible) >= 2
    try:
        for plan in possible:
            try:
                run(partial(planned, plan))
            except AssertionError as error:
                raise AssertionError(f"{plan}: {error}") from error
    finally:
        launch._plan.cache_clear()


@pytest.mark.parametrize("store_hidden", [False, True])
@pytest.mark.parametrize("height, width", [(2, 1500), (1501, 2), (3000, 1)])
def test_gradients_over_long_maps_match_float64(height, width, store_hidden, device, poisoned):
    shape = {"height": height, "width": width, "store_hidden": store_hidden}
    for dtype in LOW_PRECISION:
        check_gradients(Case(channels=4, dtype=dtype, **shape), device, Tensor.contiguous)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("store_hidden", [False, True])
def test_gradients_are_right_for_any_subset_of_inputs_that_need_them(dtype, store_hidden, device):
    case = Case(batch=2, channels=6, groups=2, dtype=dtype, store_hidden=store_hidden)
    inputs = case.draw(device)
    complete = gradients(lambda *t: case.scan(t, "cuda"), inputs, torch.ones_like(inputs[0]))
    for wanted in product([False, True], repeat=len(inputs)):
        if not any(wanted):
            continue
        leaves = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
        case.scan(leaves, "cuda").backward(torch.ones_like(inputs[0]))
        for leaf, gradient in zip(leaves, complete, strict=True):
            assert (leaf.grad is not None) == leaf.requires_grad
            if leaf.grad is not None:
                assert_close(leaf.grad, gradient.double())


def test_extreme_logits_give_weights_that_sum_to_one(device):
    """Sigmoids that underflow in float32 (-500) and saturate (+500), mixed in every triple."""
    case = Case(channels=3, height=12, width=9, layout="planar")
    x, logits, *gates = case.draw(device)
    logits = 500 * logits.sign()
    y = case.scan([x, logits, *gates], "cuda")
    assert_close(y, case.reference([x, logits, *gates]))

    logits = torch.full_like(logits, -500).requires_grad_()
    y = case.scan([x, logits, *gates], "cuda")
    assert_close(y, case.reference([x, torch.zeros_like(logits), *gates]))
    y.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_nan_and_infinity_spread_no_further_than_the_scan_carries_them(device):
    """Nothing is read across channels, batch items or borders: 0 * NaN would show."""
    case = Case(batch=2, channels=4, groups=2, height=8, width=9, skip=False)
    x, logits, lam, u = case.draw(device)
    x[0, 1, 2, 2] = torch.nan
    y = case.scan([x, logits, lam, u], "cuda")
    hit = torch.isnan(y)
    assert hit[0, 1, 2, 2] and not hit[1].any() and not hit[0, [0, 2, 3]].any()
    assert torch.equal(hit, torch.isnan(case.reference([x, logits, lam, u])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_inputs_add_up_over_many_lines(dtype, device):
    lines = 512  # a bfloat16 sum of ones stops growing at 256
    case = Case(channels=2, height=lines, width=2, dtype=dtype, skip=False)
    x, logits, lam, u = case.draw(device)
    only_down = torch.zeros_like(lam)
    only_down[:, 0] = 1
    y = case.scan([torch.ones_like(x), logits, only_down, only_down], "cuda")
    torch.testing.assert_close(y[..., -1, :], torch.full_like(y[..., -1, :], lines))


@pytest.mark.parametrize("store_hidden", [False, True])
@pytest.mark.parametrize("layout", ["channels_last", "tokens"])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_runs_repeat_bit_for_bit(dtype, layout, store_hidden, device):
    """Hundreds of blocks on every multiprocessor, between other work that moves them about."""
    shape = {"batch": 2, "channels": 96, "groups": 4, "height": 200, "width": 170}
    case = Case(dtype=dtype, layout=layout, store_hidden=store_hidden, **shape)
    inputs = case.draw(device)
    grad = torch.randn(2, 96, 200, 170, device=device).to(dtype)

    def run():
        y = case.scan(inputs, "cuda")
        return y, *gradients(lambda *t: case.scan(t, "cuda"), inputs, grad)

    first = run()
    for _ in range(4):
        torch.randn(1000, 1000, device=device).mm(torch.randn(1000, 1000, device=device))
        for once, again in zip(first, run(), strict=True):
            assert torch.equal(once, again)


def test_storing_hidden_states_changes_time_and_memory_not_the_gradients(device):
    case = Case(batch=2, channels=16, height=33, width=31)
    inputs, grad = case.draw(device), torch.randn(2, 16, 33, 31, device=device)
    kept, recomputed = (
        gradients(lambda *t, c=c: c.scan(t, "cuda"), inputs, grad)
        for c in (replace(case, store_hidden=True), replace(case, store_hidden=False))
    )
    for one, other in zip(kept, recomputed, strict=True):
        assert_close(one, other.double())


@pytest.mark.parametrize("mixed", [("x",), ("logits",), ("lam", "skip")])
def test_inputs_of_different_dtypes_are_not_misread(mixed, device):
    case = Case(channels=4)
    named = zip(INPUTS, case.draw(device), strict=True)
    inputs = [t.bfloat16() if name in mixed else t for name, t in named]
    y = case.scan(inputs, "auto")
    assert y.dtype == inputs[0].dtype
    assert_close(y, case.reference(inputs))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("skip", [False, True])
def test_lines_are_scanned_where_they_lie(dtype, skip, device, poisoned):
    case = Case(batch=2, channels=6, groups=3, height=21, width=75, dtype=dtype, skip=skip)
    inputs = case.draw(device)
    lines = pack_maps(*inputs, *(() if skip else (None,)))
    options = {"proxy_dim": 6, "groups": 3, "skip": skip, "backend": "cuda"}
    y = gspn2_scan_lines(*lines, (21, 75), **options)
    check("result", y, case.reference(inputs).flatten(2).transpose(1, 2), case)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("grid", [(21, 75), (64, 64), (32, 100)])
def test_lines_may_lie_apart_and_in_any_order(dtype, grid, device, poisoned):
    """As matrix products for each column write them, and as slices of something larger."""
    height, width = grid
    case = Case(batch=2, channels=6, groups=3, height=height, width=width, dtype=dtype)
    inputs = case.draw(device)
    rows, columns = pack_maps(*inputs)
    columns = columns.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    larger = rows.new_full((2, height + 3, *rows.shape[2:]), torch.nan)
    larger[:, 1:-2] = rows
    unaligned = rows.new_full((*rows.shape[:3], rows.shape[3] + 1), torch.nan)
    unaligned[..., 1:] = rows
    exact = case.reference(inputs).flatten(2).transpose(1, 2)
    options = {"proxy_dim": 6, "groups": 3, "backend": "cuda"}

    def scan(*lines):
        leaves = [t.detach().requires_grad_() for t in lines]
        y = gspn2_scan_lines(*leaves, grid, **options)
        return y, *torch.autograd.grad(y.sum(), leaves)

    together = scan(rows, columns.contiguous())
    for some in (rows, larger[:, 1:-2], unaligned[..., 1:]):
        check("result", gspn2_scan_lines(some, columns, grid, **options), exact, case)
        for mine, expected in zip(scan(some, columns), together, strict=True):
            assert torch.isfinite(mine).all() and torch.equal(mine, expected)
