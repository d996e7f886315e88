"""Saving and loading the sidecar, and what is said about files that are not one."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from tiny_models import awaken, tiny_denoiser, tiny_dit, tiny_sd_pipeline, tiny_unet

from gspn2_diffusers import (
    GSPN2Adapter,
    GSPN2Config,
    apply_gspn2,
    gspn2_sites,
    remove_gspn2,
    save_gspn2,
)

pytestmark = pytest.mark.filterwarnings("ignore::gspn2_diffusers.UntrainedBlocksWarning")
WEIGHTS = "diffusion_pytorch_model.safetensors"

GENERATE = """
import sys, torch
from diffusers import StableDiffusionPipeline
from gspn2_diffusers import apply_gspn2
model, weights, output = sys.argv[1:]
pipe = apply_gspn2(StableDiffusionPipeline.from_pretrained(model), weights)
generator = torch.Generator().manual_seed(5)
images = pipe("a cat", generator=generator, num_inference_steps=2, output_type="pt").images
torch.save(images, output)
"""


@pytest.fixture
def sidecar(tmp_path):
    """A folder with the weights of a patched `tiny_unet`."""
    torch.manual_seed(0)
    save_gspn2(awaken(apply_gspn2(tiny_unet(), GSPN2Config(groups=2))), tmp_path / "gspn2")
    return tmp_path / "gspn2"


def test_a_new_process_that_loads_the_weights_draws_identical_images(tmp_path, sd_folder):
    pipe = tiny_sd_pipeline()
    awaken(apply_gspn2(pipe, GSPN2Config()).unet)
    save_gspn2(pipe, tmp_path / "gspn2")
    generator = torch.Generator().manual_seed(5)
    here = pipe("a cat", generator=generator, num_inference_steps=2, output_type="pt").images
    output = tmp_path / "images.pt"
    subprocess.run(
        [sys.executable, "-c", GENERATE, sd_folder, str(tmp_path / "gspn2"), str(output)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert torch.equal(torch.load(output, weights_only=True), here)


@torch.no_grad()
@pytest.mark.parametrize("family", ["unet", "sdxl", "dit", "pixart"])
def test_saved_blocks_load_into_an_equal_model_and_give_its_outputs(family, tmp_path):
    """Weights bit for bit. Outputs to rounding: on some processors the order of a sum depends on
    where in memory the weights lie."""
    model, run = tiny_denoiser(family)
    config = GSPN2Config(groups=2, parameters_from="tokens", chunk_size=3)
    apply_gspn2(model, config, sites="*.0.attn1" if family == "unet" else None)
    image = run(awaken(model))
    save_gspn2(model, tmp_path)
    twin, _ = tiny_denoiser(family)
    apply_gspn2(twin, tmp_path)
    for mine, saved in zip(twin.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, saved)
    torch.testing.assert_close(run(twin), image, rtol=1e-5, atol=1e-5)


def test_only_a_config_and_safetensors_are_written(sidecar):
    assert sorted(path.name for path in sidecar.iterdir()) == ["config.json", WEIGHTS]
    config = json.loads((sidecar / "config.json").read_text())
    assert config["base_model_class"] == "UNet2DConditionModel"
    assert config["block_config"]["groups"] == 2
    assert config["layers"][0].keys() == {"name", "channels", "grid"}


def test_blocks_know_the_native_grid_of_their_layer_after_loading(sidecar, tmp_path):
    grids = {site.name: site.grid for site in gspn2_sites(tiny_unet())}
    model = apply_gspn2(tiny_unet(), sidecar)
    for name, block in GSPN2Adapter.of_patched(model).blocks_by_site().items():
        assert block.native_grid == grids[name]
    save_gspn2(model, tmp_path)
    again = GSPN2Adapter.from_pretrained(tmp_path)
    assert [b.native_grid for b in again.blocks] == list(grids.values())


def test_a_model_whose_grids_cannot_be_found_without_data_is_patched_all_the_same():
    model = apply_gspn2(tiny_unet(num_class_embeds=4), GSPN2Config())
    assert {block.native_grid for block in GSPN2Adapter.of_patched(model).blocks} == {None}


def test_weights_from_before_grids_were_kept_load_and_leave_lam_alone(sidecar):
    config = json.loads((sidecar / "config.json").read_text())
    for layer in config["layers"]:
        del layer["grid"]
    (sidecar / "config.json").write_text(json.dumps(config))
    adapter = GSPN2Adapter.from_pretrained(sidecar)
    assert {block.native_grid for block in adapter.blocks} == {None}


def test_loads_in_half_precision_and_follows_the_model_it_is_put_into(sidecar):
    adapter = GSPN2Adapter.from_pretrained(sidecar, torch_dtype=torch.bfloat16)
    assert adapter.blocks[0].down.weight.dtype == torch.bfloat16
    model = apply_gspn2(tiny_unet().half(), adapter)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_part_of_the_layers_can_be_taken_from_weights(sidecar):
    model = apply_gspn2(tiny_unet(), sidecar, keep_attention="up_blocks.*")
    assert {name.split(".")[0] for name in GSPN2Adapter.of_patched(model).sites} == {
        "down_blocks",
        "mid_block",
    }


def truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def drop_a_tensor(folder):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    del tensors["blocks.1.down.weight"]
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def add_a_tensor(folder):
    tensors = safetensors.torch.load_file(folder / WEIGHTS) | {"blocks.0.extra": torch.ones(1)}
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def reshape_a_tensor(folder):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    tensors["blocks.0.down.weight"] = torch.ones(3, 3)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def damage_config(folder):
    (folder / "config.json").write_text("{")


def delete(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncate, "could not load GSPN-2 weights"),
        (drop_a_tensor, "missing keys: blocks.1.down.weight|blocks.1.down.weight"),
        (add_a_tensor, "unexpected keys: blocks.0.extra"),
        (reshape_a_tensor, "blocks.0.down.weight"),
        (delete(WEIGHTS), "could not load GSPN-2 weights"),
        (delete("config.json"), "expected a config.json of GSPN-2 weights, found none"),
        (damage_config, "expected JSON, got a damaged file"),
        (edit_config(_class_name="UNet2DModel"), "of a GSPN2Adapter, got 'UNet2DModel'"),
        (edit_config(block_config={"groups": 0}), "groups: expected at least 1, got 0"),
        (edit_config(block_config={"taps": 5}), "could not load.*taps"),
        (edit_config(format_version="0.1.0"), "format_version: expected 2, got '0.1.0'"),
        (edit_config(base_model_class="DiTTransformer2DModel"), "expected a DiTTrans.*got a UNet2"),
    ],
)
def test_damaged_or_foreign_weights_are_refused_before_anything_changes(sidecar, damage, message):
    model, run = tiny_denoiser("unet")
    image = run(model)
    damage(sidecar)
    with pytest.raises(ValueError, match=message):
        apply_gspn2(model, sidecar)
    assert torch.equal(run(model), image)


def test_weights_for_another_width_name_the_layer_and_both_widths(sidecar):
    wider = tiny_unet(block_out_channels=(32, 128))
    with pytest.raises(ValueError, match="with 64 channels in down_blocks.1.*, got 128 channels"):
        apply_gspn2(wider, sidecar)


def test_weights_for_other_layers_name_the_missing_one(sidecar):
    shallow = tiny_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(ValueError, match="in down_blocks.0.*, got no such layer"):
        apply_gspn2(shallow, sidecar)


@pytest.mark.parametrize("source", ["./gone", "/no/such/folder", "a/b/c", "name"])
def test_a_folder_that_does_not_exist_is_not_sought_on_the_hub(source):
    with pytest.raises(ValueError, match="expected a folder written by save_gspn2 or a hub id"):
        apply_gspn2(tiny_unet(), source)


def test_a_hub_id_that_cannot_be_reached_is_one_clear_error():
    with pytest.raises(ValueError, match="owner/name: could not load GSPN-2 weights"):
        apply_gspn2(tiny_unet(), "owner/name")


def test_saving_a_model_without_blocks_is_refused(tmp_path):
    model = remove_gspn2(apply_gspn2(tiny_dit(), GSPN2Config()))
    with pytest.raises(ValueError, match="expected a model patched by apply_gspn2, got a DiT"):
        save_gspn2(model, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
