"""The lift equals a linear layer plus a vector per image, by every way it has of computing that."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tolerances import assert_close
from torch import nn

from gspn2_diffusers import lift as lift_module
from gspn2_diffusers.lift import Lift


def inputs(batch, dtype=torch.float32, tokens=7):
    torch.manual_seed(batch)
    lift = Lift(6, 10).to(dtype)
    return lift, torch.randn(batch, tokens, 6, dtype=dtype), torch.randn(batch, 10, dtype=dtype)


def expected(lift, y, shift):
    weight, bias = lift.weight.double(), lift.bias.double()
    return nn.functional.linear(y.double(), weight, bias) + shift.double()[:, None]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_image_gets_its_own_vector(batch, dtype, gradients):
    lift, y, shift = inputs(batch, dtype)
    with torch.set_grad_enabled(gradients):
        result = lift(y, shift)
    assert result.dtype == dtype
    assert_close(result, expected(lift, y, shift))


@torch.no_grad()
@pytest.mark.parametrize("batch", [2, 5])
def test_images_written_one_by_one_are_the_same(batch, monkeypatch):
    lift, y, shift = inputs(batch)
    monkeypatch.setattr(lift_module, "LARGE_OUTPUT", 0)
    # Taken on GPUs only.
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    result = lift(y, shift)
    monkeypatch.undo()
    assert_close(result, expected(lift, y, shift))


@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_reach_the_weights_the_tokens_and_the_vectors(batch):
    lift, y, shift = inputs(batch, torch.float64)
    leaves = (lift.weight, lift.bias, y.requires_grad_(), shift.requires_grad_())
    torch.autograd.gradcheck(lambda *_: lift(y, shift), leaves)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_without_a_vector_or_without_a_bias_it_is_what_is_left(batch):
    lift, y, shift = inputs(batch)
    assert torch.equal(lift(y), nn.Linear.forward(lift, y))
    moved = copy.deepcopy(lift)
    moved.bias = None
    torch.testing.assert_close(moved(y, lift.bias + shift), lift(y, shift))


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_autocast_and_compilers_give_the_same(batch):
    lift, y, shift = inputs(batch)
    torch.compiler.reset()
    compiled = torch.compile(lift, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(y, shift), lift(y, shift))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(lift(y, shift.bfloat16()), expected(lift, y, shift), torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_lora_finds_it_and_adds_to_it(batch):
    lift, y, shift = inputs(batch)
    block = nn.ModuleDict({"up": lift})
    plain = lift(y, shift)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"], init_lora_weights=False), block)
    up = block["up"]
    update = up.lora_B["default"](up.lora_A["default"](y)) * up.scaling["default"]
    torch.testing.assert_close(up(y, shift), plain + update)
