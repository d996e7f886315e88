"""examples/distill.py: from pictures to blocks, killed and resumed, by one process and by two."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_teachers import picture_folder, teacher_pipeline

from gspn2_diffusers import GSPN2Adapter, apply_gspn2
from gspn2_diffusers.distillation.checkpoints import find_checkpoints
from gspn2_diffusers.pipelines import load_pipeline

SCRIPT = Path(__file__).parents[2] / "examples" / "distill.py"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHORT = {
    "teacher_forcing_steps": 3,
    "end_to_end_steps": 3,
    "train_batch_size": 2,
    "held_out": 2,
    "max_aspect_ratio": 1.0,
    "lr_warmup_steps": 1,
    "logging_steps": 1,
    "validation_steps": 3,
    "num_inference_steps": 2,
    "learning_rate": 3e-3,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "tiny-teacher"
    teacher_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("pictures") / "images")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """One cache for all runs, so that only the first encodes."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture
def options(teacher, pictures, caches, tmp_path):
    return SHORT | {
        "pretrained_model_name_or_path": teacher,
        "train_data_dir": pictures,
        "cache_dir": caches,
        "output_dir": tmp_path / "out",
    }


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("distill", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(options, *flags):
    pairs = [[f"--{name}", str(value)] for name, value in options.items() if value is not None]
    return [*(word for pair in pairs for word in pair), *flags]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return {line["step"]: (line["loss"], line["layers"]) for line in log(folder) if "loss" in line}


def start(options, *flags, launcher=()):
    command = [sys.executable, *launcher, str(SCRIPT), *arguments(options, *flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def test_a_folder_of_pictures_becomes_blocks_with_a_card(script, options, teacher):
    results = script.main(arguments(options, "--use_ema", "--validation_prompt", "a cat", "a dog"))
    out = options["output_dir"]
    assert 0 < results["output_error"] < 1 and len(results["layers"]) == 7
    pipe = load_pipeline(teacher, dtype="float32", device="cpu")
    apply_gspn2(pipe, out)
    assert len(GSPN2Adapter.of_patched(pipe).blocks) == 7
    card = (out / "README.md").read_text()
    assert "tiny-teacher" in card and str(teacher) not in card
    assert f"{results['output_error']:.4g}" in card and "12 |" in card
    sheet = Image.open(out / "validation" / "validation-000006.png")
    assert sheet.width > 2 * 32
    for stage in ("teacher_forcing", "end_to_end"):
        assert GSPN2Adapter.from_pretrained(out / stage)
    stages = [line["stage"] for line in log(out) if "loss" in line]
    assert stages == ["teacher_forcing"] * 3 + ["end_to_end"] * 3


def test_a_run_killed_at_any_moment_resumes_bit_for_bit(script, options, tmp_path):
    options |= {"checkpointing_steps": 2, "teacher_forcing_steps": 5, "end_to_end_steps": 7}
    script.main(arguments(options, "--use_ema"))
    cut = options | {"output_dir": tmp_path / "cut"}
    process = start(cut, "--use_ema")
    wanted = random.randint(2, 9)
    while process.poll() is None:
        path = cut["output_dir"] / "log.jsonl"
        if path.is_file() and path.read_text().count("\n") >= wanted:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL
    assert not (cut["output_dir"] / "config.json").exists()
    script.main(arguments(cut, "--use_ema", "--resume_from_checkpoint", "latest"))
    assert losses(cut["output_dir"]) == losses(options["output_dir"])
    found, expected = (load_file(o["output_dir"] / WEIGHTS) for o in (cut, options))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_sigterm_saves_and_exits_with_success(options):
    options |= {"teacher_forcing_steps": 100000}
    process = start(options)
    path = options["output_dir"] / "log.jsonl"
    while process.poll() is None and not path.is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 0, output
    (checkpoint,) = find_checkpoints(options["output_dir"])
    steps = int(checkpoint.name.split("-")[1])
    assert len(losses(options["output_dir"])) == steps and f"stopped after step {steps}" in output


def test_two_processes_train_as_one_with_twice_the_batch(script, options, tmp_path):
    one = options | {"train_batch_size": 4}
    script.main(arguments(one))
    two = options | {"output_dir": tmp_path / "two"}
    # With ACCELERATE_USE_CPU this is how accelerate starts several processes on one CPU.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                "--main_process_port", "0"]  # fmt: skip
    code, output = finish(start(two, launcher=launcher))
    assert code == 0, output
    assert "| 2 x " in (two["output_dir"] / "README.md").read_text()
    for step, (loss, layers) in losses(one["output_dir"]).items():
        found, found_layers = losses(two["output_dir"])[step]
        assert found == pytest.approx(loss, rel=1e-4)
        assert found_layers == pytest.approx(layers, rel=1e-4)
    expected, found = (load_file(o["output_dir"] / WEIGHTS) for o in (one, two))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_only_the_first_samples_are_used_if_asked(script, options):
    script.main(arguments(options | {"max_train_samples": 6}))
    card = (options["output_dir"] / "README.md").read_text()
    assert "| source | image folder |" in card and "| examples | 6 |" in card


def test_the_teacher_draws_its_own_examples_from_prompts(script, options, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n\na fish\n")
    options |= {
        "train_data_dir": None, "self_generate": prompts, "images_per_prompt": 2, "cache_dir": None
    }  # fmt: skip
    script.main(arguments(options))
    (record,) = options["output_dir"].glob("cache/*/cache.json")
    assert json.loads(record.read_text())["totals"]["rows"] == 6
    assert GSPN2Adapter.from_pretrained(options["output_dir"])


def test_the_curriculum_trains_at_twice_the_size_and_resumes_bit_for_bit(script, options, tmp_path):
    options |= {"teacher_forcing_steps": 2, "end_to_end_steps": 0, "curriculum_steps": 4}
    options |= {"checkpointing_steps": 4}
    script.main(arguments(options))
    out = options["output_dir"]
    assert [line["stage"] for line in log(out) if "loss" in line][2:] == ["curriculum"] * 4
    expected, whole = load_file(out / WEIGHTS), losses(out)
    script.main(arguments(options, "--resume_from_checkpoint", "checkpoint-4"))
    found = load_file(out / WEIGHTS)
    assert losses(out) == whole
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_each_stage_runs_alone_and_goes_on_from_blocks(script, options, tmp_path):
    script.main(arguments(options | {"end_to_end_steps": 0}))
    first = log(options["output_dir"])[-1]["validation"]["layer_error"]
    then = options | {
        "gspn2_weights": options["output_dir"], "output_dir": tmp_path / "then",
        "teacher_forcing_steps": 0, "learning_rate": 1e-9,
    }  # fmt: skip
    script.main(arguments(then))
    assert log(then["output_dir"])[-1]["validation"]["layer_error"] == pytest.approx(first)


def test_lora_is_saved_for_diffusers_to_load(script, options, teacher):
    pytest.importorskip("peft")
    script.main(arguments(options | {"lora_rank": 2}))
    out = options["output_dir"]
    pipe = load_pipeline(teacher, dtype="float32", device="cpu")
    apply_gspn2(pipe, out)
    pipe.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    loaded = [m for m in pipe.unet.modules() if hasattr(m, "lora_B")]
    assert loaded and any(m.lora_B["default_0"].weight.abs().sum() > 0 for m in loaded)


def test_curves_and_pictures_reach_tensorboard(script, options):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    script.main(arguments(options, "--report_to", "tensorboard", "--validation_prompt", "a cat"))
    (folder,) = (options["output_dir"] / "logs").glob("*")
    events = reader.EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    assert "teacher_forcing/loss" in tags["scalars"] and "validation" in tags["images"]
    assert sum(tag.startswith("end_to_end/layers/") for tag in tags["scalars"]) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tiny_scenes": 4}, "expected one of --train_data_dir"),
        ({"train_data_dir": None}, "expected one of --train_data_dir"),
        ({"held_out": 0}, "--held_out: expected at least 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(
    script, options, changes, message, capsys
):
    with pytest.raises(SystemExit):
        script.parse_args(arguments(options | changes))
    assert message in capsys.readouterr().err
