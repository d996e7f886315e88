"""fuse_gspn2: fewer layers, the same outputs, and back again bit for bit."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, inject_adapter_in_model
from tiny_models import awaken, tiny_denoiser, tiny_sd_pipeline
from torch import nn

from gspn2_diffusers import (
    GSPN2Adapter,
    GSPN2Block,
    GSPN2Config,
    apply_gspn2,
    fuse_gspn2,
    remove_gspn2,
    save_gspn2,
    unfuse_gspn2,
)
from gspn2_diffusers.fuse import fuse_block
from gspn2_diffusers.kernels.lines import pack_maps
from gspn2_diffusers.line_projection import LineProjection

pytestmark = pytest.mark.filterwarnings("ignore::gspn2_diffusers.UntrainedBlocksWarning")

TOKENS = GSPN2Config(parameters_from="tokens", proxy_dim=6, groups=2)
CONFIGS = [
    GSPN2Config(),
    GSPN2Config(mean_path=False),
    TOKENS,
    GSPN2Config(parameters_from="tokens", groups=None, chunk_size=2, mean_path=False),
]


def patched(config=TOKENS, family="unet"):
    """A model with blocks that are not a no-op, and its runner."""
    model, run = tiny_denoiser(family)
    apply_gspn2(model, config)
    for block in blocks(awaken(model)):
        nn.init.normal_(block.up.bias)
    return model, run


def blocks(model):
    return GSPN2Adapter.of_patched(model).blocks


def fingerprint(model):
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, weight.requires_grad) for name, weight in model.named_parameters()],
    )


def assert_same(before, after):
    assert list(before[0]) == list(after[0])
    for key, value in before[0].items():
        assert torch.equal(value, after[0][key]) and value.dtype == after[0][key].dtype, key
    assert before[1:] == after[1:]


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.to_dict()}")
def test_a_fused_model_computes_the_same_to_rounding(config, dtype, batch):
    model, run = patched(config)
    exact = run(model.double(), batch, 12, 10, dtype=torch.float64)
    model.to(dtype)
    images = [
        run(change(model), batch, 12, 10, dtype=dtype) for change in (unfuse_gspn2, fuse_gspn2)
    ]
    plain, fused = ((image.double() - exact).norm() / exact.norm() for image in images)
    assert fused < 1e-12 if dtype == torch.float64 else fused < 2 * plain


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.to_dict()}")
def test_unfusing_restores_every_weight_key_and_mode_bit_for_bit(config, training):
    model, _ = patched(config)
    model.train(training).requires_grad_(training)
    before = fingerprint(model)
    for _ in range(2):
        assert fuse_gspn2(fuse_gspn2(model)) is model
        assert unfuse_gspn2(unfuse_gspn2(model)) is model
        assert_same(before, fingerprint(model))


@torch.no_grad()
@pytest.mark.parametrize(
    "config, layers",
    [
        (TOKENS, ["down_and_params", "mean", "up"]),
        (CONFIGS[3], ["down_and_params", "up"]),
        (CONFIGS[0], ["mean", "to_lines", "up"]),
        (CONFIGS[1], ["to_lines", "up"]),
    ],
)
def test_one_layer_reads_the_tokens_in_place_of_two(config, layers):
    model, run = patched(config)
    block = blocks(fuse_gspn2(model))[0]
    called = []
    for name, child in block.named_children():
        child.register_forward_hook(lambda *_, name=name: called.append(name))
    run(model)
    assert sorted(called) == layers
    assert block.down_and_params is None or block.down_and_params.out_features % 16 == 0
    assert block.up.bias is None or block.mean is None


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_projection_writes_the_lines_that_packing_would(groups, dtype):
    config = GSPN2Config(proxy_dim=4, groups=groups)
    block = awaken(GSPN2Block(16, config)).to(dtype)
    tokens = torch.randn(2, 5 * 9, 16).to(dtype)
    x, params = block._project(tokens)
    maps = [part.movedim(1, -1).unflatten(-1, (5, 9)) for part in (x, *block.layout.split(params))]
    expected = pack_maps(*maps)
    lines = LineProjection(block.down, block.to_params, block.layout)(tokens, (5, 9))
    for mine, packed, length in zip(lines, expected, (9, 5), strict=True):
        padding = mine[..., length:]
        assert mine.shape == packed.shape and padding.numel() and not padding.any()
        torch.testing.assert_close(mine, packed)
        assert torch.equal(mine[:, :, :4], packed[:, :, :4])  # x, through the identity


def test_lam_is_scaled_to_the_size_in_a_fused_block_too():
    config = GSPN2Config(mean_path=False)
    block = awaken(GSPN2Block(16, config, native_grid=(6, 4)).double())
    tokens = torch.randn(2, 30, 16, dtype=torch.float64)
    expected = block(tokens, (3, 10))
    fuse_block(block)
    torch.testing.assert_close(block(tokens, (3, 10)), expected)


@pytest.mark.parametrize("config", [TOKENS, GSPN2Config()], ids=["tokens", "proxy"])
def test_weights_are_moved_and_not_kept_twice(config):
    model, _ = patched(config)
    unread = 15 * sum(block.down.in_features + 1 for block in blocks(model))
    proxies = sum(block.layout.proxy_dim for block in blocks(model))  # biases `down` did not have
    if config.parameters_from == "proxy":  # an identity for each axis, and up to 7 columns of zeros
        sizes = [(block.layout.proxy_dim, block.layout.width) for block in blocks(model)]
        unread += sum(2 * p * p + 7 * (k + 2 * p) for p, k in sizes)
    size = sum(weight.numel() for weight in model.parameters())
    fused = sum(weight.numel() for weight in fuse_gspn2(model).parameters())
    assert size <= fused <= size + unread + proxies


@torch.no_grad()
def test_a_pipeline_is_fused_in_place():
    pipe = tiny_sd_pipeline()
    apply_gspn2(pipe, TOKENS)
    awaken(pipe.unet)
    image = draw(pipe)
    assert fuse_gspn2(pipe) is pipe
    assert all(block.down_and_params is not None for block in blocks(pipe))
    torch.testing.assert_close(draw(pipe), image, rtol=0, atol=1e-4)
    assert torch.equal(draw(unfuse_gspn2(pipe)), image)


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a", num_inference_steps=1, generator=generator, output_type="pt").images


def test_a_fused_model_refuses_to_be_saved_and_an_unfused_one_writes_the_usual_files(tmp_path):
    for config in (TOKENS, GSPN2Config()):
        model, _ = patched(config)
        save_gspn2(model, tmp_path / "before")
        fuse_gspn2(model)
        for save in (lambda m, f: save_gspn2(m, f), save_adapter):
            with pytest.raises(ValueError, match="got fused ones: call unfuse_gspn2 before saving"):
                save(model, tmp_path / "fused")
        assert not (tmp_path / "fused").exists()
        save_gspn2(unfuse_gspn2(model), tmp_path / "after")
        for file in (tmp_path / "before").iterdir():
            assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()


def save_adapter(model, folder):
    GSPN2Adapter.of_patched(model).save_pretrained(folder)


def quantise(model):
    class Quantised(torch.Tensor):
        pass

    up = model.mid_block.attentions[0].transformer_blocks[0].attn1.gspn2.up
    up.weight = nn.Parameter(up.weight.data.as_subclass(Quantised), requires_grad=False)


def cast_by_layer(model):
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: cpu_offload(model, torch.device("cpu")), "offloaded or cast on the fly"),
        (cast_by_layer, "offloaded or cast on the fly"),
        (lambda model: model.to("meta"), "offloaded"),
        (quantise, "mid_block.*gspn2.up: .* got Lift with Quantised: fuse before quantising"),
    ],
)
@pytest.mark.parametrize(
    "prepare, act", [(unfuse_gspn2, fuse_gspn2), (fuse_gspn2, unfuse_gspn2)], ids=["fuse", "unfuse"]
)
def test_layers_that_cannot_be_rearranged_are_named_and_nothing_changes(
    prepare, act, change, message
):
    model, _ = patched()
    change(prepare(model))
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        act(model)
    assert list(model.state_dict()) == keys


def test_lora_on_a_block_is_to_be_merged_first():
    model, _ = patched()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=r"mid_block\..*gspn2\.up"), model)
    with pytest.raises(ValueError, match="merge or unload LoRA first"):
        fuse_gspn2(model)


def test_a_model_without_blocks_has_nothing_to_fuse_and_nothing_to_undo():
    model, _ = tiny_denoiser("unet")
    with pytest.raises(
        ValueError, match="expected a model patched by apply_gspn2, got one without"
    ):
        fuse_gspn2(model)
    assert unfuse_gspn2(model) is model
    with pytest.raises(TypeError, match="expected a diffusers pipeline or model"):
        fuse_gspn2("model")


@torch.no_grad()
def test_a_fused_model_is_unpatched_bit_for_bit():
    model, run = tiny_denoiser("unet")
    plain = run(model)
    apply_gspn2(model, TOKENS)
    assert torch.equal(run(remove_gspn2(fuse_gspn2(model))), plain)


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_fused_model_is_fused_and_unfuses_alone(duplicate):
    model, run = patched()
    image = run(model)
    fused = run(fuse_gspn2(model))
    twin = duplicate(model)
    assert torch.equal(run(twin), fused)
    assert torch.equal(run(unfuse_gspn2(twin)), image)
    assert torch.equal(run(model), fused)


@torch.no_grad()
@pytest.mark.parametrize(
    "hook, tolerance",
    [(lambda model: cpu_offload(model, torch.device("cpu")), 0), (cast_by_layer, 0.03)],
)
def test_offload_and_casting_take_a_fused_model(hook, tolerance):
    model, run = patched()
    image = run(fuse_gspn2(model))
    hook(model)
    assert (run(model) - image).norm() <= tolerance * image.norm()


@pytest.mark.parametrize("change", [fuse_gspn2, unfuse_gspn2])
def test_what_is_done_already_is_no_error_under_offload(change):
    model, _ = patched()
    cpu_offload(change(model), torch.device("cpu"))
    assert change(model) is model


@torch.no_grad()
def test_fusing_and_unfusing_a_compiled_model_takes_effect():
    model, run = patched(family="dit")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for change in (fuse_gspn2, unfuse_gspn2):
        change(compiled)
        torch.testing.assert_close(run(compiled), run(model))


def test_gradients_still_reach_the_input_of_a_fused_block():
    model, _ = patched()
    block = blocks(model)[0]
    tokens = torch.randn(2, 12, block.up.out_features, requires_grad=True)
    grads = [
        torch.autograd.grad(block(tokens, (3, 4)).square().sum(), tokens)[0]
        for change in (unfuse_gspn2, fuse_gspn2)
        if change(model)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
