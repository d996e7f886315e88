"""Generate a picture of any size with a pipeline whose self-attention GSPN-2 replaces.

    python generate_highres.py MODEL "a prompt" --weights FOLDER_OR_HUB_ID --size 4096x4096

The weights must have been trained for MODEL: without training the pictures are noise. Without
them, softmax attention draws, which takes the longer the larger the picture.
"""

import argparse
from pathlib import Path

import torch

from gspn2_diffusers.hardware import prefer_growing_memory
from gspn2_diffusers.pipelines import HighResPipeline, load_pipeline

parser = argparse.ArgumentParser(description="Generate a picture of any size.")
parser.add_argument("model", help="pipeline folder or hub id")
parser.add_argument("prompt")
parser.add_argument("--weights", help="GSPN-2 weights, folder or hub id")
parser.add_argument("--size", default="2048x2048", help="WIDTHxHEIGHT in pixels")
parser.add_argument("--steps", type=int, default=30, help="of the first stage")
parser.add_argument("--guidance_scale", type=float, default=5.0)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", type=Path, default=Path("picture.png"), help="or .tif")
options = parser.parse_args()
width, height = map(int, options.size.split("x"))

prefer_growing_memory()
pipe = HighResPipeline(load_pipeline(options.model, weights=options.weights, fuse=True))
for stage in pipe.default_stages(height, width, num_inference_steps=options.steps):
    print(f"{stage.width}x{stage.height}: {stage.steps} steps of strength {stage.strength}")
result = pipe(
    options.prompt,
    height,
    width,
    num_inference_steps=options.steps,
    guidance_scale=options.guidance_scale,
    generator=torch.Generator().manual_seed(options.seed),
    keep=options.output.with_suffix(".stages"),  # an interrupted run goes on from here
    resume=True,
    output=options.output,
)
for part, seconds in result.seconds.items():
    print(f"{part}: {seconds:.1f} s")
print(result.path)
