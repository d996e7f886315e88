"""Distillation on a GPU: the kernels give the losses and gradients of plain torch."""

import pytest
import torch
from tiny_models import awaken
from tiny_teachers import FAMILIES, patched_pipeline, random_batch

from gspn2_diffusers.distillation.batches import Batch
from gspn2_diffusers.distillation.losses import Distillation, LossWeights
from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.noising import Noising

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """Convolutions in TF32 would blur the comparisons."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def to_device(batch: Batch, device: str) -> Batch:
    moved = [
        {name: column.to(device) for name, column in field.items()}
        if isinstance(field, dict)
        else field.to(device)
        for field in batch
    ]
    return Batch(*moved)


def run(family, stage, size, backend, device, dtype=None):
    """Loss and gradients of a student whose blocks are awake, at `size` latents."""
    pipe, adapter = patched_pipeline(family)
    awaken(find_denoiser(pipe))
    for block in adapter.blocks:
        block.backend = backend
    weights = LossWeights(guided=0.5)
    distillation = Distillation(find_denoiser(pipe), Noising(pipe.scheduler), weights).to(device)
    batch = to_device(random_batch(family, size=size), device)
    with torch.autocast(device, dtype, dtype is not None):
        loss = distillation(batch, stage)["loss"]
    loss.backward()
    return loss.item(), torch.cat([p.grad.float().flatten().cpu() for p in adapter.parameters()])


@pytest.mark.parametrize("size", [8, 12])
@pytest.mark.parametrize("stage", ["teacher_forcing", "end_to_end"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_give_the_losses_and_gradients_of_plain_torch(family, stage, size):
    if family == "dit" and size != 8:
        pytest.skip("DiT has one size only")
    loss, gradient = run(family, stage, size, "cuda", "cuda")
    expected, expected_gradient = run(family, stage, size, "torch", "cpu")
    assert loss == pytest.approx(expected, rel=1e-3)
    difference = (gradient - expected_gradient).norm() / expected_gradient.norm()
    assert difference < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_losses_are_near_those_in_float32(dtype):
    loss, gradient = run("sd", "end_to_end", 8, "cuda", "cuda", dtype)
    expected, _ = run("sd", "end_to_end", 8, "torch", "cpu")
    assert loss == pytest.approx(expected, rel=0.1) and gradient.isfinite().all()
