"""What the trainer asks of a teacher's pipeline: latents, prompt embeddings, denoiser inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
)
from torch import Tensor, nn

from ..families import find_denoiser
from ..pipelines.generation import seeded
from ..sites import pixels_per_latent

_SAMPLED_VALUES = 64

Rows = dict[str, Tensor]


class TeacherEncoder:
    """Makes the rows of a latent cache with the parts of a pipeline.

    Args:
        pipe: a text-to-image pipeline, or one of classes (DiT), whose captions are class labels or
            class numbers.
        steps, guidance_scale: of the images that the teacher generates itself; None leaves them
            to the pipeline.

    Raises:
        TypeError, ValueError: no supported model in the pipeline, or it has no VAE.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ):
        self.pipe = pipe
        self.denoiser = find_denoiser(pipe)
        if getattr(pipe, "vae", None) is None:
            raise ValueError(f"expected a pipeline with a VAE, got a {type(pipe).__name__} without")
        self._options = {"num_inference_steps": steps, "guidance_scale": guidance_scale}

    @property
    def device(self) -> torch.device:
        return self.pipe.vae.device

    def describe(self) -> dict:
        """Identity of all that rows depend on: configurations and samples of the weights."""
        parts = [
            (name, part)
            for name, part in sorted(self.pipe.components.items())
            if isinstance(part, nn.Module) and part is not self.denoiser
        ]
        return {name: fingerprint(part) for name, part in parts}

    def describe_generation(self) -> dict:
        """Identity of all that generated latents depend on besides `describe`."""
        return {"denoiser": fingerprint(self.denoiser), **self._options}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents ``[n, c, h/8, w/8]``, scaled as the denoiser knows them, of uint8 images
        ``[n, 3, h, w]``: the means of the VAE's posteriors."""
        vae = self.pipe.vae
        with _safe_dtype(vae):
            pixels = images.to(vae.device).to(vae.dtype) / 127.5 - 1
            latents = vae.encode(pixels).latent_dist.mode()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * vae.config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, captions: Sequence[str]) -> Rows:
        """What the denoiser is told of these captions, columns of first dimension n."""
        return _encoder_of(self.denoiser)(self.pipe, list(captions))

    def encode_unconditional(self) -> Rows:
        """The same for no caption, as the pipeline itself does it under guidance; one row."""
        return _encode_nothing(self.pipe, self.denoiser)

    @torch.no_grad()
    def generate(
        self, captions: Sequence[str], seeds: Sequence[int], height: int, width: int
    ) -> Tensor:
        """Latents ``[n, c, h/8, w/8]`` of pictures that the teacher draws, one seed each."""
        options = {name: value for name, value in self._options.items() if value is not None}
        options["generator"] = [seeded(seed) for seed in seeds]
        if isinstance(self.denoiser, DiTTransformer2DModel):
            # Its pipeline draws in the model's own size only and always decodes.
            numbers = _class_numbers(self.pipe, captions)
            pictures = torch.from_numpy(self.pipe(numbers, output_type="np", **options).images)
            return self.encode_images((255 * pictures).round().byte().permute(0, 3, 1, 2))
        if isinstance(self.denoiser, PixArtTransformer2DModel):
            options["use_resolution_binning"] = False
        options |= {"height": height, "width": width, "output_type": "latent"}
        return self.pipe(list(captions), **options).images


def denoiser_inputs(denoiser: nn.Module, rows: Mapping[str, Tensor]) -> dict:
    """Keyword arguments of the denoiser's forward pass, besides sample and timestep.

    Args:
        rows: columns of `TeacherEncoder.encode_prompts` and ``sizes`` ``[n, 6]``: original height
            and width, top and left of the crop, height and width of the image in pixels.
    """
    if isinstance(denoiser, DiTTransformer2DModel):
        return {"class_labels": rows["class_labels"]}
    dtype = _dtype(denoiser)
    inputs = {"encoder_hidden_states": rows["prompt_embeds"].to(dtype)}
    if isinstance(denoiser, PixArtTransformer2DModel):
        inputs["encoder_attention_mask"] = rows["prompt_mask"]
        size = {"resolution": None, "aspect_ratio": None}
        if denoiser.use_additional_conditions:
            target = rows["sizes"][:, 4:].to(dtype)
            size = {"resolution": target, "aspect_ratio": target[:, :1] / target[:, 1:]}
        inputs["added_cond_kwargs"] = size
    elif denoiser.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": rows["pooled_embeds"].to(dtype),
            "time_ids": rows["sizes"].to(dtype),
        }
    return inputs


def predict(denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, inputs: dict) -> Tensor:
    """The denoiser's answer ``[n, c, h, w]``, without the variances that some learn beside it."""
    noisy = noisy.to(_dtype(denoiser))
    answer = denoiser(noisy, timestep=timesteps, **inputs, return_dict=False)[0]
    return answer[:, : noisy.shape[1]]


def fingerprint(module: nn.Module) -> str:
    """Hash of a module's class, configuration and some values of every tensor in it."""
    digest = hashlib.sha256(type(module).__name__.encode())
    config = getattr(module, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    digest.update(repr(sorted(public.items(), key=lambda item: item[0])).encode())
    for name, tensor in module.state_dict().items():
        values = tensor.detach().flatten()
        step = max(1, values.numel() // _SAMPLED_VALUES)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(values[::step].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def native_resolution(pipe: DiffusionPipeline) -> int:
    """Side of the square image, in pixels, that the denoiser is made for."""
    return find_denoiser(pipe).config.sample_size * pixels_per_latent(pipe.vae.config)


def size_step(pipe: DiffusionPipeline) -> int:
    """What the sides of an image, in pixels, must be multiples of."""
    config = find_denoiser(pipe).config
    levels = len(config.get("block_out_channels", [1]))
    return pixels_per_latent(pipe.vae.config) * (config.get("patch_size") or 2 ** (levels - 1))


def _dtype(denoiser: nn.Module) -> torch.dtype:
    """Of the first layer's weights: blocks may be of another."""
    return next(denoiser.parameters()).dtype


def _encoder_of(denoiser: nn.Module):
    if isinstance(denoiser, DiTTransformer2DModel):
        return _encode_classes
    if isinstance(denoiser, PixArtTransformer2DModel):
        return _encode_pixart
    if denoiser.config.addition_embed_type == "text_time":
        return _encode_sdxl
    return _encode_sd


def _encode_sd(pipe: DiffusionPipeline, captions: list[str]) -> Rows:
    embeds, _ = pipe.encode_prompt(captions, pipe.text_encoder.device, 1, False)
    return {"prompt_embeds": embeds}


def _encode_sdxl(pipe: DiffusionPipeline, captions: list[str]) -> Rows:
    device = pipe.text_encoder_2.device
    embeds, _, pooled, _ = pipe.encode_prompt(
        captions, device=device, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds, "pooled_embeds": pooled}


def _encode_pixart(pipe: DiffusionPipeline, captions: list[str]) -> Rows:
    embeds, mask, _, _ = pipe.encode_prompt(
        captions, do_classifier_free_guidance=False, device=pipe.text_encoder.device
    )
    return {"prompt_embeds": embeds, "prompt_mask": mask}


def _encode_classes(pipe: DiffusionPipeline, captions: list[str]) -> Rows:
    return {"class_labels": torch.tensor(_class_numbers(pipe, captions))}


def _encode_nothing(pipe: DiffusionPipeline, denoiser: nn.Module) -> Rows:
    if isinstance(denoiser, DiTTransformer2DModel):
        return {"class_labels": torch.tensor([denoiser.config.num_embeds_ada_norm])}
    rows = _encoder_of(denoiser)(pipe, [""])
    if getattr(pipe.config, "force_zeros_for_empty_prompt", False):
        rows = {name: torch.zeros_like(column) for name, column in rows.items()}
    return rows


def _class_numbers(pipe: DiffusionPipeline, captions: Sequence[str]) -> list[int]:
    labels = getattr(pipe, "labels", None) or {}
    numbers = []
    for caption in captions:
        text = caption.strip()
        if not text.isdecimal() and text not in labels:
            raise ValueError(f"expected a class number or a label of the pipeline, got {text!r}")
        numbers.append(int(text) if text.isdecimal() else labels[text])
    return numbers


@contextmanager
def _safe_dtype(vae: nn.Module) -> Iterator[None]:
    """While open, a VAE that overflows in float16, and says so, is in float32."""
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)
