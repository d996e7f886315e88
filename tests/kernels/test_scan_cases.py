"""The float64 reference and the cases of the GPU tests, held to the dense affinity."""

import random

import pytest
import torch
from scan_cases import LAYOUTS, TOKEN_LAYOUTS, Case, pack_tokens, random_case, unpack_tokens
from tolerances import assert_close

from gspn2_diffusers.kernels.dense import dense_scan

SIZES = [(1, 1), (1, 7), (6, 1), (5, 7), (4, 4), (9, 2)]


def maps_of(case, inputs):
    """Inputs as `gspn2_scan` takes them."""
    if not case.is_tokens:
        return inputs
    return unpack_tokens(*inputs, (case.height, case.width), case.groups)


@pytest.mark.parametrize("layout", [*LAYOUTS, *TOKEN_LAYOUTS])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_reference_is_the_dense_affinity(layout, chunk_size):
    for seed, (height, width) in enumerate(SIZES):
        case = Case(
            batch=2,
            channels=4,
            groups=(1, 2, 4)[seed % 3],
            height=height,
            width=width,
            layout=layout,
            chunk_size=chunk_size,
            skip=seed % 2 == 0,
            seed=seed,
        )
        inputs = case.draw("cpu")
        expected = dense_scan(*maps_of(case, inputs), chunk_size=chunk_size)
        assert_close(case.reference(inputs), expected)


def test_reference_has_the_gradient_of_finite_differences():
    case = Case(batch=1, channels=2, groups=2, height=4, width=3, chunk_size=3, layout="planar")
    inputs = [t.double().requires_grad_() for t in case.draw("cpu")]
    assert torch.autograd.gradcheck(lambda *tensors: case.reference(tensors), inputs)


def test_tokens_unpack_to_what_was_packed():
    maps = Case(batch=2, channels=6, groups=3).draw("cpu")
    for packed, unpacked in zip(maps, unpack_tokens(*pack_tokens(*maps), (6, 5), 3), strict=True):
        assert torch.equal(packed, unpacked)


def test_random_cases_reach_every_layout_option_and_shape():
    rng = random.Random(0)
    cases = [random_case(rng) for _ in range(2000)]
    assert {case.layout for case in cases} == {*LAYOUTS, *TOKEN_LAYOUTS}
    assert len({case.channels for case in cases}) > 40
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16, torch.float16}
    for seen in (
        lambda case: case.height == 1 < case.width,
        lambda case: case.width == 1 < case.height,
        lambda case: case.groups == case.channels > 1,
        lambda case: 1 < case.groups < case.channels,
        lambda case: case.chunk_size is None and not case.skip and case.store_hidden,
        lambda case: case.chunk_size and case.height % case.chunk_size,
        lambda case: case.channels > 40,
    ):
        assert sum(map(bool, map(seen, cases))) > 50
