"""The training scripts: data stays aligned, the objective is right, runs stop, resume and save."""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import PixArtSigmaPipeline, StableDiffusionPipeline
from torch import nn
from torch.nn import functional as F

from gspn2_diffusers.distillation.checkpoints import find_checkpoints
from gspn2_diffusers.pipelines import load_pipeline
from gspn2_diffusers.tiny_scenes import train_pipeline, train_probe, train_vae
from gspn2_diffusers.tiny_scenes.captions import caption
from gspn2_diffusers.tiny_scenes.data import Pool, Renderer, stream_scenes, stream_seed, tokenize
from gspn2_diffusers.tiny_scenes.models import WEIGHTS, build_scheduler, build_vae, save_half
from gspn2_diffusers.tiny_scenes.probe import Probe, perceptual_distance, probe_loss
from gspn2_diffusers.tiny_scenes.scenes import ATTRIBUTES, sample_scenes
from gspn2_diffusers.tiny_scenes.score import generate
from gspn2_diffusers.tiny_scenes.tokenizer import build_tokenizer
from gspn2_diffusers.tiny_scenes.train_pipeline import DENOISERS, caption_mask
from gspn2_diffusers.tiny_scenes.training import Clock, learning_rate_factor

CPU = torch.device("cpu")
PIPELINES = {"unet": StableDiffusionPipeline, "pixart": PixArtSigmaPipeline}
every_kind = pytest.mark.parametrize("kind", DENOISERS)


def test_pool_keeps_rows_of_its_columns_together_when_it_wraps():
    pool = Pool(10, CPU)
    for begin in range(0, 24, 4):
        numbers = torch.arange(begin, begin + 4)
        pool.add(number=numbers, square=(numbers**2)[:, None])
    rows = pool.draw(200)
    assert torch.equal(rows["square"][:, 0], rows["number"] ** 2)
    assert set(rows["number"].tolist()) == set(range(14, 24))


@pytest.mark.parametrize(
    "columns", [{"a": torch.zeros(2), "b": torch.zeros(3)}, {"other": torch.zeros(2)}]
)
def test_pool_refuses_columns_that_do_not_fit(columns):
    pool = Pool(4, CPU)
    pool.add(a=torch.zeros(2), b=torch.zeros(2))
    with pytest.raises(ValueError, match="expected columns"):
        pool.add(**columns)


def test_empty_pool_cannot_be_drawn_from():
    with pytest.raises(ValueError, match="empty"):
        Pool(4, CPU).draw(1)


def test_stream_pairs_every_scene_with_its_own_captions():
    stream = stream_scenes(5, seed=7, captions=2)
    next(stream)
    scenes, ids = next(stream)
    expected = sample_scenes(5, seed=8)
    assert torch.equal(scenes.position, expected.position)
    for k in range(2):
        assert torch.equal(ids[:, k].long(), tokenize(caption(expected, seed=8 + k)))


def test_streams_of_processes_and_resumed_runs_differ():
    seeds = {stream_seed(0, process, step) for process in (-1, 0, 1) for step in (0, 100)}
    assert len(seeds) == 6


def test_compiled_renderer_fills_up_a_last_small_batch(monkeypatch):
    sizes = []

    def fake_render(scenes, size, supersample, *, chunk, compiled):
        sizes.append(len(scenes))
        return scenes.setting.float()[:, None, None, None].expand(-1, 3, size, size)

    monkeypatch.setattr("gspn2_diffusers.tiny_scenes.data.render", fake_render)
    scenes = sample_scenes(70, seed=0)
    images = Renderer(4, CPU, compiled=True)(scenes)
    assert sizes == [128]
    assert torch.equal(images[:, 0, 0, 0], scenes.setting.float())


def test_learning_rate_warms_up_and_ends_at_zero():
    assert learning_rate_factor(0, 0.0, 10) == pytest.approx(0.1)
    assert learning_rate_factor(10, 0.0, 10) == pytest.approx(1.0)
    assert learning_rate_factor(100, 0.5, 10) == pytest.approx(0.5)
    assert learning_rate_factor(100, 1.0, 10) == pytest.approx(0.0)


def run_clock(minutes=1.0, stop_after_minutes=None):
    """A clock, and a function that lets time pass on it."""
    clock = Clock(
        argparse.Namespace(
            minutes=minutes, max_train_steps=None, stop_after_minutes=stop_after_minutes
        )
    )

    def wait(seconds):
        clock._started -= seconds
        clock.synchronise(CPU)

    return clock, wait


def test_progress_leaves_out_preparation_and_still_ends_in_time():
    clock, wait = run_clock()
    wait(40)
    assert clock.progress == 0
    clock.end_preparation(CPU)
    wait(10)
    assert clock.progress == pytest.approx(0.5, abs=0.02)
    wait(10)
    assert clock.progress == 1


def test_resumed_clock_continues_and_leaves_out_its_own_preparation():
    clock, wait = run_clock(stop_after_minutes=0.4)
    clock.load_state_dict({"step": 50, "elapsed": 30.0, "time_share": 0.4})
    wait(10)
    assert clock.progress == pytest.approx(0.4)
    clock.end_preparation(CPU)
    wait(10)
    assert clock.step == 50 and clock.progress == pytest.approx(0.7, abs=0.02)
    assert not clock.stopped_early
    wait(5)
    assert clock.stopped_early and clock.progress < 1


class Oracle(nn.Module):
    """Knows that the clean latents are zero, so that noisy latents are noise scaled by sigma."""

    def __init__(self, scheduler):
        super().__init__()
        self.alphas = scheduler.alphas_cumprod

    def forward(self, noisy, timesteps, ids):
        self.timesteps, self.ids = timesteps, ids
        alpha = self.alphas[timesteps][:, None, None, None]
        return (alpha / (1 - alpha)).sqrt() * noisy


def test_objective_asks_for_the_velocity():
    scheduler = build_scheduler()
    objective = train_pipeline.Objective(scheduler, 0.0, CPU)
    ids = torch.zeros(64, 2, 48, dtype=torch.long)
    oracle = Oracle(scheduler)
    assert objective(oracle, torch.zeros(64, 4, 2, 2), ids) < 1e-6
    assert oracle.timesteps.min() < 16 and oracle.timesteps.max() > 983


def test_objective_drops_whole_captions_for_the_empty_one():
    scheduler = build_scheduler()
    oracle = Oracle(scheduler)
    ids = torch.arange(400)[:, None, None].expand(-1, 2, 48)
    train_pipeline.Objective(scheduler, 0.25, CPU)(oracle, torch.zeros(400, 4, 1, 1), ids)
    dropped = (oracle.ids == tokenize([""])).all(1)
    assert torch.equal(oracle.ids[~dropped], ids[~dropped, 0])
    assert 0.15 < dropped.float().mean() < 0.35


def test_last_timestep_is_pure_noise():
    assert build_scheduler().alphas_cumprod[-1] == 0


@every_kind
def test_parts_stay_small_enough_to_ship(kind):
    def millions(model):
        return sum(p.numel() for p in model.parameters()) / 1e6

    model = DENOISERS[kind].build(256)
    assert millions(model.denoiser) < 7.5  # one float16 file of 15 MB
    assert millions(model) + millions(build_vae()) + millions(Probe()) < 12


def text_and_noise(count=3):
    """Noisy latents, timesteps and ids of the empty and of other captions."""
    captions = ["", *caption(sample_scenes(count - 1, seed=0), seed=0)]
    noisy = torch.randn(1, 4, 8, 8).expand(count, -1, -1, -1)
    return captions, noisy, torch.full((count,), 500)


@every_kind
@pytest.mark.parametrize("mixed_precision", [False, True])
def test_every_parameter_gets_a_gradient_which_parallel_training_waits_for(kind, mixed_precision):
    torch.manual_seed(0)
    model = DENOISERS[kind].build(64)
    captions, noisy, timesteps = text_and_noise()
    with torch.autocast("cpu", torch.bfloat16, mixed_precision):
        prediction = model(noisy, timesteps, tokenize(captions))
    assert prediction.shape == noisy.shape
    F.mse_loss(prediction.float(), torch.randn(noisy.shape)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@every_kind
def test_training_lowers_the_loss_of_a_single_batch(kind):
    torch.manual_seed(0)
    model = DENOISERS[kind].build(64)
    captions, noisy, timesteps = text_and_noise()
    ids, target = tokenize(captions), torch.randn(noisy.shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(noisy, timesteps, ids), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # The latents are the same in every row: only the captions can tell the targets apart.
    indistinct = F.mse_loss(target.mean(0, keepdim=True).expand_as(target), target)
    assert losses[-1] < 0.8 * indistinct < losses[0]


def test_mask_of_ids_is_the_mask_of_the_tokenizer():
    tokenizer = build_tokenizer()
    captions, _, _ = text_and_noise(20)
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    mask = caption_mask(tokens.input_ids, tokenizer.eos_token_id)
    assert torch.equal(mask, tokens.attention_mask)


@torch.no_grad()
def test_pixart_predicts_the_same_however_far_captions_are_padded():
    torch.manual_seed(0)
    model = DENOISERS["pixart"].build(64).eval()
    nn.init.normal_(model.denoiser.proj_out.weight, std=0.1)
    captions, noisy, timesteps = text_and_noise()
    trained = model(noisy, timesteps, tokenize(captions))
    pipe = model.assemble(build_vae(64))
    text, mask, _, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    assert text.shape[1] == 300
    drawn = pipe.transformer(
        noisy, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=timesteps
    ).sample
    torch.testing.assert_close(drawn, trained, rtol=1e-4, atol=1e-5)
    assert (trained[1:] - trained[:1]).abs().amax((1, 2, 3)).min() > 0.01  # captions do matter


def test_pixart_reads_captions_as_they_are_even_where_it_cleans_them(monkeypatch):
    module = sys.modules[PixArtSigmaPipeline.__module__]
    for name in ("is_bs4_available", "is_ftfy_available"):
        monkeypatch.setattr(module, name, lambda: True)
    # Both packages leave plain words and commas alone.
    soup = lambda text, features: SimpleNamespace(text=text)  # noqa: E731
    monkeypatch.setattr(module, "BeautifulSoup", soup, raising=False)
    monkeypatch.setattr(module, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    pipe = DENOISERS["pixart"].build(64).assemble(build_vae(64))
    captions, _, _ = text_and_noise(500)
    cleaned = pipe._text_preprocessing(captions, clean_caption=True)
    assert torch.equal(tokenize(cleaned), tokenize(captions))


@every_kind
def test_a_saved_pipeline_is_of_its_class_and_training_can_start_from_it(kind, tmp_path):
    torch.manual_seed(0)
    model = DENOISERS[kind].build(64)
    save_half(model.assemble(build_vae(64)), tmp_path / "saved")
    assert next(model.denoiser.parameters()).dtype == torch.float32
    loaded = load_pipeline(tmp_path / "saved", dtype="float32", device="cpu")
    assert type(loaded) is PIPELINES[kind]
    options = ["--denoiser", kind, "--pretrained_model_name_or_path", str(tmp_path / "saved")]
    start = train_pipeline.build_denoiser(train_pipeline.parse_args(options))
    assert start.denoiser.training and start.text_encoder.training
    for name, parameter in start.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).half().float())
    (other,) = DENOISERS.keys() - {kind}
    options[1] = other
    with pytest.raises(ValueError, match="expected a pipeline with a .* got one with a"):
        train_pipeline.build_denoiser(train_pipeline.parse_args(options))


def test_folders_go_by_the_denoiser_unless_they_are_named():
    folders = {"unet": "pipeline", "pixart": "pixart"}
    for kind, folder in folders.items():
        args = train_pipeline.parse_args(["--denoiser", kind])
        assert args.pipeline_dir == WEIGHTS / folder
        assert args.output_dir == WEIGHTS / f"{folder}_run"
    args = train_pipeline.parse_args(["--denoiser", "pixart", "--pipeline_dir", "elsewhere"])
    assert str(args.pipeline_dir) == "elsewhere"


def test_probe_loss_leaves_out_what_does_not_apply():
    logits = {name: torch.randn(6, len(classes)) for name, classes in ATTRIBUTES.items()}
    truth = {name: torch.full((6,), -1) for name in ATTRIBUTES}
    assert probe_loss(logits, truth) == 0
    truth["light"][2] = 1
    expected = nn.functional.cross_entropy(logits["light"][2:3], torch.tensor([1]))
    assert torch.allclose(probe_loss(logits, truth), expected)


def test_probe_takes_other_sizes_and_sees_differences():
    probe = Probe(image_size=64)
    images = torch.rand(2, 3, 48, 96)
    assert probe(images)["setting"].shape == (2, len(ATTRIBUTES["setting"]))
    assert perceptual_distance(probe, images, images) == 0
    assert perceptual_distance(probe, images, images.flip(-1)) > 0


def test_blur_and_noise_keep_images_recognisable():
    images = torch.rand(4, 3, 32, 32)
    changed = train_probe.augment(images)
    assert changed.shape == images.shape
    assert (changed.mean((2, 3)) - images.mean((2, 3))).abs().max() < 0.1


def test_gradient_distance_ignores_brightness_but_not_blur():
    images = torch.rand(1, 3, 16, 16)
    assert train_vae.gradient_distance(images + 0.1, images) < 1e-5
    blurred = nn.functional.avg_pool2d(images, 3, 1, 1)
    assert train_vae.gradient_distance(blurred, images) > 0.05


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Probe and autoencoder at 64 pixels; returns their folder and a function that runs a script
    with it."""
    folder = tmp_path_factory.mktemp("run")
    common = (
        "--resolution 64 --supersample 1 --train_batch_size 2 --pool_size 8 --pool_batch_size 4 "
        "--pool_seconds 1 --dataloader_num_workers 0 --mixed_precision no --eval_scenes 4 "
        "--refresh_steps 2 "
    )

    def run(module, name, extra):
        return module.main((common + f"--output_dir {folder / name} {extra}").split())

    run(train_probe, "probe", "--max_train_steps 2")
    run(train_vae, "vae", f"--max_train_steps 2 --probe {folder / 'probe'}")
    return folder, run


@every_kind
def test_training_stops_early_resumes_and_saves_a_pipeline_that_loads(small_run, kind):
    folder, run = small_run
    options = (
        f"--denoiser {kind} --vae {folder / 'vae'} --probe {folder / 'probe'} "
        f"--pipeline_dir {folder / kind} --num_inference_steps 2 --checkpointing_steps 2 "
        "--max_train_steps 4 "
    )

    def checkpoints():
        return [path.name for path in find_checkpoints(folder / f"{kind}_run")]

    run(train_pipeline, f"{kind}_run", options + "--stop_after_minutes 1e-9")
    assert checkpoints() == ["checkpoint-0"]
    result = run(train_pipeline, f"{kind}_run", options + "--resume_from_checkpoint latest")
    assert checkpoints() == ["checkpoint-2", "checkpoint-4"]
    assert 0 <= result["mean_accuracy"] <= 1
    pipe = PIPELINES[kind].from_pretrained(folder / kind, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = generate(pipe, ["a red ball"], steps=1, guidance_scale=4.0, seed=0)
    assert images.shape == (1, 3, 64, 64) and images.isfinite().all()


def test_run_without_an_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--minutes or --max_train_steps"):
        train_probe.main(["--output_dir", str(tmp_path)])
