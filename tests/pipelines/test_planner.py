"""Plans: what is chosen as memory gets short, what is refused, and whether predictions hold."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import AutoencoderKL
from tiny_models import tiny_dit, tiny_pixart, tiny_sdxl_pipeline, tiny_unet, tiny_vae
from tiny_teachers import patched_pipeline, teacher_pipeline

from gspn2_diffusers import GSPN2Adapter, GSPN2Config, apply_gspn2, fuse_gspn2, gspn2_sites
from gspn2_diffusers.families import family_of, find_denoiser
from gspn2_diffusers.pipelines import ladders
from gspn2_diffusers.pipelines.cards import card_rates
from gspn2_diffusers.pipelines.cascade import Stage
from gspn2_diffusers.pipelines.decoding import Tiling, decode_bands, encode_tiled
from gspn2_diffusers.pipelines.lean import LeanOptions
from gspn2_diffusers.pipelines.loading import load_pipeline
from gspn2_diffusers.pipelines.parts import Parts, outline_parts, weight_bytes, without_data
from gspn2_diffusers.pipelines.planner import DoesNotFitError, Plan, plan, plan_stages
from gspn2_diffusers.pipelines.sampling import GuidedDenoiser, Thrift
from gspn2_diffusers.pipelines.tracing import trace

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GIB = 2**30
PLENTY = 2**50
H100 = card_rates("H100")
PIECES = (2**17, 2**14)
# Of a VAE with 4 pixels per latent pixel.
STAGES = (Stage(32, 32, 6), Stage(384, 192, 6, 0.4))


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    """Pieces and tiles that make a difference to tiny models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladders, "PIECES", PIECES)
        patch.setattr(ladders, "TILES", ((48, 12), (32, 8)))
        yield


@pytest.fixture(scope="module")
def sdxl():
    return Parts.of(patched_pipeline("sdxl")[0])


@pytest.fixture(scope="module")
def plans(sdxl):
    """All plans for `sdxl`, from plenty of memory down to the least that will do."""
    return descent(sdxl, STAGES, rates=H100)


@pytest.fixture
def usual_pieces(monkeypatch):
    monkeypatch.setattr(ladders, "PIECES", (2**30, 2**28))
    monkeypatch.setattr(ladders, "TILES", ladders.TILES[:2])


@pytest.fixture(scope="module")
def large_sdxl(tmp_path_factory):
    """SDXL as published, patched, from configuration files."""
    folder = tmp_path_factory.mktemp("sdxl")
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.syspath_prepend(str(BENCHMARKS))
        unet = importlib.import_module("models").build_sdxl_unet()
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        layers = [{"name": site.name, "channels": site.channels} for site in gspn2_sites(unet)]
        adapter = GSPN2Adapter(type(unet).__name__, layers, GSPN2Config().to_dict())
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    unet.save_config(folder / "unet")
    vae.save_config(folder / "vae")
    adapter.save_config(folder / "gspn2")
    return outline_parts(folder, weights=folder / "gspn2")


def descent(model, stages, **options) -> list[Plan]:
    """Plans in less and less memory, down to the last that there is."""
    plans = [plan_stages(model, stages, PLENTY, **options)]
    while True:
        try:
            plans.append(plan_stages(model, stages, plans[-1].peak_bytes - 1, **options))
        except DoesNotFitError:
            return plans


# ---- choices


def test_less_memory_gives_leaner_plans_and_each_fits(plans):
    first, last = plans[0], plans[-1]
    peaks = [found.peak_bytes for found in plans]
    assert all(found.peak_bytes <= found.vram_bytes for found in plans)
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(plans) > 4
    assert not (first.offload_text or first.offload_denoiser or first.decode.tiling)
    assert all(not stage.split_guidance and stage.lean is None for stage in first.stages)
    assert last.offload_text and last.decode.tiling is not None
    assert last.stages[1].split_guidance and last.stages[1].lean.offload_skips
    assert last.host_bytes > 0 == first.host_bytes
    assert first.seconds < last.seconds


def test_memory_is_saved_where_it_is_short_and_nowhere_else(sdxl, plans):
    assert not any(found.stages[0].split_guidance for found in plans)
    for found in plans:
        # Text encoders stay as long as nothing becomes faster without them.
        alone = plan_stages(replace(sdxl, others=()), STAGES, found.vram_bytes, rates=H100)
        same = [stage.thrift for stage in alone.stages] == [s.thrift for s in found.stages]
        assert same and alone.decode.tiling == found.decode.tiling


def test_pieces_come_before_skips_that_wait_in_cpu_memory(plans):
    ways = [found.stages[1] for found in plans]
    lean = [options for options in dict.fromkeys(stage.lean for stage in ways) if options]
    away = [options.offload_skips for options in lean]
    kept = [options.max_elements for options in lean if not options.offload_skips]
    assert away == sorted(away) and True in away
    assert kept and kept == sorted(kept, reverse=True)
    names = [stage.describe() for stage in ways]
    assert names[0] == "passes together, CUDA graph"
    assert names[-1].startswith("passes one by one, pieces of 2^1")
    assert names[-1].endswith(" elements, skips in CPU memory")


def test_decoding_keeps_the_whole_picture_and_the_denoiser_as_long_as_it_can(sdxl):
    ladder, rungs = ladders.Ladders(sdxl, 1, H100).decoding(STAGES, enlarging=True), []
    while (option := ladder.rung(len(rungs))) is not None:
        rungs.append(option)
    ways = [(option.tiling and option.tiling.tile, option.without_denoiser) for option in rungs]
    possible = [(tile, gone) for tile in (None, 48, 32) for gone in (False, True)]
    assert ways == [way for way in possible if way in ways]
    assert ways[:2] == possible[:2] and ways[-1] == possible[-1]
    sizes = [option.bytes for option in rungs]
    assert sizes == sorted(set(sizes), reverse=True)
    assert rungs[0].bytes - rungs[1].bytes == weight_bytes([sdxl.denoiser])
    assert rungs[0].seconds < rungs[1].seconds < rungs[-1].seconds


def test_without_guidance_there_is_one_pass_and_nothing_to_split(sdxl, plans):
    stages = [replace(stage, guidance_scale=1.0) for stage in STAGES]
    first = plan_stages(sdxl, stages, PLENTY, rates=H100).stages[1]
    leanest = ladders.Ladders(sdxl, 1, H100).stage(stages[1]).leanest()
    assert not (first.guidance or first.split_guidance or leanest.how.split_guidance)
    assert first.describe() == "CUDA graph"
    assert first.peak_bytes < plans[0].stages[1].peak_bytes
    assert leanest.bytes < plans[-1].stages[1].peak_bytes
    assert leanest.seconds == pytest.approx(plans[-1].stages[1].seconds / 2, rel=0.05)


def test_a_batch_of_pictures_needs_more(sdxl):
    one, three = (plan_stages(sdxl, STAGES, PLENTY, batch=n, rates=H100) for n in (1, 3))
    assert three.stages[1].peak_bytes > one.stages[1].peak_bytes
    assert three.decode.seconds == pytest.approx(3 * one.decode.seconds)


def test_transformers_feed_their_tokens_in_chunks(monkeypatch):
    pipe = patched_pipeline("pixart")[0]
    plans = descent(pipe, [Stage(32, 32, 3), Stage(768, 512, 3, 0.4)])
    chunks = [found.stages[1].chunk_feed_forward for found in plans]
    sizes = [chunk for chunk in chunks if chunk is not None]
    tokens = (768 // 4 // 2) * (512 // 4 // 2)
    assert chunks[0] is None and sizes and sizes == sorted(sizes, reverse=True)
    assert all(tokens % chunk == 0 for chunk in sizes)
    assert all(stage.lean is None for found in plans for stage in found.stages)


def test_a_unet_of_a_layout_that_cannot_be_walked_is_run_as_it_is():
    unet = tiny_unet(class_embed_type="timestep", projection_class_embeddings_input_dim=8)
    ways = ladders.Ladders(Parts(unet), 1, None)._thrifts(Stage(16, 16, 2), reuse=1)
    assert ways == [Thrift(), Thrift(split_guidance=True)]


def test_reuse_is_for_the_last_stage_and_saves_time(sdxl):
    found = [plan_stages(sdxl, STAGES, PLENTY, reuse=n, rates=H100) for n in (2, 3, 6)]
    assert [[stage.reuse for stage in each.stages] for each in found] == [[1, 2], [1, 3], [1, 6]]
    assert all(each.stages[1].lean == LeanOptions(PIECES[0]) for each in found)
    first, second, third = (each.stages[1].seconds for each in found)
    assert first - second == pytest.approx(second - third)
    assert 0 < third < 0.8 * first
    assert found[1].stages[1].thrift.reuse == 3


def test_deep_features_that_are_kept_take_memory(sdxl):
    found = ladders.Ladders(sdxl, 1, None)
    thrift = Thrift(True, LeanOptions(PIECES[0]))
    plain, kept = (
        found._stage_option(STAGES[1], replace(thrift, reuse=reuse), softmax=False).bytes
        for reuse in (1, 2)
    )
    # Those of the pass with the prompt and of the one without.
    assert kept - plain > 4 * 64 * (96 // 2) * (48 // 2)


def test_reuse_of_what_a_transformer_does_not_have_is_refused():
    with pytest.raises(ValueError, match="reuse: expected 1 for a PixArtTransformer2DModel.*got 2"):
        plan_stages(tiny_pixart(), [Stage(8, 8, 3)], PLENTY, reuse=2)


def test_the_first_stage_runs_softmax_attention_if_it_is_there():
    def times(pipe, softmax_base):
        options = {"softmax_base": softmax_base, "rates": H100}
        return [stage.seconds for stage in plan_stages(pipe, STAGES, PLENTY, **options).stages]

    pipe, plain = patched_pipeline()[0], teacher_pipeline()
    assert times(pipe, True)[0] == times(plain, True)[0] != times(pipe, False)[0]
    assert times(pipe, True)[1] == times(pipe, False)[1] != times(plain, True)[1]
    config = GSPN2Config(proxy_ratio=4, parameters_from="tokens")
    with pytest.warns(UserWarning, match="untrained"):
        apply_gspn2(plain, config, drop_attention=True)
    assert times(plain, True) == times(plain, False)


def test_parts_that_offload_themselves_count_only_while_they_run():
    pipe = tiny_sdxl_pipeline()
    add_hook_to_module(pipe.unet, CpuOffload(torch.device("cpu")))
    found = plan_stages(pipe, STAGES, PLENTY)
    plain = plan_stages(tiny_sdxl_pipeline(), STAGES, PLENTY)
    text = weight_bytes([pipe.text_encoder, pipe.text_encoder_2])
    assert found.offload_text and found.offload_denoiser
    assert found.stages[1].peak_bytes == plain.stages[1].peak_bytes - text
    assert found.decode.peak_bytes == plain.decode.peak_bytes - text - weight_bytes([pipe.unet])
    assert found.encode_bytes < plain.encode_bytes
    assert isinstance(pipe.unet._hf_hook, CpuOffload)


@pytest.mark.parametrize("make", [tiny_unet, tiny_dit])
def test_a_denoiser_alone_is_planned_in_latent_pixels(make):
    model = make()
    side = model.config.sample_size
    found = plan(side, side, model, PLENTY, rates=H100)
    assert found.decode is None and not found.offload_denoiser
    assert [(s.height, s.width) for s in found.stages] == [(side, side)]
    assert found.seconds == found.stages[0].seconds


def test_the_default_cascade_ends_at_the_size_that_was_asked_for(sdxl):
    found = plan(96, 160, sdxl, PLENTY, steps=7, guidance_scale=1.0)
    assert (found.height, found.width) == (96, 160)
    assert len(found.stages) > 1 and found.stages[0].steps == 7 and not found.stages[0].guidance


def test_stages_of_another_size_are_refused(sdxl):
    with pytest.raises(ValueError, match="expected the last one of 64x64 pixels, got 192x384"):
        plan(64, 64, sdxl, PLENTY, stages=STAGES)


def test_memory_has_to_be_named_where_there_is_no_gpu_to_ask(sdxl):
    with pytest.raises(ValueError, match="vram: expected a number of bytes for a model on 'cpu'"):
        plan_stages(sdxl, STAGES)


# ---- refusals


def test_a_refusal_says_what_would_do(sdxl, plans):
    short = plans[-1].peak_bytes - 1
    with pytest.raises(DoesNotFitError, match=r"192x384: expected at least .* GiB") as caught:
        plan_stages(sdxl, STAGES, short)
    error = caught.value
    assert isinstance(error, MemoryError) and error.vram_bytes == short
    assert plan_stages(sdxl, STAGES, error.needed_bytes).peak_bytes <= error.needed_bytes
    height, width = error.largest
    assert f"{width}x{height} would fit" in str(error)
    assert height * width > 0.3 * 384 * 192 and height == pytest.approx(2 * width, rel=0.1)
    smaller = [STAGES[0], replace(STAGES[1], height=height, width=width)]
    assert plan_stages(sdxl, smaller, short).peak_bytes <= short


def test_weights_that_do_not_fit_at_once_are_refused_before_sizes_are_tried(sdxl):
    match = r"weights of all.*enable_model_cpu_offload"
    with pytest.raises(DoesNotFitError, match=match) as caught:
        plan_stages(sdxl, STAGES, 2**20)
    assert caught.value.needed_bytes > weight_bytes(sdxl.all) and caught.value.largest is None


def test_tensors_of_2_31_elements_and_more_are_left_to_the_lean_unet(monkeypatch, sdxl):
    def first_way(limit: int) -> tuple[bool, bool]:
        monkeypatch.setattr(ladders, "TOO_MANY_ELEMENTS", limit)
        way = ladders.Ladders(sdxl, 1, None).stage(STAGES[1]).rung(0).how
        return way.lean is not None, way.split_guidance

    # The widest tensor of a pass: the projection of the feed-forward layers, below one halving.
    widest = 8 * 64 * (96 // 2) * (48 // 2)
    assert first_way(2 * widest + 1) == (False, False)
    assert first_way(2 * widest) == first_way(widest + 1) == (False, True)
    assert first_way(widest) == (True, True)


def test_a_model_for_which_there_is_no_way_at_all_is_refused(monkeypatch):
    monkeypatch.setattr(ladders, "TOO_MANY_ELEMENTS", 2**12)
    stages = [Stage(8, 8, 3), Stage(128, 128, 3, 0.4)]
    match = r"128x128: expected tensors of fewer than 2\^31 .* got more of a DiT"
    with pytest.raises(DoesNotFitError, match=match) as caught:
        plan_stages(tiny_dit(), stages, PLENTY)
    assert caught.value.needed_bytes is None


def test_quantised_weights_are_refused():
    unet = tiny_unet()
    unet.hf_quantizer = object()
    with pytest.raises(ValueError, match="got a quantised UNet2DConditionModel"):
        plan(8, 8, unet, PLENTY)


# ---- after memory ran out


def test_leaner_plans_end(sdxl):
    found = plan_stages(sdxl, STAGES, PLENTY)
    peaks = []
    while found is not None:
        peaks.append(found.peak_bytes)
        last, found = found, found.leaner()
    assert len(peaks) > 6 and peaks == sorted(peaks, reverse=True)
    assert last.stages[1].lean.offload_skips and last.decode.tiling.tile == 32


def test_the_phase_that_failed_gets_leaner(sdxl):
    first = plan_stages(sdxl, STAGES, PLENTY).leaner()  # without text encoders
    assert first.offload_text
    stage, decoding = first.leaner(0), first.leaner(2)
    assert stage.stages[0].peak_bytes < first.stages[0].peak_bytes
    assert (stage.stages[1], stage.decode) == (first.stages[1], first.decode)
    assert decoding.decode.peak_bytes < first.decode.peak_bytes
    assert decoding.stages == first.stages


# ---- what plans say


def test_a_plan_is_the_same_after_json(plans):
    for found in plans:
        values = json.loads(json.dumps(found.to_dict()))
        again = Plan.from_dict(values)
        assert again == found and again.leaner() is None
        assert values["peak_bytes"] == again.peak_bytes and values["seconds"] == again.seconds


def test_the_table_has_a_row_for_every_phase(sdxl):
    found = plan_stages(sdxl, STAGES, PLENTY, rates=H100)
    rows = found.rows()
    assert [row["what"] for row in rows] == ["stage 0", "stage 1", "decode"]
    assert [row["how"] for row in rows] == ["passes together, CUDA graph"] * 2 + ["whole"]
    assert sum(row["seconds"] for row in rows) == pytest.approx(found.seconds)
    assert max(row["peak_bytes"] for row in rows) <= found.peak_bytes


def test_times_are_known_for_known_rates_only(sdxl):
    assert plan_stages(sdxl, STAGES, PLENTY).seconds is None
    fast, slow = (
        plan_stages(sdxl, STAGES, PLENTY, rates=card_rates(name)).seconds for name in ("H100", "T4")
    )
    assert fast < slow
    twice = [replace(stage, steps=2 * stage.steps) for stage in STAGES]
    busy = replace(H100, launch=0.0)  # so that nothing is gained by a CUDA graph
    longer, once = (plan_stages(sdxl, each, PLENTY, rates=busy) for each in (twice, STAGES))
    assert not longer.stages[0].graph
    assert longer.stages[0].seconds == pytest.approx(2 * once.stages[0].seconds)


def test_a_stage_is_a_cuda_graph_where_it_would_wait_for_python(sdxl):
    def first(steps: int, **changes: float):
        stages = [replace(STAGES[0], steps=steps), STAGES[1]]
        return plan_stages(sdxl, stages, PLENTY, rates=replace(H100, **changes)).stages[0]

    many, few = first(30), first(2)
    assert many.graph and many.thrift.graph and not few.graph
    assert many.seconds < 0.5 * 15 * few.seconds
    assert not first(30, launch=1e-9).graph
    assert not plan_stages(sdxl, STAGES, PLENTY).stages[0].graph  # speeds are not known
    split = plan_stages(replace(sdxl, others=()), STAGES, PLENTY, rates=H100).leaner(0).stages[0]
    assert split.split_guidance and not split.graph


def test_enlarging_in_pixels_takes_the_vae_time(sdxl):
    pixel, latent = (
        plan_stages(sdxl, STAGES, PLENTY, rates=H100, upsample=name).decode
        for name in ("pixel", "latent")
    )
    assert pixel.seconds > latent.seconds > 0 and pixel.peak_bytes >= latent.peak_bytes


# ---- copies without data


def test_a_copy_without_data_leaves_the_model_alone_and_shares_nothing_with_it():
    unet = patched_pipeline()[0].unet
    find_denoiser(unet)
    add_hook_to_module(unet, CpuOffload(torch.device("cpu")))
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    hook, replaced = unet._hf_hook, unet.forward
    ghost = without_data(unet)
    assert {parameter.device.type for parameter in ghost.parameters()} == {"meta"}
    assert not hasattr(ghost, "_hf_hook") and "forward" not in vars(ghost)
    assert unet._hf_hook is hook and unet.forward is replaced
    assert before.keys() == ghost.state_dict().keys()
    for name, value in unet.state_dict().items():
        assert torch.equal(value, before[name])
    assert not {id(m) for m in unet.modules()} & {id(m) for m in ghost.modules()}


def test_blocks_told_to_run_on_cuda_are_traced_all_the_same():
    unet = patched_pipeline()[0].unet
    for site in gspn2_sites(unet):
        unet.get_submodule(site.name).gspn2.backend = "cuda"
    assert plan(8, 8, unet, PLENTY).stages[0].peak_bytes > 0


@pytest.mark.parametrize("patched", [False, True])
def test_an_outline_is_planned_as_the_pipeline_itself(sd_folder, gspn2_folder, patched):
    weights = gspn2_folder if patched else None
    outline = outline_parts(sd_folder, weights=weights, dtype=torch.float32)
    pipe = load_pipeline(sd_folder, dtype="float32", device="cpu")
    if patched:
        fuse_gspn2(apply_gspn2(pipe, weights, min_tokens="native"))
    assert all(parameter.is_meta for part in outline.all for parameter in part.parameters())
    found = plan(128, 96, outline, PLENTY, rates=H100)
    assert found == plan(128, 96, pipe, PLENTY, rates=H100)


def test_an_outline_of_another_models_weights_is_refused(sd_folder, tmp_path):
    GSPN2Adapter.for_model(tiny_dit(), GSPN2Config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a DiTTransformer2DModel"):
        outline_parts(sd_folder, weights=tmp_path)


def test_an_outline_needs_a_pipeline_with_a_known_denoiser(tmp_path):
    index = {"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    tiny_vae().save_config(tmp_path / "vae")
    with pytest.raises(ValueError, match="expected a pipeline with one model of .* AutoencoderKL"):
        outline_parts(tmp_path)


# ---- predictions


@pytest.mark.parametrize(
    "thrift",
    [
        Thrift(),
        Thrift(split_guidance=True),
        Thrift(True, LeanOptions(PIECES[0])),
        Thrift(True, LeanOptions(PIECES[1])),
        Thrift(True, LeanOptions(PIECES[1]), reuse=2),
    ],
    ids=["together", "split", "pieces", "small pieces", "reuse"],
)
def test_a_step_without_data_has_the_peak_of_the_step_in_earnest(sdxl, thrift):
    stage = Stage(192, 128, 2)
    found = ladders.Ladders(sdxl, 1, None)
    option = found._stage_option(stage, thrift, softmax=False)
    rows = {name: torch.zeros(column.shape) for name, column in found._rows.items()}
    denoiser = GuidedDenoiser(sdxl.denoiser, rows, rows, stage.guidance_scale, thrift)
    noisy, timestep = torch.randn(1, 4, 48, 32), torch.tensor(5)
    real = trace(lambda: denoiser(noisy, timestep, 0), "cpu")
    weights = weight_bytes([sdxl.denoiser, sdxl.vae])
    predicted = option.bytes - ladders.with_reserve(0) - weights - found._latent_bytes(stage)
    share = 1 + ladders.WORKSPACE_SHARE + ladders.FRAGMENTATION_SHARE
    assert predicted / share == pytest.approx(real.peak_bytes, rel=0.01)


@pytest.mark.parametrize("tile", [None, 32])
def test_the_vae_without_data_has_the_peak_of_the_vae_in_earnest(sdxl, tile):
    tiling = tile and Tiling(tile, 8)
    size = (56, 70) if tile else (40, 30)
    found = ladders.Ladders(sdxl, 1, None)
    latents = torch.randn(1, 4, *size)
    picture = torch.zeros(4 * size[0], 4 * size[1], 3, dtype=torch.uint8)
    for what, run in (
        ("decode", lambda: [None for _ in decode_bands(sdxl.vae, latents, tiling)]),
        ("encode", lambda: encode_tiled(sdxl.vae, picture, tiling)),
    ):
        cost, share = found._vae_cost(what, size, tiling)
        assert share == 1
        assert cost.peak_bytes == pytest.approx(trace(run, "cpu").peak_bytes, rel=0.01)


def measured(name: str) -> list[dict]:
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())["rows"]


def test_predicted_memory_and_time_of_sdxl_are_what_an_h100_measured(large_sdxl):
    unet = without_data(large_sdxl.denoiser)
    for row in measured("unet-sdxl-cuda"):
        if row["variant"] != "gspn2":
            continue
        height, width = row["latent"]
        with torch.device("meta"):
            known = family_of(unet).conditioning(unet)
            sample = torch.empty(1, 4, height, width, dtype=torch.bfloat16)
            timestep = torch.zeros(1, dtype=torch.long)
        known["encoder_hidden_states"] = sample.new_empty(1, 77, 2048)
        known["added_cond_kwargs"] = {
            key: value.to(torch.bfloat16) for key, value in known["added_cond_kwargs"].items()
        }
        cost = trace(lambda s=sample, k=known, t=timestep: unet(s, timestep=t, **k).sample)
        predicted = weight_bytes([unet]) + ladders.with_reserve(cost.peak_bytes)
        predicted -= ladders.CONTEXT_BYTES + ladders.FRAGMENTATION_SHARE * cost.peak_bytes
        assert predicted == pytest.approx(row["peak_mib"] * 2**20, rel=0.02)
        if height >= 512:  # below, the host decides
            assert cost.seconds(H100) == pytest.approx(row["ms"] / 1000, rel=0.1)


def test_sdxl_draws_16384_squared_in_24_gib(usual_pieces, large_sdxl):
    card = card_rates("RTX 4090")
    found = plan(16384, 16384, large_sdxl, 24 * GIB, rates=card, upper_guidance_scale=4.0)
    last = found.stages[-1]
    assert last.split_guidance and last.lean.offload_skips and last.peak_bytes < 24 * GIB
    assert found.decode.tiling is not None and found.peak_bytes <= 24 * GIB
    assert found.stages[0].lean is None and not found.stages[0].split_guidance


def test_with_any_memory_16384_squared_is_walked_piece_by_piece(usual_pieces, large_sdxl):
    found = plan(16384, 16384, large_sdxl, PLENTY)
    assert [stage.lean is None for stage in found.stages] == [True] * 4 + [False]
    assert found.decode.tiling is not None
