"""The losses of distillation: a patched model that is teacher and student in one.

With its blocks the model is the student, with the softmax attention that its layers still have it
is the teacher. Three stages train the blocks (arXiv 2606.00746 names the first two):

* teacher forcing: one pass of the teacher gives every block its layer's input and output; all
  blocks learn at once and no gradient passes through the model;
* end to end: the student's output and features follow the teacher's;
* curriculum: at twice the size, the student's features follow those of a frozen student of the size
  before, enlarged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditioning import denoiser_inputs, predict
from ..noising import Levels, Noising
from ..patch import softmax_in
from .batches import Batch
from .lora import lora_layers, without_lora
from .observe import Observer

STAGES = ("teacher_forcing", "end_to_end", "curriculum")


@dataclass(frozen=True)
class LossWeights:
    """Weights of the end-to-end losses and of the curriculum's.

    Every term but `base` is a squared error over the variance of what is to be matched.

    Args:
        output: the denoiser's output against the teacher's.
        layer: each replaced layer's output against the teacher's, in the student's own pass.
        block: the same for the transformer block around the layer.
        base: the denoiser's output against the true target.
        guided: the output under classifier-free guidance of `guidance_scale`, against the
            teacher's; doubles the cost of a step.
        snr_gamma: min-SNR weights on `base`; None weighs all noise levels alike.
    """

    output: float = 1.0
    layer: float = 0.5
    block: float = 0.5
    base: float = 0.0
    guided: float = 0.0
    guidance_scale: float = 4.0
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        terms = ("output", "layer", "block", "base", "guided")
        negative = [name for name in terms if getattr(self, name) < 0]
        if negative:
            raise ValueError(f"expected weights of at least 0, got {negative[0]} = "
                             f"{getattr(self, negative[0])}")  # fmt: skip
        if not any(getattr(self, name) for name in terms):
            raise ValueError("expected one weight above 0 at least, got none")


class Distillation(nn.Module):
    """Teacher and student on the same noisy latents; gives the losses of a stage.

    Args:
        model: a denoiser patched by :func:`apply_gspn2`; what requires gradients in it is trained.
        noising: noise levels and targets of its scheduler.
        weights: of the losses.

    Attributes:
        layers: names of the replaced layers, in the order of all per-layer results.
    """

    def __init__(
        self,
        model: nn.Module,
        noising: Noising,
        weights: LossWeights = LossWeights(),
    ):
        super().__init__()
        self.model = model
        self.noising = noising
        self.weights = weights
        self.layers = [name for name, module in model.named_modules() if hasattr(module, "gspn2")]
        if not self.layers:
            raise ValueError("expected a model patched by apply_gspn2, got none of its layers")
        self._attentions = [model.get_submodule(name) for name in self.layers]
        self._taps = _observe_layers(model, self.layers)
        self._lora = lora_layers(model)
        self._previous: _Frozen | None = None
        self.register_buffer("layer_variance", torch.ones(len(self.layers)))
        self.register_buffer("block_variance", torch.ones(len(self.layers)))
        self.register_buffer("output_variance", torch.ones(1))

    def forward(self, batch: Batch, stage: str) -> dict[str, Tensor]:
        """Losses of one of `STAGES`: ``loss`` to minimise, its terms, and ``layers`` ``[L]``, the
        relative error of every replaced layer."""
        return getattr(self, f"_{stage}")(batch)

    def trained(self) -> dict[str, Tensor]:
        """What is trained of the model, by name."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def follow(self, trained: dict[str, Tensor]) -> None:
        """For the curriculum: follow at half the size a frozen student with these weights.

        It shares what is not trained with the model.
        """
        self._taps.forget()
        shared = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        student = copy.deepcopy(self.model, shared).requires_grad_(False)
        student.load_state_dict(trained, strict=False)
        self._previous = _Frozen(student, _observe_layers(student, self.layers))

    @torch.no_grad()
    def calibrate(
        self, batches: Iterable[Batch], reduce: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        """Measure the variances of what the teacher says, by which errors are divided.

        They are measured once, not per batch, so that a small batch at one noise level counts by
        its errors and not by how little its features vary.

        Args:
            batches: this process's share of some batches.
            reduce: the mean of a tensor over all processes.
        """
        moments = {"layer": _Moments(), "block": _Moments(), "output": _Moments()}
        for batch in batches:
            noisy, levels, inputs = self._question(batch)
            output = self._teach(noisy, levels, inputs)
            moments["output"].add([output])
            moments["layer"].add([self._taps.outputs[name] for name in self.layers])
            moments["block"].add([self._taps.outputs[_around(name)] for name in self.layers])
        for name, found in moments.items():
            getattr(self, f"{name}_variance").copy_(found.variance(reduce))

    @torch.no_grad()
    def output_error(self, batch: Batch) -> Tensor:
        """Squared error of the student's output over the variance of the teacher's; a scalar."""
        noisy, levels, inputs = self._question(batch)
        target = self._teach(noisy, levels, inputs)
        output = predict(self.model, noisy, levels.timesteps, inputs)
        return F.mse_loss(output.float(), target.float()) / self.output_variance[0]

    def _teacher_forcing(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            self._teach(*self._question(batch))
        seen = [(self._taps.inputs[name], self._taps.outputs[name]) for name in self.layers]
        errors = [
            F.mse_loss(layer(tokens).float(), target.float())
            for layer, (tokens, target) in zip(self._attentions, seen, strict=True)
        ]
        layers = torch.stack(errors) / self.layer_variance
        return {"loss": layers.mean(), "layers": layers.detach()}

    def _end_to_end(self, batch: Batch) -> dict[str, Tensor]:
        weights = self.weights
        noisy, levels, inputs = self._question(batch, also_unconditional=weights.guided > 0)
        with torch.no_grad():
            target = self._teach(noisy, levels, inputs)
        taught = self._taps.outputs
        with self._taps.recording():
            output = predict(self.model, noisy, levels.timesteps, inputs)
        layers = self._feature_errors(taught, self.layers) / self.layer_variance
        terms = {
            "output": F.mse_loss(output.float(), target.float()) / self.output_variance[0],
            "layer": layers.mean(),
        }
        if weights.block:
            around = [_around(name) for name in self.layers]
            terms["block"] = (self._feature_errors(taught, around) / self.block_variance).mean()
        if weights.base:
            terms["base"] = self._base_loss(batch, output[: len(batch.latents)])
        if weights.guided:
            terms["guided"] = self._guided_loss(output, target)
        return self._weigh(terms, layers)

    def _curriculum(self, batch: Batch) -> dict[str, Tensor]:
        if self._previous is None:
            raise ValueError("expected a call of follow before the curriculum, got none")
        noisy, levels, inputs = self._question(batch)
        with torch.no_grad():
            # A mean of four has half the noise: twice the mean of the noise is as noisy as before.
            latents, noise = F.avg_pool2d(batch.latents, 2), 2 * F.avg_pool2d(batch.noise, 2)
            small = self.noising.mix(latents, noise, levels)
            followed = self._previous.features(small, levels.timesteps, inputs)
        with self._taps.recording():
            output = predict(self.model, noisy, levels.timesteps, inputs)
        targets = {
            name: _enlarge(tokens, grid, _grid(self.model, name))
            for name, (tokens, grid) in followed.items()
        }
        layers = self._feature_errors(targets, self.layers) / self.layer_variance
        terms = {"layer": layers.mean()}
        if self.weights.base:
            terms["base"] = self._base_loss(batch, output)
        return self._weigh(terms, layers)

    def _question(
        self, batch: Batch, also_unconditional: bool = False
    ) -> tuple[Tensor, Levels, dict]:
        """Noisy latents, their levels and the denoiser's other inputs."""
        levels = self.noising.levels(batch.quantiles)
        noisy = self.noising.mix(batch.latents, batch.noise, levels)
        rows = batch.rows
        if also_unconditional:
            rows = {name: torch.cat((rows[name], batch.unconditional[name])) for name in rows}
            noisy = torch.cat((noisy, noisy))
            levels = Levels(*(torch.cat((value, value)) for value in levels))
        return noisy, levels, denoiser_inputs(self.model, rows)

    def _teach(self, noisy: Tensor, levels: Levels, inputs: dict) -> Tensor:
        """The teacher's output; its features are in the taps then."""
        with softmax_in(self._attentions), without_lora(self._lora), self._taps.recording():
            return predict(self.model, noisy, levels.timesteps, inputs)

    def _feature_errors(self, targets: dict[str, Tensor], names: list[str]) -> Tensor:
        """Mean squared errors ``[L]`` of the student's recorded outputs."""
        found = self._taps.outputs
        return torch.stack([F.mse_loss(found[n].float(), targets[n].float()) for n in names])

    def _base_loss(self, batch: Batch, output: Tensor) -> Tensor:
        levels = self.noising.levels(batch.quantiles)
        target = self.noising.target(batch.latents, batch.noise, levels)
        errors = (output.float() - target.float()).square().mean((1, 2, 3))
        if self.weights.snr_gamma is not None:
            errors = errors * self.noising.min_snr_weights(levels, self.weights.snr_gamma)
        return errors.mean()

    def _guided_loss(self, output: Tensor, target: Tensor) -> Tensor:
        student, teacher = (self._guide(answer.float()) for answer in (output, target))
        return F.mse_loss(student, teacher) / self.output_variance[0]

    def _guide(self, answers: Tensor) -> Tensor:
        told, untold = answers.chunk(2)
        return untold + self.weights.guidance_scale * (told - untold)

    def _weigh(self, terms: dict[str, Tensor], layers: Tensor) -> dict[str, Tensor]:
        weighed = [getattr(self.weights, name) * value for name, value in terms.items()]
        shown = {name: value.detach() for name, value in terms.items()}
        return {"loss": torch.stack(weighed).sum(), **shown, "layers": layers.detach()}


class _Frozen(NamedTuple):
    """The student of half the size, and the taps in it."""

    student: nn.Module
    taps: Observer

    def features(
        self, noisy: Tensor, timesteps: Tensor, inputs: dict
    ) -> dict[str, tuple[Tensor, tuple[int, int]]]:
        """Outputs of the replaced layers, by name, with their grids."""
        with self.taps.recording():
            predict(self.student, noisy, timesteps, inputs)
        layers = [name for name, m in self.student.named_modules() if hasattr(m, "gspn2")]
        return {name: (self.taps.outputs[name], _grid(self.student, name)) for name in layers}


class _Moments:
    """First and second moments of a list of tensors, over batches."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._batches = 0

    def add(self, tensors: list[Tensor]) -> None:
        found = torch.stack(
            [torch.stack((x.float().mean(), x.float().square().mean())) for x in tensors]
        )
        self._sums = found if self._sums is None else self._sums + found
        self._batches += 1

    def variance(self, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        mean, square = reduce(self._sums / self._batches).unbind(1)
        return (square - mean.square()).clamp(min=1e-8)


def _observe_layers(model: nn.Module, layers: list[str]) -> Observer:
    names = {*layers, *map(_around, layers)}
    return Observer({name: model.get_submodule(name) for name in names})


def _around(layer: str) -> str:
    """Name of the transformer block that a layer is in."""
    return layer.rpartition(".")[0]


def _grid(model: nn.Module, layer: str) -> tuple[int, int]:
    return tuple(model.get_submodule(layer).gspn2.grid.shape[:2])


def _enlarge(tokens: Tensor, grid: tuple[int, int], larger: tuple[int, int]) -> Tensor:
    """Tokens ``[n, h w, c]`` of a grid as those of a larger one, bilinearly."""
    maps = tokens.float().transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, larger, mode="bilinear").flatten(2).transpose(1, 2)
