"""Distil the pipeline's self-attention into GSPN-2 blocks, and save them as a sidecar.

Teacher forcing first: every block learns its layer's output from its layer's input, all of them
from one pass of the teacher. Then end to end: the student's prediction follows the teacher's. Only
the blocks are trained.

accelerate launch -m gspn2_diffusers.tiny_scenes.distill --minutes 4
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from gspn2_diffusers import (
    GSPN2Adapter,
    GSPN2Config,
    apply_gspn2,
    gspn2_sites,
    softmax_attention,
)
from gspn2_diffusers.pipelines.loading import load_pipeline

from .data import Renderer, held_out_scenes
from .models import WEIGHTS, build_scheduler
from .probe import Probe
from .score import render_features, score
from .train_pipeline import (
    CAPTIONS_PER_SCENE,
    Objective,
    add_captioned_arguments,
    latents_with_captions,
)
from .training import (
    Trainer,
    compile_in_place,
    make_accelerator,
    make_renderer,
    start_feeder,
    training_parser,
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = training_parser(
        __doc__, output_dir=WEIGHTS / "distill_run", batch_size=256, learning_rate=2e-3
    )
    add = parser.add_argument
    add("--pipeline", type=Path, default=WEIGHTS / "pipeline", help="folder of the teacher")
    add("--gspn2_dir", type=Path, default=WEIGHTS / "gspn2", help="result, in float16")
    add("--teacher_forcing", type=float, default=0.35, help="share of the run, in 0..1")
    add("--proxy_ratio", type=int, default=4, help="channels per proxy channel")
    add("--parameters_from", choices=("proxy", "tokens"), default="tokens")
    add_captioned_arguments(parser)
    parser.set_defaults(
        pool_size=65536, pool_seconds=20.0, refresh_steps=8, dataloader_num_workers=8,
        ema_decay=0.995, adam_weight_decay=0.0,
    )  # fmt: skip
    return parser.parse_args(argv)


class Distillation(nn.Module):
    """Teacher and student on the same noisy latents; gives the loss of either stage.

    student: a patched copy of the teacher, in which only the blocks require gradients.
    """

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        teacher: UNet2DConditionModel,
        student: UNet2DConditionModel,
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.teacher = teacher
        self.student = student
        self.layers = [site.name for site in gspn2_sites(student) if site.patched]

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor, forced: bool) -> Tensor:
        """Loss of noisy latents, timesteps ``[n]`` and ids ``[n, l]``, with or without forcing."""
        with torch.no_grad():
            text = self.text_encoder(ids)[0]
        inputs = (noisy, timesteps, text)
        return self._layer_loss(inputs) if forced else self._output_loss(inputs)

    def _layer_loss(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Mean over the layers of squared error / variance, on the teacher's own inputs."""
        with torch.no_grad(), softmax_attention(self.student):
            with _observe(self.student, self.layers) as seen:
                self.student.forward(*inputs)  # a compiled call would not see the hooks
        errors = []
        for name, (tokens, target) in seen.items():
            mixed = self.student.get_submodule(name).gspn2(tokens).float()
            target = target.float()
            errors.append(F.mse_loss(mixed, target) / target.var().clamp(min=1e-8))
        return torch.stack(errors).mean()

    def _output_loss(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Mean squared error between the predictions."""
        with torch.no_grad():
            target = self.teacher(*inputs, return_dict=False)[0]
        return F.mse_loss(self.student(*inputs, return_dict=False)[0].float(), target.float())


@contextmanager
def _observe(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """While open, a pass through `model` leaves (input, output) of the named layers."""
    seen = {}

    def keep(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = (inputs[0], output)

    layers = {name: model.get_submodule(name) for name in names}
    handles = [layer.register_forward_hook(partial(keep, name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def main(argv: Sequence[str] | None = None) -> dict:
    """Distil, save the blocks in float16 and return the scores of teacher and student."""
    args = parse_args(argv)
    accelerator = make_accelerator(args)
    pipe = load_pipeline(args.pipeline, dtype="float32", device=accelerator.device)
    student, adapter = make_student(pipe.unet, args)
    model = Distillation(pipe.text_encoder, pipe.unet.requires_grad_(False), student)
    model.text_encoder.requires_grad_(False)
    compile_in_place(args.compile_backend, model.teacher, model.student)
    trainer = Trainer(args, accelerator, model)
    renderer = make_renderer(args, accelerator.device)
    make_columns = partial(latents_with_captions, accelerator, pipe.vae, renderer)
    feeder = start_feeder(args, trainer, make_columns, captions=CAPTIONS_PER_SCENE)
    objective = Objective(build_scheduler(), args.caption_dropout, accelerator.device)

    def compute_loss() -> Tensor:
        rows = feeder.pool.draw(args.train_batch_size)
        batch = objective.draw(rows["latents"].float(), rows["ids"].long())
        forced = trainer.clock.progress < args.teacher_forcing
        return trainer.model(batch.noisy, batch.timesteps, batch.ids, forced)

    trainer.run(compute_loss, feeder.refresh)
    result = {}
    if accelerator.is_main_process:
        adapter.half().save_pretrained(args.gspn2_dir)
        if args.eval_scenes:
            result = evaluate(args, renderer)
            accelerator.print(json.dumps(result, indent=2), flush=True)
    accelerator.end_training()
    return result


def make_student(
    teacher: UNet2DConditionModel, args: argparse.Namespace
) -> tuple[UNet2DConditionModel, GSPN2Adapter]:
    """A copy of the teacher with fresh blocks, the only part of it that trains."""
    config = GSPN2Config(proxy_ratio=args.proxy_ratio, parameters_from=args.parameters_from)
    student = copy.deepcopy(teacher).requires_grad_(False)
    adapter = GSPN2Adapter.for_model(student, config)
    return apply_gspn2(student, adapter), adapter


def evaluate(args: argparse.Namespace, renderer: Renderer) -> dict[str, dict]:
    """Scores of the saved pipeline without and with the saved blocks, on held-out scenes."""
    pipe = load_pipeline(args.pipeline, dtype="float32", device=renderer.device)
    pipe.set_progress_bar_config(disable=True)
    probe = Probe.from_pretrained(args.probe).to(renderer.device).eval()
    scenes = held_out_scenes(args.eval_scenes, args.seed)
    reference = render_features(probe, scenes, renderer, args.pool_batch_size)

    def measure() -> dict:
        return score(
            pipe, probe, scenes, steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale, batch_size=args.pool_batch_size,
            reference=reference,
        )  # fmt: skip

    teacher = measure()
    apply_gspn2(pipe, args.gspn2_dir)
    return {"softmax": teacher, "gspn2": measure()}


if __name__ == "__main__":
    main()
