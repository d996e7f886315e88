"""FID and CLIP score by torchmetrics, where its models are to be had."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from PIL import Image
from torch import Tensor, nn

CLIP_MODEL = "openai/clip-vit-large-patch14"
INCEPTION_WIDTH = 2048


def to_bytes(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as uint8 ``[n, 3, h, w]``."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def load_fid() -> nn.Module:
    """torchmetrics' FID on the Inception features of torch-fidelity.

    Raises:
        ImportError: torchmetrics or torch-fidelity is not installed.
        OSError: HF_HUB_OFFLINE is set and the Inception's weights would have to be downloaded, or
            their download failed.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError(
            f"torchmetrics with torch-fidelity cannot be imported ({error}): "
            "pip install 'torchmetrics[image]'"
        ) from error
    name = URL_INCEPTION_V3.rsplit("/", 1)[-1]
    if HF_HUB_OFFLINE and not Path(torch.hub.get_dir(), "checkpoints", name).is_file():
        raise OSError(f"HF_HUB_OFFLINE is set and {name} is not in the cache of torch.hub")
    return FrechetInceptionDistance(feature=INCEPTION_WIDTH)


def load_clip(model: str | os.PathLike = CLIP_MODEL) -> nn.Module:
    """torchmetrics' CLIP score by a CLIP model, from a folder or the hub.

    Raises:
        ImportError: torchmetrics is not installed.
        OSError: no such model; with HF_HUB_OFFLINE, none in the cache.
    """
    try:
        from torchmetrics.multimodal.clip_score import CLIPScore
    except ImportError as error:
        raise ImportError(
            f"torchmetrics cannot be imported ({error}): pip install torchmetrics"
        ) from error
    from transformers import CLIPModel, CLIPProcessor

    def parts() -> tuple[nn.Module, object]:
        try:
            clip = CLIPModel.from_pretrained(model)
            return _ClipFeatures(clip), CLIPProcessor.from_pretrained(model)
        except OSError as error:
            reason = "HF_HUB_OFFLINE is set and it is not in the cache"
            raise OSError(f"CLIP {model}: {reason if HF_HUB_OFFLINE else error}") from error

    return CLIPScore(model_name_or_path=parts)


class _ClipFeatures(nn.Module):
    """A CLIP model whose features are tensors ``[n, d]`` in every version of transformers: newer
    ones return an output object, which torchmetrics 1.9 cannot read."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip.eval()
        self.config = clip.config

    def get_image_features(self, pixels: Tensor) -> Tensor:
        features = self.clip.get_image_features(pixels)
        return getattr(features, "pooler_output", features)

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        features = self.clip.get_text_features(ids, mask)
        return getattr(features, "pooler_output", features)


class Judge:
    """A metric of torchmetrics; whatever goes wrong in it becomes the reason why it is missing."""

    def __init__(
        self, metric: object | None, load: Callable[[], object], device: torch.device
    ) -> None:
        self.metric = metric
        self.device = device
        self.reason: str | None = None
        with self._excused():
            self.metric = load() if metric is None else metric
            self.metric.to(device)

    @contextmanager
    def _excused(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a metric that fails must not cost the other results
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.reason = lines[0]

    def start(self, *, is_teacher: bool) -> None:
        """Begin with the next contestant."""
        if self.reason is None:
            with self._excused():
                self._start(is_teacher)

    def add(self, images: Tensor, prompts: list[str]) -> None:
        """Look at pictures, uint8 ``[n, 3, h, w]``, of prompts."""
        if self.reason is None:
            with self._excused():
                self._add(images.to(self.device), prompts)

    def result(self) -> tuple[float | None, str | None]:
        """The contestant's score, or None, and a note."""
        value, note = None, None
        if self.reason is None:
            with self._excused():
                value, note = self._result()
        if value is not None and not math.isfinite(value):
            return None, f"it came out as {value}"
        return (value, note) if self.reason is None else (None, self.reason)


class ClipJudge(Judge):
    def __init__(self, metric: object | None, device: torch.device) -> None:
        super().__init__(metric, load_clip, device)

    def _start(self, is_teacher: bool) -> None:
        self.metric.reset()

    def _add(self, images: Tensor, prompts: list[str]) -> None:
        self.metric.update(images, prompts)

    def _result(self) -> tuple[float, None]:
        return float(self.metric.compute()), None


class FidJudge(Judge):
    """FID to real pictures, or to those that the teacher drew at the same resolution."""

    def __init__(
        self, metric: object | None, device: torch.device, real: Sequence[Path] | None
    ) -> None:
        super().__init__(metric, load_fid, device)
        self.real = real
        self.is_reference = False
        self.count = 0
        if real is not None and self.reason is None:
            with self._excused():
                self._forget_reference()
                for path in real:  # one by one, since they may differ in size
                    self.metric.update(to_bytes([Image.open(path)]).to(device), real=True)

    def _forget_reference(self) -> None:
        self.metric.reset_real_features = True
        self.metric.reset()
        self.metric.reset_real_features = False

    def _start(self, is_teacher: bool) -> None:
        self.is_reference = is_teacher and self.real is None
        self.count = 0
        if self.is_reference:
            self._forget_reference()
        else:
            self.metric.reset()

    def _add(self, images: Tensor, prompts: list[str]) -> None:
        self.metric.update(images, real=self.is_reference)
        self.count += len(images)

    def _result(self) -> tuple[float | None, str]:
        if self.is_reference:
            return None, "the other rows are compared with the pictures of this one"
        note = "to the teacher's pictures" if self.real is None else "to the real pictures"
        fewest = min(self.count, self.count if self.real is None else len(self.real))
        if fewest <= INCEPTION_WIDTH:
            note += f"; {fewest} are few: compare it within this table only"
        return float(self.metric.compute()), note
