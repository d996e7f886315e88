"""Load pipelines, with or without GSPN-2 weights, and generate pictures of any size with them."""

from gspn2_diffusers.lazy import lazy_getattr

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


__getattr__ = lazy_getattr(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
