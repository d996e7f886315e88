"""apply_gspn2, remove_gspn2 and softmax_attention on whole models and pipelines."""

import copy
import warnings

import pytest
import torch
from tiny_models import awaken, tiny_denoiser, tiny_dit, tiny_sd_pipeline, tiny_unet

from gspn2_diffusers import (
    GSPN2Adapter,
    GSPN2Config,
    UntrainedBlocksWarning,
    apply_gspn2,
    gspn2_sites,
    remove_gspn2,
    save_gspn2,
    softmax_attention,
)

pytestmark = pytest.mark.filterwarnings("ignore::gspn2_diffusers.UntrainedBlocksWarning")
FAMILIES = ("unet", "sdxl", "dit", "pixart")


def patched(model, config=None):
    return awaken(apply_gspn2(model, config or GSPN2Config()))


def fingerprint(model):
    """Everything that unpatching has to bring back."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "processors": {
            name: module.processor
            for name, module in model.named_modules()
            if hasattr(module, "processor")
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_pre_hooks) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
    }


def assert_same(before, after):
    assert list(before["state"]) == list(after["state"])
    assert all(torch.equal(before["state"][key], after["state"][key]) for key in before["state"])
    for part in ("classes", "processors", "attributes", "hooks", "training"):
        assert before[part] == after[part], part


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_unpatching_restores_outputs_state_processors_and_classes_bit_for_bit(family):
    model, run = tiny_denoiser(family)
    before, image = fingerprint(model), run(model)
    for _ in range(2):
        patched(model)
        assert not torch.equal(run(model), image)
        remove_gspn2(model)
        assert_same(before, fingerprint(model))
        assert torch.equal(run(model), image)


@torch.no_grad()
def test_a_pipeline_generates_patches_generates_and_unpatches_to_the_same_image():
    pipe = tiny_sd_pipeline()

    def draw():
        generator = torch.Generator().manual_seed(3)
        options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 4.0}
        return pipe("a cat", generator=generator, **options).images

    before, image = fingerprint(pipe.unet), draw()
    assert apply_gspn2(pipe, GSPN2Config()) is pipe
    awaken(pipe.unet)
    assert not torch.equal(draw(), image)
    assert remove_gspn2(pipe) is pipe
    assert torch.equal(draw(), image)
    assert_same(before, fingerprint(pipe.unet))


@torch.no_grad()
def test_applying_over_an_earlier_patch_replaces_it():
    model, run = tiny_denoiser("unet")
    before, image = fingerprint(model), run(model)
    patched(model, GSPN2Config(proxy_dim=2))
    patched(model, GSPN2Config(proxy_dim=4))
    blocks = GSPN2Adapter.of_patched(model).blocks
    assert {block.down.out_features for block in blocks} == {4}
    assert all(len(module._forward_pre_hooks) <= 1 for module in model.modules())
    remove_gspn2(model)
    assert torch.equal(run(model), image)
    assert_same(before, fingerprint(model))


@torch.no_grad()
def test_reapplying_to_fewer_layers_leaves_the_others_as_attention():
    model, _ = tiny_denoiser("unet")
    patched(model)
    apply_gspn2(model, GSPN2Config(), sites="mid_block.*")
    assert [s.name for s in gspn2_sites(model) if s.patched] == [
        "mid_block.attentions.0.transformer_blocks.0.attn1"
    ]


def test_removing_from_an_unpatched_model_changes_nothing():
    model = tiny_unet()
    before = fingerprint(model)
    assert_same(before, fingerprint(remove_gspn2(model)))


def test_fresh_blocks_warn_once_that_images_will_be_noise_and_loaded_ones_do_not(tmp_path):
    model = tiny_unet()
    with pytest.warns(UntrainedBlocksWarning, match="will be noise until.*Train them") as caught:
        apply_gspn2(model, GSPN2Config())
    assert len(caught) == 1 and caught[0].filename == __file__
    save_gspn2(model, tmp_path)
    remove_gspn2(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_gspn2(model, tmp_path)


def test_only_self_attention_is_replaced():
    model = tiny_unet()
    apply_gspn2(model, GSPN2Config())
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if hasattr(m, "to_q")}
    assert {kind for name, kind in kinds.items() if name.endswith("attn1")} == {"GSPN2Attention"}
    assert {kind for name, kind in kinds.items() if name.endswith("attn2")} == {"Attention"}


@pytest.mark.parametrize(
    "selection, expected",
    [
        ({"sites": "down_blocks.1.*"}, {"down_blocks.1"}),
        ({"sites": ["down_blocks.1.*", "mid_block.*"]}, {"down_blocks.1", "mid_block"}),
        ({"sites": lambda site: site.channels == 32}, {"down_blocks.0", "up_blocks.1"}),
        (
            {"keep_attention": "*_blocks.1.*"},
            {"down_blocks.0", "mid_block", "up_blocks.0"},
        ),
        ({"sites": "down_*", "keep_attention": "*.1.attentions.*"}, {"down_blocks.0"}),
    ],
)
def test_layers_are_chosen_by_pattern_or_predicate(selection, expected):
    model = tiny_unet()
    apply_gspn2(model, GSPN2Config(), **selection)
    names = {site.name.split(".attentions")[0] for site in gspn2_sites(model) if site.patched}
    assert names == expected


@pytest.mark.parametrize(
    "selection, message",
    [
        ({"sites": "decoder.*"}, r"sites: expected to match.*\(down_blocks.*'decoder.\*' matched"),
        ({"sites": ["mid_block.*", "nope"]}, "'nope' matched none"),
        ({"keep_attention": "attn1"}, "keep_attention: expected to match"),
        ({"sites": lambda site: site.channels > 9000}, "'<lambda>' matched none"),
        ({"sites": "mid_block.*", "keep_attention": "mid_block.*"}, "at least one of the .* none"),
    ],
)
def test_a_selection_that_matches_nothing_is_refused_and_changes_nothing(selection, message):
    model = tiny_unet()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        apply_gspn2(model, GSPN2Config(), **selection)
    assert_same(before, fingerprint(model))


@torch.no_grad()
def test_a_failed_second_patch_leaves_the_first_in_place():
    model, run = tiny_denoiser("unet")
    patched(model)
    image = run(model)
    for wrong in (GSPN2Config(groups=3), GSPN2Config(proxy_dim=4096)):
        with pytest.raises(ValueError):
            apply_gspn2(model, wrong)
    with pytest.raises(ValueError):
        apply_gspn2(model, "/no/such/folder")
    assert torch.equal(run(model), image)


@pytest.mark.parametrize(
    "target, error, message",
    [
        (torch.nn.Linear(2, 2), ValueError, "expected one model of UNet2DCond.*; got Linear"),
        ("a path", TypeError, "expected a diffusers pipeline or model, got .* str"),
        (tiny_sd_pipeline().vae, ValueError, "got AutoencoderKL"),
    ],
)
def test_an_unsupported_model_is_named_beside_the_supported_ones(target, error, message):
    for act in (gspn2_sites, remove_gspn2, lambda m: apply_gspn2(m, GSPN2Config())):
        with pytest.raises(error, match=message):
            act(target)


def test_something_that_is_neither_weights_nor_config_is_refused():
    with pytest.raises(TypeError, match="folder, hub id, GSPN2Adapter or GSPN2Config, got dict"):
        apply_gspn2(tiny_unet(), {"proxy_ratio": 8})


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_softmax_attention_runs_the_teacher_inside_a_patched_model(family):
    model, run = tiny_denoiser(family)
    teacher = run(model)
    student = run(patched(model))
    with softmax_attention(model):
        assert torch.equal(run(model), teacher)
    assert torch.equal(run(model), student)


@torch.no_grad()
def test_softmax_attention_ends_even_when_the_body_fails():
    model, run = tiny_denoiser("unet")
    student = run(patched(model))
    with pytest.raises(KeyError), softmax_attention(model):
        raise KeyError
    assert torch.equal(run(model), student)


@torch.no_grad()
def test_dropped_attention_saves_its_weights_and_refuses_to_come_back():
    model, run = tiny_denoiser("unet")
    adapter = GSPN2Adapter.of_patched(patched(copy.deepcopy(model)))
    image = run(apply_gspn2(model, adapter))
    size = sum(p.numel() for p in model.parameters())
    apply_gspn2(model, adapter, drop_attention=True)
    assert torch.equal(run(model), image)
    assert sum(p.numel() for p in model.parameters()) < size
    for act in (
        remove_gspn2,
        lambda m: apply_gspn2(m, GSPN2Config()),
        lambda m: softmax_attention(m).__enter__(),
    ):
        with pytest.raises(ValueError, match="own attention, but it was (deleted|dropped)"):
            act(model)
    assert torch.equal(run(model), image)


def test_an_adapter_and_the_model_it_was_applied_to_share_their_blocks():
    model = tiny_dit()
    adapter = GSPN2Adapter.for_model(model, GSPN2Config())
    apply_gspn2(model, adapter)
    assert model.transformer_blocks[1].attn1.gspn2 is adapter.blocks[1]


def test_the_backend_is_set_on_every_block_and_not_saved(tmp_path):
    model = apply_gspn2(tiny_dit(), GSPN2Config(), backend="torch")
    assert {block.backend for block in GSPN2Adapter.of_patched(model).blocks} == {"torch"}
    save_gspn2(model, tmp_path)
    assert "backend" not in (tmp_path / "config.json").read_text()
    apply_gspn2(model, tmp_path)
    assert {block.backend for block in GSPN2Adapter.of_patched(model).blocks} == {"auto"}


def test_an_unknown_backend_is_refused_and_changes_nothing():
    model = tiny_dit()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="backend: expected one of auto, cuda, torch, got 'gpu'"):
        apply_gspn2(model, GSPN2Config(), backend="gpu")
    assert_same(before, fingerprint(model))


@torch.no_grad()
def test_the_cuda_backend_raises_where_it_cannot_run_while_auto_falls_back():
    model, run = tiny_denoiser("dit")
    adapter = awaken(GSPN2Adapter.for_model(model, GSPN2Config()))
    apply_gspn2(model, adapter, backend="cuda")
    with pytest.raises(RuntimeError, match="backend='cuda': expected .* CUDA device"):
        run(model)
    images = [run(apply_gspn2(model, adapter, backend=name)) for name in ("auto", "torch")]
    assert torch.equal(*images)


def test_layers_with_few_tokens_compute_their_own_attention():
    plain, model = tiny_unet().eval(), patched(tiny_unet()).eval()
    config = model.config
    weights = GSPN2Adapter.of_patched(model)
    apply_gspn2(model, weights, min_tokens=17)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".gspn2." not in k})
    grids = {site.name: site.grid for site in gspn2_sites(model)}
    seen = set()
    for name, module in model.named_modules():
        if hasattr(module, "gspn2"):
            few = grids[name][0] * grids[name][1] < 17
            tokens = torch.randn(1, *(grids[name][0] * grids[name][1], module.query_dim))
            own = plain.get_submodule(name)(tokens)
            assert torch.equal(module(tokens, grid=grids[name]), own) == few, name
            seen.add(few)
    assert seen == {True, False}, f"expected layers of both kinds in {config.sample_size}"


def test_min_tokens_native_keeps_attention_up_to_the_models_own_size():
    model = patched(tiny_unet()).eval()
    native, larger = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 12, 8)
    text = torch.randn(1, 3, 32)
    weights = GSPN2Adapter.of_patched(model)
    scans = {name: model(x, 10, text).sample for name, x in {"n": native, "l": larger}.items()}
    apply_gspn2(model, weights, min_tokens="native")
    with softmax_attention(model):
        own = model(native, 10, text).sample
    assert torch.equal(model(native, 10, text).sample, own)
    assert not torch.equal(own, scans["n"])
    assert torch.equal(model(larger, 10, text).sample, scans["l"])
    remove_gspn2(model)
    assert not any("gspn2_min_tokens" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"min_tokens": -1}, "at least 0, or 'native', got -1"),
     ({"min_tokens": "all"}, "got 'all'"),
     ({"min_tokens": 5, "drop_attention": True}, "drop_attention")],
)  # fmt: skip
def test_min_tokens_that_cannot_be_met_leave_the_model_alone(options, message):
    model = tiny_unet()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        apply_gspn2(model, GSPN2Config(), **options)
    assert_same(before, fingerprint(model))


def test_the_number_of_tokens_chooses_inside_a_compiled_model():
    model = patched(tiny_unet()).eval()
    apply_gspn2(model, GSPN2Adapter.of_patched(model), min_tokens="native")
    text = torch.randn(1, 3, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in ((8, 8), (12, 8), (8, 8)):
        x = torch.randn(1, 4, *size)
        expected = model(x, 10, text).sample
        torch.testing.assert_close(compiled(x, 10, text).sample, expected)
