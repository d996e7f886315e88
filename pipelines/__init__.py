"""Load a pipeline, with or without GSPN-2 weights, and generate images with it."""

from gspn2_diffusers.pipelines.generation import generate_images
from gspn2_diffusers.pipelines.loading import load_pipeline

__all__ = ["generate_images", "load_pipeline"]
