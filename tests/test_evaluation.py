"""Evaluation: errors are what they say, the pipeline comes back as it was, nothing is made up."""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_models import (
    TEXT_WIDTH,
    awaken,
    tiny_dit,
    tiny_pixart_pipeline,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_tokenizer,
    tiny_vae,
)
from torch import nn

from gspn2_diffusers import (
    GSPN2Adapter,
    GSPN2Config,
    apply_gspn2,
    evaluation,
    gspn2_sites,
    save_gspn2,
)
from gspn2_diffusers.evaluation import TEACHER, evaluate, write_results
from gspn2_diffusers.image_metrics import load_clip, load_fid, to_bytes
from gspn2_diffusers.tiny_scenes.score import frechet_distance
from gspn2_diffusers.trajectory import KDMeter, record_calls

PROMPTS = ["a cube", "a ball", "a cone"]
QUICK = {"prompts": PROMPTS, "steps": 2, "batch_size": 2, "metrics": ("kd",)}
PIPELINES = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline}


def awakened(pipe) -> GSPN2Adapter:
    """Blocks for a pipeline that are not a no-op; the pipeline stays as it is."""
    adapter = GSPN2Adapter.for_model(pipe, GSPN2Config())
    awaken(adapter)
    return adapter


def by_name(rows):
    return {row.name: row for row in rows}


def is_patched(pipe) -> bool:
    return any(site.patched for site in gspn2_sites(pipe))


@pytest.mark.parametrize("family", PIPELINES)
def test_the_teacher_has_no_kd_error_and_an_awakened_student_has(family):
    pipe = PIPELINES[family]()
    rows = by_name(evaluate(pipe, {"same": None, "student": awakened(pipe)}, **QUICK))
    assert list(rows) == [TEACHER, "same", "student"]
    assert rows[TEACHER].kd.total == rows["same"].kd.total == 0
    assert rows["student"].kd.total > 1e-6
    assert len(rows["student"].kd.quarters) == 2 and min(rows["student"].kd.quarters) > 0


def test_kd_error_is_the_squared_error_over_the_variance_of_all_answers():
    pipe = tiny_sd_pipeline()
    adapter = awakened(pipe)
    with record_calls(pipe) as calls:
        pipe("a cube", num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    apply_gspn2(pipe, adapter)
    meter = KDMeter()
    meter.add(calls, pipe)
    with torch.no_grad():
        answers = torch.cat([pipe.unet(*call.args, **call.kwargs)[0] for call in calls])
    truth = torch.cat([call.answer for call in calls])
    expected = (answers - truth).square().mean() / truth.var(correction=0)
    assert meter.result().total == pytest.approx(expected.item(), rel=1e-4)
    assert len(meter.result().quarters) == 3


def test_recorded_calls_of_pixart_replay_and_leave_no_hook():
    pipe = tiny_pixart_pipeline()
    masks = {
        name: torch.ones(1, 5)
        for name in ("prompt_attention_mask", "negative_prompt_attention_mask")
    }
    embeds = {
        name: torch.randn(1, 5, TEXT_WIDTH) for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    with record_calls(pipe) as calls:
        pipe(prompt=None, negative_prompt=None, num_inference_steps=2, height=32, width=32,
             use_resolution_binning=False, **embeds, **masks)  # fmt: skip
    assert not pipe.transformer._forward_hooks and not pipe.transformer._forward_pre_hooks
    assert [call.answer.shape for call in calls] == [(2, 4, 8, 8)] * 2
    meters = {"teacher": KDMeter(), "student": KDMeter()}
    meters["teacher"].add(calls, pipe)
    apply_gspn2(pipe, awakened(pipe))
    meters["student"].add(calls, pipe)
    assert meters["teacher"].result().total == 0 < meters["student"].result().total


def test_a_meter_refuses_trajectories_of_another_length():
    pipe = tiny_sd_pipeline()
    with record_calls(pipe) as calls:
        pipe("a cube", num_inference_steps=2)
    meter = KDMeter()
    with pytest.raises(ValueError, match="got none"):
        meter.result()
    meter.add(calls, pipe)
    with pytest.raises(ValueError, match="expected 2 recorded calls, got 1"):
        meter.add(calls[:1], pipe)


def test_a_pipeline_that_takes_class_labels_is_refused():
    from diffusers import DDIMScheduler, DiTPipeline

    pipe = DiTPipeline(transformer=tiny_dit(), vae=tiny_vae(), scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="DiTPipeline, which takes class labels"):
        evaluate(pipe, {}, **QUICK)


def test_sidecars_that_do_not_load_or_fit_fail_before_anything_is_drawn(tmp_path, monkeypatch):
    pipe = tiny_sd_pipeline()
    monkeypatch.setattr(evaluation, "_draw", lambda *args, **options: pytest.fail("drew"))
    misfits = {
        tmp_path / "nothing": "neither",
        awakened(tiny_sdxl_pipeline()): "expected the model",
    }
    for misfit, message in misfits.items():
        with pytest.raises(ValueError, match=message):
            evaluate(pipe, {"good": awakened(pipe), "bad": misfit}, **QUICK)
        assert not is_patched(pipe)


def test_a_backend_that_cannot_run_fails_before_anything_is_drawn(monkeypatch):
    pipe = tiny_sd_pipeline()
    monkeypatch.setattr(evaluation, "_draw", lambda *args, **options: pytest.fail("drew"))
    with pytest.raises(RuntimeError, match="expected tensors on a CUDA device"):
        evaluate(pipe, {"a": awakened(pipe)}, **QUICK, backend="cuda")


@pytest.mark.parametrize("fails", [False, True])
def test_a_patched_pipeline_comes_back_as_it_was(fails, monkeypatch):
    pipe = tiny_sd_pipeline()
    apply_gspn2(pipe, awakened(pipe), sites="mid_block.*", backend="torch")
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.gspn2
    block.double()  # as in training: not the dtype of the model
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    sites = gspn2_sites(pipe)
    if fails:
        monkeypatch.setattr(evaluation, "_measure", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(pipe, {"found": None}, **QUICK)
    else:
        rows = by_name(evaluate(pipe, {"found": None}, **QUICK))
        assert rows[TEACHER].kd.total == 0 < rows["found"].kd.total
    assert gspn2_sites(pipe) == sites
    assert pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.gspn2 is block
    assert block.backend == "torch"
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].dtype == value.dtype for name, value in before.items())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_unpatched_pipeline_and_the_adapter_come_back_as_they_were():
    pipe = tiny_sd_pipeline()
    adapter = awakened(pipe).double()
    before = copy.deepcopy(pipe.unet.state_dict())
    evaluate(pipe, {"a": adapter}, **QUICK)
    assert not is_patched(pipe)
    assert all(torch.equal(pipe.unet.state_dict()[name], value) for name, value in before.items())
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.double}


def test_two_resolutions_run_on_two_grids_and_every_contestant_draws_the_same_prompts(tmp_path):
    pipe = tiny_sd_pipeline()
    calls = []
    rows = evaluate(
        pipe, {"a": awakened(pipe)}, **QUICK, resolutions=(32, 48), output=tmp_path,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert [(row.name, row.resolution) for row in rows] == [
        (name, side) for side in (32, 48) for name in (TEACHER, "a")
    ]
    assert [row.size for row in rows] == [(32, 32)] * 2 + [(48, 48)] * 2
    assert len({row.kd.total for row in rows if row.name == "a"}) == 2
    assert all(row.seconds_per_image > 0 for row in rows)
    sheets = [Image.open(tmp_path / f"images-{side}.png") for side in (32, 48)]
    assert sheets[0].width < sheets[1].width
    assert ("KD error, 48 px", 3, 3) in calls and ("a, 32 px", 2, 3) in calls


def test_rows_repeat_themselves_whatever_the_batch_size():
    pipe = tiny_sd_pipeline()
    student = awakened(pipe)
    errors = [
        evaluate(pipe, {"a": student}, **QUICK | {"batch_size": size})[1].kd.total
        for size in (1, 3)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


class Channels(nn.Module):
    """Features ``[n, 4]`` of uint8 pictures, in place of an Inception."""

    num_features = 4

    def forward(self, images):
        images = images.double() / 255
        return torch.cat((images.mean((2, 3)), images.std((2, 3))[:, :1]), dim=1)


@pytest.fixture
def fid():
    image = pytest.importorskip("torchmetrics.image.fid")
    return image.FrechetInceptionDistance(feature=Channels())


@pytest.fixture
def real_images(tmp_path) -> Path:
    """A folder with pictures of several sizes, and a file that is none."""
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        pixels = torch.randint(256, (20 + index, 24, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray((pixels // (1 + index % 5)).numpy()).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


def features_drawn(pipe, prompts):
    """Of the pictures that evaluation draws of the prompts."""
    images = [
        pipe(prompt, num_inference_steps=2, guidance_scale=4.0,
             generator=torch.Generator().manual_seed(index)).images[0]
        for index, prompt in enumerate(prompts)
    ]  # fmt: skip
    return Channels()(to_bytes(images))


FID_QUICK = {"prompts": PROMPTS * 4, "steps": 2, "batch_size": 5, "metrics": ("fid",)}


def test_fid_to_real_pictures_is_the_frechet_distance_of_the_features(fid, real_images):
    pipe = tiny_sd_pipeline()
    rows = evaluate(pipe, {"same": None}, **FID_QUICK, fid=fid, real_images=real_images)
    real = torch.cat(
        [Channels()(to_bytes([Image.open(path)])) for path in real_images.glob("*.png")]
    )
    expected = frechet_distance(features_drawn(pipe, FID_QUICK["prompts"]), real)
    assert [row.fid for row in rows] == pytest.approx([expected] * 2, rel=1e-3)
    assert "12 are few" in rows[0].notes["fid"]


def test_fid_to_the_teacher_forgets_the_pictures_of_the_resolution_before(fid):
    pipe = tiny_sd_pipeline()
    student = awakened(pipe)
    both = evaluate(pipe, {"a": student}, **FID_QUICK, fid=fid, resolutions=(48, None))
    teacher, row = both[2:]
    assert teacher.fid is None and "compared with the pictures" in teacher.notes["fid"]
    reference = features_drawn(pipe, FID_QUICK["prompts"])
    apply_gspn2(pipe, student)
    expected = frechet_distance(features_drawn(pipe, FID_QUICK["prompts"]), reference)
    assert row.fid == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert both[1].fid != row.fid


def test_too_few_pictures_for_fid_are_a_note_and_too_few_real_ones_an_error(fid, tmp_path):
    pipe = tiny_sd_pipeline()
    rows = evaluate(pipe, {"a": None}, **FID_QUICK | {"prompts": ["a cube"]}, fid=fid)
    assert rows[1].fid is None and "More than one sample" in rows[1].notes["fid"]
    with pytest.raises(ValueError, match="at least 2 images, got 0 in"):
        evaluate(pipe, {}, **FID_QUICK, fid=fid, real_images=tmp_path)


class NotANumber:
    """A metric that came out of a division by zero."""

    def to(self, device):
        return self

    def reset(self):
        pass

    def update(self, *args):
        pass

    def compute(self):
        return torch.tensor(float("nan"))


def test_a_score_that_is_not_a_number_is_a_note():
    row = evaluate(tiny_sd_pipeline(), {}, **QUICK | {"metrics": ("clip",)}, clip=NotANumber())[0]
    assert row.clip is None and row.notes == {"clip": "it came out as nan"}


def test_missing_weights_of_torchmetrics_leave_a_reason_and_the_other_columns():
    pytest.importorskip("torchmetrics")
    rows = evaluate(tiny_sd_pipeline(), {}, **QUICK | {"metrics": ("kd", "fid", "clip")})
    assert rows[0].kd.total == 0 and rows[0].fid is None and rows[0].clip is None
    assert "HF_HUB_OFFLINE" in rows[0].notes["clip"]
    assert rows[0].notes["fid"] and "\n" not in rows[0].notes["fid"]


def test_the_inception_is_not_downloaded_when_offline(monkeypatch, tmp_path):
    pytest.importorskip("torchmetrics")
    name = "torch_fidelity.feature_extractor_inceptionv3"
    fake = SimpleNamespace(URL_INCEPTION_V3="https://example.org/inception.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set and inception.pth is not in"):
        load_fid()


def test_without_torchmetrics_the_reason_says_what_to_install(monkeypatch):
    for module in ("torchmetrics.image.fid", "torchmetrics.multimodal.clip_score"):
        monkeypatch.setitem(sys.modules, module, None)
    row = evaluate(tiny_sd_pipeline(), {}, **QUICK | {"metrics": ("fid", "clip")})[0]
    assert row.fid is None and row.clip is None
    assert all("pip install" in note for note in row.notes.values()) and len(row.notes) == 2


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    """Folder of a tiny CLIP with random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = tiny_tokenizer()
    vocabulary = tokenizer.get_vocab()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 4}  # fmt: skip
    ends = {key: vocabulary["<|endoftext|>"] for key in ("eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 16, **ends}
    config = CLIPConfig(
        text_config=sizes | text | {"bos_token_id": vocabulary["<|startoftext|>"]},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return str(folder)


def test_clip_score_of_a_local_model_is_the_mean_cosine_of_image_and_prompt(clip_folder):
    pytest.importorskip("torchmetrics")
    metric = load_clip(clip_folder)
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    metric.update(images, PROMPTS)
    clip, processor = metric.model.clip, metric.processor
    inputs = processor(text=PROMPTS, images=list(images), return_tensors="pt", padding=True)
    with torch.no_grad():
        output = clip(**inputs)
    cosines = (output.image_embeds * output.text_embeds).sum(1)
    assert float(metric.compute()) == pytest.approx(max(0, 100 * cosines.mean().item()), rel=1e-3)


def test_clip_column_is_filled_by_an_injected_metric(clip_folder):
    pytest.importorskip("torchmetrics")
    quick = QUICK | {"metrics": ("clip",)}
    row = evaluate(tiny_sd_pipeline(), {}, **quick, clip=load_clip(clip_folder))[0]
    assert 0 <= row.clip <= 100 and row.notes == {}


def test_attributes_are_those_of_the_tiny_scenes_score():
    pipe = tiny_sd_pipeline()
    quick = QUICK | {"metrics": ("attributes",), "prompts": PROMPTS[:1]}
    rows = evaluate(pipe, {"same": None}, **quick, scenes=2)
    assert rows[0].attributes["scenes"] == 2 and rows[0].kd is None
    for key in ("mean_accuracy", "all_right", "frechet"):
        assert rows[0].attributes[key] == pytest.approx(rows[1].attributes[key])


def test_attributes_are_measured_by_default_for_the_pipeline_that_ships_only():
    pipe = tiny_sd_pipeline()
    assert evaluation.default_metrics(pipe) == ("kd",)
    pipe.register_to_config(_name_or_path=str(evaluation.shipped_folder("pipeline")))
    assert evaluation.default_metrics(pipe) == ("kd", "attributes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "at least 1 prompt"),
        ({"prompts": "a cube"}, "expected a list of"),
        ({"resolutions": (32, 32)}, "different resolutions"),
        ({"steps": 0}, "steps of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"scenes": 1}, "scenes of at least 2, got 1"),
        ({"metrics": ("ssim",)}, "got 'ssim'"),
        ({"backend": "triton"}, "'triton'"),
    ],
)
def test_wrong_arguments_say_what_was_expected(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_sd_pipeline(), {}, **QUICK | change)


def test_a_sidecar_by_the_teachers_name_is_refused():
    with pytest.raises(ValueError, match="other than the teacher's"):
        evaluate(tiny_sd_pipeline(), {TEACHER: None}, **QUICK)


def test_results_have_rows_settings_versions_hardware_and_date(tmp_path):
    pipe = tiny_sd_pipeline()
    apply_gspn2(pipe, awakened(pipe))
    save_gspn2(pipe, tmp_path / "weights")
    rows = evaluate(pipe, {"a": tmp_path / "weights"}, **QUICK)
    settings = {"steps": 2, "weights": tmp_path / "weights"}
    path = write_results(tmp_path / "new" / "results.json", rows, pipe.device, settings)
    content = json.loads(path.read_text())
    assert [row["name"] for row in content["rows"]] == [TEACHER, "a"]
    assert content["rows"][1]["kd"]["total"] == rows[1].kd.total
    assert content["rows"][1]["size"] == [32, 32] and content["rows"][1]["fid"] is None
    assert content["settings"] == {"steps": 2, "weights": str(tmp_path / "weights")}
    assert content["versions"]["torch"] == torch.__version__
    assert content["hardware"]["device"] == "cpu" and content["hardware"]["threads"] >= 1
    assert content["date"].endswith("+00:00")
