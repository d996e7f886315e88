"""Plans fit the device and cover the scan, whatever their sizes. No GPU needed."""

import random

import pytest
import torch

from gspn2_diffusers.kernels import plans
from gspn2_diffusers.kernels.plans import Device, Problem

KIB = 1024
# Turing, Ampere, a laptop's Ada, Hopper, a slice of one, Blackwell for data centres and laptops.
DEVICES = {
    "sm_75": Device((7, 5), 40, 64 * KIB),
    "sm_80": Device((8, 0), 108, 163 * KIB),
    "sm_89": Device((8, 9), 20, 99 * KIB),
    "sm_90": Device((9, 0), 132, 227 * KIB),
    "sm_90 slice": Device((9, 0), 16, 227 * KIB),
    "sm_100": Device((10, 0), 148, 227 * KIB),
    "sm_120": Device((12, 0), 20, 99 * KIB),
}


def random_problem(rng: random.Random) -> Problem:
    dtype = rng.choice(list(plans.NUMBER_FORMATS))
    channels = rng.choice([1, 2, 3, 6, 8, 16, 40, 80, 144, 160, 1152])
    groups = rng.choice([g for g in range(1, channels + 1) if channels % g == 0])
    height, width = (rng.choice([1, 7, 32, 64, 100, 256, 512, 1024, 5000]) for _ in range(2))
    kernel = rng.choice([plans.FORWARD, plans.BACKWARD])
    batch = rng.choice([1, 2, 16])
    return Problem(kernel, dtype, batch, height, width, channels, groups, rng.random() < 0.5)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_plans_cover_the_scan_and_fit_the_device(device):
    rng = random.Random(0)
    known = set(plans.variants(device.capability))
    for _ in range(300):
        problem = random_problem(rng)
        plan = plans.make_plan(problem, device)
        assert plan.variant in known, f"{plan.variant} is not among those compiled in the tests"
        check_plan(plan, problem, device)


def check_plan(plan, problem, device):
    variant, share = plan.variant, problem.channels // problem.groups
    parties = problem.batch * -(-problem.channels // plan.party)
    assert plan.threads % 32 == 0 and plan.threads <= variant.threads
    assert plan.shared_bytes <= device.shared_bytes
    longest = max(problem.height, problem.width)
    if not variant.stages:
        assert plan.blocks == 4 * parties and plan.counters == parties
        return
    assert share % variant.channels == 0 and plan.party % variant.channels == 0
    units = 4 * plan.party // variant.channels  # of a party: directions and channels of a thread
    if variant.strips:
        assert plan.blocks == units * parties and plan.counters == parties
        assert plan.threads // 32 * 28 * variant.vector >= longest
    else:
        assert plan.blocks == parties and plan.counters == 0
        assert plan.lanes * variant.vector >= longest and 32 % plan.lanes == 0
        assert plan.threads >= units * plan.lanes


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_division_that_is_offered_is_a_right_one(device):
    for seed in range(100):
        problem = random_problem(random.Random(seed))
        for plan in plans.ring_plans(problem, device):
            check_plan(plan, problem, device)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_blocks_that_wait_for_one_another_have_room_at_the_same_time(device):
    for seed in range(300):
        plan = plans.make_plan(random_problem(random.Random(seed)), device)
        if plan.counters:
            meeting = 4 * plan.party // plan.variant.channels if plan.variant.stages else 4
            assert meeting <= device.processors


def test_lines_too_wide_to_count_in_32_bits_run_the_kernels_without_a_ring():
    huge = Problem(plans.FORWARD, torch.float32, 1, 2000, 2000, 65536, 1, skip=True)
    assert not plans.make_plan(huge, DEVICES["sm_90"]).variant.stages


def test_the_layers_of_sdxl_never_run_the_slow_kernels():
    for device in DEVICES.values():
        for channels, side in [(80, 64), (160, 32), (80, 256), (160, 128), (80, 512), (160, 256)]:
            for kernel in (plans.FORWARD, plans.BACKWARD):
                problem = Problem(kernel, torch.bfloat16, 1, side, side, channels, 1, skip=True)
                assert plans.make_plan(problem, device).variant.stages


@pytest.mark.parametrize("batch", [1, 4, 16, 64, 256])
def test_gradients_take_two_positions_to_a_thread_only_while_warps_are_few(batch):
    device = DEVICES["sm_90"]
    problem = Problem(plans.BACKWARD, torch.bfloat16, batch, 128, 128, 160, 1, True)
    plan = plans.make_plan(problem, device)
    warps = plan.blocks * plan.threads / 32 / device.processors
    assert (plan.variant.vector == 2) == (batch == 1)
    assert plan.variant.vector == 4 or warps <= 10


@pytest.mark.parametrize("channels, groups, ready", [(80, 1, True), (32, 2, True), (80, 10, False)])
def test_weights_are_made_ready_where_many_channels_share_them(channels, groups, ready):
    problem = Problem(plans.FORWARD, torch.bfloat16, 1, 256, 256, channels, groups, True)
    assert plans.make_plan(problem, DEVICES["sm_90"]).variant.ready == ready


@pytest.mark.parametrize("kernel", [plans.FORWARD, plans.BACKWARD])
@pytest.mark.parametrize("result, skip", [(True, True), (True, False), (False, True)])
def test_a_forward_scan_has_a_variant_for_what_it_writes(kernel, result, skip):
    problem = Problem(kernel, torch.bfloat16, 1, 256, 256, 80, 1, skip, result)
    name = plans.make_plan(problem, DEVICES["sm_90"]).variant.name
    output = "HIDDEN" if not result else "RESULT_WITH_SKIP" if skip else "RESULT"
    assert name.endswith(f", {output}>") == (kernel == plans.FORWARD)


@pytest.mark.parametrize(
    "kernel, size, groups, fastest",
    [
        (plans.FORWARD, (1, 160, 32, 32), 1, (2, 1)),
        (plans.FORWARD, (1, 80, 64, 64), 1, (2, 1)),
        (plans.FORWARD, (2, 160, 64, 64), 1, (2, 1)),
        (plans.FORWARD, (8, 160, 64, 64), 1, (4, 4)),
        (plans.FORWARD, (1, 1152, 64, 64), 144, (4, 4)),
        (plans.FORWARD, (1, 80, 128, 128), 1, (2, 1)),
        (plans.FORWARD, (1, 160, 128, 128), 1, (2, 1)),
        (plans.FORWARD, (2, 160, 128, 128), 1, (2, 2)),
        (plans.FORWARD, (1, 1152, 128, 128), 1, (2, 2)),
        (plans.FORWARD, (1, 80, 256, 256), 1, (2, 1)),
        (plans.FORWARD, (1, 160, 256, 256), 1, (4, 1)),
        (plans.FORWARD, (4, 80, 256, 256), 1, (4, 1)),
        (plans.FORWARD, (8, 64, 256, 256), 8, (2, 2)),
        (plans.FORWARD, (1, 40, 512, 512), 1, (2, 1)),
        (plans.FORWARD, (1, 80, 512, 512), 1, (4, 1)),
        (plans.FORWARD, (1, 160, 512, 512), 1, (8, 1)),
        (plans.FORWARD, (1, 128, 512, 512), 16, (2, 4)),
        (plans.FORWARD, (1, 24, 1024, 1024), 1, (2, 1)),
        (plans.FORWARD, (1, 80, 1024, 1024), 1, (8, 1)),
        (plans.FORWARD, (1, 80, 1024, 1024), 10, (4, 4)),
        (plans.BACKWARD, (1, 80, 128, 128), 1, (2, 1)),
        (plans.BACKWARD, (1, 160, 128, 128), 1, (2, 2)),
        (plans.BACKWARD, (1, 80, 512, 512), 1, (2, 4)),
        (plans.BACKWARD, (1, 160, 512, 512), 1, (4, 4)),
    ],
)
def test_the_shape_of_a_thread_is_the_one_that_was_fastest_on_an_h100(
    kernel, size, groups, fastest
):
    batch, channels, height, width = size
    problem = Problem(kernel, torch.bfloat16, batch, height, width, channels, groups, True)
    variant = plans.make_plan(problem, DEVICES["sm_90"]).variant
    assert (variant.vector, variant.channels) == fastest
