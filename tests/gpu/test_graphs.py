"""CUDA graphs of forward passes draw what the passes draw that Python launches."""

import warnings
from dataclasses import replace

import pytest
import torch
from tiny_models import awaken
from tiny_teachers import random_batch, teacher_pipeline

from gspn2_diffusers import GSPN2Config, apply_gspn2
from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.pipelines.cascade import Stage
from gspn2_diffusers.pipelines.generation import seeded
from gspn2_diffusers.pipelines.graphs import Replayed
from gspn2_diffusers.pipelines.highres import HighResPipeline
from gspn2_diffusers.pipelines.planner import plan_stages
from gspn2_diffusers.pipelines.sampling import GuidedDenoiser, StageSampler, Thrift

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::gspn2_diffusers.UntrainedBlocksWarning"),
]


@torch.no_grad()
def test_every_replay_computes_with_what_it_is_given(device):
    runs = []

    def run(x, y):
        runs.append(torch.cuda.is_current_stream_capturing())
        return x @ y + 1

    replayed, outputs = Replayed(run), []
    for seed in range(5):
        torch.manual_seed(seed)
        x, y = torch.randn(2, 64, 64, device=device)
        outputs.append((replayed(x, y), x @ y + 1))
    assert runs == [False, False, True]
    for found, expected in outputs:
        assert torch.equal(found, expected)


def wait_by_torch():
    torch.zeros(1, device="cuda").item()


def wait_unseen():
    """By a way of which torch knows nothing: only the driver refuses to capture it."""
    import cupy

    cupy.cuda.runtime.deviceSynchronize()


@torch.no_grad()
@pytest.mark.parametrize("wait", [wait_by_torch, wait_unseen])
def test_what_cannot_be_captured_goes_on_as_it_is(wait, device):
    captures = []

    def run(x):
        captures.append(torch.cuda.is_current_stream_capturing())
        x = x * 2
        wait()
        return x + 1

    replayed = Replayed(run)
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(64, 64, device=device)
        assert torch.equal(replayed(x), x * 2 + 1)
    assert captures.count(True) == (wait is wait_unseen)
    works = Replayed(lambda x: x * 2)  # another capture is not disturbed
    for _ in range(4):
        assert torch.equal(works(x), x * 2)


@torch.no_grad()
def test_warnings_of_the_forward_pass_are_still_given(device):
    def run(x):
        warnings.warn("look out", stacklevel=1)
        return x

    replayed = Replayed(run)
    for _ in range(2):
        with pytest.warns(UserWarning, match="look out"):
            replayed(torch.ones(2, device=device))


def drawn(pipe, family, stage, device, graph):
    model = find_denoiser(pipe)
    batch = random_batch(family, 1)
    rows = [
        {name: column.to(device) for name, column in each.items()}
        for each in (batch.rows, batch.unconditional)
    ]
    denoiser = GuidedDenoiser(model, *rows, stage.guidance_scale, Thrift(graph=graph))
    assert denoiser.graph == graph
    sampler = StageSampler(pipe.scheduler, stage, denoiser, device)
    channels = model.config.in_channels
    with torch.no_grad():
        return sampler((1, channels, stage.height, stage.width), [seeded(0)])


@pytest.mark.parametrize("patched", [False, True], ids=["softmax", "gspn2"])
@pytest.mark.parametrize("family", ["sd", "pixart"])
@pytest.mark.parametrize("size", [(8, 8), (12, 20)])
def test_a_stage_draws_the_same_as_a_graph(family, size, patched, device):
    pipe = teacher_pipeline(family)
    if patched:
        apply_gspn2(pipe, GSPN2Config())
        awaken(find_denoiser(pipe))
    find_denoiser(pipe.to(device)).eval()
    dilation = {"dilation": 2, "dilated_steps": 0.5} if family == "sd" else {}
    stage = Stage(*size, 8, guidance_scale=3.0, **dilation)
    plain, graph = (drawn(pipe, family, stage, device, graph) for graph in (False, True))
    torch.testing.assert_close(graph, plain, rtol=1e-4, atol=1e-4)


def test_a_run_follows_its_plan_and_a_callback_prevents_graphs(device, monkeypatch):
    base = apply_gspn2(teacher_pipeline("sd"), GSPN2Config())
    awaken(base.unet)
    pipe = HighResPipeline(base.to(device))
    stages = [Stage(32, 32, 6), Stage(64, 64, 4, 0.4)]
    plan = plan_stages(pipe.base, stages)
    graphs = replace(plan, stages=tuple(replace(stage, graph=True) for stage in plan.stages))
    plain = replace(plan, stages=tuple(replace(stage, graph=False) for stage in plan.stages))
    captures = []
    own = Replayed._capture
    monkeypatch.setattr(
        Replayed, "_capture", lambda self, given: captures.append(1) or own(self, given)
    )

    def draw(plan, **options):
        options |= {"output_type": "latent", "generator": seeded(0)}
        return pipe("a", stages=stages, plan=plan, **options).images

    expected = draw(plain)
    assert not captures
    torch.testing.assert_close(draw(graphs), expected, rtol=1e-4, atol=1e-4)
    assert len(captures) == 2
    draw(graphs, callback_on_step_end=lambda *_: {})
    assert len(captures) == 2
