"""Stages are sampled as diffusers' own pipelines would, with what the cascade adds."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from tiny_teachers import random_batch, teacher_pipeline

from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.noising import Noising
from gspn2_diffusers.pipelines import sampling
from gspn2_diffusers.pipelines.cascade import Stage
from gspn2_diffusers.pipelines.generation import seeded
from gspn2_diffusers.pipelines.lean import LeanOptions
from gspn2_diffusers.pipelines.sampling import (
    GuidedDenoiser,
    LowFrequencies,
    StageSampler,
    Thrift,
    chunked_feed_forward,
    dilated,
)

CPU = torch.device("cpu")
PLAIN = Thrift()
SCHEDULERS = [
    DDIMScheduler(clip_sample=False, steps_offset=1),
    DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    EulerDiscreteScheduler(),
    EulerAncestralDiscreteScheduler(),
    DPMSolverMultistepScheduler(),
    UniPCMultistepScheduler(),
    HeunDiscreteScheduler(),
    LCMScheduler(),
    FlowMatchEulerDiscreteScheduler(),
]


def named(scheduler) -> str:
    return f"{type(scheduler).__name__}-{scheduler.config.get('prediction_type', 'flow')}"


def guided(family="sd", scale=3.0, thrift=PLAIN, n=1):
    model = find_denoiser(teacher_pipeline(family)).eval()
    batch = random_batch(family, n)
    return GuidedDenoiser(model, batch.rows, batch.unconditional, scale, thrift)


def sample(stage, denoiser=None, scheduler=SCHEDULERS[0], image=None, seeds=(0,), **options):
    sampler = StageSampler(scheduler, stage, denoiser or guided(), CPU)
    shape = (len(seeds), 4, stage.height // 4, stage.width // 4)
    coarse = None if image is None else (4, 4)
    return sampler(shape, [seeded(seed) for seed in seeds], image, coarse, **options)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=named)
def test_every_scheduler_samples_from_noise_and_from_an_image(scheduler):
    image = torch.randn(1, 4, 8, 8, generator=seeded(3))
    whole = sample(Stage(32, 32, 3), scheduler=scheduler)
    part = Stage(32, 32, 3, strength=0.4, low_frequency=1.0)
    first, again = (sample(part, scheduler=scheduler, image=image) for _ in range(2))
    assert torch.isfinite(whole).all() and torch.isfinite(first).all()
    assert torch.equal(first, again), "the same seed gave another picture"
    assert not torch.equal(first, sample(part, scheduler=scheduler, image=image, seeds=(1,)))


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_a_part_of_the_schedule_is_that_of_img2img(strength):
    pipe = teacher_pipeline()
    img2img = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    whole = round(6 / strength)
    pipe.scheduler.set_timesteps(whole)
    expected, _ = img2img.get_timesteps(whole, strength, CPU)
    sampler = StageSampler(pipe.scheduler, Stage(32, 32, 6, strength), guided(), CPU)
    assert sampler.timesteps.tolist() == expected.tolist()
    assert len(sampler.timesteps) == 6


def test_a_stage_without_strength_to_change_anything_keeps_the_image():
    image = torch.randn(1, 4, 8, 8, generator=seeded(3))
    nearly = sample(Stage(32, 32, 1, strength=0.005), image=image)
    assert (nearly - image).std() < 0.25 * image.std()


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart"])
def test_guidance_is_the_same_in_one_batch_and_in_two(family):
    noisy = torch.randn(2, 4, 8, 8)
    joint, split = (
        guided(family, thrift=Thrift(split_guidance=split), n=2)(noisy, torch.tensor(500), 0)
        for split in (False, True)
    )
    torch.testing.assert_close(joint, split, rtol=1e-3, atol=1e-4)


def test_without_guidance_only_the_prompt_is_asked():
    denoiser = guided(scale=1.0)
    with counted_calls(denoiser.model) as calls:
        denoiser(torch.randn(1, 4, 8, 8), torch.tensor(500), 0)
    assert calls == [1]


def test_a_lean_stage_is_the_plain_one():
    stage = Stage(36, 44, 3)
    expected = sample(stage)
    lean = guided(thrift=Thrift(split_guidance=True, lean=LeanOptions(max_elements=512)))
    torch.testing.assert_close(sample(stage, lean), expected, rtol=1e-3, atol=1e-4)


def test_deep_features_are_computed_anew_every_few_steps():
    denoiser = guided(thrift=Thrift(reuse=2))
    with counted_calls(denoiser.model.mid_block.attentions[0].transformer_blocks[0].attn1) as calls:
        result = sample(Stage(32, 32, 5), denoiser)
    assert len(calls) == 3  # steps 0, 2 and 4
    assert torch.isfinite(result).all()


def test_low_frequencies_of_the_answer_become_those_of_the_image():
    noising = Noising(DDIMScheduler())
    image, noisy, answer = torch.randn(3, 1, 4, 16, 16, generator=seeded(0))
    levels = noising.level_at(torch.tensor(600))

    def distance(latents):
        return F.interpolate(latents - image, (4, 4), mode="area").square().mean()

    def fine(latents):
        coarse = F.interpolate(latents, (4, 4), mode="area")
        return latents - F.interpolate(coarse, (16, 16), mode="bicubic")

    before = noising.clean(noisy, answer, levels)
    strong = LowFrequencies(noising, image, (4, 4), 1.0)
    after = noising.clean(noisy, strong(answer, noisy, torch.tensor(600), 0.0), levels)
    assert distance(after) < 0.1 * distance(before)
    assert (fine(after) - fine(before)).square().mean() < 0.05 * fine(before).square().mean()
    later = noising.clean(noisy, strong(answer, noisy, torch.tensor(600), 0.8), levels)
    assert distance(after) < distance(later) < distance(before), "it does not decay"
    assert torch.equal(strong(answer, noisy, torch.tensor(600), 1.0), answer)


def test_images_of_a_batch_are_those_drawn_alone():
    both = sample(Stage(32, 32, 3), guided(n=2), seeds=(5, 6))
    batch = random_batch(n=2)
    model = find_denoiser(teacher_pipeline()).eval()
    rows, nothing = ({k: v[1:] for k, v in r.items()} for r in (batch.rows, batch.unconditional))
    second = GuidedDenoiser(model, rows, nothing, 3.0, PLAIN)
    alone = sample(Stage(32, 32, 3), second, seeds=(6,))
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-4)


def test_dilation_spreads_deep_convolutions_in_early_steps_only_and_is_undone():
    denoiser = guided()
    deep = denoiser.model.mid_block.resnets[0].conv1
    shallow = denoiser.model.down_blocks[0].resnets[0].conv1
    seen = []

    def look(step, timestep, latents):
        return latents

    with counted_calls(deep, lambda module: seen.append(module.dilation)):
        dilation = Stage(32, 32, 4, dilation=2, dilated_steps=0.5)
        changed = sample(dilation, denoiser, on_step=look)
    assert seen == [(2, 2), (2, 2), (1, 1), (1, 1)]
    assert (deep.dilation, deep.padding, shallow.dilation) == ((1, 1), (1, 1), (1, 1))
    assert not torch.equal(changed, sample(Stage(32, 32, 4), denoiser))
    with pytest.raises(RuntimeError, match="stop"), dilated(denoiser.model, 2):
        raise RuntimeError("stop")
    assert deep.dilation == (1, 1)


def test_dilation_of_a_lean_stage_is_that_of_a_plain_one():
    stage = Stage(36, 44, 2, dilation=2, dilated_steps=1.0)
    lean = guided(thrift=Thrift(split_guidance=True, lean=LeanOptions(max_elements=512)))
    torch.testing.assert_close(sample(stage, lean), sample(stage), rtol=1e-3, atol=1e-4)


def test_dilation_needs_a_unet():
    with pytest.raises(ValueError, match="dilation: expected a UNet2DConditionModel, got PixArt"):
        sample(Stage(32, 32, 2, dilation=2, dilated_steps=1.0), guided("pixart"))


def test_graphs_are_for_the_models_own_forward_pass_on_a_gpu(monkeypatch):
    on_gpu = property(lambda self: torch.device("cuda"))
    assert not guided(thrift=Thrift(graph=True)).graph
    monkeypatch.setattr(UNet2DConditionModel, "device", on_gpu)
    assert guided(thrift=Thrift(graph=True)).graph
    assert not guided(thrift=Thrift()).graph
    lean = LeanOptions(max_elements=512)
    assert not guided(thrift=Thrift(split_guidance=True, lean=lean, graph=True)).graph
    assert not guided(thrift=Thrift(reuse=2, graph=True)).graph
    model, batch = find_denoiser(teacher_pipeline()).eval(), random_batch()
    given = batch.rows, batch.unconditional, 3.0, Thrift(graph=True)
    assert not GuidedDenoiser(torch.compile(model), *given).graph
    add_hook_to_module(model, CpuOffload(torch.device("cpu")))
    assert not GuidedDenoiser(model, *given).graph


def test_a_graph_ends_where_the_dilation_changes(monkeypatch):
    """One each, of passes with one dilation."""
    dilations = []

    class Recorded:
        def __init__(self, run):
            self.run, self.seen = run, []
            dilations.append(self.seen)

        def __call__(self, *inputs):
            self.seen.append(deep.dilation[0])
            return self.run(*inputs)

    denoiser = guided()
    deep = denoiser.model.mid_block.resnets[0].conv1
    stage = Stage(32, 32, 5, dilation=2, dilated_steps=0.5)
    expected = sample(stage, denoiser)
    monkeypatch.setattr(sampling, "Replayed", Recorded)
    denoiser.graph = True
    assert torch.equal(sample(stage, denoiser), expected)
    assert dilations == [[2, 2, 2], [1, 1]]


def test_feed_forward_layers_take_chunks_and_are_left_as_they_were():
    denoiser = guided("pixart")
    expected = sample(Stage(32, 32, 2), denoiser)
    with chunked_feed_forward(denoiser.model, 4):
        found = sample(Stage(32, 32, 2), denoiser)
        assert denoiser.model.transformer_blocks[0]._chunk_size == 4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert denoiser.model.transformer_blocks[0]._chunk_size is None


@contextmanager
def counted_calls(module, look=lambda module: None):
    """A list with the batch size of every call of a module."""
    calls = []

    def hook(module, args, kwargs):
        look(module)
        calls.append(len(args[0] if args else next(iter(kwargs.values()))))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
