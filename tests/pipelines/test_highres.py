"""The high-resolution pipeline: what it draws, what it refuses, and what it leaves as it was."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_models import awaken
from tiny_teachers import patched_pipeline, teacher_pipeline, with_text_encoder

from gspn2_diffusers import fuse_gspn2
from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.pipelines import highres as module
from gspn2_diffusers.pipelines import running
from gspn2_diffusers.pipelines.cascade import Stage
from gspn2_diffusers.pipelines.generation import literal_options, seeded
from gspn2_diffusers.pipelines.highres import HighResPipeline
from gspn2_diffusers.pipelines.parts import Parts
from gspn2_diffusers.pipelines.sampling import Thrift
from gspn2_diffusers.pipelines.writing import read_metadata

STAGES = (
    Stage(32, 32, 3, guidance_scale=3.0),
    Stage(64, 64, 2, 0.5, 1.0, low_frequency=1.0),
    Stage(128, 128, 2, 0.4, 1.0, low_frequency=1.0),
)


def highres(family="sd", patched=True) -> HighResPipeline:
    pipe = patched_pipeline(family)[0] if patched else teacher_pipeline(family)
    if patched:
        awaken(find_denoiser(pipe))
    if family == "pixart":
        pipe = with_text_encoder(pipe)
    pipe.set_progress_bar_config(disable=True)
    pipe = HighResPipeline(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt="a cube", seed=0, stages=STAGES, **options):
    options = {"output_type": "latent", "generator": seeded(seed)} | options
    return pipe(prompt, stages=stages, **options).images


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart"])
def test_one_stage_is_what_the_pipeline_itself_draws(family):
    pipe = highres(family, patched=False)
    seed = torch.randint(2**62, (1,), generator=seeded(7)).item()
    noise = torch.randn(1, 4, 8, 8, generator=seeded(seed))
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 32, "width": 32}
    expected = pipe.base(
        "a cube", latents=noise, output_type="latent", **options, **literal_options(pipe.base)
    ).images
    found = pipe("a cube", generator=seeded(7), output_type="latent", **options).images
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart"])
@pytest.mark.parametrize("upsample", ["pixel", "latent"])
def test_a_cascade_ends_at_the_size_that_was_asked_for(family, upsample):
    pipe = highres(family)
    picture = pipe(
        "a cube", 80, 48, num_inference_steps=2, upsample=upsample, generator=seeded(0)
    ).images[0]
    assert picture.size == (48, 80)


def test_softmax_attention_draws_the_first_stage_and_gspn2_the_others():
    pipe, plain = highres(), highres(patched=False)
    plain.denoiser.load_state_dict(
        {k: v for k, v in pipe.denoiser.state_dict().items() if ".gspn2." not in k}
    )
    first = draw(pipe, stages=STAGES[:1])
    assert torch.equal(first, draw(plain, stages=STAGES[:1]))
    assert not torch.equal(first, draw(pipe, stages=STAGES[:1], softmax_base=False))
    assert not torch.equal(draw(pipe, stages=STAGES[:2]), draw(plain, stages=STAGES[:2]))


@pytest.mark.parametrize("family", ["sd", "pixart"])
def test_fused_blocks_draw_the_same_picture(family):
    pipe = highres(family)
    expected = draw(pipe, softmax_base=False)
    fuse_gspn2(pipe.denoiser)
    torch.testing.assert_close(draw(pipe, softmax_base=False), expected, rtol=1e-2, atol=1e-3)


def test_a_seed_gives_the_same_picture_alone_and_in_a_batch():
    pipe = highres()
    generators = [seeded(3), seeded(4)]
    both = draw(pipe, ["a cube", "a ball"], generator=generators, stages=STAGES[:2])
    alone = draw(pipe, "a ball", seed=4, stages=STAGES[:2])
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-4)
    assert torch.equal(alone, draw(pipe, "a ball", seed=4, stages=STAGES[:2]))
    assert not torch.equal(alone, draw(pipe, "a ball", seed=5, stages=STAGES[:2]))


def test_negative_prompts_matter_where_there_is_guidance():
    pipe = highres()
    plain = draw(pipe, stages=STAGES[:1])
    assert not torch.equal(plain, draw(pipe, stages=STAGES[:1], negative_prompt="a ball"))
    unguided = (replace(STAGES[0], guidance_scale=1.0),)
    expected = draw(pipe, stages=unguided)
    assert torch.equal(expected, draw(pipe, stages=unguided, negative_prompt="a ball"))


def test_a_given_picture_takes_the_place_of_the_first_stage():
    pipe = highres()
    picture = Image.fromarray(np.full((32, 32, 3), (200, 30, 60), np.uint8))
    stages = (STAGES[0], replace(STAGES[1], strength=0.01, steps=1))
    found = pipe("a cube", stages=stages, image=picture, generator=seeded(0), output_type="np")
    own = pipe("a cube", stages=stages, generator=seeded(0), output_type="np")
    assert found.images.shape == (1, 64, 64, 3)
    assert not np.allclose(found.images, own.images)
    again = pipe("a cube", 64, 64, image=picture, num_inference_steps=2, generator=seeded(0))
    assert again.stages[0].height == 32 and again.images[0].size == (64, 64)
    with pytest.raises(ValueError, match="aspect ratio"):
        pipe("a cube", 64, 128, image=picture)


@pytest.mark.parametrize("fail_at", [1, 2])
def test_a_killed_run_goes_on_at_its_stage_and_draws_the_same_picture(tmp_path, fail_at):
    pipe = highres()
    expected = draw(pipe)
    steps = [sum(stage.steps for stage in STAGES[:n]) for n in range(4)]

    class Killed(Exception):
        pass

    def kill(pipe, step, timestep, tensors):
        if step == steps[fail_at]:
            raise Killed
        return tensors

    with pytest.raises(Killed):
        draw(pipe, keep=tmp_path, callback_on_step_end=kill)
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((pipe.stage, step))
        return tensors

    again = draw(pipe, keep=tmp_path, resume=True, callback_on_step_end=look)
    assert torch.equal(again, expected)
    assert [step for _, step in seen] == list(range(steps[fail_at], steps[3]))
    assert seen[0][0] == fail_at
    finished = draw(pipe, keep=tmp_path, resume=True, callback_on_step_end=look)
    assert torch.equal(finished, expected) and len(seen) == steps[3] - steps[fail_at]


def test_a_run_of_another_model_or_seed_does_not_go_on(tmp_path):
    pipe = highres()
    draw(pipe, keep=tmp_path)
    other = draw(pipe, seed=1, keep=tmp_path, resume=True)
    assert torch.equal(other, draw(pipe, seed=1))
    with torch.no_grad():
        next(pipe.denoiser.parameters()).add_(0.5)
    assert torch.equal(draw(pipe, seed=1, keep=tmp_path, resume=True), draw(pipe, seed=1))


def test_a_run_with_one_stage_more_goes_on_from_the_others(tmp_path):
    pipe = highres()
    draw(pipe, stages=STAGES[:2], keep=tmp_path)
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append(pipe.stage)
        return tensors

    more = draw(pipe, keep=tmp_path, resume=True, callback_on_step_end=look)
    assert set(seen) == {2} and torch.equal(more, draw(pipe))


def test_a_compiled_denoiser_is_the_one_that_runs():
    pipe = highres()
    expected = draw(pipe, stages=STAGES[:2])
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(1)
            return graph.forward(*args)

        return run

    pipe.base.unet = torch.compile(pipe.base.unet, backend=backend)
    again = HighResPipeline(pipe.base)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(again, stages=STAGES[:2]), expected, rtol=1e-3, atol=1e-4)
    assert calls, "the compiled denoiser was bypassed"


def test_a_file_holds_the_picture_and_what_made_it(tmp_path):
    pipe = highres()
    result = pipe(
        "a cube", stages=STAGES[:2], generator=seeded(0), output=tmp_path / "new" / "a.png",
        metadata={"note": "hello"},
    )  # fmt: skip
    assert result.images == [] and result.path == tmp_path / "new" / "a.png"
    expected = pipe("a cube", stages=STAGES[:2], generator=seeded(0)).images[0]
    assert np.array_equal(np.asarray(Image.open(result.path)), np.asarray(expected))
    told = read_metadata(result.path)
    assert told["prompt"] == "a cube" and told["note"] == "hello"
    for stage, written in zip(STAGES, json.loads(told["settings"])["stages"], strict=False):
        assert stage.to_dict().items() <= written.items() and len(written["seeds"]) == 1
    assert "torch" in json.loads(told["versions"]) and told["plan"] == "null"


def test_a_tiff_comes_with_a_preview(tmp_path):
    pipe = highres()
    result = pipe("a cube", stages=STAGES[:2], generator=seeded(0), output=tmp_path / "a.tif")
    expected = pipe("a cube", stages=STAGES[:2], generator=seeded(0)).images[0]
    assert read_metadata(result.path)["prompt"] == "a cube"
    preview = Image.open(tmp_path / "a.preview.png")
    assert np.array_equal(np.asarray(preview), np.asarray(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 34, "width": 32}, "multiples of 4 pixels, such as 32x32, got 32x34"),
        ({"upsample": "both"}, "upsample: expected one of pixel, latent, got 'both'"),
        ({"output_type": "gif"}, "output_type: expected one of"),
        ({"resume": True}, "resume: expected a folder in keep"),
        ({"generator": [seeded(0), seeded(1)]}, "generator: expected one or 1, got 2"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: expected one text or 1, got"),
        ({"stages": ()}, "stages: expected at least one"),
        ({"stages": (STAGES[1],)}, "expected the first with strength 1, got 0.5"),
        ({"stages": STAGES, "height": 64}, "expected those of the last stage, 128x128, got 32x64"),
        ({"output": "picture.xyz"}, "xyz"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_a_mistake_is_found_before_anything_is_computed(options, message, monkeypatch):
    pipe = highres()
    monkeypatch.setattr(running, "encode_prompts", lambda *_: pytest.fail("it began to compute"))
    with pytest.raises(ValueError, match=message):
        pipe("a cube", **{"height": 32, "width": 32} | options)


def test_an_output_that_cannot_be_written_is_found_before_anything_is_computed(
    tmp_path, monkeypatch
):
    pipe = highres()
    monkeypatch.setattr(running, "encode_prompts", lambda *_: pytest.fail("it began to compute"))
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "a.png", tmp_path):
        with pytest.raises((OSError, ValueError)):
            pipe("a cube", 32, 32, output=output)


def test_latents_that_are_not_finite_are_no_picture():
    pipe = highres()

    def spoil(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * float("nan")}

    with pytest.raises(RuntimeError, match="stage 0: expected finite latents"):
        pipe("a cube", stages=STAGES, callback_on_step_end=spoil)


class FakePlan:
    """As much of a Plan as a run needs, which can be leaner so many times."""

    def __init__(self, leaner=1):
        thrift = Thrift(split_guidance=leaner == 0)
        sizes = [(stage.height, stage.width) for stage in STAGES]
        self.stages = [SimpleNamespace(height=h, width=w, thrift=thrift) for h, w in sizes]
        self.decode = SimpleNamespace(tiling=None)
        self.offload_text = self.offload_denoiser = leaner == 0
        self.left = leaner

    def leaner(self, phase):
        return FakePlan(self.left - 1) if self.left else None

    def to_dict(self):
        return {"left": self.left}


@pytest.mark.parametrize(("failures", "survives"), [(1, True), (2, False)])
def test_out_of_memory_is_tried_once_more_with_a_leaner_plan(failures, survives, monkeypatch):
    pipe = highres()
    expected = draw(pipe)
    left = [failures]

    class Short(running.GuidedDenoiser):
        def __call__(self, noisy, *args):
            if noisy.shape[-1] == 16 and left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return super().__call__(noisy, *args)

    monkeypatch.setattr(running, "GuidedDenoiser", Short)
    options = {"plan": FakePlan(leaner=2), "output_type": "latent", "generator": seeded(0)}
    if not survives:
        with pytest.raises(torch.OutOfMemoryError):
            pipe("a cube", stages=STAGES, **options)
        return
    result = pipe("a cube", stages=STAGES, **options)
    torch.testing.assert_close(result.images, expected, rtol=1e-3, atol=1e-4)
    assert result.plan.left == 1


def test_a_leaner_plan_found_while_decoding_takes_the_other_parts_away(monkeypatch):
    pipe, moved, failures = highres(), [], [1]
    decode_bands, away = running.decode_bands, running.Run._away

    def short(*args, **kwargs):
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return decode_bands(*args, **kwargs)

    def watched(run, modules):
        moved.append((len(failures), list(modules)))
        return away(run, modules)

    monkeypatch.setattr(running, "decode_bands", short)
    monkeypatch.setattr(running.Run, "_away", watched)
    options = {"plan": FakePlan(leaner=1), "upsample": "latent", "output_type": "np"}
    assert pipe("a cube", stages=STAGES, **options).images.shape[0] == 1
    assert moved == [(1, []), (0, list(Parts.of(pipe.base).others)), (0, [pipe.denoiser])]


def test_runs_on_cuda_are_planned_unless_the_model_is_quantised(monkeypatch):
    pipe, planned = highres(), []
    monkeypatch.setattr(module, "execution_device", lambda pipe: torch.device("cuda"))
    monkeypatch.setattr(module, "plan_stages", lambda *args, **kw: planned.append((args, kw)))
    draw(pipe, stages=STAGES[:2], vram=5, reuse=2, upsample="latent")
    (_, stages, vram), options = planned.pop()
    assert stages == STAGES[:2] and vram == 5
    assert options == {"batch": 1, "reuse": 2, "upsample": "latent", "softmax_base": True}
    pipe.denoiser.hf_quantizer = object()
    draw(pipe, stages=STAGES[:1])
    assert not planned


def test_a_plan_for_other_sizes_is_refused():
    with pytest.raises(ValueError, match="plan: expected one for stages"):
        highres()("a cube", stages=STAGES[:2], plan=FakePlan())


def test_it_shares_the_pipelines_parts_and_leaves_them_as_they_were():
    pipe = highres()
    base = pipe.base
    state = {key: value.clone() for key, value in pipe.denoiser.state_dict().items()}
    config = dict(base.scheduler.config)
    assert isinstance(pipe, DiffusionPipeline)
    assert pipe.components.keys() == base.components.keys()
    assert all(pipe.components[name] is part for name, part in base.components.items())
    assert pipe.device == base.device and pipe.dtype == base.dtype
    draw(pipe, stages=(*STAGES[:1], replace(STAGES[1], dilation=2, dilated_steps=1.0)))
    assert all(torch.equal(state[key], value) for key, value in pipe.denoiser.state_dict().items())
    assert dict(base.scheduler.config) == config
    assert base("a cube", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)
    moved = pipe.to(torch.float64)
    assert moved is pipe and base.unet.dtype == torch.float64


def test_model_offload_moves_the_parts_of_this_pipeline():
    pipe = highres()
    assert pipe.model_cpu_offload_seq == pipe.base.model_cpu_offload_seq
    assert HighResPipeline.from_pipe(pipe.base).base is pipe.base


def test_a_callback_may_stop_the_run():
    pipe = highres()
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append(step)
        pipe._interrupt = True
        return tensors

    latents = draw(pipe, callback_on_step_end=stop)
    assert len(seen) == 1 and latents.shape[-1] == 8


def test_progress_is_told_by_stage_and_by_tile():
    calls = []
    highres()(
        "a cube", stages=STAGES[:2], generator=seeded(0), progress=lambda *call: calls.append(call)
    )
    names = dict.fromkeys(name for name, _, _ in calls)
    assert list(names) == ["stage 0, 32x32", "enlarging to 64x64", "stage 1, 64x64", "decoding"]
    for name in names:
        done = [(now, total) for called, now, total in calls if called == name]
        assert done[-1][0] == done[-1][1], f"{name} stopped at {done[-1]}"


def test_a_pipeline_without_a_vae_is_refused():
    pipe = teacher_pipeline()
    pipe.vae = None
    with pytest.raises(ValueError, match="expected a pipeline with a vae"):
        HighResPipeline(pipe)


def test_the_docstring_has_an_example():
    assert "HighResPipeline(pipe)" in module.HighResPipeline.__call__.__doc__
