"""Faster inference: the layers of a block rearranged for fewer passes over memory."""

from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .block import GSPN2Block
from .families import find_denoiser
from .kernels.layout import ROW_MULTIPLE
from .lift import Lift
from .line_projection import LineProjection
from .sites import is_patched, walk_sites

PipeOrModel = TypeVar("PipeOrModel", bound=DiffusionPipeline | nn.Module)


def fuse_gspn2(pipe_or_model: PipeOrModel) -> PipeOrModel:
    """Fuse the layers of every GSPN-2 block for inference, in place; twice is as once.

    Outputs change by rounding only. The bias of `up` moves to `mean`. `down` and `to_params` become
    a :class:`LineProjection`, or with ``parameters_from="tokens"`` one linear layer. Weights are
    moved, not kept twice, so a fused model cannot be saved by :func:`save_gspn2`: unfuse it first.
    :func:`unfuse_gspn2` gives the weights back bit for bit, but as new parameters, which an
    optimizer made before does not know.

    Raises:
        TypeError: neither a pipeline nor a model.
        ValueError: unsupported model, one without GSPN-2 blocks, or one whose blocks are offloaded,
            hooked, quantised or wrapped, by LoRA for instance; nothing changed.
    """
    blocks = _blocks_by_site(pipe_or_model)
    if not blocks:
        raise ValueError(
            "expected a model patched by apply_gspn2, got one without GSPN-2 blocks to fuse"
        )
    separate = {name: block for name, block in blocks.items() if not is_fused(block)}
    _check_plain(separate)
    for block in separate.values():
        fuse_block(block)
    return pipe_or_model


def unfuse_gspn2(pipe_or_model: PipeOrModel) -> PipeOrModel:
    """Undo :func:`fuse_gspn2`, bit for bit; a model that is not fused stays as it is.

    Raises:
        TypeError, ValueError: as :func:`fuse_gspn2`; a model without GSPN-2 blocks is no error.
    """
    blocks = _blocks_by_site(pipe_or_model)
    fused = {name: block for name, block in blocks.items() if is_fused(block)}
    _check_plain(fused)
    for block in fused.values():
        if block.config.parameters_from == "tokens":
            _part_projections(block)
        else:
            _part_lines(block)
        if block.mean is not None:
            block.mean.bias, block.up.bias = None, block.mean.bias
    return pipe_or_model


def fuse_block(block: GSPN2Block) -> None:
    """Fuse the layers of one block that is not fused and whose weights are its own."""
    if block.config.parameters_from == "tokens":
        _join_projections(block)
    else:
        block.to_lines = LineProjection(block.down, block.to_params, block.layout)
        block.down = block.to_params = None
    if block.mean is not None:
        block.mean.bias, block.up.bias = block.up.bias, None


def is_fused(block: GSPN2Block) -> bool:
    """Whether :func:`fuse_gspn2` has rearranged the weights of a block."""
    return block.down_and_params is not None or block.to_lines is not None


@torch.no_grad()
def _join_projections(block: GSPN2Block) -> None:
    # Rows of whole memory sectors, with the parameters first: both slices are then aligned.
    params, down = block.to_params, block.down
    joint = block.layout.width + block.layout.proxy_dim
    unread = -joint % ROW_MULTIPLE
    zeros = down.weight.new_zeros(unread, down.in_features)
    weight = torch.cat([params.weight, down.weight, zeros])
    bias = torch.cat([params.bias, params.bias.new_zeros(block.layout.proxy_dim + unread)])
    block.down_and_params = _linear(weight, bias, params.weight, params.training)
    block.down = block.to_params = None


@torch.no_grad()
def _part_projections(block: GSPN2Block) -> None:
    joint, width = block.down_and_params, block.layout.width
    kind = joint.weight, joint.training
    weight = joint.weight[width : width + block.layout.proxy_dim]
    block.down = _linear(weight.clone(), None, *kind)
    block.to_params = _linear(joint.weight[:width].clone(), joint.bias[:width].clone(), *kind)
    block.down_and_params = None


def _part_lines(block: GSPN2Block) -> None:
    lines = block.to_lines
    down, weight, bias = lines.weights()
    block.down = _linear(down, None, lines.down, lines.training)
    block.to_params = _linear(weight, bias, lines.rows, lines.training)
    block.to_lines = None


def _linear(weight: Tensor, bias: Tensor | None, like: Tensor, training: bool) -> nn.Linear:
    """A layer with these weights, trained if `like` is."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    trained = like.requires_grad
    layer.weight = nn.Parameter(weight, requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=trained)
    return layer.train(training)


def _blocks_by_site(pipe_or_model: DiffusionPipeline | nn.Module) -> dict[str, GSPN2Block]:
    sites = walk_sites(find_denoiser(pipe_or_model))
    return {name: attn.gspn2 for name, _, attn in sites if is_patched(attn)}


def _check_plain(blocks: dict[str, GSPN2Block]) -> None:
    """Check that the weights of these blocks may be rearranged."""
    for site, block in blocks.items():
        for name, layer in block.named_children():
            _check_plain_layer(f"{site}.gspn2.{name}", layer)


def _check_plain_layer(name: str, layer: nn.Module) -> None:
    # An offloading or casting hook replaces `forward` on the instance.
    if "forward" in layer.__dict__ or any(weight.is_meta for weight in layer.parameters()):
        raise ValueError(
            f"{name}: expected a layer without hooks, got one that is offloaded or cast on the "
            "fly: fuse or unfuse first, then set up the hook"
        )
    kinds = {type(weight) for weight in layer.parameters()}
    if type(layer) not in (nn.Linear, Lift, LineProjection) or kinds != {nn.Parameter}:
        kind = max(kinds, key=lambda kind: kind is not nn.Parameter, default=None)
        raise ValueError(
            f"{name}: expected a linear layer with weights of its own, got {type(layer).__name__} "
            f"with {getattr(kind, '__name__', 'none')}: fuse before quantising, and merge or "
            "unload LoRA first"
        )
