"""Loading a pipeline: devices, dtypes, and what is refused."""

import pytest
import torch

from gspn2_diffusers import GSPN2Adapter, gspn2_sites
from gspn2_diffusers.fuse import is_fused
from gspn2_diffusers.kernels import backends
from gspn2_diffusers.pipelines import load_pipeline
from gspn2_diffusers.pipelines.loading import available_devices, default_dtype
from gspn2_diffusers.pipelines.outline import outline_sites


def test_weights_patch_the_pipeline_and_its_dtype_holds_for_the_blocks(sd_folder, gspn2_folder):
    pipe = load_pipeline(sd_folder, weights=gspn2_folder, dtype="bfloat16", device="cpu")
    assert all(site.patched for site in gspn2_sites(pipe))
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("backend, kernels_run", [("auto", True), ("auto", False), ("torch", True)])
def test_blocks_are_fused_only_for_the_cuda_kernels(
    sd_folder, gspn2_folder, backend, kernels_run, monkeypatch
):
    obstacle = None if kernels_run else "expected a GPU"
    monkeypatch.setattr(backends, "why_not_cuda", lambda *_: obstacle)
    options = {"weights": gspn2_folder, "device": "cpu", "backend": backend}
    blocks = [
        block
        for fuse in (False, True)
        for block in GSPN2Adapter.of_patched(
            load_pipeline(sd_folder, fuse=fuse, **options).unet
        ).blocks
    ]
    half = len(blocks) // 2
    assert not any(map(is_fused, blocks[:half]))
    assert all(is_fused(block) == (kernels_run and backend == "auto") for block in blocks[half:])


def test_cpu_computes_in_float32_unless_told_otherwise(sd_folder):
    assert default_dtype(torch.device("cpu")) == torch.float32
    assert load_pipeline(sd_folder, device="cpu").dtype == torch.float32
    assert available_devices()[-1] == "cpu"


def test_outline_from_configuration_equals_the_sites_of_the_loaded_pipeline(sd_folder):
    pipe = load_pipeline(sd_folder, device="cpu")
    assert outline_sites(sd_folder) == gspn2_sites(pipe)
    assert outline_sites(sd_folder, height=52, width=36) == gspn2_sites(pipe, 52, 36)


@pytest.mark.parametrize("name", ["", "model_index.json"])
def test_a_path_that_is_no_pipeline_is_refused_before_the_hub_is_asked(tmp_path, name):
    path = tmp_path / name
    if name:
        path.write_text("{}")
    with pytest.raises(ValueError, match=f"expected a pipeline folder.*{path}"):
        load_pipeline(path)
