"""Tiny Scenes: ray-traced pictures with captions, and the pipeline trained on them."""

from .captions import GALLERY, VOCABULARY, caption
from .render import render, render_core
from .scenes import ATTRIBUTES, Scenes, sample_scenes, scenes_from_attributes
from .tokenizer import build_tokenizer

__all__ = [
    "ATTRIBUTES",
    "GALLERY",
    "VOCABULARY",
    "Scenes",
    "build_tokenizer",
    "caption",
    "render",
    "render_core",
    "sample_scenes",
    "scenes_from_attributes",
]
