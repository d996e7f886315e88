"""Patched models on a GPU: the CUDA kernels draw what the torch implementation draws."""

import copy

import pytest
import torch
from accelerate.utils import send_to_device
from tiny_models import awaken, tiny_denoiser, tiny_sd_pipeline

from gspn2_diffusers import GSPN2Adapter, GSPN2Block, GSPN2Config, apply_gspn2, fuse_gspn2
from gspn2_diffusers.fuse import fuse_block
from gspn2_diffusers.kernels import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::gspn2_diffusers.UntrainedBlocksWarning"),
]


@pytest.fixture
def torch_backend(monkeypatch):
    """A function that makes backend="auto" take torch from then on."""

    def switch():
        monkeypatch.setattr(backends, "why_not_cuda", lambda *_: "switched off by a test")

    return switch


def near(actual, expected, tolerance):
    error = (actual.double() - expected.double()).square().mean().sqrt()
    return error <= tolerance * expected.double().square().mean().sqrt()


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """Convolutions in TF32 would blur the comparisons."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def with_inputs_on(device, model):
    """A function that sends its inputs to `device` and calls the model."""

    def call(*args, **kwargs):
        return model(*send_to_device(args, device), **send_to_device(kwargs, device))

    return call


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
@pytest.mark.parametrize("family", ["unet", "sdxl", "dit", "pixart"])
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_patched_models_compute_the_same_with_both_backends(
    fused, family, dtype, tolerance, device, torch_backend
):
    model, run = tiny_denoiser(family)
    awaken(apply_gspn2(model, GSPN2Config())).to(device, dtype)
    if fused:
        fuse_gspn2(model)
    call = with_inputs_on(device, model)
    sizes = [(8, 8)] if family == "dit" else [(8, 8), (12, 10), (2, 16)]
    fast = [run(call, 2, *size, dtype=dtype) for size in sizes]
    torch_backend()
    for size, image in zip(sizes, fast, strict=True):
        assert torch.isfinite(image).all()
        assert near(image, run(call, 2, *size, dtype=dtype), tolerance)


@pytest.mark.parametrize("config", [GSPN2Config(groups=None), GSPN2Config(chunk_size=3)])
def test_training_a_patched_model_gives_the_gradients_of_torch(config, device, torch_backend):
    model, run = tiny_denoiser("unet")
    call = with_inputs_on(device, awaken(apply_gspn2(model, config)).to(device))

    def gradients():
        model.zero_grad()
        run(call, 2).square().mean().backward()
        adapter = GSPN2Adapter.of_patched(model)
        return {name: weight.grad.clone() for name, weight in adapter.named_parameters()}

    fast = gradients()
    torch_backend()
    for name, gradient in gradients().items():
        assert near(fast[name], gradient, 1e-3), name


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a", num_inference_steps=2, generator=generator, output_type="pt").images.cpu()


@pytest.fixture
def adapter():
    """Blocks for `tiny_sd_pipeline` that are not a no-op."""
    return awaken(GSPN2Adapter.for_model(tiny_sd_pipeline(), GSPN2Config()))


@pytest.fixture
def image(adapter, device):
    """What a pipeline patched with them draws, without offload."""
    return draw(apply_gspn2(tiny_sd_pipeline().to(device), copy.deepcopy(adapter)))


@pytest.mark.parametrize("first", ["patch", "offload"])
def test_model_offload_and_patching_work_in_either_order(first, adapter, image):
    pipe = tiny_sd_pipeline()
    steps = [lambda: apply_gspn2(pipe, adapter), pipe.enable_model_cpu_offload]
    for step in steps if first == "patch" else reversed(steps):
        step()
    assert near(draw(pipe), image, 1e-4)
    assert next(pipe.unet.parameters()).device.type == "cpu"


def test_sequential_offload_works_after_patching(adapter, image):
    pipe = apply_gspn2(tiny_sd_pipeline(), adapter)
    pipe.enable_sequential_cpu_offload()
    assert near(draw(pipe), image, 1e-4)


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_a_scaled_map_computes_the_same_with_both_backends(fused, device, torch_backend):
    """Off the size of the model, lam is scaled, and odd sizes are padded."""
    block = awaken(GSPN2Block(64, GSPN2Config(), native_grid=(8, 8)))
    tokens = torch.randn(2, 37 * 90, 64, device=device)
    expected = block.cpu().double()(tokens.cpu().double(), (37, 90))
    block.to(device, torch.float32)
    if fused:
        fuse_block(block)
    assert near(block(tokens, (37, 90)).cpu(), expected, 1e-4)
    torch_backend()
    assert near(block(tokens, (37, 90)).cpu(), expected, 1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_patched_model_draws_the_same(fused, device):
    model, run = tiny_denoiser("pixart")
    call = with_inputs_on(device, awaken(apply_gspn2(model, GSPN2Config())).to(device))
    if fused:
        fuse_gspn2(model)
    sizes = [(8, 8), (12, 10)]
    torch.compiler.reset()
    with torch.no_grad():
        expected = [run(call, 1, *size) for size in sizes]
        model.compile(fullgraph=True)
        for size, eager in zip(sizes, expected, strict=True):
            assert near(run(call, 1, *size), eager, 1e-4)
