"""How much a denoiser needs its self-attention: entropy, share between tokens, mean ablation.

Self-attention layers are the denoiser's modules named ``attn1``, as every supported family calls
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from gspn2_diffusers.families import find_denoiser
from gspn2_diffusers.pipelines.generation import literal_options

_IMAGES_FOR_ENTROPY = 8


def self_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The denoiser's self-attention layers by name; raises ValueError without any."""
    found = {name: m for name, m in model.named_modules() if name.split(".")[-1] == "attn1"}
    if not found:
        raise ValueError(
            f"expected self-attention layers named attn1, got {type(model).__name__} without"
        )
    return found


@contextmanager
def mean_ablation(pipe_or_model: DiffusionPipeline | nn.Module) -> Iterator[None]:
    """While open, every self-attention gives the mean of its output over the tokens.

    Raises ValueError for an unsupported model and without any self-attention.
    """
    layers = self_attentions(find_denoiser(pipe_or_model)).values()
    handles = [layer.register_forward_hook(_to_mean) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _to_mean(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.mean(dim=1, keepdim=True).expand_as(output)


def attention_report(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int = 10,
    guidance_scale: float = 4.0,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Averages over the denoising of ``prompts``, for every softmax self-attention and ``"mean"``.

    ``entropy``: entropy of a query's attention divided by that of uniform attention.
    ``between_tokens``: share of the variance of the layer's output that lies between the tokens of
    an image, the rest being between images. Raises ValueError for an unsupported pipeline and
    without any self-attention.
    """
    layers = self_attentions(find_denoiser(pipe))
    records = {name: _Record() for name in layers}
    handles = [
        layer.register_forward_hook(partial(_observe, records[name]), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            pipe(
                list(prompts),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
                **literal_options(pipe),
            )
    finally:
        for handle in handles:
            handle.remove()
    report = {name: record.mean() for name, record in records.items()}
    report["mean"] = {
        key: sum(layer[key] for layer in report.values()) / len(report)
        for key in ("entropy", "between_tokens")
    }
    return report


@dataclass
class _Record:
    """What one layer showed at each denoising step."""

    entropy: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)

    def mean(self) -> dict[str, float]:
        return {
            "entropy": sum(self.entropy) / len(self.entropy),
            "between_tokens": sum(self.between_tokens) / len(self.between_tokens),
        }


def _observe(
    record: _Record, layer: nn.Module, inputs: tuple[Tensor, ...], kwargs: dict, output: Tensor
) -> None:
    tokens = inputs[0] if inputs else kwargs["hidden_states"]
    record.entropy.append(_normalised_entropy(layer, tokens[-_IMAGES_FOR_ENTROPY:]))
    record.between_tokens.append(_between_tokens(output.float()))


def _normalised_entropy(layer: nn.Module, tokens: Tensor) -> float:
    """Mean over images, heads and queries of the entropy in units of log(tokens)."""
    query, key = layer.to_q(tokens), layer.to_k(tokens)
    query, key = (x.unflatten(-1, (layer.heads, -1)).transpose(1, 2).float() for x in (query, key))
    weights = (query @ key.transpose(-1, -2) * layer.scale).softmax(-1)
    entropy = -torch.xlogy(weights, weights).sum(-1).mean()
    return (entropy / torch.tensor(tokens.shape[1]).log().to(entropy)).item()


def _between_tokens(output: Tensor) -> float:
    """Variance within images over the total variance of ``[n, tokens, channels]``."""
    within = output.var(dim=1, correction=0).mean()
    total = output.flatten(0, 1).var(dim=0, correction=0).mean()
    return (within / total.clamp(min=1e-12)).item()
