"""Train the text encoder and the UNet from scratch on captioned scenes, and save the pipeline.

accelerate launch -m gspn2_diffusers.tiny_scenes.train_pipeline --minutes 18
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from gspn2_diffusers.pipelines.loading import load_pipeline

from .captions import GALLERY
from .data import Renderer, held_out_scenes, tokenize
from .models import (
    WEIGHTS,
    assemble_pipeline,
    build_scheduler,
    build_text_encoder,
    build_unet,
    save_half,
)
from .probe import Probe
from .scenes import Scenes
from .score import render_features, score
from .tokenizer import build_tokenizer
from .training import (
    Trainer,
    compile_in_place,
    make_accelerator,
    make_renderer,
    save_sheet,
    start_feeder,
    training_parser,
)

CAPTIONS_PER_SCENE = 2


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = training_parser(
        __doc__, output_dir=WEIGHTS / "pipeline_run", batch_size=512, learning_rate=8e-4
    )
    add = parser.add_argument
    add("--vae", type=Path, default=WEIGHTS / "vae_run", help="folder of the trained autoencoder")
    add("--pipeline_dir", type=Path, default=WEIGHTS / "pipeline", help="result, in float16")
    add("--pretrained_model_name_or_path", help="start from this pipeline's weights")
    add_captioned_arguments(parser)
    parser.set_defaults(
        pool_size=262144, pool_seconds=60.0, refresh_steps=8, lr_warmup_steps=500,
        dataloader_num_workers=8, eval_scenes=256,
    )  # fmt: skip
    return parser.parse_args(argv)


def add_captioned_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the scripts that train on captions and end with a score."""
    add = parser.add_argument
    add("--caption_dropout", type=float, default=0.1, help="share of examples without a caption")
    add("--probe", type=Path, default=WEIGHTS / "probe", help="folder of the trained probe")
    add("--num_inference_steps", type=int, default=50, help="steps of the closing evaluation")
    add("--guidance_scale", type=float, default=4.0, help="guidance of the closing evaluation")


class Denoiser(nn.Module):
    """Text encoder and UNet as one module, trained together."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Prediction ``[n, 4, h, w]`` from noisy latents, timesteps ``[n]`` and ids ``[n, l]``."""
        text = self.text_encoder(ids)[0]
        return self.unet(noisy, timesteps, text, return_dict=False)[0]


def main(argv: Sequence[str] | None = None) -> dict:
    """Train, save the pipeline in float16 and return its score."""
    args = parse_args(argv)
    accelerator = make_accelerator(args)
    vae = AutoencoderKL.from_pretrained(args.vae).to(accelerator.device).eval()
    vae.requires_grad_(False)
    model = build_denoiser(args)
    model.to(memory_format=torch.channels_last)
    compile_in_place(args.compile_backend, model.unet)
    trainer = Trainer(args, accelerator, model)
    renderer = make_renderer(args, accelerator.device)
    make_columns = partial(latents_with_captions, accelerator, vae, renderer)
    feeder = start_feeder(args, trainer, make_columns, captions=CAPTIONS_PER_SCENE)
    objective = Objective(build_scheduler(), args.caption_dropout, accelerator.device)

    def compute_loss() -> Tensor:
        rows = feeder.pool.draw(args.train_batch_size)
        return objective(trainer.model, rows["latents"].float(), rows["ids"].long())

    trainer.run(compute_loss, feeder.refresh)
    result = {}
    if accelerator.is_main_process:
        parts = (vae, model.text_encoder, build_tokenizer(), model.unet)
        save_half(assemble_pipeline(*parts), args.pipeline_dir)
        if args.eval_scenes:
            result = evaluate(args, renderer)
            accelerator.print(json.dumps(result, indent=2), flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def build_denoiser(args: argparse.Namespace) -> Denoiser:
    """New parts, or those of ``--pretrained_model_name_or_path`` in float32."""
    if args.pretrained_model_name_or_path is None:
        return Denoiser(build_text_encoder(build_tokenizer()), build_unet(args.resolution))
    pipeline = load_pipeline(args.pretrained_model_name_or_path, dtype="float32", device="cpu")
    return Denoiser(pipeline.text_encoder.train(), pipeline.unet.train())


@torch.no_grad()
def latents_with_captions(
    accelerator: Accelerator, vae: AutoencoderKL, renderer: Renderer, scenes: Scenes, ids: Tensor
) -> dict[str, Tensor]:
    """Columns ``latents [n, 4, h/8, w/8]`` (float16), scaled, drawn from the posterior; ``ids``."""
    images = (renderer(scenes) * 2 - 1).contiguous(memory_format=torch.channels_last)
    with accelerator.autocast():
        latents = vae.encode(images).latent_dist.sample()
    return {"latents": (latents * vae.config.scaling_factor).to(torch.float16), "ids": ids}


class NoisyBatch(NamedTuple):
    """What a denoiser is asked, and its answer."""

    noisy: Tensor
    """Latents ``[n, 4, h, w]`` with noise."""
    timesteps: Tensor
    """``[n]``."""
    ids: Tensor
    """Token ids ``[n, length]`` of one caption each."""
    velocity: Tensor
    """The answer, ``[n, 4, h, w]``."""


class Objective:
    """Mean squared error of the predicted velocity, in float32.

    Timesteps are drawn evenly spread over the batch, which steadies the loss. A share of the
    captions is replaced by the empty one, for classifier-free guidance.
    """

    def __init__(self, scheduler: DDIMScheduler, dropout: float, device: torch.device) -> None:
        self.scheduler = scheduler
        self.dropout = dropout
        self.empty = tokenize([""]).to(device)

    def __call__(self, model: nn.Module, latents: Tensor, ids: Tensor) -> Tensor:
        """Loss of scaled latents ``[n, 4, h, w]`` with token ids ``[n, captions, length]``."""
        batch = self.draw(latents, ids)
        prediction = model(batch.noisy, batch.timesteps, batch.ids)
        return F.mse_loss(prediction.float(), batch.velocity)

    def draw(self, latents: Tensor, ids: Tensor) -> NoisyBatch:
        """Noise, timestep and caption for every one of these latents."""
        n, device = len(latents), latents.device
        rows = torch.arange(n, device=device)
        told = ids[rows, torch.randint(ids.shape[1], (n,), device=device)]
        told = torch.where(torch.rand(n, 1, device=device) < self.dropout, self.empty, told)
        levels = (rows + torch.rand(n, device=device)) / n
        timesteps = (levels * self.scheduler.config.num_train_timesteps).long()
        noise = torch.randn_like(latents)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        return NoisyBatch(
            noisy, timesteps, told, self.scheduler.get_velocity(latents, noise, timesteps)
        )


def evaluate(args: argparse.Namespace, renderer: Renderer) -> dict:
    """Score of the saved pipeline on held-out scenes, in float32; also writes ``samples.png``."""
    pipeline = load_pipeline(args.pipeline_dir, dtype="float32", device=renderer.device)
    pipeline.set_progress_bar_config(disable=True)
    samples = pipeline(
        [text for text, _ in GALLERY],
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(args.seed),
        output_type="pt",
    ).images
    save_sheet(samples, args.output_dir / "samples.png", columns=4)
    probe = Probe.from_pretrained(args.probe).to(renderer.device).eval()
    scenes = held_out_scenes(args.eval_scenes, args.seed)
    return score(
        pipeline,
        probe,
        scenes,
        steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        batch_size=args.pool_batch_size,
        reference=render_features(probe, scenes, renderer, args.pool_batch_size),
    )


if __name__ == "__main__":
    main()
