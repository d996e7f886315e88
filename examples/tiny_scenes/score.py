"""Scores of a pipeline on Tiny Scenes: does the picture show what the caption says?

python -m gspn2_diffusers.tiny_scenes.score --pipeline weights/pipeline --scenes 1024
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from gspn2_diffusers import apply_gspn2
from gspn2_diffusers.pipelines.loading import load_pipeline

from .attention_report import attention_report, mean_ablation
from .captions import caption
from .data import Renderer, held_out_scenes
from .models import WEIGHTS
from .probe import Probe
from .scenes import ATTRIBUTES, Scenes

_REPORT_PROMPTS = 16


@torch.no_grad()
def score(
    pipe: DiffusionPipeline,
    probe: Probe,
    scenes: Scenes,
    *,
    captions: Sequence[str] | None = None,
    steps: int = 50,
    guidance_scale: float = 4.0,
    batch_size: int = 64,
    seed: int = 0,
    reference: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """Generate a picture for every scene's caption and compare it with the scene.

    captions: one per scene, by default drawn from the grammar with ``seed``. reference: features of
        the true pictures, by default ``render_features``; pass them to score several pipelines on
        the same scenes. progress: called with each batch's number of images.

    Returns ``accuracy`` of every attribute where it applies, their mean ``mean_accuracy``,
    ``all_right`` (share of scenes with every applicable attribute right), ``frechet`` (distance
    on probe features to renders of the same scenes), ``scenes``, ``steps``, ``guidance_scale`` and
    ``seconds`` of generation. Raises ValueError where captions and scenes differ in number.
    """
    captions = caption(scenes, seed=seed) if captions is None else list(captions)
    if len(captions) != len(scenes):
        raise ValueError(f"expected {len(scenes)} captions, received {len(captions)}")
    device = pipe.device
    found, features, seconds = [], [], 0.0
    for begin in range(0, len(scenes), batch_size):
        prompts = captions[begin : begin + batch_size]
        start = time.perf_counter()
        images = _generate(pipe, prompts, steps, guidance_scale, seed + begin)
        seconds += time.perf_counter() - start
        logits = probe(images)
        found.append(torch.stack([logits[name].argmax(1).cpu() for name in ATTRIBUTES], dim=1))
        features.append(probe.features(images))
        if progress is not None:
            progress(len(prompts))
    if reference is None:
        renderer = Renderer(images.shape[-1], device)
        reference = render_features(probe, scenes, renderer, batch_size)
    return {
        **_compare(torch.cat(found), scenes),
        "frechet": frechet_distance(torch.cat(features), reference),
        "scenes": len(scenes),
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seconds": seconds,
    }


@torch.no_grad()
def render_features(probe: Probe, scenes: Scenes, renderer: Renderer, batch_size: int) -> Tensor:
    """The probe's features ``[n, d]`` of the true pictures of the scenes."""
    parts = [scenes[begin : begin + batch_size] for begin in range(0, len(scenes), batch_size)]
    return torch.cat([probe.features(renderer(part)) for part in parts])


def _generate(
    pipe: DiffusionPipeline, prompts: list[str], steps: int, guidance_scale: float, seed: int
) -> Tensor:
    """Images float32 ``[n, 3, h, w]`` in 0..1, the same for a seed whatever the device's own."""
    images = pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="pt",
    ).images
    return images.float()


def _compare(found: Tensor, scenes: Scenes) -> dict:
    """Accuracies of classes found ``[n, attributes]`` against the scenes' truth."""
    truth = torch.stack(list(scenes.truth().values()), dim=1).cpu()
    known = truth >= 0
    right = found == truth
    shares = (right & known).sum(0) / known.sum(0)
    accuracy = {
        name: share
        for name, share, count in zip(ATTRIBUTES, shares.tolist(), known.sum(0), strict=True)
        if count
    }
    return {
        "accuracy": accuracy,
        "mean_accuracy": sum(accuracy.values()) / len(accuracy),
        "all_right": (right | ~known).all(1).float().mean().item(),
    }


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features ``[n, d]`` and ``[m, d]``.

    Raises ValueError with fewer than two rows, which have no covariance.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"expected at least 2 rows each, received {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = _matrix_root(cov_a)
    overlap = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return distance.item()


def _matrix_root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--pipeline", default=str(WEIGHTS / "pipeline"), help="folder or hub id of the pipeline")
    add("--probe", default=str(WEIGHTS / "probe"), help="folder of the probe")
    add("--gspn2", help="folder or hub id of GSPN-2 weights to score, too")
    add("--scenes", type=int, default=1024)
    add("--steps", type=int, default=50)
    add("--guidance_scale", type=float, default=4.0)
    add("--batch_size", type=int, default=256)
    add("--seed", type=int, default=0)
    add("--device", help="default: the first of cuda, mps and cpu that is there")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    add("--mixed_precision", choices=("no", "bf16"), default="no", help="bf16: autocast, faster")
    add("--report", action="store_true", help="add the attention report and the mean ablation")
    add("--output", type=Path, help="JSON file of the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, dict]:
    """Score the pipeline, optionally its mean ablation and its GSPN-2 version; returns all."""
    args = parse_args(argv)
    pipe = load_pipeline(args.pipeline, dtype=args.dtype, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    probe = Probe.from_pretrained(args.probe).to(pipe.device).eval()
    scenes = held_out_scenes(args.scenes, args.seed)
    renderer = Renderer(pipe.vae.config.sample_size, pipe.device)
    reference = render_features(probe, scenes, renderer, args.batch_size)

    def measure() -> dict:
        with torch.autocast(pipe.device.type, torch.bfloat16, args.mixed_precision == "bf16"):
            return score(
                pipe, probe, scenes, steps=args.steps, guidance_scale=args.guidance_scale,
                batch_size=args.batch_size, seed=args.seed, reference=reference,
            )  # fmt: skip

    results = {"softmax": measure()}
    if args.report:
        prompts = caption(scenes[:_REPORT_PROMPTS], seed=args.seed)
        results["attention"] = attention_report(pipe, prompts, guidance_scale=args.guidance_scale)
        with mean_ablation(pipe.unet):
            results["mean ablation"] = measure()
    if args.gspn2 is not None:
        apply_gspn2(pipe, args.gspn2)
        results["gspn2"] = measure()
    print(json.dumps(results, indent=2))
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
