"""Train a text encoder and a denoiser from scratch on captioned scenes, and save the pipeline.

accelerate launch -m gspn2_diffusers.tiny_scenes.train_pipeline --minutes 18
accelerate launch -m gspn2_diffusers.tiny_scenes.train_pipeline --denoiser pixart --minutes 18
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    ModelMixin,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.pipelines.loading import load_pipeline

from .captions import GALLERY
from .data import Renderer, tokenize
from .models import (
    WEIGHTS,
    assemble_pipeline,
    assemble_pixart_pipeline,
    build_pixart,
    build_scheduler,
    build_t5_encoder,
    build_text_encoder,
    build_unet,
    save_half,
)
from .scenes import Scenes
from .score import generate, prepare_exam, score
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
    add("--denoiser", choices=DENOISERS, default="unet", help="architecture of the pipeline")
    add("--vae", type=Path, default=WEIGHTS / "vae_run", help="folder of the trained autoencoder")
    add("--pipeline_dir", type=Path, default=WEIGHTS / "pipeline", help="result, in float16")
    add("--pretrained_model_name_or_path", help="start from this pipeline's weights")
    add("--caption_dropout", type=float, default=0.1, help="share of examples without a caption")
    add("--probe", type=Path, default=WEIGHTS / "probe", help="folder of the trained probe")
    add("--num_inference_steps", type=int, default=50, help="steps of the closing evaluation")
    add("--guidance_scale", type=float, default=4.0, help="guidance of the closing evaluation")
    parser.set_defaults(
        pool_size=262144, pool_seconds=60.0, refresh_steps=8, lr_warmup_steps=500,
        dataloader_num_workers=8, eval_scenes=256,
    )  # fmt: skip
    folder = WEIGHTS / DENOISERS[parser.parse_known_args(argv)[0].denoiser].folder
    parser.set_defaults(pipeline_dir=folder, output_dir=folder.with_name(f"{folder.name}_run"))
    return parser.parse_args(argv)


class CaptionedDenoiser(nn.Module):
    """Text encoder and denoiser as one module, trained together; every kind is one subclass."""

    folder: ClassVar[str]
    """Name of the folder of the finished pipeline."""
    model_class: ClassVar[type[ModelMixin]]
    """Of the denoiser."""
    memory_format = torch.contiguous_format

    def __init__(self, text_encoder: PreTrainedModel, denoiser: ModelMixin) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.denoiser = denoiser

    @classmethod
    def build(cls, resolution: int) -> CaptionedDenoiser:
        """New models for square images of ``resolution`` pixels."""
        raise NotImplementedError

    @classmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline) -> CaptionedDenoiser:
        """The models of a pipeline; raises ValueError for one of another kind."""
        denoiser = find_denoiser(pipeline)
        if not isinstance(denoiser, cls.model_class):
            raise ValueError(
                f"expected a pipeline with a {cls.model_class.__name__}, got one with a "
                f"{type(denoiser).__name__}: see --denoiser"
            )
        return cls(pipeline.text_encoder.train(), denoiser.train())

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Prediction ``[n, 4, h, w]`` from noisy latents, timesteps ``[n]`` and ids ``[n, l]``."""
        raise NotImplementedError

    def assemble(self, vae: AutoencoderKL) -> DiffusionPipeline:
        """The pipeline of these models."""
        raise NotImplementedError


class CaptionedUNet(CaptionedDenoiser):
    """Of a Stable Diffusion pipeline; it attends to a caption's padding, too."""

    folder = "pipeline"
    model_class = UNet2DConditionModel
    memory_format = torch.channels_last

    @classmethod
    def build(cls, resolution: int) -> CaptionedUNet:
        return cls(build_text_encoder(build_tokenizer()), build_unet(resolution))

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        text = self.text_encoder(ids)[0]
        return self.denoiser(noisy, timesteps, text, return_dict=False)[0]

    def assemble(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        return assemble_pipeline(vae, self.text_encoder, build_tokenizer(), self.denoiser)


class CaptionedPixArt(CaptionedDenoiser):
    """Of a PixArt-Sigma pipeline; a caption's padding is masked."""

    folder = "pixart"
    model_class = PixArtTransformer2DModel

    @classmethod
    def build(cls, resolution: int) -> CaptionedPixArt:
        return cls(build_t5_encoder(build_tokenizer()), build_pixart(resolution))

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        mask = caption_mask(ids, self.text_encoder.config.eos_token_id)
        text = self.text_encoder(ids, attention_mask=mask)[0]
        return self.denoiser(
            noisy,
            encoder_hidden_states=text,
            timestep=timesteps,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]

    def assemble(self, vae: AutoencoderKL) -> PixArtSigmaPipeline:
        return assemble_pixart_pipeline(vae, self.text_encoder, build_tokenizer(), self.denoiser)


DENOISERS: dict[str, type[CaptionedDenoiser]] = {"unet": CaptionedUNet, "pixart": CaptionedPixArt}


def caption_mask(ids: Tensor, end: int) -> Tensor:
    """Mask ``[n, l]`` of ids: 1 up to the first end token and for it, 0 for the padding after it.

    Padding is the end token, so it cannot be told from the ids alone.
    """
    ends = (ids == end).long()
    return (ends.cumsum(1) == ends).long()


def main(argv: Sequence[str] | None = None) -> dict:
    """Train, save the pipeline in float16 and return its score."""
    args = parse_args(argv)
    accelerator = make_accelerator(args)
    vae = AutoencoderKL.from_pretrained(args.vae).to(accelerator.device).eval()
    vae.requires_grad_(False)
    model = build_denoiser(args)
    model.to(memory_format=model.memory_format)
    compile_in_place(args.compile_backend, model.denoiser)
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
        save_half(model.assemble(vae), args.pipeline_dir)
        if args.eval_scenes:
            result = evaluate(args, renderer)
            accelerator.print(json.dumps(result, indent=2), flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def build_denoiser(args: argparse.Namespace) -> CaptionedDenoiser:
    """New models, or those of ``--pretrained_model_name_or_path`` in float32."""
    kind = DENOISERS[args.denoiser]
    if args.pretrained_model_name_or_path is None:
        return kind.build(args.resolution)
    source = args.pretrained_model_name_or_path
    return kind.from_pipeline(load_pipeline(source, dtype="float32", device="cpu"))


@torch.no_grad()
def latents_with_captions(
    accelerator: Accelerator, vae: AutoencoderKL, renderer: Renderer, scenes: Scenes, ids: Tensor
) -> dict[str, Tensor]:
    """Columns ``latents [n, 4, h/8, w/8]`` (float16), scaled, drawn from the posterior; ``ids``."""
    images = (renderer(scenes) * 2 - 1).contiguous(memory_format=torch.channels_last)
    with accelerator.autocast():
        latents = vae.encode(images).latent_dist.sample()
    return {"latents": (latents * vae.config.scaling_factor).to(torch.float16), "ids": ids}


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
        n, device = len(latents), latents.device
        rows = torch.arange(n, device=device)
        told = ids[rows, torch.randint(ids.shape[1], (n,), device=device)]
        told = torch.where(torch.rand(n, 1, device=device) < self.dropout, self.empty, told)
        levels = (rows + torch.rand(n, device=device)) / n
        timesteps = (levels * self.scheduler.config.num_train_timesteps).long()
        noise = torch.randn_like(latents)
        prediction = model(self.scheduler.add_noise(latents, noise, timesteps), timesteps, told)
        velocity = self.scheduler.get_velocity(latents, noise, timesteps)
        return F.mse_loss(prediction.float(), velocity)


def evaluate(args: argparse.Namespace, renderer: Renderer) -> dict:
    """Score of the saved pipeline on held-out scenes, in float32; also writes ``samples.png``."""
    pipeline = load_pipeline(args.pipeline_dir, dtype="float32", device=renderer.device)
    pipeline.set_progress_bar_config(disable=True)
    options = {"steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    samples = generate(pipeline, [text for text, _ in GALLERY], seed=args.seed, **options)
    save_sheet(samples, args.output_dir / "samples.png", columns=4)
    exam = prepare_exam(
        renderer.device, args.eval_scenes, args.seed, batch_size=args.pool_batch_size,
        renderer=renderer, probe=args.probe,
    )  # fmt: skip
    return score(pipeline, exam, batch_size=args.pool_batch_size, **options)


if __name__ == "__main__":
    main()
