"""The example programs run as their first lines say."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

from gspn2_diffusers.shipped import shipped_folder

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_patch_pipeline_draws_with_a_pipeline_that_was_saved_in_half_precision(tmp_path):
    output = tmp_path / "image.png"
    options = ["--weights", shipped_folder("gspn2"), "--output", output]
    command = [sys.executable, EXAMPLES / "patch_pipeline.py", shipped_folder("pipeline")]
    done = subprocess.run(
        [*map(str, command), "a red ball in the snow", *map(str, options)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(output).size == (256, 256)


def test_evaluate_prints_the_table_and_writes_the_results(sd_folder, gspn2_folder, tmp_path):
    command = [sys.executable, EXAMPLES / "evaluate.py", sd_folder, "a cube", "a ball"]
    options = ["--weights", gspn2_folder, "--resolution", "48", "--steps", "2"]
    done = subprocess.run(
        [*map(str, command), *options, "--output", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "KD error" in done.stdout and "softmax attention" in done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "results.json")
    assert (tmp_path / "results.json").is_file() and (tmp_path / "images-48.png").is_file()


def test_generate_highres_writes_a_picture_of_the_size_asked_for(
    sd_folder, gspn2_folder, tmp_path
):
    output = tmp_path / "picture.png"
    command = [sys.executable, EXAMPLES / "generate_highres.py", sd_folder, "a cube"]
    options = ["--weights", gspn2_folder, "--size", "96x64", "--steps", "2", "--output", output]
    done = subprocess.run([*map(str, command), *map(str, options)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(output).size == (96, 64)
    assert "96x64: 3 steps of strength 0.3" in done.stdout
    assert done.stdout.splitlines()[-1] == str(output)
