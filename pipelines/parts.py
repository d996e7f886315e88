"""The models of a pipeline, and copies of them without data."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from gspn2_diffusers.adapter import GSPN2Adapter
from gspn2_diffusers.attention import PATCHED_CLASSES
from gspn2_diffusers.block import GSPN2Block
from gspn2_diffusers.conditioning import native_side, side_step
from gspn2_diffusers.families import FAMILIES, find_denoiser
from gspn2_diffusers.fuse import fuse_block
from gspn2_diffusers.grid import attach_grid_hook
from gspn2_diffusers.lift import Lift
from gspn2_diffusers.pipelines.loading import load_failure, resolve_model
from gspn2_diffusers.sites import pixels_per_latent, walk_sites

# Where libraries that offload or cast weights hang themselves onto a module.
HOOKS = ("_hf_hook", "_old_forward", "_diffusers_hook", "forward")


@dataclass(frozen=True)
class Parts:
    """What a pipeline computes with.

    Args:
        denoiser: a UNet or transformer, patched or not.
        vae: None for a denoiser alone, whose sizes are then in latent pixels.
        others: text encoders and whatever else runs before the denoiser does.
        device: on which they compute.
        offloaded: whether only the part that runs is there, as `enable_model_cpu_offload` has it.
    """

    denoiser: nn.Module
    vae: nn.Module | None = None
    others: tuple[nn.Module, ...] = ()
    device: torch.device = torch.device("meta")
    offloaded: bool = False

    @classmethod
    def of(cls, pipe_or_model: DiffusionPipeline | nn.Module) -> Parts:
        """The parts of a pipeline, or a bare denoiser.

        Raises:
            TypeError, ValueError: not a supported model.
        """
        denoiser = find_denoiser(pipe_or_model)
        if not isinstance(pipe_or_model, DiffusionPipeline):
            return cls(denoiser, device=denoiser.device)
        parts = {
            name: getattr(part, "_orig_mod", part)
            for name, part in pipe_or_model.components.items()
            if isinstance(part, nn.Module)
        }
        vae = parts.get("vae")
        others = tuple(part for part in parts.values() if part is not denoiser and part is not vae)
        offloaded = isinstance(getattr(denoiser, "_hf_hook", None), CpuOffload)
        return cls(denoiser, vae, others, pipe_or_model._execution_device, offloaded)

    @property
    def all(self) -> tuple[nn.Module, ...]:
        return tuple(part for part in (self.denoiser, self.vae, *self.others) if part is not None)

    @property
    def pixels_per_latent(self) -> int:
        return 1 if self.vae is None else pixels_per_latent(self.vae.config)

    @property
    def native_pixels(self) -> int:
        """Side of the square picture that the denoiser is made for."""
        return native_side(self.denoiser, self.pixels_per_latent)

    @property
    def size_step(self) -> int:
        """Pixels of which the sides of smaller stages are multiples."""
        return side_step(self.denoiser, self.pixels_per_latent)

    def bytes_on_device(self) -> int:
        """Weights that are on the device now."""
        tensors = _tensors(self.all)
        return sum(tensor.nbytes for tensor in tensors if tensor.device == self.device)


def outline_parts(
    model: str | Path, *, weights: str | Path | None = None, dtype: torch.dtype = torch.bfloat16
) -> Parts:
    """The parts of a pipeline from its configuration files alone, without data.

    Args:
        model: pipeline folder or hub id.
        weights: GSPN-2 sidecar, folder or hub id, whose blocks the denoiser gets, fused; they
            compute above the model's own size.
        dtype: of all parts.

    Raises:
        ValueError: no pipeline there, one without a supported model, or weights of another model.
        OSError: the hub has no such model, or cannot be reached.
    """
    source = resolve_model(model)
    try:
        index = DiffusionPipeline.load_config(source)
        with torch.device("meta"):
            modules = {
                part: _outline(source, part, *entry[:2])
                for part, entry in index.items()
                if isinstance(entry, list) and None not in entry
            }
    except OSError as error:
        raise OSError(load_failure(source, error)) from error
    modules = {part: module.to(dtype).eval() for part, module in modules.items() if module}
    supported = tuple(family.model_class for family in FAMILIES)
    denoisers = [module for module in modules.values() if isinstance(module, supported)]
    if len(denoisers) != 1:
        expected = ", ".join(kind.__name__ for kind in supported)
        found = ", ".join(type(module).__name__ for module in modules.values()) or "no models"
        raise ValueError(f"expected a pipeline with one model of {expected}; got {found}")
    if weights is not None:
        _patch(denoisers[0], weights, dtype)
    vae = modules.get("vae")
    others = [part for part in modules.values() if part is not denoisers[0] and part is not vae]
    return Parts(denoisers[0], vae, tuple(others))


def _outline(source: str, part: str, library: str, name: str) -> nn.Module | None:
    """A module without data; None for what is no module."""
    libraries = {"diffusers": diffusers, "transformers": transformers}
    kind = getattr(libraries.get(library), name, None)
    if not isinstance(kind, type):
        return None
    if issubclass(kind, diffusers.ModelMixin):
        return kind.from_config(kind.load_config(source, subfolder=part))
    if issubclass(kind, transformers.PreTrainedModel):
        return kind(kind.config_class.from_pretrained(source, subfolder=part))
    return None


def _patch(denoiser: nn.Module, weights: str | Path, dtype: torch.dtype) -> None:
    """Give a denoiser without data the blocks of a sidecar, as apply_gspn2 and fuse_gspn2 do."""
    config = GSPN2Adapter.load_config(str(weights))
    with torch.device("meta"):
        adapter = GSPN2Adapter.from_config(config).to(dtype)
    chosen, blocks = adapter.select(denoiser), adapter.blocks_by_site()
    for name, owner_name, attn in list(walk_sites(denoiser)):
        if name in chosen:
            attn.gspn2 = block = blocks[name]
            fuse_block(block)
            attn.__class__ = PATCHED_CLASSES[type(attn)]
            if block.native_grid is not None:
                attn.gspn2_min_tokens = math.prod(block.native_grid) + 1
            attach_grid_hook(denoiser.get_submodule(owner_name), [_within(name, owner_name)])


def _within(name: str, owner_name: str) -> str:
    return name.removeprefix(owner_name).lstrip(".")


def without_data(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device, in evaluation mode and without offload hooks.

    It computes in the dtype that the module computes in, and shares nothing with it.

    Raises:
        ValueError: quantised weights, whose operators cannot run without data.
    """
    if getattr(module, "hf_quantizer", None) is not None:
        raise ValueError(f"expected weights as they are, got a quantised {type(module).__name__}")
    memo: dict[int, object] = {}
    dtype = module.dtype
    for part in module.modules():
        memo |= {id(vars(part)[name]): None for name in HOOKS if name in vars(part)}
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            memo[id(tensor)] = _emptied(tensor, dtype)
    ghost = copy.deepcopy(module, memo)
    for part in ghost.modules():
        for name in HOOKS:
            vars(part).pop(name, None)
        if isinstance(part, GSPN2Block):
            part.backend = "torch"  # "cuda" would refuse; a trace counts what CUDA does
        if type(part) is Lift:
            part.__class__ = _LiftWithoutData
    return ghost.eval()


class _LiftWithoutData(Lift):
    """Does not ask for autocast, which torch does not know on the meta device."""

    def _is_plain_inference(self, y: Tensor) -> bool:
        return True


def _emptied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Layer-wise casting keeps weights in 8 bits and computes in more.
    stored = tensor.is_floating_point() and tensor.itemsize == 1
    empty = torch.empty_like(tensor, device="meta", dtype=dtype if stored else tensor.dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Memory of their parameters and buffers, shared ones once."""
    return sum(tensor.nbytes for tensor in _tensors(modules))


def _tensors(modules: Iterable[nn.Module]) -> Collection[Tensor]:
    return {
        id(tensor): tensor
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    }.values()
