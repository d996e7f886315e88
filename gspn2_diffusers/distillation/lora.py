"""LoRA on the rest of a student: what surrounds the blocks adapts to them, by peft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

LORA_FILE = "pytorch_lora_weights.safetensors"
# Cross-attention and feed-forward layers. Self-attention's own projections have no part in a
# patched layer.
_TARGETS = r".*\.(attn2\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"


def add_lora(denoiser: nn.Module, rank: int) -> None:
    """Put trainable float32 LoRA layers of `rank` beside cross-attention and feed-forward.

    Raises:
        ImportError: peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("expected peft for LoRA, found none: pip install peft") from error
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS)
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    inject_adapter_in_model(config, denoiser)
    for parameter in trained:
        parameter.requires_grad_(True)  # peft freezes all but its own
    for name, parameter in denoiser.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def lora_layers(denoiser: nn.Module) -> list[nn.Module]:
    """The layers that :func:`add_lora` has wrapped."""
    return [m for m in denoiser.modules() if hasattr(m, "lora_A") and hasattr(m, "enable_adapters")]


@contextmanager
def without_lora(layers: Sequence[nn.Module]) -> Iterator[None]:
    """While open, these layers compute without their LoRA: the teacher's."""
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_lora(denoiser: nn.Module, folder: Path, prefix: str, dtype: torch.dtype) -> None:
    """Write the LoRA for ``pipe.load_lora_weights``; prefix: the denoiser's name there."""
    state = {
        f"{prefix}.{name.replace('.default', '')}": p.detach().to(dtype).cpu().contiguous()
        for name, p in denoiser.named_parameters()
        if "lora_" in name
    }
    save_file(state, folder / LORA_FILE)
