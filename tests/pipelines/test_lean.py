"""LeanUNet against the UNet's own forward pass."""

import copy
import types
import weakref

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from tiny_models import TEXT_WIDTH, awaken, tiny_dit, tiny_sdxl_pipeline, tiny_unet
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gspn2_diffusers import GSPN2Config, apply_gspn2, fuse_gspn2, gspn2_sites
from gspn2_diffusers.kernels.dense import relative_error
from gspn2_diffusers.pipelines import strips
from gspn2_diffusers.pipelines.lean import DeepFeatures, LeanOptions, LeanUNet, Parked
from gspn2_diffusers.pipelines.tracing import trace

pytestmark = pytest.mark.filterwarnings("ignore::gspn2_diffusers.UntrainedBlocksWarning")

ATTENTION_EVERYWHERE = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
LAYOUTS = {
    "sd": lambda: tiny_unet(**ATTENTION_EVERYWHERE),
    "sdxl": lambda: tiny_sdxl_pipeline().unet,
    "scale_shift": lambda: tiny_unet(resnet_time_scale_shift="scale_shift"),
    "one level": lambda: tiny_unet(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        only_cross_attention=True,
    ),
    "no middle": lambda: tiny_unet(mid_block_type=None, act_fn="gelu", center_input_sample=True),
}
LIMITS = (40_000, 4_000, 1)  # of these tiny layers: some fit, none fit, one row at a time


def build(layout="sd", patched=False, dtype=torch.float64, fused=False):
    torch.manual_seed(0)
    unet = LAYOUTS[layout]()
    for module in unet.modules():  # fresh affine parameters are ones and zeros
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight, mean=1)
            torch.nn.init.normal_(module.bias)
    if patched:
        awaken(apply_gspn2(unet, GSPN2Config()))
    if fused:
        fuse_gspn2(unet)
    return unet.to(dtype).eval()


def inputs(unet, batch=1, height=8, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(unet.dtype)

    found = {
        "sample": randn(batch, 4, height, width),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "encoder_hidden_states": randn(batch, 5, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        added = {"text_embeds": randn(batch, TEXT_WIDTH), "time_ids": 100 * randn(batch, 6)}
        found["added_cond_kwargs"] = added
    return found


@torch.no_grad()
def plain(unet, given):
    return unet(**given).sample


def lean(unet, given, limit, **options):
    return LeanUNet(unet, LeanOptions(limit, **options))(**given)


@pytest.mark.parametrize("size", [(8, 8), (13, 9), (6, 21)], ids=str)
@pytest.mark.parametrize("kind", ["attention", "gspn2", "fused"])
@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_a_pass_in_pieces_equals_the_plain_pass(layout, kind, size):
    unet = build(layout, kind != "attention", fused=kind == "fused")
    given = inputs(unet, 2, *size)
    expected = plain(unet, given)
    for limit in LIMITS:
        assert_close(lean(unet, given, limit), expected)


@pytest.mark.parametrize("layout", ["scale_shift", "one level", "no middle"])
def test_options_of_a_layout_are_followed(layout):
    unet = build(layout)
    given = inputs(unet, 2, 9, 10)
    expected = plain(unet, given)
    for limit in LIMITS:
        assert_close(lean(unet, given, limit), expected)


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_layers_that_fit_run_as_they_are_bit_for_bit(layout):
    unet = build(layout, patched=True, dtype=torch.float32)
    given = inputs(unet, 2, 13, 9)
    assert torch.equal(lean(unet, given, 2**30), plain(unet, given))


@pytest.mark.parametrize(
    "timestep", [7, 7.5, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 900])], ids=str
)
def test_timesteps_are_taken_in_every_form_that_the_unet_takes(timestep):
    unet = build("sdxl")
    given = inputs(unet, 2) | {"timestep": timestep}
    assert_close(lean(unet, given, 4_000), plain(unet, given))


def test_a_channels_last_model_keeps_its_maps_channels_last():
    unet = build("sd", patched=True).to(memory_format=torch.channels_last)
    given = inputs(unet, 2, 10, 12)
    given["sample"] = given["sample"].to(memory_format=torch.channels_last)
    expected = plain(unet, given)
    result = lean(unet, given, 4_000)
    assert_close(result, expected)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_loses_no_more_than_the_plain_pass_does():
    unet = build("sdxl", patched=True)
    given = inputs(unet, 1, 16, 16)
    expected = plain(unet, given)
    unet = unet.to(torch.bfloat16)
    given = inputs(unet, 1, 16, 16)
    allowed = 1.2 * relative_error(plain(unet, given), expected)
    for limit in LIMITS:
        assert relative_error(lean(unet, given, limit), expected) < allowed


@pytest.mark.parametrize(
    "dtype, offset, allowed",
    [(torch.float64, 1e5, 1e-10), (torch.float32, 3e3, 3e-4), (torch.bfloat16, 100, 4e-3)],
)
@pytest.mark.parametrize("limit", [10**6, 500, 1])
def test_statistics_survive_a_mean_that_is_large_against_the_deviation(
    dtype, offset, allowed, limit
):
    torch.manual_seed(0)
    x = (torch.randn(2, 12, 40, 30) + offset).to(dtype)
    parts = x.split((5, 7), dim=1)  # the second of four groups has channels of both
    norm = torch.nn.GroupNorm(4, 12).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = norm(x.double()).detach()
    with torch.no_grad():
        moments = [strips.Moments(limit).add(part) for part in parts]
        result = strips.Normalisation(norm.to(dtype), moments).rows(parts, 0, 40)
        own = F.group_norm(x, 4, norm.weight, norm.bias, norm.eps)
    assert relative_error(own, expected) < allowed
    assert relative_error(result, expected) < allowed


def test_moments_of_unequal_strips_are_those_of_the_map():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 11, 7, dtype=torch.float64) * 5 + torch.arange(11.0)[:, None]
    moments = strips.Moments(10**6)
    for start, stop in ((0, 1), (1, 6), (6, 11)):
        moments.add(x[:, :, start:stop])
    mean, variance = moments.result()
    assert_close(mean, x.mean((2, 3)))
    assert_close(variance, x.var((2, 3), correction=0))


@pytest.mark.parametrize("limit", LIMITS)
def test_offloading_skips_changes_no_bit(limit):
    unet = build("sdxl", patched=True)
    given = inputs(unet, 2, 13, 9)
    executor = LeanUNet(unet, LeanOptions(limit, offload_skips=True))
    kept = lean(unet, given, limit)
    for _ in range(2):  # the second pass finds the buffers of the first
        assert torch.equal(executor(**given), kept)


def test_a_parked_tensor_is_let_go_and_comes_back_in_its_layout():
    tensor = torch.empty(1, 3, 4, 5, device="meta").to(memory_format=torch.channels_last)
    stride, alive = tensor.stride(), weakref.ref(tensor)
    parked = Parked(tensor, away=True)
    del tensor
    assert alive() is None
    assert parked.shape == (1, 3, 4, 5)
    assert parked.fetch().stride() == stride


@pytest.mark.gpu
def test_on_a_gpu_pieces_equal_the_plain_pass_in_double_and_in_half_precision():
    for patched in (False, True):
        unet = build("sdxl", patched).cuda()
        given = _to_cuda(inputs(unet, 2, 48, 31))
        expected = plain(unet, given)
        assert_close(lean(unet, given, 2**16), expected)
        unet = unet.to(torch.bfloat16)
        given = _to_cuda(inputs(unet, 2, 48, 31))
        allowed = 1.2 * relative_error(plain(unet, given), expected)
        assert relative_error(lean(unet, given, 2**16), expected) < allowed


@pytest.mark.gpu
def test_skips_and_deep_features_come_back_from_cpu_memory_unharmed():
    unet = build("sdxl").cuda()
    executor, deep = LeanUNet(unet, LeanOptions(2**20, offload_skips=True)), DeepFeatures()
    for size in ((64, 48), (96, 80), (64, 48)):
        given = _to_cuda(inputs(unet, 2, *size))
        expected = plain(unet, given)
        with torch.inference_mode():
            assert_close(executor(**given), expected)
        deep.clear()
        for _ in range(3):
            assert_close(executor(**given, deep=deep), expected)
        pinned = [*executor._buffers.values(), deep._buffer]
        assert len(pinned) == 5 and all(buffer.is_pinned() for buffer in pinned)


def _to_cuda(value):
    if isinstance(value, dict):
        return {key: _to_cuda(inner) for key, inner in value.items()}
    return value.cuda()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deep_features_of_the_same_inputs_give_the_same_bits(layout):
    unet = build(layout)
    given = inputs(unet, 2, 13, 9)
    for limit in (2**30, 4_000):
        executor, deep = LeanUNet(unet, LeanOptions(limit)), DeepFeatures()
        whole = executor(**given)
        assert not deep.filled
        assert torch.equal(executor(**given, deep=deep), whole)
        assert deep.filled
        for _ in range(2):
            assert torch.equal(executor(**given, deep=deep), whole)


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_reused_features_are_the_last_up_blocks_input_and_all_else_is_new(layout):
    unet = build(layout)
    first, second = (inputs(unet, 1, 10, 8, seed) for seed in (0, 1))
    stored = []

    def store(block, args, kwargs):
        stored.append(kwargs["hidden_states"])

    def replace(block, args, kwargs):
        return args, kwargs | {"hidden_states": stored[0]}

    with unet.up_blocks[-1].register_forward_pre_hook(store, with_kwargs=True):
        plain(unet, first)
    with unet.up_blocks[-1].register_forward_pre_hook(replace, with_kwargs=True):
        expected = plain(unet, second)

    for limit in (2**30, 4_000):
        executor, deep = LeanUNet(unet, LeanOptions(limit)), DeepFeatures()
        executor(**first, deep=deep)
        assert_close(executor(**second, deep=deep), expected)
        deep.clear()
        assert_close(executor(**second, deep=deep), plain(unet, second))


def test_a_pass_that_reuses_deep_features_runs_only_the_first_level():
    unet = build("sdxl")
    given = inputs(unet)
    executor, deep = LeanUNet(unet, LeanOptions(4_000)), DeepFeatures()
    executor(**given, deep=deep)
    ran = []
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    executor(**given, deep=deep)
    blocks = {name.split(".conv")[0].removesuffix(".0") for name in ran}
    assert blocks == {
        "conv_in",
        "down_blocks.0.resnets",
        "up_blocks.1.resnets",
        "up_blocks.1.resnets.1",
        "conv_out",
    }


def test_deep_features_of_another_size_are_refused():
    unet = build("sd")
    executor, deep = LeanUNet(unet), DeepFeatures()
    executor(**inputs(unet, 1, 8, 8), deep=deep)
    with pytest.raises(ValueError, match=r"expected latents of shape \(1, 4, 8, 8\).*8, 16\)"):
        executor(**inputs(unet, 1, 8, 16), deep=deep)


def test_operators_write_no_more_than_max_elements_at_once():
    unet = build("sdxl", dtype=torch.float32)
    given = inputs(unet, 1, 32, 32)
    # Maps of the first level have 32 768 elements or more. The tokens of the second, which
    # self-attention needs all at once, have 16 384.
    limit = 17_000
    with _WrittenByOperators() as whole:
        plain(unet, given)
    with _WrittenByOperators() as pieces:
        lean(unet, given, limit)
    assert whole.largest > 5 * limit
    assert pieces.largest <= limit


class _WrittenByOperators(TorchDispatchMode):
    """Elements of the largest tensor that an operator wrote; making room writes nothing."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func.__name__.startswith("empty"):
            written = [t.numel() for t in tree_leaves(result) if torch.is_tensor(t)]
            self.largest = max([self.largest, *written])
        return result


def test_nothing_lingers_one_layers_input_and_output_are_all_that_is_held():
    unet = build("sdxl", dtype=torch.bfloat16).to("meta")
    height, width = 512, 384
    given = _to_meta(inputs(unet, 1, 1, 1))
    given["sample"] = torch.empty(1, 4, height, width, device="meta", dtype=torch.bfloat16)
    row = 2 * width  # bytes of one channel
    executor = LeanUNet(unet, LeanOptions(10**6, offload_skips=True))
    cost = trace(lambda: executor(**given))
    # The last up block receives 64 channels and a skip connection of 32, and makes 32.
    assert cost.peak_bytes < (64 + 32 + 32) * height * row + 4 * 2 * 10**6
    assert cost.kept_bytes == 4 * height * row


def _to_meta(value):
    if isinstance(value, dict):
        return {key: _to_meta(inner) for key, inner in value.items()}
    return value.to("meta")


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_it_runs_without_data(layout):
    unet = build(layout, dtype=torch.bfloat16).to("meta")
    given = _to_meta(inputs(unet, 2, 13, 9))
    deep = DeepFeatures()
    executor = LeanUNet(unet, LeanOptions(4_000, offload_skips=True))
    for _ in range(2):
        result = executor(**given, deep=deep)
        assert result.is_meta and result.shape == (2, 4, 13, 9)


def test_the_unet_its_inputs_and_gradient_mode_stay_as_they_were():
    unet = build("sdxl", patched=True)
    given = inputs(unet, 1, 9, 8)
    before = _everything(unet), copy.deepcopy(given)
    result = lean(unet, given, 4_000)
    assert not result.requires_grad and torch.is_grad_enabled()
    for now, then in zip((_everything(unet), given), before, strict=True):
        assert len(tree_leaves(now)) == len(tree_leaves(then))
        for one, other in zip(tree_leaves(now), tree_leaves(then), strict=True):
            assert torch.equal(one, other) if torch.is_tensor(one) else one == other


def _everything(unet):
    return {
        name: [
            type(module),
            module.training,
            sorted(vars(module)),
            len(module._forward_pre_hooks) + len(module._forward_hooks),
            [parameter.detach().clone() for parameter in module.parameters(recurse=False)],
        ]
        for name, module in unet.named_modules()
    }


def test_patches_and_lora_that_come_later_are_followed():
    unet = build("sd", dtype=torch.float32)
    given = inputs(unet, 1, 9, 8)
    executor = LeanUNet(unet, LeanOptions(4_000))
    first = executor(**given)
    layers = ["conv1", "conv2", "conv_shortcut", "conv", "proj_in", "to_q", "ff.net.0.proj"]
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=layers))
    unet.eval()
    with_lora = executor(**given)
    assert relative_error(with_lora, first) > 0.01
    assert_close(with_lora, plain(unet, given), torch.float32)
    awaken(apply_gspn2(unet, GSPN2Config(), sites=gspn2_sites(unet)[0].name))
    patched = executor(**given)
    assert relative_error(patched, with_lora) > 1e-4
    assert_close(patched, plain(unet, given), torch.float32)


def test_weights_that_layers_cast_on_their_way_are_cast():
    unet = build("sdxl", dtype=torch.float32)
    given = inputs(unet, 1, 9, 8)
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert_close(lean(unet, given, 4_000), plain(unet, given), torch.float32)


def test_a_model_offload_hook_runs_around_the_pass():
    unet = build("sdxl")
    given = inputs(unet)
    expected = plain(unet, given)
    calls = []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(("before", module))
            return (args[0] + 1, *args[1:]), kwargs

        def post_forward(self, module, output):
            calls.append(("after", module))
            return 2 * output

    add_hook_to_module(unet, Hook())
    result = lean(unet, given | {"sample": given["sample"] - 1}, 4_000)
    assert_close(result, 2 * expected)
    assert calls == [("before", unet), ("after", unet)]


def test_weights_that_are_offloaded_layer_by_layer_are_loaded_when_they_are_read():
    unet = build("sdxl")
    given = inputs(unet)
    expected = plain(unet, given)
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    assert unet.conv_norm_out.weight.is_meta
    assert_close(lean(unet, given, 4_000), expected)
    assert unet.conv_norm_out.weight.is_meta


def test_hooks_of_a_layer_run_around_the_read_of_its_weights():
    unet = build("sdxl")
    given = inputs(unet)
    expected = plain(unet, given)
    unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    hook = unet.conv_norm_out._diffusers_hook.hooks["group_offloading"]
    calls = []
    hook.pre_forward = lambda *_: calls.append("before")
    hook.post_forward = lambda *_: calls.append("after")
    assert_close(lean(unet, given, 1), expected)
    assert calls == ["before", "after"]


def test_a_unet_in_training_mode_is_refused_when_it_is_called():
    executor = LeanUNet(build("sd").train())
    with pytest.raises(ValueError, match="evaluation mode, got one in training mode"):
        executor(**inputs(executor.unet))


def test_extensions_that_replace_a_forward_pass_are_refused_while_they_do():
    unet = build("sd")
    given = inputs(unet)
    executor = LeanUNet(unet)

    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(ValueError, match="without FreeU"):
        executor(**given)
    unet.disable_freeu()

    resnet = unet.mid_block.resnets[0]
    resnet.forward = types.MethodType(lambda self, x, temb: x, resnet)
    with pytest.raises(ValueError, match="ResnetBlock2D with its own forward pass"):
        executor(**given)
    del resnet.forward

    add_hook_to_module(unet, ModelHook())
    accelerate.hooks.remove_hook_from_module(unet)  # leaves the own forward on the instance
    assert_close(executor(**given), plain(unet, given))

    unet.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    with pytest.raises(ValueError, match="with its own forward pass, got one that an extension"):
        executor(**given)


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"class_embed_type": "timestep"}, "class labels"),
        ({"downsample_padding": 0}, "a Downsample2D of another kind"),
        ({"mid_block_type": "UNetMidBlock2D"}, "a UNetMidBlock2D"),
        ({"dual_cross_attention": True}, "a DualTransformer2DModel of another kind"),
        ({"conv_out_kernel": 1}, "3 and 1 as its end kernels"),
        (
            {
                "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            },
            "a ResnetDownsampleBlock2D",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layouts_that_it_does_not_know_are_named(changes, found):
    unet = tiny_unet(**changes)
    assert not LeanUNet.supports(unet)
    with pytest.raises(ValueError, match=f"layout of SD 1.5, SD 2 or SDXL, got one with .*{found}"):
        LeanUNet(unet)


def test_other_models_and_subclasses_are_not_supported():
    class Other(UNet2DConditionModel):
        pass

    unet = build("sd")
    assert LeanUNet.supports(unet) and LeanUNet.supports(build("sdxl", patched=True))
    unet.__class__ = Other
    for model in (unet, tiny_dit(), None):
        assert not LeanUNet.supports(model)
    with pytest.raises(ValueError, match="got a DiTTransformer2DModel"):
        LeanUNet(tiny_dit())


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="max_elements: expected at least 1, got 0"):
        LeanOptions(0)
