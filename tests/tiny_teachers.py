"""Small teachers with attention worth learning, and batches and pictures for them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline
from PIL import Image
from tiny_models import (
    TEXT_WIDTH,
    tiny_dit,
    tiny_pixart_pipeline,
    tiny_sd_pipeline,
    tiny_sdxl_pipeline,
    tiny_tokenizer,
    tiny_vae,
)
from transformers import T5Config, T5EncoderModel

from gspn2_diffusers import GSPN2Adapter, GSPN2Config, apply_gspn2
from gspn2_diffusers.distillation.batches import Batch
from gspn2_diffusers.families import find_denoiser

CONFIG = GSPN2Config(proxy_ratio=4, parameters_from="tokens")
FAMILIES = ("sd", "sdxl", "pixart", "dit")


def teacher_pipeline(family: str = "sd") -> DiffusionPipeline:
    """A pipeline of random weights, frozen, whose attention is far from uniform."""
    if family == "dit":
        torch.manual_seed(0)
        labels = {3: "a cat, a small one", 4: "dog"}
        pipe = DiTPipeline(tiny_dit(), tiny_vae(), DDIMScheduler(clip_sample=False), labels)
    else:
        make = {"sd": tiny_sd_pipeline, "sdxl": tiny_sdxl_pipeline, "pixart": tiny_pixart_pipeline}
        pipe = make[family]()
    for name, parameter in find_denoiser(pipe).named_parameters():
        parameter.requires_grad_(False)
        if "attn1.to_q" in name:
            parameter.mul_(30)  # random attention is nearly uniform, which new blocks already are
    return pipe


def patched_pipeline(family: str = "sd") -> tuple[DiffusionPipeline, GSPN2Adapter]:
    """The same with fresh blocks, which are all that requires gradients."""
    pipe = teacher_pipeline(family)
    adapter = GSPN2Adapter.for_model(pipe, CONFIG)
    apply_gspn2(pipe, adapter)
    adapter.requires_grad_(True)
    return pipe, adapter


def with_text_encoder(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A PixArt pipeline with a small T5 encoder and the other pipelines' tokenizer."""
    tokenizer = tiny_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    pipe.register_modules(tokenizer=tokenizer, text_encoder=T5EncoderModel(config).eval())
    return pipe


def random_batch(family: str = "sd", n: int = 4, size: int = 8, seed: int = 0) -> Batch:
    """Latents of noise with conditions of noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if family == "dit":
        rows, nothing = {"class_labels": torch.arange(n)}, {"class_labels": torch.full((n,), 10)}
    else:
        width = 2 * TEXT_WIDTH if family == "sdxl" else TEXT_WIDTH
        rows = {"prompt_embeds": draw(n, 6, width)}
        if family == "sdxl":
            rows["pooled_embeds"] = draw(n, TEXT_WIDTH)
        if family == "pixart":
            rows["prompt_mask"] = torch.ones(n, 6, dtype=torch.long)
        nothing = {name: torch.zeros_like(column) for name, column in rows.items()}
        if family == "pixart":
            nothing["prompt_mask"][:, 0] = 1
    sizes = torch.tensor([[4 * size, 4 * size, 0, 0, 4 * size, 4 * size]]).expand(n, 6)
    rows, nothing = rows | {"sizes": sizes}, nothing | {"sizes": sizes}
    quantiles = (torch.arange(n) + 0.5) / n
    return Batch(draw(n, 4, size, size), draw(n, 4, size, size), quantiles, rows, nothing)


def picture_folder(folder: Path, count: int = 12) -> Path:
    """Gradients of 40 x 36 pixels with captions in a ``metadata.jsonl``."""
    folder.mkdir()
    lines = []
    for index in range(count):
        ramp = torch.linspace(0, 255, 40)[:, None] * torch.linspace(0.2, 1, 36)
        pixels = torch.stack((ramp, ramp.flip(0), torch.full_like(ramp, 20.0 * index)), dim=-1)
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{index:02d}.png")
        lines.append(json.dumps({"file_name": f"{index:02d}.png", "text": f"picture {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder
