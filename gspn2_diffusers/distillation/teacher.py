"""What the trainer asks of a teacher's pipeline: latents, prompt embeddings, denoiser inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

from ..conditioning import Rows, class_numbers, encode_prompts, encode_unconditional, safe_dtype
from ..families import find_denoiser
from ..fingerprint import fingerprint
from ..pipelines.generation import seeded


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
        with safe_dtype(vae):
            pixels = images.to(vae.device).to(vae.dtype) / 127.5 - 1
            latents = vae.encode(pixels).latent_dist.mode()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (latents - shift) * vae.config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, captions: Sequence[str]) -> Rows:
        """What the denoiser is told of these captions, columns of first dimension n."""
        return encode_prompts(self.pipe, captions)

    def encode_unconditional(self) -> Rows:
        """The same for no caption, as the pipeline itself does it under guidance; one row."""
        return encode_unconditional(self.pipe)

    @torch.no_grad()
    def generate(
        self, captions: Sequence[str], seeds: Sequence[int], height: int, width: int
    ) -> Tensor:
        """Latents ``[n, c, h/8, w/8]`` of pictures that the teacher draws, one seed each."""
        options = {name: value for name, value in self._options.items() if value is not None}
        options["generator"] = [seeded(seed) for seed in seeds]
        if isinstance(self.denoiser, DiTTransformer2DModel):
            # Its pipeline draws in the model's own size only and always decodes.
            numbers = class_numbers(self.pipe, captions)
            pictures = torch.from_numpy(self.pipe(numbers, output_type="np", **options).images)
            return self.encode_images((255 * pictures).round().byte().permute(0, 3, 1, 2))
        if isinstance(self.denoiser, PixArtTransformer2DModel):
            options["use_resolution_binning"] = False
        options |= {"height": height, "width": width, "output_type": "latent"}
        return self.pipe(list(captions), **options).images
