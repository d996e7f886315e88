"""Put GSPN-2 blocks into a model, take them out, or switch them off for a while."""

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import nn

from .adapter import GSPN2Adapter
from .attention import PATCHED_CLASSES
from .block import GSPN2Block
from .config import GSPN2Config
from .families import find_denoiser
from .grid import attach_grid_hook, detach_grid_hook
from .kernels.backends import check_backend
from .sites import Selection, is_patched, select_sites, walk_sites

PipeOrModel = TypeVar("PipeOrModel", bound=DiffusionPipeline | nn.Module)


class UntrainedBlocksWarning(UserWarning):
    """Fresh GSPN-2 blocks were put into a model: it has to be trained before it draws."""


def apply_gspn2(
    pipe_or_model: PipeOrModel,
    weights_or_config: str | os.PathLike | GSPN2Adapter | GSPN2Config,
    *,
    sites: Selection | None = None,
    keep_attention: Selection | None = None,
    drop_attention: bool = False,
    min_tokens: int | Literal["native"] = 0,
    backend: str = "auto",
) -> PipeOrModel:
    """Replace self-attention by GSPN-2 blocks, in place. An earlier patch is undone first.

    Args:
        pipe_or_model: a diffusers pipeline or a bare model.
        weights_or_config: trained blocks (a folder of :func:`save_gspn2`, a hub id, or an adapter,
            whose blocks are then shared with the model), or a config for fresh, untrained ones.
        sites: which layers: a shell pattern on the names that :func:`gspn2_sites` lists,
            several patterns, or a predicate on a Site. Default: every self-attention layer, or
            every layer the weights have.
        keep_attention: layers to leave as attention, chosen in the same ways.
        drop_attention: delete the query, key, value and output projections that the blocks
            replace, to save memory. The model can then no longer be unpatched or saved whole.
        min_tokens: a layer computes its own softmax attention for fewer tokens than this, chosen
            anew in every forward pass; "native": for as many as it has at the model's own size,
            or fewer. It is not saved with the blocks.
        backend: what runs the blocks' scans: the "cuda" kernels, plain "torch", or "auto", the
            former where they can run and the latter elsewhere. It is not saved with the blocks.

    Returns:
        `pipe_or_model`, patched.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: unsupported model, selection that matches nothing, unknown backend, min_tokens
            that does not fit, weights that are damaged or belong to another model. The model is
            then as it was before.
    """
    check_backend(backend)
    _check_min_tokens(min_tokens, drop_attention)
    model = find_denoiser(pipe_or_model)
    _check_restorable(model)
    if isinstance(weights_or_config, GSPN2Config):
        chosen = [site.name for site in select_sites(model, sites, keep_attention)]
        _check_swappable(model, chosen)
        adapter = GSPN2Adapter.for_model(model, weights_or_config, chosen)
        _warn_untrained(model, len(chosen))
    else:
        adapter = _load_adapter(weights_or_config)
        chosen = adapter.select(model, sites, keep_attention)
        _check_swappable(model, chosen)

    blocks = adapter.blocks_by_site()
    fewest = {name: _min_tokens_of(name, blocks[name], min_tokens) for name in chosen}
    remove_gspn2(model)
    owners: dict[str, list[str]] = {}
    for name, owner_name, attn in walk_sites(model):
        if name in chosen:
            owners.setdefault(owner_name, []).append(name.removeprefix(owner_name).lstrip("."))
            blocks[name].backend = backend
            _swap(attn, blocks[name], drop_attention)
            attn.gspn2_min_tokens = fewest[name]
    for owner_name, names in owners.items():
        attach_grid_hook(model.get_submodule(owner_name), names)
    return pipe_or_model


def remove_gspn2(pipe_or_model: PipeOrModel) -> PipeOrModel:
    """Give a patched model its own attention back, exactly; an unpatched one stays as it is.

    Raises:
        TypeError: neither a pipeline nor a model.
        ValueError: unsupported model, or its attention was dropped or hooked; nothing changed.
    """
    model = find_denoiser(pipe_or_model)
    _check_restorable(model)
    originals = {swapped: original for original, swapped in PATCHED_CLASSES.items()}
    for _, owner_name, attn in list(walk_sites(model)):
        if is_patched(attn):
            del attn.gspn2
            for name in ("gspn2_enabled", "gspn2_min_tokens"):
                attn.__dict__.pop(name, None)
            attn.__class__ = originals[type(attn)]
            detach_grid_hook(model.get_submodule(owner_name))
    return pipe_or_model


@contextmanager
def softmax_attention(pipe_or_model: DiffusionPipeline | nn.Module) -> Iterator[None]:
    """While inside, patched layers compute their own softmax attention: the teacher's forward pass.

    Raises:
        ValueError: the attention of a patched layer was dropped.
    """
    with softmax_in(attn for _, _, attn in walk_sites(find_denoiser(pipe_or_model))):
        yield


@contextmanager
def softmax_in(layers: Iterable[Attention]) -> Iterator[None]:
    """:func:`softmax_attention` for those of these layers that are patched.

    Raises:
        ValueError: the attention of a patched layer was dropped.
    """
    layers = [attn for attn in layers if is_patched(attn) and attn.gspn2_enabled]
    if not all(map(_has_own_attention, layers)):
        raise ValueError("expected the layers' own attention, but it was dropped from this model")
    for attn in layers:
        attn.gspn2_enabled = False
    try:
        yield
    finally:
        for attn in layers:
            attn.__dict__.pop("gspn2_enabled", None)


def _swap(attn: Attention, block: nn.Module, drop_attention: bool) -> None:
    weight = next(attn.to_out[0].parameters())
    attn.gspn2 = block.to(device=weight.device, dtype=weight.dtype)
    attn.__class__ = PATCHED_CLASSES[type(attn)]
    if drop_attention:
        for name in ("to_q", "to_k", "to_v"):
            delattr(attn, name)
        attn.to_out[0] = nn.Identity()


def _check_min_tokens(min_tokens: int | str, drop_attention: bool) -> None:
    if min_tokens != "native" and (not isinstance(min_tokens, int) or min_tokens < 0):
        raise ValueError(
            "min_tokens: expected a number of tokens of at least 0, or 'native', "
            f"got {min_tokens!r}"
        )
    if min_tokens and drop_attention:
        raise ValueError(
            f"min_tokens: expected 0 with drop_attention=True, which leaves no softmax attention, "
            f"got {min_tokens!r}"
        )


def _min_tokens_of(site: str, block: GSPN2Block, min_tokens: int | str) -> int:
    if min_tokens != "native":
        return min_tokens
    if block.native_grid is None:
        raise ValueError(
            f"min_tokens: expected a number of tokens, got 'native': the weights do not say what "
            f"{site} has at the model's own size"
        )
    return math.prod(block.native_grid) + 1


def _load_adapter(weights: str | os.PathLike | GSPN2Adapter) -> GSPN2Adapter:
    if isinstance(weights, GSPN2Adapter):
        return weights
    if isinstance(weights, str | os.PathLike):
        return GSPN2Adapter.from_pretrained(weights)
    raise TypeError(
        f"expected a folder, hub id, GSPN2Adapter or GSPN2Config, got {type(weights).__name__}"
    )


def _has_own_attention(attn: Attention) -> bool:
    return hasattr(attn, "to_q")


def _check_restorable(model: nn.Module) -> None:
    for name, _, attn in walk_sites(model):
        if is_patched(attn):
            _check_not_hooked(name, attn)
            if not _has_own_attention(attn):
                raise ValueError(
                    f"{name}: expected the layer's own attention, but it was deleted by "
                    "apply_gspn2(..., drop_attention=True): load the model again"
                )


def _check_swappable(model: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        attn = model.get_submodule(name)
        _check_not_hooked(name, attn)
        if any(parameter.is_meta for parameter in attn.parameters()):
            raise ValueError(
                f"{name}: expected weights in memory, got meta tensors: call apply_gspn2 before "
                "enable_sequential_cpu_offload"
            )


def _check_not_hooked(name: str, attn: Attention) -> None:
    # A hook library that replaced `forward` on the instance holds on to the class's old one.
    if "forward" in attn.__dict__:
        raise ValueError(
            f"{name}: expected a layer whose forward is its class's own, got one replaced by a "
            "hook: remove the hook (offload, cache, ...), patch or unpatch, then set it again"
        )


def _warn_untrained(model: nn.Module, count: int) -> None:
    warnings.warn(
        f"{count} self-attention layers of this {type(model).__name__} now hold untrained GSPN-2 "
        "blocks: its images will be noise until the blocks are trained. Train them by distillation "
        "from the model itself, or pass trained weights (a folder or hub id) to apply_gspn2.",
        UntrainedBlocksWarning,
        stacklevel=3,
    )
