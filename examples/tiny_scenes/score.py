"""Scores of a pipeline on Tiny Scenes: does the picture show what the caption says?

python -m gspn2_diffusers.tiny_scenes.score --pipeline weights/pipeline --scenes 1024
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from gspn2_diffusers import GSPN2Adapter, apply_gspn2, remove_gspn2
from gspn2_diffusers.evaluation import name_weights
from gspn2_diffusers.pipelines.generation import literal_options
from gspn2_diffusers.pipelines.loading import load_pipeline

from .attention_report import attention_report, mean_ablation
from .captions import caption
from .data import Renderer, held_out_scenes
from .models import WEIGHTS
from .probe import Probe
from .scenes import ATTRIBUTES, Scenes

Progress = Callable[[str, int, int], None]

_REPORT_PROMPTS = 16


@dataclass(frozen=True)
class Exam:
    """What pictures are drawn of, and what it takes to judge them; the same for every pipeline.

    Raises ValueError where captions and scenes differ in number.
    """

    probe: Probe
    scenes: Scenes
    captions: list[str]
    """One for each scene."""
    reference: Tensor
    """The probe's features ``[n, d]`` of renders of the scenes."""
    seed: int = 0
    """Of the noise that the pictures start from."""

    def __post_init__(self) -> None:
        if len(self.captions) != len(self.scenes):
            raise ValueError(f"expected {len(self.scenes)} captions, got {len(self.captions)}")


def prepare_exam(
    device: torch.device,
    scenes: int,
    seed: int,
    *,
    resolution: int = 256,
    batch_size: int = 64,
    renderer: Renderer | None = None,
    probe: str | Path = WEIGHTS / "probe",
) -> Exam:
    """Held-out scenes with captions, and the probe's features of their renders, on a device.

    resolution: side of the renders in pixels, whatever the size of the pictures to be judged: the
        probe resizes both. batch_size: scenes rendered at once. renderer: another one than
        ``Renderer(resolution, device)``, such as a compiled one. probe: its folder.
    """
    reader = Probe.from_pretrained(probe).to(device).eval()
    drawn = held_out_scenes(scenes, seed)
    renderer = Renderer(resolution, device) if renderer is None else renderer
    reference = render_features(reader, drawn, renderer, batch_size)
    return Exam(reader, drawn, caption(drawn, seed=seed), reference, seed)


@torch.no_grad()
def render_features(probe: Probe, scenes: Scenes, renderer: Renderer, batch_size: int) -> Tensor:
    """The probe's features ``[n, d]`` of the true pictures of the scenes."""
    parts = [scenes[begin : begin + batch_size] for begin in range(0, len(scenes), batch_size)]
    return torch.cat([probe.features(renderer(part)) for part in parts])


def score_weights(
    pipe: DiffusionPipeline,
    exam: Exam,
    weights: Mapping[str, str | os.PathLike | GSPN2Adapter],
    *,
    ablation: bool = False,
    backend: str = "auto",
    steps: int = 50,
    guidance_scale: float = 4.0,
    batch_size: int = 64,
    height: int | None = None,
    width: int | None = None,
    progress: Progress | None = None,
) -> dict[str, dict]:
    """What `score` says of the pipeline with softmax attention and with each of the weights.

    weights: GSPN-2 weights by the name that their score gets. ablation: score the mean ablation of
        softmax attention, too. backend: of the GSPN-2 scan, see `apply_gspn2`. progress: called
        with (what is being scored, done, expected), in scenes. The rest is that of `score`.

    Returns the scores as ``"softmax"``, ``"mean ablation"`` and by the names of the weights. The
    pipeline is left with softmax attention. Raises ValueError for an unsupported pipeline, for
    weights that do not fit and for those that go by the name of another score.
    """
    taken = weights.keys() & {"softmax", "mean ablation"}
    if taken:
        raise ValueError(f"expected other names for weights, got {', '.join(sorted(taken))}")

    def measure(name: str) -> dict:
        return score(
            pipe, exam, steps=steps, guidance_scale=guidance_scale, batch_size=batch_size,
            height=height, width=width, progress=count_images(name, exam, progress),
        )  # fmt: skip

    remove_gspn2(pipe)
    results = {"softmax": measure("softmax")}
    if ablation:
        with mean_ablation(pipe):
            results["mean ablation"] = measure("mean ablation")
    try:
        for name, trained in weights.items():
            apply_gspn2(pipe, trained, backend=backend)
            results[name] = measure(name)
    finally:
        remove_gspn2(pipe)
    return results


def count_images(name: str, exam: Exam, progress: Progress | None) -> Callable[[int], None] | None:
    """The ``progress`` of `score` that calls another one with (name, done, expected)."""
    if progress is None:
        return None
    done = 0

    def count(images: int) -> None:
        nonlocal done
        done += images
        progress(name, done, len(exam.scenes))

    return count


@torch.no_grad()
def score(
    pipe: DiffusionPipeline,
    exam: Exam,
    *,
    steps: int = 50,
    guidance_scale: float = 4.0,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    height: int | None = None,
    width: int | None = None,
) -> dict:
    """Generate a picture for every caption of the exam and compare it with the scene.

    progress: called with each batch's number of images. height, width: of the pictures in pixels,
        by default the pipeline's own.

    Returns ``accuracy`` of every attribute where it applies, their mean ``mean_accuracy``,
    ``all_right`` (share of scenes with every applicable attribute right), ``frechet`` (distance
    on probe features to renders of the same scenes), ``scenes``, ``steps``, ``guidance_scale`` and
    ``seconds`` of generation.
    """
    found, features, seconds = [], [], 0.0
    for begin in range(0, len(exam.scenes), batch_size):
        prompts = exam.captions[begin : begin + batch_size]
        start = time.perf_counter()
        images = generate(
            pipe, prompts, steps=steps, guidance_scale=guidance_scale, seed=exam.seed + begin,
            height=height, width=width,
        )  # fmt: skip
        seconds += time.perf_counter() - start
        logits = exam.probe(images)
        found.append(torch.stack([logits[name].argmax(1).cpu() for name in ATTRIBUTES], dim=1))
        features.append(exam.probe.features(images))
        if progress is not None:
            progress(len(prompts))
    return {
        **_compare(torch.cat(found), exam.scenes),
        "frechet": frechet_distance(torch.cat(features), exam.reference),
        "scenes": len(exam.scenes),
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seconds": seconds,
    }


def generate(
    pipe: DiffusionPipeline,
    prompts: list[str],
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    """Images float32 ``[n, 3, h, w]`` in 0..1, the same for a seed whatever the device's own."""
    images = pipe(
        prompts,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="pt",
        **literal_options(pipe),
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
        raise ValueError(f"expected at least 2 rows each, got {len(a)} and {len(b)}")
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
    add("--gspn2", action="append", default=[], help="GSPN-2 weights to score, too; repeatable")
    add("--scenes", type=int, default=1024)
    add("--steps", type=int, default=50)
    add("--guidance_scale", type=float, default=4.0)
    add("--batch_size", type=int, default=256)
    add("--height", type=int, help="of the pictures; default: the pipeline's own")
    add("--width", type=int, help="of the pictures; default: the pipeline's own")
    add("--seed", type=int, default=0)
    add("--device", help="default: the first of cuda, mps and cpu that is there")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    add("--mixed_precision", choices=("no", "bf16"), default="no", help="bf16: autocast, faster")
    add("--report", action="store_true", help="add the attention report and the mean ablation")
    add("--output", type=Path, help="JSON file of the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, dict]:
    """Score the pipeline, optionally its mean ablation and its GSPN-2 versions; returns all."""
    args = parse_args(argv)
    pipe = load_pipeline(args.pipeline, dtype=args.dtype, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    exam = prepare_exam(
        pipe.device, args.scenes, args.seed, batch_size=args.batch_size, probe=args.probe
    )
    with torch.autocast(pipe.device.type, torch.bfloat16, args.mixed_precision == "bf16"):
        results = score_weights(
            pipe, exam, name_weights(args.gspn2), ablation=args.report, steps=args.steps,
            guidance_scale=args.guidance_scale, batch_size=args.batch_size,
            height=args.height, width=args.width,
        )  # fmt: skip
    if args.report:
        prompts = exam.captions[:_REPORT_PROMPTS]
        results["attention"] = attention_report(pipe, prompts, guidance_scale=args.guidance_scale)
    print(json.dumps(results, indent=2))
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
