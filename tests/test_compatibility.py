"""A patched model does what diffusers models do: copies, casts, offload, compile, LoRA, ..."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.hooks import apply_layerwise_casting
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from tiny_models import awaken, tiny_denoiser, tiny_sd_pipeline

from gspn2_diffusers import GSPN2Adapter, GSPN2Config, apply_gspn2, remove_gspn2

pytestmark = pytest.mark.filterwarnings("ignore::gspn2_diffusers.UntrainedBlocksWarning")
FAMILIES = ("unet", "dit", "pixart")


@pytest.fixture
def patched():
    """A patched UNet, its runner, and its output."""
    model, run = tiny_denoiser("unet")
    awaken(apply_gspn2(model, GSPN2Config()))
    with torch.no_grad():
        return model, run, run(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_copy_computes_with_its_own_blocks_and_unpatches_alone(family, duplicate):
    model, run = tiny_denoiser(family)
    plain = run(model)
    image = run(awaken(apply_gspn2(model, GSPN2Config())))
    twin = duplicate(model)
    for block in GSPN2Adapter.of_patched(model).blocks:
        block.up.weight.zero_()
    assert torch.equal(run(twin), image)
    assert not torch.equal(run(model), image)
    assert torch.equal(run(remove_gspn2(twin)), plain)
    assert len(GSPN2Adapter.of_patched(model).blocks) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_blocks_follow_the_dtype_of_the_model(patched, dtype):
    model, run, image = patched
    low = run(model.to(dtype), dtype=dtype)
    assert low.dtype == dtype
    error = (low.double() - image).square().mean().sqrt() / image.square().mean().sqrt()
    assert error < 0.03


@torch.no_grad()
def test_blocks_move_with_the_model_between_devices(patched):
    model, _, _ = patched
    model.to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(patched, reentrant):
    model, run, _ = patched
    model.train()

    def gradients():
        model.zero_grad()
        run(model, 2).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    if reentrant:
        model.enable_gradient_checkpointing(
            lambda module, *args: torch.utils.checkpoint.checkpoint(
                module, *args, use_reentrant=True
            )
        )
    else:
        model.enable_gradient_checkpointing()
    checkpointed = gradients()
    assert {name for name in plain if "gspn2" in name} <= checkpointed.keys()
    for name, gradient in checkpointed.items():
        torch.testing.assert_close(gradient, plain[name])


@pytest.mark.parametrize(
    "family, backend",
    [("sdxl", "aot_eager"), ("dit", "eager"), ("pixart", "aot_eager")],
)
@torch.no_grad()
def test_compiles_as_one_graph_and_follows_changing_sizes(family, backend):
    model, run = tiny_denoiser(family)
    awaken(apply_gspn2(model, GSPN2Config()))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for size in [(8, 8), (16, 16)] if family == "dit" else [(8, 8), (12, 10)]:
        torch.testing.assert_close(run(compiled, 1, *size), run(model, 1, *size))


def test_compiled_training_gives_the_gradients_of_eager():
    model, run = tiny_denoiser("dit")
    awaken(apply_gspn2(model, GSPN2Config()))
    torch.compiler.reset()

    def gradients(callable_model):
        model.zero_grad()
        run(callable_model, 2).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    eager = gradients(model)
    compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_patching_after_compiling_takes_effect_and_unpatching_too():
    model, run = tiny_denoiser("pixart")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    plain = run(compiled)
    awaken(apply_gspn2(compiled, GSPN2Config()))
    student = run(model)
    assert not torch.allclose(student, plain)
    torch.testing.assert_close(run(compiled), student)
    remove_gspn2(compiled)
    torch.testing.assert_close(run(compiled), plain)


@pytest.mark.parametrize("first", ["patch", "offload"])
@torch.no_grad()
def test_model_offload_and_patching_work_in_either_order(first):
    pipe, plain = tiny_sd_pipeline(), tiny_sd_pipeline()
    adapter = GSPN2Adapter.for_model(plain, GSPN2Config())
    awaken(adapter)
    apply_gspn2(plain, copy.deepcopy(adapter))
    steps = [
        lambda: apply_gspn2(pipe, adapter),
        # What enable_model_cpu_offload puts on each model, with the CPU for the accelerator.
        lambda: cpu_offload_with_hook(pipe.unet, torch.device("cpu")),
    ]
    for step in steps if first == "patch" else reversed(steps):
        step()
    assert torch.equal(draw(pipe), draw(plain))
    remove_gspn2(pipe)
    assert torch.equal(draw(pipe), draw(tiny_sd_pipeline()))


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a", num_inference_steps=1, generator=generator, output_type="pt").images


@torch.no_grad()
def test_sequential_offload_after_patching_works_and_before_it_is_refused(patched):
    model, run, image = patched
    cpu_offload(model, torch.device("cpu"))
    assert torch.equal(run(model), image)

    other, _ = tiny_denoiser("unet")
    cpu_offload(other, torch.device("cpu"))
    with pytest.raises(ValueError, match="call apply_gspn2 before enable_sequential_cpu_offload"):
        apply_gspn2(other, GSPN2Config())


@torch.no_grad()
def test_layerwise_casting_reaches_the_blocks(patched):
    model, run, image = patched
    apply_layerwise_casting(
        model,
        storage_dtype=torch.bfloat16,
        compute_dtype=torch.float32,
        skip_modules_pattern=None,
    )
    assert model.mid_block.attentions[0].transformer_blocks[0].attn1.gspn2.up.weight.dtype == (
        torch.bfloat16
    )
    error = (run(model) - image).square().mean().sqrt()
    assert error < 0.03 * image.square().mean().sqrt()


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
@torch.no_grad()
def test_setting_processors_does_not_switch_the_blocks_off(patched, processor):
    model, run, image = patched
    model.set_attn_processor(processor())
    assert torch.allclose(run(model), image, atol=1e-5)


@torch.no_grad()
def test_default_processors_attention_slicing_and_fused_projections_keep_the_blocks(patched):
    model, run, image = patched
    for change in (
        model.set_default_attn_processor,
        lambda: model.set_attention_slice("max"),
        model.fuse_qkv_projections,
        model.unfuse_qkv_projections,
    ):
        change()
        torch.testing.assert_close(run(model), image, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_processor_that_needs_attention_maps_is_refused_not_ignored(patched):
    model, run, _ = patched
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    model.get_submodule(name).set_processor(PAGIdentitySelfAttnProcessor2_0())
    with pytest.raises(ValueError, match="got PAGIdentity.*keep_attention"):
        run(model)
    apply_gspn2(model, GSPN2Config(), keep_attention=name)
    run(model, 2)  # perturbed-attention guidance splits its batch in two


def test_a_mask_or_another_sequence_is_refused(patched):
    model, _, _ = patched
    attention = model.mid_block.attentions[0].transformer_blocks[0].attn1
    tokens = torch.randn(1, 16, 64)
    with pytest.raises(ValueError, match="expected no attention_mask"):
        attention(tokens, attention_mask=torch.ones(1, 16))
    with pytest.raises(ValueError, match="expected self-attention, got encoder_hidden_states"):
        attention(tokens, encoder_hidden_states=tokens)


def test_a_layer_with_a_replaced_forward_is_refused_before_anything_changes():
    model, _ = tiny_denoiser("unet")
    attention = model.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.forward = attention.forward
    with pytest.raises(ValueError, match="mid_block.*got one replaced by a hook"):
        apply_gspn2(model, GSPN2Config())
    assert not any(type(module).__name__ == "GSPN2Attention" for module in model.modules())


@torch.no_grad()
def test_lora_loads_before_or_after_patching_and_unpatches_cleanly():
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
    first, run = tiny_denoiser("unet")
    torch.manual_seed(1)
    first.add_adapter(copy.deepcopy(lora))
    with_lora = run(first)
    awaken(apply_gspn2(first, GSPN2Config()))
    assert not torch.equal(run(first), with_lora)
    assert torch.equal(run(remove_gspn2(first)), with_lora)

    second, run = tiny_denoiser("unet")
    awaken(apply_gspn2(second, GSPN2Config()))
    torch.manual_seed(1)
    second.add_adapter(copy.deepcopy(lora))
    assert torch.equal(run(remove_gspn2(second)), with_lora)


def test_only_the_sidecar_can_be_trained_averaged_and_checkpointed(patched, tmp_path):
    model, run, _ = patched
    model.requires_grad_(False)
    adapter = GSPN2Adapter.of_patched(model).requires_grad_(True)
    ema = EMAModel(adapter.parameters())
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(model).square().mean().backward()
    optimizer.step()
    ema.step(adapter.parameters())
    changed = {k for k, value in model.state_dict().items() if not torch.equal(value, before[k])}
    assert changed and all(".gspn2." in name for name in changed)
    ema.copy_to(adapter.parameters())
    adapter.save_pretrained(tmp_path)
    loaded = GSPN2Adapter.from_pretrained(tmp_path)
    for mine, saved in zip(adapter.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, saved)
