"""Scores: right answers count as right, the Fréchet distance is the known one, hooks come off."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from gspn2_diffusers.tiny_scenes.attention_report import (
    attention_report,
    mean_ablation,
    self_attentions,
)
from gspn2_diffusers.tiny_scenes.scenes import ATTRIBUTES, sample_scenes
from gspn2_diffusers.tiny_scenes.score import frechet_distance, score


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


REFERENCE = torch.rand(10, 3)  # features of true pictures, for the Fréchet distance only


def test_right_pictures_score_full_marks_in_batches():
    scenes = sample_scenes(11, seed=3)
    seen = []
    result = score(
        IndexPipe(), KnowingProbe(scenes.truth()), scenes, batch_size=4, reference=REFERENCE,
        progress=seen.append,
    )  # fmt: skip
    assert result["all_right"] == result["mean_accuracy"] == 1
    assert seen == [4, 4, 3]


def test_one_wrong_attribute_spoils_one_scene_only():
    scenes = sample_scenes(10, seed=3)
    probe = KnowingProbe(scenes.truth(), {"setting": (2,), "light": (2, 5)})
    result = score(IndexPipe(), probe, scenes, reference=REFERENCE)
    assert result["accuracy"]["setting"] == pytest.approx(0.9)
    assert result["accuracy"]["light"] == pytest.approx(0.8)
    assert result["all_right"] == pytest.approx(0.8)


def test_attributes_that_never_apply_are_left_out():
    scenes = sample_scenes(40, seed=0)
    scenes = scenes[scenes.count < 0]
    result = score(IndexPipe(), KnowingProbe(scenes.truth()), scenes, reference=REFERENCE)
    assert "count" not in result["accuracy"] and "setting" in result["accuracy"]


def test_captions_of_another_number_are_refused():
    scenes = sample_scenes(3, seed=0)
    with pytest.raises(ValueError, match="expected 3 captions, received 1"):
        score(IndexPipe(), KnowingProbe(scenes.truth()), scenes, captions=["a red ball"])


def test_frechet_distance_of_known_gaussians():
    torch.manual_seed(0)
    sample = torch.randn(20000, 3)
    assert frechet_distance(sample, sample) == pytest.approx(0, abs=1e-6)
    moved = 2 * torch.randn(20000, 3) + torch.tensor([1.0, 0.0, 0.0])
    assert frechet_distance(sample, moved) == pytest.approx(1 + 3, rel=0.05)


def test_frechet_distance_needs_two_rows():
    with pytest.raises(ValueError, match="received 1 and 5"):
        frechet_distance(torch.zeros(1, 2), torch.zeros(5, 2))


class OneLayer(nn.Module):
    """A denoiser with one self-attention."""

    def __init__(self):
        super().__init__()
        self.attn1 = Attention(query_dim=8, heads=2, dim_head=4)


class OneLayerPipe:
    """Runs the denoiser's only layer once a step."""

    def __init__(self):
        self.unet = OneLayer()

    def __call__(self, prompts, num_inference_steps, generator, **options):
        for _ in range(num_inference_steps):
            self.unet.attn1(torch.randn(len(prompts), 6, 8, generator=generator))


def test_uniform_attention_has_entropy_one_and_nothing_between_tokens():
    pipe = OneLayerPipe()
    nn.init.zeros_(pipe.unet.attn1.to_q.weight)
    report = attention_report(pipe, ["a", "b"], steps=2)
    assert report["attn1"]["entropy"] == pytest.approx(1, abs=1e-5)
    assert report["mean"]["between_tokens"] == pytest.approx(0, abs=1e-6)


def test_sharp_attention_has_low_entropy_and_leaves_no_hook():
    pipe = OneLayerPipe()
    with torch.no_grad():
        for projection in (pipe.unet.attn1.to_q, pipe.unet.attn1.to_k):
            projection.weight.copy_(20 * torch.eye(8))
    report = attention_report(pipe, ["a", "b"], steps=1)
    assert report["attn1"]["entropy"] < 0.5
    assert report["attn1"]["between_tokens"] > 0.5
    assert not pipe.unet.attn1._forward_hooks


def test_mean_ablation_makes_tokens_equal_and_is_undone():
    model, tokens = OneLayer(), torch.randn(2, 6, 8)
    before = model.attn1(tokens)
    with mean_ablation(model):
        ablated = model.attn1(tokens)
    assert torch.allclose(ablated, before.mean(1, keepdim=True).expand_as(before))
    assert torch.equal(model.attn1(tokens), before)


def test_model_without_self_attention_is_refused():
    with pytest.raises(ValueError, match="attn1"):
        self_attentions(nn.Linear(2, 2))
