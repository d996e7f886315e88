"""The command line, called as its console script calls it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from PIL import Image, ImageChops

from gspn2_diffusers import cli, doctor, evaluation
from gspn2_diffusers.doctor import Finding
from gspn2_diffusers.kernels.backends import BACKENDS

COMMANDS = ("demo", "generate", "highres", "plan", "evaluate", "info", "doctor")


@pytest.fixture(autouse=True)
def restore_logging(monkeypatch):
    """Commands silence the libraries for good; the tests after them want them as they were."""
    monkeypatch.setenv("COLUMNS", "80")
    loggers = [diffusers.utils.logging, transformers.utils.logging]
    verbosities = [logging.get_verbosity() for logging in loggers]
    yield
    for logging, verbosity in zip(loggers, verbosities, strict=True):
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def differ(first: Path, second: Path) -> bool:
    with Image.open(first) as a, Image.open(second) as b:
        return ImageChops.difference(a, b).getbbox() is not None


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_fits_80_columns(command, capsys):
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"gspn2 {command}" in out.partition("Examples")[2]
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_docs_show_the_help_as_it_is_printed(command, capsys):
    assert cli.main([command, "--help"]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.strip("\n").splitlines()]
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    assert "\n".join(printed).strip("\n") in page


def test_no_arguments_print_the_help(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("Commands", *COMMANDS))


def test_help_does_not_wait_for_torch():
    program = (
        "import sys; from gspn2_diffusers.cli import main; main(['demo', '--help']);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_generate_writes_one_image_per_prompt_and_prints_only_their_paths(
    sd_folder, tmp_path, capsys
):
    arguments = ["generate", sd_folder, "-p", "a red cube", "-p", "A hill!", "--steps", "2"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    paths = [tmp_path / "00-a-red-cube.png", tmp_path / "01-a-hill.png"]
    assert capsys.readouterr().out.splitlines() == list(map(str, paths))
    assert [Image.open(path).size for path in paths] == [(32, 32), (32, 32)]


def test_generate_repeats_itself_by_seed_and_prompts_have_noise_of_their_own(sd_folder, tmp_path):
    def run(name, *options):
        arguments = ["generate", sd_folder, "--steps", "1", "-p", "x", "-p", "x", *options]
        assert cli.main([*arguments, "-o", str(tmp_path / name)]) == 0
        return tmp_path / name / "00-x.png", tmp_path / name / "01-x.png"

    first, second = run("a", "--seed", "3")
    assert not differ(first, run("b", "--seed", "3")[0])
    assert not differ(second, run("c", "--seed", "4")[0])
    assert differ(first, second)


def test_generate_takes_size_and_weights(sd_folder, gspn2_folder, tmp_path, capsys):
    options = ["-p", "x", "--steps", "1", "--height", "40", "--width", "24"]
    for name, weights in {"softmax": [], "gspn2": ["--weights", gspn2_folder]}.items():
        output = ["--output", str(tmp_path / name)]
        assert cli.main(["generate", sd_folder, *options, *weights, *output]) == 0
    assert capsys.readouterr().err == ""
    softmax, gspn2 = tmp_path / "softmax" / "00-x.png", tmp_path / "gspn2" / "00-x.png"
    assert Image.open(gspn2).size == (24, 40)
    assert differ(softmax, gspn2)


def test_generate_with_gspn2_obeys_the_backend(sd_folder, gspn2_folder, tmp_path, capsys):
    options = ["-p", "x", "--steps", "1", "--weights", gspn2_folder, "--device", "cpu"]
    for backend in ("auto", "torch"):
        output = ["--backend", backend, "-o", str(tmp_path / backend)]
        assert cli.main(["generate", sd_folder, *options, *output]) == 0
    assert not differ(tmp_path / "auto" / "00-x.png", tmp_path / "torch" / "00-x.png")
    capsys.readouterr()
    assert cli.main(["generate", sd_folder, *options, "--backend", "cuda"]) == 1
    assert "error: backend='cuda': expected tensors on a CUDA device" in capsys.readouterr().err


def test_the_backends_of_the_command_line_are_those_of_the_operator():
    assert tuple(name.value for name in cli.BackendName) == BACKENDS


def test_the_metrics_of_the_command_line_are_those_of_evaluate():
    assert tuple(name.value for name in cli.MetricName) == evaluation.METRICS


def test_evaluate_prints_a_table_and_writes_results_and_sheets(
    sd_folder, gspn2_folder, tmp_path, capsys
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a ball\n\n  a cone  \n")
    arguments = ["evaluate", sd_folder, "--weights", gspn2_folder, "-p", "a cube"]
    options = ["--prompts", str(prompts), "--resolution", "32", "--resolution", "48"]
    output = tmp_path / "new"
    assert cli.main([*arguments, *options, "--steps", "2", "-o", str(output)]) == 0
    out, err = capsys.readouterr()
    *table, first, second, results = out.splitlines()
    assert err == "" and max(map(len, table)) <= 80
    assert "KD error" in out and "right %" not in out and "FID" not in out
    assert sum("softmax attention" in line for line in table) == 2
    assert sum(Path(gspn2_folder).name in line for line in table) == 2
    assert [Path(first).name, Path(second).name] == ["images-32.png", "images-48.png"]
    assert Image.open(first).width < Image.open(second).width
    content = json.loads(Path(results).read_text())
    assert content["settings"]["prompts"] == ["a cube", "a ball", "a cone"]
    assert content["settings"]["weights"] == {Path(gspn2_folder).name: gspn2_folder}
    assert content["settings"]["model"] == sd_folder and content["settings"]["seed"] == 0
    assert [row["resolution"] for row in content["rows"]] == [32, 32, 48, 48]


def test_evaluate_with_every_metric_fits_80_columns_and_says_what_is_missing(
    sd_folder, gspn2_folder, tmp_path, capsys
):
    metrics = [word for name in evaluation.METRICS for word in ("--metric", name)]
    arguments = ["evaluate", sd_folder, "--weights", gspn2_folder, "-p", "x", "--steps", "1"]
    assert cli.main([*arguments, *metrics, "--scenes", "2", "-o", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-2])) <= 80
    for heading in ("s/image", "KD error", "right %", "all %", "Fréchet", "FID", "CLIP"):
        assert heading in lines[1]
    assert lines[2].split()[-2:] == ["-", "-"]
    assert any(line.startswith("fid: ") for line in lines)
    assert any(line.startswith("clip: ") for line in lines)


def test_weights_are_named_by_their_folder_unless_two_are_alike():
    assert cli._name_sidecars(["a/x", "b/y"]) == {"x": "a/x", "y": "b/y"}
    assert cli._name_sidecars(["a/x", "b/x"]) == {"a/x": "a/x", "b/x": "b/x"}


def test_info_lists_every_site_on_one_line_with_the_grid_at_that_size(sd_folder, capsys):
    assert cli.main(["info", sd_folder, "--height", "40", "--width", "104"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "attn1" in line]
    assert len(lines) == 7
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert [name, "32", "4", "10x26"] in lines


def test_doctor_fails_when_something_is_missing(monkeypatch, capsys):
    cli.main(["doctor"])
    out = capsys.readouterr().out
    assert "line scan" in out and "diffusers" in out
    for good, code in {True: 0, None: 0, False: 1}.items():
        monkeypatch.setattr(doctor, "examine", lambda good=good: [Finding("x", "y", good)])
        assert cli.main(["doctor"]) == code


def findings_by_topic():
    return {finding.topic: finding for finding in doctor.examine()}


@pytest.fixture
def doctor_on_cuda(monkeypatch):
    """doctor as on a machine with a CUDA GPU; returns a function that names the obstacle."""
    monkeypatch.setattr(doctor, "available_devices", lambda: ["cuda", "cpu"])
    monkeypatch.setattr(doctor, "default_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return lambda obstacle: monkeypatch.setattr(doctor, "why_not_cuda", lambda *_: obstacle)


def fake_cupy(get_version):
    return SimpleNamespace(cuda=SimpleNamespace(nvrtc=SimpleNamespace(getVersion=get_version)))


def test_doctor_says_which_backend_runs_without_a_gpu_and_why(monkeypatch):
    monkeypatch.setattr(doctor, "available_devices", lambda: ["cpu"])
    findings = findings_by_topic()
    assert "'torch' on cpu" in findings["line scan"].found
    assert "CUDA device" in findings["CUDA kernels"].found
    assert findings["CUDA kernels"].good is None


def test_doctor_passes_on_why_the_kernels_cannot_run_on_a_gpu(doctor_on_cuda):
    doctor_on_cuda("CuPy is not installed: pip install it")
    findings = findings_by_topic()
    assert findings["CUDA kernels"].found.endswith("CuPy is not installed: pip install it")
    assert "'torch' on cuda" in findings["line scan"].found


def test_doctor_tells_capability_compiler_and_cache_where_the_kernels_run(
    doctor_on_cuda, monkeypatch
):
    doctor_on_cuda(None)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(lambda: (13, 0)))
    monkeypatch.setenv("CUPY_CACHE_DIR", "/some/cache")
    findings = findings_by_topic()
    assert "9.0" in findings["CUDA kernels"].found and findings["CUDA kernels"].good
    assert "NVRTC 13.0" in findings["CUDA compiler"].found
    assert "/some/cache" in findings["CUDA compiler"].found
    assert "'cuda'" in findings["line scan"].found


@pytest.mark.parametrize("obstacle", [None, "CuPy finds no NVRTC"])
def test_doctor_misses_a_compiler_that_cupy_cannot_load(obstacle, doctor_on_cuda, monkeypatch):
    def get_version():
        raise RuntimeError("failed to load libnvrtc.so.13")

    doctor_on_cuda(obstacle)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(get_version))
    finding = findings_by_topic()["CUDA compiler"]
    assert finding.good is False and "libnvrtc.so.13" in finding.found


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["frobnicate"], 2, "No such command"),
        (["generate"], 2, "Missing argument"),
        (["generate", "{sd}"], 2, "--prompt"),
        (["generate", "{sd}", "-p", "x", "--steps", "0"], 2, "--steps"),
        (["generate", "{sd}", "-p", "x", "--dtype", "int8"], 2, "float32, float16, bfloat16"),
        (["generate", "{sd}", "-p", "x", "--device", "toaster"], 2, "'toaster'"),
        (["generate", "{sd}", "-p", "x", "--device", "cuda:99"], 2, "'cuda:99'"),
        (["generate", "{sd}", "-p", "x", "--backend", "triton"], 2, "'triton'"),
        (["generate", "{sd}", "-p", "x", "--weights", "{empty}"], 2, "{empty}"),
        (["generate", "owner/model", "-p", "x"], 1, "HF_HUB_OFFLINE"),
        (["evaluate", "{sd}"], 2, "--prompt or --prompts"),
        (["evaluate", "{sd}", "--prompts", "{empty}/none.txt"], 2, "none.txt"),
        (["evaluate", "{sd}", "-p", "x", "--metric", "ssim"], 2, "'ssim'"),
        (["evaluate", "{sd}", "-p", "x", "--weights", "{empty}"], 2, "{empty}"),
        (["evaluate", "{sd}", "-p", "x", "--weights", "a", "--weights", "a"], 2, "twice"),
        (["evaluate", "{sd}", "-p", "x", "--real-images", "{empty}"], 2, "at least 2 images"),
        (["info", "owner/model"], 1, "HF_HUB_OFFLINE"),
        (["info", "/no/such/folder"], 2, "/no/such/folder does not exist"),
        (["info", "{empty}"], 2, "model_index.json"),
    ],
)
def test_errors_are_one_line_on_stderr(arguments, code, message, sd_folder, tmp_path, capsys):
    places = {"sd": sd_folder, "empty": str(tmp_path)}
    assert cli.main([argument.format(**places) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message.format(**places) in err


@pytest.mark.parametrize("arguments", [["--debug", "info", "/no"], ["info", "/no", "--debug"]])
def test_debug_lets_the_traceback_through(arguments):
    with pytest.raises(ValueError, match="/no does not exist"):
        cli.main(arguments)


def test_example_script_patches_a_pipeline(sd_folder, gspn2_folder, tmp_path):
    script = Path(__file__).parents[1] / "examples" / "patch_pipeline.py"
    output = tmp_path / "image.png"
    options = ["--weights", gspn2_folder, "--output", str(output)]
    subprocess.run([sys.executable, str(script), sd_folder, "a cube", *options], check=True)
    assert Image.open(output).size == (32, 32)


def test_highres_writes_the_picture_and_clears_up_what_it_kept(
    sd_folder, gspn2_folder, tmp_path, capsys
):
    output = tmp_path / "new" / "a.png"
    options = ["--size", "96x64", "--model", sd_folder, "--weights", gspn2_folder]
    assert cli.main(["highres", "a cube", *options, "--steps", "2", "-o", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(output)
    with Image.open(output) as picture:
        assert picture.size == (96, 64)
        assert picture.info["prompt"] == "a cube" and picture.info["seed"] == "0"
    assert [path.name for path in output.parent.iterdir()] == ["a.png"]


def test_highres_goes_on_from_an_interrupted_run(sd_folder, tmp_path, monkeypatch, capsys):
    from gspn2_diffusers.pipelines import running

    output = tmp_path / "a.png"
    command = ["highres", "a cube", "--size", "64", "--model", sd_folder, "--steps", "2"]
    write = running.Run.write

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(running.Run, "write", fail)
    assert cli.main([*command, "-o", str(output)]) == 1
    assert "no space left" in capsys.readouterr().err
    kept = sorted(path.name for path in (tmp_path / "a.png.stages").iterdir())
    assert kept == ["run.json", "stage-0.safetensors", "stage-1.safetensors"]
    monkeypatch.setattr(running.Run, "write", write)
    monkeypatch.setattr(running.Run, "_stage", lambda *_: pytest.fail("it began anew"))
    assert cli.main([*command, "-o", str(output)]) == 0
    assert output.is_file() and not (tmp_path / "a.png.stages").exists()


@pytest.mark.parametrize("size", ["64y64", "64x", "0x64", "1x2x3"])
def test_sizes_that_are_none_are_refused(size, sd_folder, capsys):
    for command in (["highres", "a cube", "--model", sd_folder], ["plan", sd_folder]):
        assert cli.main([*command, "--size", size]) == 2
        assert f"got '{size}'" in capsys.readouterr().err


def test_plan_prints_a_table_of_80_columns_without_weights(sd_folder, tmp_path, capsys):
    import shutil

    folder = tmp_path / "configs"
    shutil.copytree(sd_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    options = ["--size", "1024x512", "--vram", "2", "--card", "RTX 4090"]
    assert cli.main(["plan", str(folder), *options]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "1024x512" in out and "decode" in out and "Peak" in out


def test_plan_says_what_would_fit(sd_folder, capsys):
    assert cli.main(["plan", sd_folder, "--size", "16384", "--vram", "1.1"]) == 1
    err = capsys.readouterr().err
    assert "expected at least" in err and "got 1.1 GiB" in err and "would fit" in err


def test_plan_needs_a_card_that_it_knows(sd_folder, capsys):
    options = ["--size", "64", "--vram", "2", "--card", "abacus"]
    assert cli.main(["plan", sd_folder, *options]) == 2
    assert "got 'abacus'" in capsys.readouterr().err
