"""How blocks learn the height and width of the map behind their tokens.

diffusers passes attention layers a sequence of tokens and never the grid it came from, and N does
not determine it. The module that flattens the map, the *grid owner*, knows: a forward pre-hook
there reads the shape of its input and leaves it on the blocks. It travels as a zero-element tensor
of shape (H, W, 0), because torch.compile treats the sizes of a tensor as dynamic, where plain
integers would cost a recompilation for every new size.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def read_grid(owner: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
    """Grid (H, W) of the tokens that `owner` makes of its input ``[B, C, height, width]``.

    Raises:
        ValueError: the input is not a four-dimensional map.
    """
    hidden_states = _input_map(args, kwargs)
    if hidden_states.ndim != 4:
        raise ValueError(
            f"{type(owner).__name__}: expected an input map [B, C, height, width] to read the grid "
            f"from, got shape {tuple(hidden_states.shape)}"
        )
    patch_size = owner.config.patch_size or 1
    return hidden_states.shape[-2] // patch_size, hidden_states.shape[-1] // patch_size


def leave_grid(sites: Sequence[str], owner: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of a grid owner: write its grid on the blocks of `sites` below it."""
    grid = _input_map(args, kwargs).new_empty(*read_grid(owner, args, kwargs), 0)
    for site in sites:
        owner.get_submodule(site).gspn2.grid = grid


def attach_grid_hook(owner: nn.Module, sites: Sequence[str]) -> None:
    """Make `owner` tell the blocks of `sites` (attention names relative to it) their grid."""
    owner.register_forward_pre_hook(partial(leave_grid, tuple(sites)), with_kwargs=True)


def detach_grid_hook(owner: nn.Module) -> None:
    """Undo :func:`attach_grid_hook`; found by its function, so that copies of a model work too."""
    for key, hook in list(owner._forward_pre_hooks.items()):
        if isinstance(hook, partial) and hook.func is leave_grid:
            del owner._forward_pre_hooks[key]
            owner._forward_pre_hooks_with_kwargs.pop(key, None)


def checkpoint_with_grid(module: nn.Module, *args) -> Tensor:
    """Gradient checkpointing that recomputes every block on the grid of its own forward pass.

    Needed when one backward pass covers several forward passes of different sizes::

        unet.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint_with_grid)
    """
    grids = {block: block.grid for block in module.modules() if hasattr(block, "grid")}

    def run(*args):
        for block, grid in grids.items():
            block.grid = grid
        return module(*args)

    return checkpoint(run, *args, use_reentrant=False)


def grid_sizes(grid: Tensor | Sequence[int] | None, tokens: Tensor) -> tuple[int, int]:
    """(H, W) from what a block was given, checked against its tokens ``[B, N, C]``.

    Raises:
        ValueError: no grid is known, or H * W is not N.
    """
    if grid is None:
        raise ValueError(
            "expected the grid (height, width) of the tokens, got none: run the layer inside its "
            "model, whose forward pass provides it, or pass grid=(height, width)"
        )
    height, width = grid.shape[:2] if isinstance(grid, torch.Tensor) else grid
    if height * width != tokens.shape[1]:
        raise ValueError(
            f"expected {height * width} tokens for a grid of {height} x {width}, "
            f"got {tokens.shape[1]}"
        )
    return height, width


def _input_map(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
