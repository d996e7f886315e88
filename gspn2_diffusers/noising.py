"""Noise levels, and what a denoiser answers at them, read from a pipeline's scheduler."""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor, nn

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


class Levels(NamedTuple):
    """Noise levels of a batch, each ``[n]``: noisy = signal * latents + noise * standard normal."""

    timesteps: Tensor
    signal: Tensor
    noise: Tensor


class Noising(nn.Module):
    """How latents become noisy and what the denoiser answers: one table of noise levels.

    Args:
        scheduler: of the pipeline; flow matching for a `FlowMatchEulerDiscreteScheduler` or where
            its config says ``prediction_type="flow_prediction"``, variance preserving otherwise.

    Raises:
        ValueError: a prediction type other than `PREDICTION_TYPES`.
    """

    def __init__(self, scheduler: SchedulerMixin):
        super().__init__()
        config = scheduler.config
        self.is_flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        default = "flow_prediction" if self.is_flow else "epsilon"
        self.prediction_type = config.get("prediction_type", default)
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"expected a scheduler with one of the prediction types {PREDICTION_TYPES}, "
                f"got {self.prediction_type!r} of {type(scheduler).__name__}"
            )
        if self.prediction_type == "flow_prediction":
            timesteps, signal, noise = _flow_table(config)
        else:
            timesteps, signal, noise = _diffusion_table(config)
        self.register_buffer("timesteps", timesteps, persistent=False)
        self.register_buffer("signal", signal, persistent=False)
        self.register_buffer("noise", noise, persistent=False)

    def levels(self, quantiles: Tensor) -> Levels:
        """The levels at `quantiles` ``[n]`` in 0..1, 0 being the least noise."""
        last = len(self.timesteps) - 1
        index = (quantiles * len(self.timesteps)).long().clamp(max=last)
        return Levels(self.timesteps[index], self.signal[index], self.noise[index])

    def level_at(self, timestep: Tensor | float) -> Levels:
        """The level of one timestep of a sampler, ``[1]`` each; between entries, interpolated."""
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=self.timesteps.device)
        known = self.timesteps.float()
        above = torch.searchsorted(known, timestep.clamp(known[0], known[-1])).clamp(min=1)
        share = (timestep - known[above - 1]) / (known[above] - known[above - 1])
        signal, noise = (
            torch.lerp(table[above - 1], table[above], share.clamp(0, 1)).reshape(1)
            for table in (self.signal, self.noise)
        )
        return Levels(timestep.reshape(1), signal, noise)

    def mix(self, latents: Tensor, noise: Tensor, levels: Levels) -> Tensor:
        """Noisy latents ``[n, c, h, w]``."""
        return _per_image(levels.signal) * latents + _per_image(levels.noise) * noise

    def target(self, latents: Tensor, noise: Tensor, levels: Levels) -> Tensor:
        """What a perfect denoiser answers, ``[n, c, h, w]``, by the prediction type."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        if self.prediction_type == "flow_prediction":
            return noise - latents
        return _per_image(levels.signal) * noise - _per_image(levels.noise) * latents

    def clean(self, noisy: Tensor, answer: Tensor, levels: Levels) -> Tensor:
        """The latents ``[n, c, h, w]`` that a denoiser's answer to `noisy` stands for."""
        signal, noise = _per_image(levels.signal), _per_image(levels.noise)
        if self.prediction_type == "epsilon":
            return (noisy - noise * answer) / signal.clamp(min=1e-4)
        if self.prediction_type == "sample":
            return answer
        if self.prediction_type == "flow_prediction":
            return noisy - noise * answer
        return signal * noisy - noise * answer

    def moved(self, answer: Tensor, change: Tensor, levels: Levels) -> Tensor:
        """The answer which stands for latents that differ by `change` from those of `answer`."""
        signal, noise = _per_image(levels.signal), _per_image(levels.noise)
        if self.prediction_type == "sample":
            return answer + change
        if self.prediction_type == "epsilon":
            return answer - signal / noise.clamp(min=1e-4) * change
        return answer - change / noise.clamp(min=1e-4)

    def min_snr_weights(self, levels: Levels, gamma: float) -> Tensor:
        """Loss weights ``[n]`` of min-SNR-gamma (arXiv 2303.09556) for this prediction type.

        The weight on the error of the clean latents is min(SNR, gamma); an error of the prediction
        counts as the error of the clean latents that it causes.
        """
        snr = (levels.signal / levels.noise.clamp(min=1e-8)).square()
        if self.prediction_type == "epsilon":
            return (gamma / snr.clamp(min=1e-8)).clamp(max=1.0)
        weights = snr.clamp(max=gamma)
        return weights if self.prediction_type == "sample" else weights * levels.noise.square()


def _flow_table(config: dict) -> tuple[Tensor, Tensor, Tensor]:
    steps = config.get("num_train_timesteps", 1000)
    sigmas = torch.arange(1, steps + 1, dtype=torch.float32) / steps
    shift = config.get("shift") or config.get("flow_shift") or 1.0
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return sigmas * steps, 1 - sigmas, sigmas


def _diffusion_table(config: dict) -> tuple[Tensor, Tensor, Tensor]:
    scheduler = DDPMScheduler.from_config(config)
    kept = scheduler.alphas_cumprod.float()
    return torch.arange(len(kept)), kept.sqrt(), (1 - kept).sqrt()


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
