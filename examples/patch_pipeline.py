"""Generate an image with GSPN-2 in place of a pipeline's self-attention.

    python patch_pipeline.py MODEL "a prompt" --weights FOLDER_OR_HUB_ID

The weights must have been trained for MODEL: without training the images are noise.
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from gspn2_diffusers import apply_gspn2, remove_gspn2

parser = argparse.ArgumentParser(description="Generate with GSPN-2 in place of self-attention.")
parser.add_argument("model", help="pipeline folder or hub id")
parser.add_argument("prompt")
parser.add_argument("--weights", required=True, help="GSPN-2 weights, folder or hub id")
parser.add_argument("--output", default="image.png")
options = parser.parse_args()

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
# Without a dtype, parts of a pipeline saved in float16 load in different ones.
pipe = DiffusionPipeline.from_pretrained(options.model, dtype=dtype).to(device)
apply_gspn2(pipe, options.weights)
pipe(options.prompt).images[0].save(options.output)
remove_gspn2(pipe)  # the pipeline is as it was loaded
