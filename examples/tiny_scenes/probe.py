"""The attribute probe: a small classifier that reads every scored attribute off a picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .scenes import ATTRIBUTES


class _Residual(nn.Module):
    """Two 3x3 convolutions around which the input is carried; keeps the shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class _Trunk(nn.Module):
    """Images to feature maps at strides 2, 4, 8 and 16."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        widths = (3, *channels)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 4, stride=2, padding=1), _Residual(after))
            for before, after in zip(widths, channels, strict=False)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, x = [], images * 2 - 1
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class _Reader(nn.Module):
    """Attention from one learned query per attribute, over the last map: ``[n, attributes, d]``."""

    def __init__(self, width: int, tokens: int, layers: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(ATTRIBUTES), width) * 0.02)
        self.positions = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, width // 32, 2 * width, dropout=0.0, activation="gelu",
                batch_first=True, norm_first=True,
            )
            for _ in range(layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)

    def forward(self, feature_map: Tensor) -> Tensor:
        tokens = feature_map.flatten(2).transpose(1, 2) + self.positions
        x = torch.cat((self.queries.expand(len(tokens), -1, -1), tokens), dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x[:, : len(self.queries)])


class Probe(ModelMixin, ConfigMixin):
    """Classifier with a head for every attribute of ``ATTRIBUTES``.

    Images are float in 0..1 and of any size; they are resized to ``image_size``.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        channels: tuple[int, ...] = (24, 40, 64, 96),
        layers: int = 3,
    ) -> None:
        super().__init__()
        self.trunk = _Trunk(tuple(channels))
        self.reader = _Reader(channels[-1], (image_size // 2 ** len(channels)) ** 2, layers)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(channels[-1], len(classes)) for name, classes in ATTRIBUTES.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits ``[n, classes]`` for every attribute, of images ``[n, 3, h, w]``."""
        read = self.reader(self.maps(images)[-1])
        return {name: head(read[:, i]) for i, (name, head) in enumerate(self.heads.items())}

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps ``[n, c, s, s]`` of images ``[n, 3, h, w]``, the finest first."""
        side = self.config.image_size
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        return self.trunk(images)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features ``[n, d]`` of images ``[n, 3, h, w]``, for the Fréchet distance."""
        return self.maps(images)[-1].mean((2, 3))


def probe_loss(logits: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """Sum of the attributes' mean cross-entropies; truth ``[n]`` of -1 is left out."""
    losses = []
    for name, scores in logits.items():
        known = (truth[name] >= 0).sum().clamp(min=1)
        total = F.cross_entropy(scores.float(), truth[name], ignore_index=-1, reduction="sum")
        losses.append(total / known)
    return torch.stack(losses).sum()


def perceptual_distance(probe: Probe, images: Tensor, others: Tensor) -> Tensor:
    """Mean squared distance of the probe's feature maps, each normalised over its channels."""
    pairs = zip(probe.maps(images), probe.maps(others), strict=True)
    return torch.stack([_map_distance(a.float(), b.float()) for a, b in pairs]).sum()


def _map_distance(a: Tensor, b: Tensor) -> Tensor:
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean()
