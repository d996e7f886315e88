"""The weights in the package: small enough to ship, and they draw what the captions say."""

import pytest
import torch

from gspn2_diffusers import apply_gspn2
from gspn2_diffusers.pipelines import load_pipeline
from gspn2_diffusers.shipped import SHIPPED_FOLDERS, shipped_folder
from gspn2_diffusers.tiny_scenes import GALLERY, render, sample_scenes
from gspn2_diffusers.tiny_scenes.models import WEIGHTS
from gspn2_diffusers.tiny_scenes.probe import Probe

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pretrained(shipped_folder("probe")).eval()


def share_right(probe: Probe, images: torch.Tensor, truth: dict[str, torch.Tensor]) -> float:
    """Share of all applicable attributes that the probe reads as `truth` has them."""
    logits = probe(images)
    right = torch.stack([logits[name].argmax(1) == truth[name] for name in truth])
    return right[torch.stack(list(truth.values())) >= 0].float().mean().item()


def test_shipped_files_are_safetensors_and_json_and_small():
    files = [path for name in SHIPPED_FOLDERS for path in (WEIGHTS / name).rglob("*.*")]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert max(path.stat().st_size for path in files) <= 15 * MEGABYTE
    assert sum(path.stat().st_size for path in files) <= 55 * MEGABYTE


@torch.no_grad()
def test_probe_reads_every_attribute_off_held_out_renders(probe):
    scenes = sample_scenes(12, seed=987654)
    assert share_right(probe, render(scenes), scenes.truth()) >= 0.98


@torch.no_grad()
@pytest.mark.parametrize(
    ("teacher", "weights", "least"), [("pipeline", "gspn2", 0.9), ("pixart", "pixart_gspn2", 0.7)]
)
def test_both_attentions_draw_what_the_gallery_says_and_nearly_the_same(
    probe, teacher, weights, least
):
    captions, classes = zip(*GALLERY[:4], strict=True)
    truth = {name: torch.tensor([entry[name] for entry in classes]) for name in classes[0]}
    pipe = load_pipeline(shipped_folder(teacher), dtype=torch.float32, device="cpu")
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        options = {"num_inference_steps": 12, "guidance_scale": 4.0, "output_type": "pt"}
        return pipe(list(captions), generator=generator, **options).images

    original = draw()
    apply_gspn2(pipe, shipped_folder(weights))
    student = draw()
    assert share_right(probe, original, truth) >= least
    assert share_right(probe, student, truth) >= least
    # Same noise, same caption: nearer to the teacher's picture than another caption's is.
    distance = (student - original).square().mean((1, 2, 3))
    other = (student.roll(1, 0) - original).square().mean((1, 2, 3))
    assert (distance < 0.3 * other).all() and (distance > 0).all()
