"""Scores: right answers count as right, the Fréchet distance is the known one, hooks come off."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gspn2_diffusers import GSPN2Adapter, GSPN2Config, gspn2_sites
from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.tiny_scenes.attention_report import (
    attention_report,
    mean_ablation,
    self_attentions,
)
from gspn2_diffusers.tiny_scenes.captions import caption
from gspn2_diffusers.tiny_scenes.data import Renderer, held_out_scenes
from gspn2_diffusers.tiny_scenes.models import build_vae
from gspn2_diffusers.tiny_scenes.probe import Probe
from gspn2_diffusers.tiny_scenes.scenes import ATTRIBUTES, sample_scenes
from gspn2_diffusers.tiny_scenes.score import (
    Exam,
    frechet_distance,
    generate,
    main,
    name_weights,
    prepare_exam,
    score,
    score_weights,
)
from gspn2_diffusers.tiny_scenes.train_pipeline import DENOISERS


class IndexPipe:
    """Draws the number of the image, so that a reader of that number can know the truth."""

    device = torch.device("cpu")

    def __init__(self):
        self.drawn = 0

    def __call__(self, prompts, **options):
        numbers = torch.arange(self.drawn, self.drawn + len(prompts))
        self.drawn += len(prompts)
        return SimpleNamespace(images=numbers[:, None, None, None].half().expand(-1, 3, 8, 8))


class KnowingProbe:
    """Answers with the truth of the scene whose number the image shows, wrong where told to."""

    def __init__(self, truth, wrong=()):
        self.truth = truth
        self.wrong = dict(wrong)

    def __call__(self, images):
        numbers = images[:, 0, 0, 0].long()
        logits = {}
        for name, classes in ATTRIBUTES.items():
            answer = self.truth[name][numbers].clamp(min=0)
            for number in self.wrong.get(name, ()):
                answer[numbers == number] = (answer[numbers == number] + 1) % len(classes)
            logits[name] = nn.functional.one_hot(answer, len(classes)).float()
        return logits

    def features(self, images):
        return images.mean((2, 3)).float()


def make_exam(scenes, wrong=()):
    """The scenes before a knowing probe; its reference is for the Fréchet distance only."""
    probe = KnowingProbe(scenes.truth(), wrong)
    return Exam(probe, scenes, caption(scenes, seed=0), reference=torch.rand(10, 3))


def test_right_pictures_score_full_marks_in_batches():
    seen = []
    exam = make_exam(sample_scenes(11, seed=3))
    result = score(IndexPipe(), exam, batch_size=4, progress=seen.append)
    assert result["all_right"] == result["mean_accuracy"] == 1
    assert seen == [4, 4, 3]


def test_one_wrong_attribute_spoils_one_scene_only():
    exam = make_exam(sample_scenes(10, seed=3), {"setting": (2,), "light": (2, 5)})
    result = score(IndexPipe(), exam)
    assert result["accuracy"]["setting"] == pytest.approx(0.9)
    assert result["accuracy"]["light"] == pytest.approx(0.8)
    assert result["all_right"] == pytest.approx(0.8)


def test_attributes_that_never_apply_are_left_out():
    scenes = sample_scenes(40, seed=0)
    result = score(IndexPipe(), make_exam(scenes[scenes.count < 0]))
    assert "count" not in result["accuracy"] and "setting" in result["accuracy"]


def test_captions_of_another_number_are_refused():
    scenes = sample_scenes(3, seed=0)
    with pytest.raises(ValueError, match="expected 3 captions, got 1"):
        Exam(KnowingProbe(scenes.truth()), scenes, ["a red ball"], torch.rand(10, 3))


def test_exam_is_of_held_out_scenes_with_captions_and_features_of_their_renders(tmp_path):
    probe = Probe().eval()
    probe.save_pretrained(tmp_path)
    device = torch.device("cpu")
    renderer = Renderer(32, device, supersample=1)
    exam = prepare_exam(device, 3, 5, batch_size=2, renderer=renderer, probe=tmp_path)
    scenes = held_out_scenes(3, 5)
    assert torch.equal(exam.scenes.position, scenes.position)
    assert exam.captions == caption(scenes, seed=5) and exam.seed == 5
    with torch.no_grad():
        assert torch.allclose(exam.reference, probe.features(renderer(scenes)), atol=1e-5)


class OptionsPipe:
    """A pipeline with PixArt's options, which it remembers."""

    def __call__(self, prompts, height, width, *, use_resolution_binning=True, clean_caption=True,
                 **options):  # fmt: skip
        self.seen = (height, width, use_resolution_binning, clean_caption)
        return SimpleNamespace(images=torch.zeros(len(prompts), 3, 8, 8))


def test_pictures_are_drawn_at_the_size_asked_for_and_not_at_a_similar_one():
    pipe = OptionsPipe()
    generate(pipe, ["a"], steps=1, guidance_scale=4.0, seed=0, height=96, width=64)
    assert pipe.seen == (96, 64, False, False)


def test_frechet_distance_of_known_gaussians():
    torch.manual_seed(0)
    sample = torch.randn(20000, 3)
    assert frechet_distance(sample, sample) == pytest.approx(0, abs=1e-6)
    moved = 2 * torch.randn(20000, 3) + torch.tensor([1.0, 0.0, 0.0])
    assert frechet_distance(sample, moved) == pytest.approx(1 + 3, rel=0.05)


def test_frechet_distance_needs_two_rows():
    with pytest.raises(ValueError, match="got 1 and 5"):
        frechet_distance(torch.zeros(1, 2), torch.zeros(5, 2))


@pytest.fixture(params=DENOISERS)
def pipe(request):
    """An untrained pipeline of either kind for 64 pixels."""
    torch.manual_seed(0)
    pipe = DENOISERS[request.param].build(64).eval().assemble(build_vae(64))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class SizeProbe(KnowingProbe):
    """Reads nothing, but remembers the sizes of the images."""

    def __init__(self):
        self.sizes = []

    def __call__(self, images):
        self.sizes.append(tuple(images.shape))
        return {name: torch.rand(len(images), len(ATTRIBUTES[name])) for name in ATTRIBUTES}


def test_every_weights_are_scored_at_the_same_size_and_taken_out_again(pipe):
    torch.manual_seed(0)
    scenes = sample_scenes(3, seed=1)
    exam = Exam(SizeProbe(), scenes, caption(scenes, seed=1), torch.rand(10, 3))
    nn.init.normal_(next(reversed(list(find_denoiser(pipe).parameters()))), std=0.1)
    weights = {"a": GSPN2Adapter.for_model(find_denoiser(pipe), GSPN2Config())}
    before = generate(pipe, ["a red ball"], steps=1, guidance_scale=4.0, seed=0)
    calls = []
    results = score_weights(
        pipe, exam, weights, ablation=True, steps=1, batch_size=2, height=48, width=80,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert list(results) == ["softmax", "mean ablation", "a"]
    assert exam.probe.sizes == 3 * [(2, 3, 48, 80), (1, 3, 48, 80)]
    assert calls == [(name, done, 3) for name in results for done in (2, 3)]
    assert not any(site.patched for site in gspn2_sites(pipe))
    after = generate(pipe, ["a red ball"], steps=1, guidance_scale=4.0, seed=0)
    assert torch.equal(before, after)


def test_weights_that_do_not_fit_leave_the_pipeline_with_softmax(pipe, tmp_path):
    scenes = sample_scenes(2, seed=1)
    exam = Exam(SizeProbe(), scenes, caption(scenes, seed=1), torch.rand(10, 3))
    with pytest.raises(ValueError):
        score_weights(pipe, exam, {"a": tmp_path}, steps=1, height=32, width=32)
    assert not any(site.patched for site in gspn2_sites(pipe))


def test_weights_cannot_take_the_name_of_another_score():
    with pytest.raises(ValueError, match="expected other names for weights, got softmax"):
        score_weights(None, None, {"softmax": "folder"})


def test_weights_are_named_by_their_folder_unless_two_share_it():
    assert name_weights(["a/gspn2", "owner/other"]) == {"gspn2": "a/gspn2", "other": "owner/other"}
    assert name_weights(["a/gspn2", "b/gspn2"]) == {"a/gspn2": "a/gspn2", "b/gspn2": "b/gspn2"}


def test_command_scores_every_sidecar_it_is_given(sd_folder, gspn2_folder, tmp_path):
    Probe().save_pretrained(tmp_path / "probe")
    shutil.copytree(gspn2_folder, tmp_path / "copy")
    results = main(
        f"--pipeline {sd_folder} --probe {tmp_path}/probe --scenes 2 --steps 1 --device cpu "
        f"--gspn2 {gspn2_folder} --gspn2 {tmp_path}/copy --output {tmp_path}/out.json".split()
    )
    assert list(results) == ["softmax", "tiny-gspn2", "copy"]
    same = ("accuracy", "frechet")
    assert [results["copy"][key] for key in same] == [results["tiny-gspn2"][key] for key in same]
    assert (tmp_path / "out.json").is_file()


def scale_queries(pipe, factor):
    """Make the attention of every self-attention layer sharper or flatter."""
    layers = self_attentions(find_denoiser(pipe))
    for layer in layers.values():
        for parameter in layer.to_q.parameters():
            parameter.data.mul_(factor)
    return layers


def test_uniform_attention_has_entropy_one_and_nothing_between_tokens(pipe):
    layers = scale_queries(pipe, 0)
    report = attention_report(pipe, ["a", "b"], steps=2)
    assert report.keys() == {*layers, "mean"}
    for shown in report.values():
        assert shown["entropy"] == pytest.approx(1, abs=1e-5)
        assert shown["between_tokens"] == pytest.approx(0, abs=1e-6)


def test_sharp_attention_has_low_entropy_and_leaves_no_hook(pipe):
    layers = scale_queries(pipe, 300)
    report = attention_report(pipe, ["a", "b"], steps=1)
    assert report["mean"]["entropy"] < 0.5
    assert report["mean"]["between_tokens"] > 0.2
    assert not any(layer._forward_hooks for layer in layers.values())


def test_mean_ablation_makes_tokens_equal_and_is_undone(pipe):
    layer = next(iter(self_attentions(find_denoiser(pipe)).values()))
    tokens = torch.randn(2, 6, layer.to_q.in_features)
    before = layer(tokens)
    with mean_ablation(pipe):
        ablated = layer(tokens)
    assert torch.allclose(ablated, before.mean(1, keepdim=True).expand_as(before))
    assert torch.equal(layer(tokens), before)


def test_model_without_self_attention_is_refused():
    with pytest.raises(ValueError, match="attn1"):
        self_attentions(nn.Linear(2, 2))
