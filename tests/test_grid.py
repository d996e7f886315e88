"""Every block is told the grid of its own tokens, at any size, in every family."""

import pytest
import torch
from tiny_models import (
    TEXT_WIDTH,
    awaken,
    tiny_denoiser,
    tiny_dit,
    tiny_pixart_pipeline,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_unet,
)

from gspn2_diffusers import (
    GSPN2Block,
    GSPN2Config,
    apply_gspn2,
    checkpoint_with_grid,
    gspn2_sites,
)
from gspn2_diffusers.families import find_denoiser

pytestmark = pytest.mark.filterwarnings("ignore::gspn2_diffusers.UntrainedBlocksWarning")


class RecordingBlock(GSPN2Block):
    """A block that writes down the batch, tokens and grid of every call."""

    def forward(self, tokens, grid=None):
        self.calls.append((*tokens.shape[:2], *self.grid.shape[:2]))
        return super().forward(tokens, grid)


def record(pipe_or_model):
    """Patch with recording blocks; returns {site: calls}."""
    model = find_denoiser(apply_gspn2(pipe_or_model, GSPN2Config()))
    calls = {}
    for site in gspn2_sites(model):
        block = model.get_submodule(site.name).gspn2
        block.__class__, block.calls = RecordingBlock, []
        calls[site.name] = block.calls
    return calls


def generate(pipe, height, width, images):
    options = {"height": height, "width": width, "num_inference_steps": 2, "output_type": "latent"}
    if pipe.__class__.__name__.startswith("PixArt"):
        shape = (images, 5, TEXT_WIDTH)
        mask = torch.ones(images, 5)
        pipe(
            prompt=None,
            negative_prompt=None,
            prompt_embeds=torch.randn(shape),
            negative_prompt_embeds=torch.randn(shape),
            prompt_attention_mask=mask,
            negative_prompt_attention_mask=mask,
            use_resolution_binning=False,
            **options,
        )
    else:
        pipe(["a cat"] * images, guidance_scale=4.0, **options)


@pytest.mark.parametrize(
    "make, height, width, grids",
    [
        # The proportions of 1216 x 832; SDXL attends on the second level, PixArt on patches of
        # 2 x 2 latent pixels.
        (tiny_sdxl_pipeline, 208, 304, {(13, 19)}),
        (tiny_sdxl_pipeline, 304, 208, {(19, 13)}),
        (tiny_pixart_pipeline, 208, 304, {(13, 19)}),
        # Odd latents 13 x 9: the level below has 7 x 5, not 6 x 4.
        (tiny_sd_pipeline, 104, 72, {(13, 9), (7, 5)}),
        (tiny_sdxl_pipeline, 104, 72, {(7, 5)}),
    ],
)
@torch.no_grad()
def test_blocks_in_a_pipeline_see_their_grid_for_a_batch_of_three_with_guidance(
    make, height, width, grids
):
    pipe = make()
    pipe.vae_scale_factor = 8  # pixels per latent pixel of real models; nothing is decoded here
    calls = record(pipe)
    generate(pipe, height, width, images=3)
    for site, seen in calls.items():
        assert len(seen) == 2, site  # one call per step: guidance doubles the batch
        for batch, tokens, rows, columns in seen:
            assert batch == 6 and tokens == rows * columns
    assert {call[2:] for seen in calls.values() for call in seen} == grids


@pytest.mark.parametrize("family", ["unet", "sdxl", "pixart"])
@pytest.mark.parametrize("size", [(13, 9), (9, 13), (2, 16), (16, 2), (24, 8)])
@torch.no_grad()
def test_sites_foretell_the_grids_of_a_forward_pass(family, size):
    model, run = tiny_denoiser(family)
    foretold = {site.name: site.grid for site in gspn2_sites(model, *size)}
    calls = record(model)
    run(model, 1, *size)
    assert {site: seen[0][2:] for site, seen in calls.items()} == foretold


@torch.no_grad()
def test_a_latent_one_pixel_high_is_a_grid_of_one_row():
    model, run = tiny_denoiser("unet")
    calls = record(model)
    run(model, 2, 1, 12)
    assert {call[2:] for seen in calls.values() for call in seen} == {(1, 12), (1, 6)}


@torch.no_grad()
def test_transposed_sizes_with_equal_token_counts_are_told_apart():
    model, run = tiny_denoiser("unet")
    calls = record(model)
    run(model, 1, 4, 16)
    run(model, 1, 16, 4)
    first = calls["down_blocks.0.attentions.0.transformer_blocks.0.attn1"]
    assert first == [(1, 64, 4, 16), (1, 64, 16, 4)]


def test_sites_give_names_widths_heads_and_grids_of_the_native_size():
    sites = gspn2_sites(tiny_sdxl_pipeline())
    assert [(s.name, s.channels, s.heads, s.grid, s.patched) for s in sites[:2]] == [
        (f"down_blocks.1.attentions.0.transformer_blocks.{i}.attn1", 64, 4, (4, 4), False)
        for i in range(2)
    ]
    assert len(sites) == 8


def test_sites_take_pixels_for_a_pipeline_and_latents_for_a_model():
    pipe = tiny_sd_pipeline()
    assert gspn2_sites(pipe, 52, 36) == gspn2_sites(pipe.unet, 13, 9)


def test_listing_sites_runs_nothing_on_the_model_itself():
    model = tiny_dit()
    model.forward = None
    assert [site.grid for site in gspn2_sites(model)] == [(4, 4), (4, 4)]


def test_a_grid_that_does_not_match_the_tokens_is_refused_inside_a_model():
    model, run = tiny_denoiser("unet")
    apply_gspn2(model, GSPN2Config())
    run(model)
    attention = model.mid_block.attentions[0].transformer_blocks[0].attn1
    with pytest.raises(ValueError, match="expected 16 tokens for a grid of 4 x 4, got 20"):
        attention(torch.randn(1, 20, 64))
    assert attention(torch.randn(1, 20, 64), grid=(4, 5)).shape == (1, 20, 64)


def test_checkpointing_recomputes_each_pass_on_its_own_grid():
    model, run = tiny_denoiser("unet")
    awaken(apply_gspn2(model, GSPN2Config())).train()

    def gradients():
        model.zero_grad()
        # One backward pass over two sizes with equally many tokens.
        (run(model, 1, 4, 16).square().sum() + run(model, 1, 16, 4).square().sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint_with_grid)
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])


def test_a_model_whose_input_is_no_map_is_refused():
    model = apply_gspn2(tiny_unet(), GSPN2Config())
    owner = model.mid_block.attentions[0]
    with pytest.raises(ValueError, match=r"expected an input map \[B, C, height, width\]"):
        owner(torch.randn(1, 16, 64))
