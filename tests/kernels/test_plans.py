"""Plans fit the device and cover the scan, whatever their sizes. No GPU needed."""

import random

import pytest
import torch

from gspn2_diffusers.kernels import plans
from gspn2_diffusers.kernels.plans import Device, Problem

KIB = 1024
# Turing, Ampere, a laptop's Ada, Hopper, a slice of one, Blackwell for data centres and laptops.
DEVICES = {
    "sm_75": Device((7, 5), 40, 64 * KIB, 4 << 20),
    "sm_80": Device((8, 0), 108, 163 * KIB, 40 << 20),
    "sm_89": Device((8, 9), 20, 99 * KIB, 24 << 20),
    "sm_90": Device((9, 0), 132, 227 * KIB, 50 << 20),
    "sm_90 slice": Device((9, 0), 16, 227 * KIB, 6 << 20),
    "sm_100": Device((10, 0), 148, 227 * KIB, 126 << 20),
    "sm_120": Device((12, 0), 20, 99 * KIB, 24 << 20),
}


def random_problem(rng: random.Random) -> Problem:
    dtype = rng.choice(list(plans.NUMBER_FORMATS))
    channels = rng.choice([1, 2, 3, 6, 8, 16, 40, 80, 144, 160, 1152])
    groups = rng.choice([g for g in range(1, channels + 1) if channels % g == 0])
    share = channels // groups
    widths = [v for v in (1, 2, 4, 8) if v * dtype.itemsize <= 16 and channels % v == 0]
    vector = rng.choice([v for v in widths if share == 1 or share % v == 0])
    height, width = (rng.choice([1, 7, 32, 64, 100, 256, 512, 1024, 5000]) for _ in range(2))
    kernel = rng.choice([plans.FORWARD, plans.BACKWARD])
    batch = rng.choice([1, 2, 16])
    return Problem(
        kernel, dtype, batch, height, width, channels, groups, vector, rng.random() < 0.5
    )


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_plans_cover_the_scan_and_fit_the_device(device):
    rng = random.Random(0)
    known = set(plans.variants(device.capability))
    for _ in range(300):
        problem = random_problem(rng)
        plan = plans.make_plan(problem, device)
        variant = plan.variant
        assert variant in known, f"{variant} is not among those that are compiled in the tests"
        assert plan.segment * variant.cluster >= max(problem.height, problem.width)
        chunks = -(-problem.channels // plan.chunk)
        assert plan.blocks == problem.batch * 4 * chunks * variant.cluster
        if variant.stages:
            assert plan.threads >= plan.segment * plan.chunk // variant.vector
            assert plan.threads % 32 == 0 and plan.threads <= variant.threads
            assert plan.shared_bytes + plans.RESERVED_BYTES <= device.shared_bytes


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_blocks_that_wait_for_one_another_have_room_at_the_same_time(device):
    for seed in range(300):
        plan = plans.make_plan(random_problem(random.Random(seed)), device)
        assert 4 * plan.variant.cluster <= device.processors / 2 or plan.variant.cluster == 1


@pytest.mark.parametrize("name", ["sm_75", "sm_80", "sm_89"])
def test_devices_without_clusters_get_none(name):
    assert DEVICES[name].clusters == (1,)


def test_the_layers_of_sdxl_never_run_the_slow_kernels():
    for device in DEVICES.values():
        for channels, side in [(80, 64), (160, 32), (80, 256), (160, 128), (80, 512), (160, 256)]:
            problem = Problem(
                plans.FORWARD, torch.bfloat16, 1, side, side, channels, 1, 8, skip=True
            )
            assert plans.make_plan(problem, device).variant.stages
