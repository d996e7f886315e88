"""The UNets that are timed, with random weights, and inputs for them."""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from gspn2_diffusers.tiny_scenes.models import build_unet

TEXT_TOKENS = 77
PIXELS_PER_LATENT = 8


def build_sdxl_unet() -> UNet2DConditionModel:
    """The UNet of Stable Diffusion XL, from its published configuration: 2.6 G parameters."""
    return UNet2DConditionModel(
        sample_size=128,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),  # the number of heads, in spite of its name
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


BUILDERS = {"tiny": build_unet, "sdxl": build_sdxl_unet}


def build(name: str, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet of `BUILDERS` on `device`, in evaluation mode."""
    torch.manual_seed(0)
    with device:
        return BUILDERS[name]().to(dtype).eval().requires_grad_(False)


def random_inputs(
    unet: UNet2DConditionModel, batch: int, height: int, width: int
) -> dict[str, Tensor | dict[str, Tensor]]:
    """Keyword arguments of one forward pass; sizes in latent pixels."""
    config = unet.config

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=unet.device, dtype=unet.dtype)

    inputs = {
        "sample": randn(batch, config.in_channels, height, width),
        "timestep": torch.full((batch,), 500, device=unet.device),
        "encoder_hidden_states": randn(batch, TEXT_TOKENS, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        sizes = 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": randn(batch, config.projection_class_embeddings_input_dim - sizes),
            "time_ids": randn(batch, 6),
        }
    return inputs
