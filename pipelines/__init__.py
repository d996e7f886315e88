"""Load pipelines, with or without GSPN-2 weights, and generate pictures of any size with them."""

import importlib

# Names are resolved on first use: loading a pipeline should not wait for every model family.
_HOME = {
    "DoesNotFitError": "planner",
    "HighResOutput": "highres",
    "HighResPipeline": "highres",
    "LeanOptions": "lean",
    "LeanUNet": "lean",
    "Plan": "planner",
    "Stage": "cascade",
    "Tiling": "decoding",
    "cascade_sizes": "cascade",
    "decode_bands": "decoding",
    "encode_tiled": "decoding",
    "generate_images": "generation",
    "load_pipeline": "loading",
    "plan": "planner",
    "plan_stages": "planner",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
