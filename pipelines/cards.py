"""How fast GPUs are: by their names, or measured where one is there."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock

from gspn2_diffusers.pipelines.loading import default_dtype
from gspn2_diffusers.pipelines.tracing import Rates, trace

# What an H100 SXM reached of its specification, 989 TFLOPS and 3.35 TB/s, in the SDXL UNet: with
# these shares the predicted times of 4096² and 8192² are within 10 % of the measured ones
# (benchmarks/results/unet-sdxl-cuda.json); smaller ones depend on the host. Other cards are taken
# to reach the same shares. Only convolutions have a bound as well, since contiguous maps and not
# products are what slows them on a fast card.
MATMUL_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.62, 0.465, 0.78
CONV_SHARE, MOST_CONV = 0.4, 225e12
# Normalisations and strided passes are slower than a plain copy: what the UNet's reached of it.
COPY_SHARE = 0.87
# Convolutions of other shapes are slower than the one that is measured.
CONV_REACHED = 0.72

# TFLOPS of dense products of 16-bit numbers summed in 32 bits, and GB/s: from the manufacturer's
# specifications. Of several names that fit a device, the first counts.
CARDS = {
    "B200": (2250, 8000),
    "GH200": (989, 4000),
    "H200": (989, 4800),
    "H100 NVL": (835, 3900),
    "H100 PCIe": (756, 2000),
    "H100": (989, 3350),
    "H20": (148, 4000),
    "A100-SXM4-80GB": (312, 2039),
    "A100 80GB": (312, 1935),
    "A100": (312, 1555),
    "A40": (150, 696),
    "A10G": (70, 600),
    "A10": (125, 600),
    "L40S": (362, 864),
    "L40": (181, 864),
    "L4": (121, 300),
    "RTX PRO 6000": (500, 1792),
    "RTX 6000 Ada": (364, 960),
    "RTX A6000": (155, 768),
    "RTX A5000": (111, 768),
    "RTX 5090": (210, 1792),
    "RTX 5080": (113, 960),
    "RTX 5070": (62, 672),
    "RTX 4090": (165, 1008),
    "RTX 4080": (98, 717),
    "RTX 4070": (58, 504),
    "RTX 4060": (30, 272),
    "RTX 3090": (71, 936),
    "RTX 3080": (60, 760),
    "RTX 3060": (26, 360),
    "V100": (125, 900),
    "T4": (65, 320),
}


def card_rates(name: str) -> Rates | None:
    """Rates of the GPU of this name, as its driver or a person writes it; None if unknown."""
    for card, (teraflops, gigabytes) in CARDS.items():
        words = re.escape(card).replace(r"\ ", r"[ -]")
        if re.search(rf"(?<![a-z0-9]){words}(?![a-z0-9])", name, re.IGNORECASE):
            return specified_rates(teraflops * 1e12, gigabytes * 1e9)
    return None


def specified_rates(flops: float, bandwidth: float) -> Rates:
    """Rates of a GPU whose specification promises so many flops and bytes a second."""
    return Rates(
        matmul=MATMUL_SHARE * flops,
        conv=min(CONV_SHARE * flops, MOST_CONV),
        attention=ATTENTION_SHARE * flops,
        bandwidth=BANDWIDTH_SHARE * bandwidth,
    )


@torch.no_grad()
def measure_rates(device: torch.device | str, *, scale: int = 1) -> Rates:
    """Rates of a device that is there. Takes less than a second and 1 GB on a large GPU.

    Args:
        device: a CUDA device; on others it works too, but no plan is made for them.
        scale: divides the sizes of what is measured.
    """
    device = torch.device(device)
    like = {"device": device, "dtype": default_dtype(device)}
    # The shapes of SDXL at 2048².
    side, channels = 256 // scale, 320 // scale
    tokens = torch.randn(side**2 // 4, 2 * channels, **like)
    weight = torch.randn(16 * channels, 2 * channels, **like)
    maps = torch.randn(1, channels, side, side, **like)
    kernel = torch.randn(channels, channels, 3, 3, **like)
    heads = torch.randn(1, 10, side**2 // 8, 64, **like)
    source = torch.randn(8, *maps.shape[1:], **like)
    target = torch.empty_like(source)
    on_host = torch.empty(maps.shape, dtype=maps.dtype, pin_memory=device.type == "cuda")

    def rate(amount: int, run: Callable[[], object]) -> float:
        return amount / _seconds(run, device)

    pairs = heads.shape[1] * heads.shape[2] ** 2
    return Rates(
        matmul=rate(2 * tokens.numel() * len(weight), lambda: F.linear(tokens, weight)),
        conv=CONV_REACHED
        * rate(2 * maps.numel() * channels * 9, lambda: F.conv2d(maps, kernel, padding=1)),
        attention=rate(
            4 * pairs * heads.shape[3],
            lambda: F.scaled_dot_product_attention(heads, heads, heads),
        ),
        bandwidth=COPY_SHARE * rate(2 * source.nbytes, lambda: target.copy_(source)),
        launch=_seconds_per_launch(like),
        transfer=rate(maps.nbytes, lambda: on_host.copy_(maps, non_blocking=True)),
    )


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Duration of one run, from several in a row."""
    run()
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _seconds_per_launch(like: dict) -> float:
    """What Python takes to launch an operator of a denoiser, from a transformer block whose
    operators have next to nothing to do."""
    width = 64
    options = {"num_attention_heads": 1, "attention_head_dim": width, "cross_attention_dim": width}
    block = BasicTransformerBlock(width, **options).eval()
    tokens = torch.randn(1, 8, width)
    with torch.device("meta"):
        outline = BasicTransformerBlock(width, **options).eval()
    launches = trace(partial(outline, tokens.to("meta"), encoder_hidden_states=tokens.to("meta")))
    block, tokens = block.to(**like), tokens.to(**like)
    run = partial(block, tokens, encoder_hidden_states=tokens)
    return _seconds(run, like["device"], repeats=20) / launches.launches


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
