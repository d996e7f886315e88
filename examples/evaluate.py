"""Compare GSPN-2 weights with the pipeline that they were trained for, in one table.

    python evaluate.py MODEL "a prompt" "another" --weights FOLDER_OR_HUB_ID --resolution 512

KD error: 0 is the teacher, 1 is no better than always answering the mean.
"""

import argparse
from pathlib import Path

from gspn2_diffusers import terminal
from gspn2_diffusers.evaluation import METRICS, default_metrics, evaluate, write_results
from gspn2_diffusers.pipelines import load_pipeline

parser = argparse.ArgumentParser(description="Measure a pipeline with and without GSPN-2 weights.")
parser.add_argument("model", help="pipeline folder or hub id")
parser.add_argument("prompts", nargs="+")
parser.add_argument("--weights", action="append", default=[], help="may be repeated")
parser.add_argument("--resolution", type=int, action="append", help="pixels; may be repeated")
parser.add_argument("--metric", choices=METRICS, action="append", help="may be repeated")
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--output", type=Path, default=Path("outputs/evaluation"))
options = parser.parse_args()

pipe = load_pipeline(options.model)
pipe.set_progress_bar_config(disable=True)
settings = {
    "prompts": options.prompts,
    "resolutions": options.resolution or [None],
    "steps": options.steps,
    "metrics": options.metric or default_metrics(pipe),
}
sidecars = {weights: weights for weights in options.weights}
rows = evaluate(pipe, sidecars, output=options.output, **settings)
terminal.stdout.print(terminal.evaluation_table(rows, settings["metrics"]))
for note in terminal.evaluation_notes(rows):
    print(note)
settings |= {"model": options.model, "weights": sidecars}
print(write_results(options.output / "results.json", rows, pipe.device, settings))
