"""Train the autoencoder on renders, with the probe's features as perceptual loss.

python -m gspn2_diffusers.tiny_scenes.train_vae --minutes 3.3
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from .data import held_out_scenes, to_bytes
from .models import WEIGHTS, build_vae
from .probe import Probe, perceptual_distance
from .training import (
    Trainer,
    compile_in_place,
    make_accelerator,
    make_renderer,
    print_table,
    save_sheet,
    start_feeder,
    training_parser,
)

SHEET_IMAGES = 8


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = training_parser(
        __doc__, output_dir=WEIGHTS / "vae_run", batch_size=32, learning_rate=1e-3
    )
    add = parser.add_argument
    add("--probe", type=Path, default=WEIGHTS / "probe", help="folder of the trained probe")
    add("--kl_weight", type=float, default=1e-6, help="weight of the KL term per image")
    add("--gradient_weight", type=float, default=1.0)
    add("--perceptual_weight", type=float, default=0.2)
    parser.set_defaults(refresh_steps=8, pool_size=32768, pool_seconds=12.0, ema_decay=0.995)
    return parser.parse_args(argv)


class Autoencoding(nn.Module):
    """Encode, sample and decode images ``[n, 3, h, w]`` in -1..1."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions ``[n, 3, h, w]`` and the KL divergence ``[n]`` in nats."""
        moments = self.vae.quant_conv(self.vae.encoder(images))
        posterior = DiagonalGaussianDistribution(moments.float())
        decoded = self.vae.decoder(self.vae.post_quant_conv(posterior.sample()))
        return decoded, posterior.kl()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, save in float32 and return the figures of held-out reconstructions."""
    args = parse_args(argv)
    accelerator = make_accelerator(args)
    vae = build_vae(args.resolution)
    vae.to(memory_format=torch.channels_last)
    probe = Probe.from_pretrained(args.probe).to(accelerator.device).eval().requires_grad_(False)
    compile_in_place(args.compile_backend, vae.encoder, vae.decoder, probe.trunk)
    trainer = Trainer(args, accelerator, Autoencoding(vae))
    renderer = make_renderer(args, accelerator.device)
    feeder = start_feeder(args, trainer, lambda scenes, _: {"images": to_bytes(renderer(scenes))})

    def compute_loss() -> Tensor:
        images = feeder.pool.draw(args.train_batch_size)["images"] / 127.5 - 1
        decoded, kl = trainer.model(images.contiguous(memory_format=torch.channels_last))
        with accelerator.autocast():
            perceptual = perceptual_distance(probe, decoded / 2 + 0.5, images / 2 + 0.5)
        return (
            F.l1_loss(decoded, images)
            + args.gradient_weight * gradient_distance(decoded, images)
            + args.perceptual_weight * perceptual
            + args.kl_weight * kl.mean()
        )

    trainer.run(compute_loss, feeder.refresh)
    figures = {}
    if accelerator.is_main_process:
        vae.save_pretrained(args.output_dir)
        saved = AutoencoderKL.from_pretrained(args.output_dir).to(accelerator.device).eval()
        images = renderer(held_out_scenes(args.eval_scenes, args.seed))
        set_scaling_factor(saved, images, args.train_batch_size)
        saved.save_pretrained(args.output_dir)
        figures = report(saved, images, args)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return figures


def gradient_distance(a: Tensor, b: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute difference of neighbouring pixels' steps, over halved resolutions."""
    total = a.new_zeros(())
    for _ in range(scales):
        error = a - b
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return total / scales


@torch.no_grad()
def set_scaling_factor(vae: AutoencoderKL, images: Tensor, batch_size: int) -> None:
    """Write 1 / standard deviation of the latents of images in 0..1 into the VAE's config."""
    latents = [vae.encode(part * 2 - 1).latent_dist.mode() for part in images.split(batch_size)]
    vae.register_to_config(scaling_factor=1 / torch.cat(latents).std().item())


@torch.no_grad()
def report(vae: AutoencoderKL, images: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Print PSNR and the probe's agreement, and write a sheet of originals over reconstructions."""
    decoded = torch.cat([
        vae(part * 2 - 1).sample / 2 + 0.5 for part in images.split(args.train_batch_size)
    ]).clamp(0, 1)  # fmt: skip
    psnr = -10 * (decoded - images).square().mean((1, 2, 3)).log10().mean().item()
    probe = Probe.from_pretrained(args.probe).to(images.device).eval()
    before, after = probe(images), probe(decoded)
    agreement = {
        name: (before[name].argmax(1) == after[name].argmax(1)).float().mean().item()
        for name in before
    }
    print(f"PSNR {psnr:.2f} dB, scaling factor {vae.config.scaling_factor:.4f}")
    print_table("probe agrees on original and reconstruction", agreement)
    sheet = torch.cat((images[:SHEET_IMAGES], decoded[:SHEET_IMAGES]))
    save_sheet(sheet, args.output_dir / "reconstructions.png", columns=len(sheet) // 2)
    return {"psnr": psnr, **agreement}


if __name__ == "__main__":
    main()
