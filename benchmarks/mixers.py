"""Token mixers to compare GSPN-2 blocks with, in the blocks' own place in a patched model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from gspn2_diffusers import GSPN2Adapter, GSPN2Block, GSPN2Config, apply_gspn2

GridLike = Tensor | Sequence[int] | None


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention (arXiv 2006.16236) of ``[..., N, d]``, with the feature map elu + 1::

    phi(q) (phi(k)^T v) / (phi(q) sum over the tokens of phi(k))
    """
    q, k = F.elu(q) + 1, F.elu(k) + 1
    mixed = q @ (k.transpose(-1, -2) @ v)
    total = q @ k.sum(dim=-2).unsqueeze(-1)
    return mixed / total


class Mixer(nn.Module):
    """What a mixer has in common with a `GSPN2Block`.

    Attributes:
        grid: written by the model's grid hook; a mixer that knows no neighbours ignores it.
        backend: of a scan, which these have none of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grid: Tensor | None = None
        self.backend = "auto"


class LinearAttention(Mixer):
    """Multi-head linear attention that starts from copies of a layer's projections, all trained.

    Args:
        attention: the softmax attention layer that it replaces.
    """

    def __init__(self, attention: Attention):
        super().__init__()
        self.heads = attention.heads
        self.to_q = copy.deepcopy(attention.to_q)
        self.to_k = copy.deepcopy(attention.to_k)
        self.to_v = copy.deepcopy(attention.to_v)
        self.to_out = copy.deepcopy(attention.to_out[0])

    def forward(self, tokens: Tensor, grid: GridLike = None) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C]``."""
        q, k, v = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        # Sums over all tokens: 8 bits of mantissa are too few for what is divided by them.
        with torch.autocast(tokens.device.type, enabled=False):
            mixed = linear_attention(*(_at_least_float32(x) for x in (q, k, v)))
        return self.to_out(mixed.to(q.dtype).transpose(1, 2).flatten(2))


class Dropped(Mixer):
    """No token mixing: the output is zero.

    Args:
        attention: the layer that it replaces.
        bias: add a trainable vector that starts at zero, so that gradients have where to go.
    """

    def __init__(self, attention: Attention, bias: bool = False):
        super().__init__()
        like = next(attention.to_out[0].parameters())
        zero = torch.zeros(attention.out_dim, dtype=like.dtype, device=like.device)
        self.register_parameter("bias", nn.Parameter(zero) if bias else None)

    def forward(self, tokens: Tensor, grid: GridLike = None) -> Tensor:
        """``[B, N, C]`` to zeros, or the bias, of that shape."""
        if self.bias is None:
            return torch.zeros_like(tokens)
        return self.bias.to(tokens.dtype).expand_as(tokens)


class MeanOnly(Mixer):
    """A linear map of the mean token, the same for all tokens, which starts from W_out W_value and
    the layer's bias: what the attention does where its weights are uniform.

    Args:
        attention: the layer that it replaces.
    """

    def __init__(self, attention: Attention):
        super().__init__()
        channels = attention.query_dim
        like = next(attention.to_out[0].parameters())
        block = GSPN2Block(channels, GSPN2Config(proxy_dim=1)).to(like.device)
        block.inherit(attention)
        self.mean = nn.Linear(channels, channels)
        self.mean.weight, self.mean.bias = block.mean.weight, block.up.bias

    def forward(self, tokens: Tensor, grid: GridLike = None) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C]``, equal for all N."""
        return self.mean(tokens.mean(dim=1, keepdim=True)).expand_as(tokens)


MIXERS: dict[str, Callable[[Attention], Mixer]] = {
    "linear attention": LinearAttention,
    "dropped": Dropped,
    "mean only": MeanOnly,
}


def patched_layers(model: nn.Module) -> list[Attention]:
    """The layers of a model that hold a block or a mixer."""
    return [module for module in model.modules() if hasattr(module, "gspn2")]


def put_mixers(model: nn.Module, mixer: Callable[[Attention], nn.Module]) -> list[nn.Module]:
    """Replace every self-attention layer of a denoiser by a mixer of its own.

    Returns:
        The mixers, in float32, which alone are to be trained.

    Raises:
        TypeError, ValueError: not a supported model.
    """
    apply_gspn2(model, GSPN2Adapter.for_model(model, GSPN2Config(), inherit=False))
    layers = patched_layers(model)
    mixers = [mixer(layer).float().requires_grad_(True) for layer in layers]
    for layer, own in zip(layers, mixers, strict=True):
        layer.gspn2 = own
    return mixers


@contextmanager
def swapped(model: nn.Module, mixers: Sequence[nn.Module]) -> Iterator[None]:
    """While inside, the patched layers of a model hold these mixers instead of their own."""
    layers = patched_layers(model)
    own = [layer.gspn2 for layer in layers]
    _place(layers, mixers)
    try:
        yield
    finally:
        _place(layers, own)


def _place(layers: Sequence[Attention], mixers: Sequence[nn.Module]) -> None:
    for layer, mixer in zip(layers, mixers, strict=True):
        layer.gspn2 = mixer


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
