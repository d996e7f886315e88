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
