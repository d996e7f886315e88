"""Train the attribute probe on renders.

python -m gspn2_diffusers.tiny_scenes.train_probe --minutes 1.25
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Renderer, held_out_scenes, to_bytes
from .models import WEIGHTS
from .probe import Probe, probe_loss
from .scenes import ATTRIBUTES, Scenes
from .training import (
    Trainer,
    compile_in_place,
    make_accelerator,
    make_renderer,
    print_table,
    start_feeder,
    training_parser,
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = training_parser(
        __doc__, output_dir=WEIGHTS / "probe", batch_size=256, learning_rate=1.5e-3
    )
    parser.set_defaults(ema_decay=0.995, eval_scenes=4096)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, save and return the accuracy of every attribute on held-out renders."""
    args = parse_args(argv)
    accelerator = make_accelerator(args)
    probe = Probe(image_size=args.resolution)
    probe.to(memory_format=torch.channels_last)
    compile_in_place(args.compile_backend, probe.trunk, probe.reader)
    trainer = Trainer(args, accelerator, probe)
    renderer = make_renderer(args, accelerator.device)
    feeder = start_feeder(args, trainer, lambda scenes, ids: renders_with_truth(renderer, scenes))

    def compute_loss() -> Tensor:
        rows = feeder.pool.draw(args.train_batch_size)
        truth = dict(zip(ATTRIBUTES, rows["truth"].unbind(1), strict=True))
        return probe_loss(trainer.model(augment(rows["images"] / 255)), truth)

    trainer.run(compute_loss, feeder.refresh)
    accuracy = {}
    if accelerator.is_main_process:
        probe.half().save_pretrained(args.output_dir)
        saved = Probe.from_pretrained(args.output_dir).to(accelerator.device).eval()
        scenes = held_out_scenes(args.eval_scenes, args.seed)
        accuracy = measure_accuracy(saved, renderer, scenes, args.pool_batch_size)
        print_table("probe accuracy on held-out renders", accuracy)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return accuracy


def renders_with_truth(renderer: Renderer, scenes: Scenes) -> dict[str, Tensor]:
    """Columns ``images [n, 3, h, w]`` (uint8) and ``truth [n, attributes]``."""
    truth = torch.stack(list(scenes.truth().values()), dim=1)
    return {"images": to_bytes(renderer(scenes)), "truth": truth}


def augment(images: Tensor) -> Tensor:
    """Soften, grain and relight each image by a random amount, as generated images may be."""

    def amount(low: float, high: float) -> Tensor:
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(low, high)

    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2.0, mode="bilinear")
    images = torch.lerp(images, blurred, amount(0, 1))
    images = torch.lerp(images, coarse, amount(-1, 1).clamp(min=0))
    images = images * amount(0.93, 1.07) + amount(-0.03, 0.03)
    return images + torch.randn_like(images) * amount(0, 0.04)


@torch.no_grad()
def measure_accuracy(
    probe: Probe, renderer: Renderer, scenes: Scenes, batch_size: int
) -> dict[str, float]:
    """Accuracy of every attribute on renders of the scenes to which it applies."""
    found = []
    for begin in range(0, len(scenes), batch_size):
        logits = probe(renderer(scenes[begin : begin + batch_size]))
        found.append(torch.stack([logits[name].argmax(1).cpu() for name in ATTRIBUTES], dim=1))
    truth = torch.stack(list(scenes.truth().values()), dim=1)
    known = truth >= 0
    right = ((torch.cat(found) == truth) & known).sum(0) / known.sum(0).clamp(min=1)
    return dict(zip(ATTRIBUTES, right.tolist(), strict=True))


if __name__ == "__main__":
    main()
