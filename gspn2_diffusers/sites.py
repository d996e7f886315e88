"""Sites: the self-attention layers of a model that are or could be swapped."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import nn

from .attention import PATCHED_CLASSES
from .families import family_of, find_denoiser
from .grid import read_grid


@dataclass(frozen=True)
class Site:
    """A self-attention layer: its module name, width C, attention heads, grid (H, W) and state."""

    name: str
    channels: int
    heads: int
    grid: tuple[int, int] | None
    patched: bool


# A shell pattern on the site's name, several of them, or a test of the site.
Selection = str | Iterable[str] | Callable[[Site], bool]


def gspn2_sites(
    pipe_or_model: DiffusionPipeline | nn.Module,
    height: int | None = None,
    width: int | None = None,
) -> list[Site]:
    """The self-attention layers of a pipeline or model, in the order of its modules.

    Args:
        pipe_or_model: a diffusers pipeline or a bare model.
        height, width: size of the image in pixels for a pipeline, of the latent for a bare
            model; by default the model's own. Grids are those of a forward pass at this size,
            which runs on the meta device and costs no memory.

    Raises:
        TypeError, ValueError: not a supported model.
    """
    model = find_denoiser(pipe_or_model)
    vae = getattr(pipe_or_model, "vae", None)
    scale = 1 if vae is None else pixels_per_latent(vae.config)
    native = model.config.sample_size
    native = (native, native) if isinstance(native, int) or native is None else tuple(native)
    size = [
        native[axis] if pixels is None else pixels // scale
        for axis, pixels in enumerate((height, width))
    ]
    return _list_sites(model, {} if None in size else _dry_run_grids(model, *size))


def select_sites(
    model: nn.Module,
    selection: Selection | None,
    keep_attention: Selection | None,
    among: Container[str] | None = None,
) -> list[Site]:
    """The sites of `model` chosen by `selection` (None: all) less those of `keep_attention`.

    `among` narrows them to the layers of these names first. The sites' grids, of the model's native
    size, are only worked out for predicates.

    Raises:
        ValueError: a pattern or predicate matches nothing, or nothing is left.
    """
    by_predicate = callable(selection) or callable(keep_attention)
    sites = gspn2_sites(model) if by_predicate else _list_sites(model, {})
    if among is not None:
        sites = [site for site in sites if site.name in among]
    chosen = sites if selection is None else _matching(sites, selection, "sites")
    if keep_attention is not None:
        kept = _matching(sites, keep_attention, "keep_attention")
        chosen = [site for site in chosen if site not in kept]
    if not chosen:
        raise ValueError(
            f"expected at least one of the {len(sites)} self-attention layers to patch, "
            "got none after sites and keep_attention"
        )
    return chosen


def pixels_per_latent(vae_config: Mapping) -> int:
    """Image pixels along one side of a latent pixel of a VAE with this config."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def walk_sites(model: nn.Module) -> Iterator[tuple[str, str, Attention]]:
    """Per site: its name, the name of its grid owner, and the attention module."""
    known = {*PATCHED_CLASSES, *PATCHED_CLASSES.values()}
    grid_owner = family_of(model).grid_owner
    for owner_name, owner in model.named_modules():
        if isinstance(owner, grid_owner):
            for name, module in owner.named_modules(prefix=owner_name):
                if type(module) in known and not module.is_cross_attention:
                    yield name, owner_name, module


def is_patched(attn: nn.Module) -> bool:
    """Whether a module is an attention layer that apply_gspn2 has swapped."""
    return type(attn) in PATCHED_CLASSES.values()


def _list_sites(model: nn.Module, grids: Mapping[str, tuple[int, int]]) -> list[Site]:
    return [
        Site(name, attn.query_dim, attn.heads, grids.get(owner_name), is_patched(attn))
        for name, owner_name, attn in walk_sites(model)
    ]


def _matching(sites: list[Site], selection: Selection, argument: str) -> list[Site]:
    if callable(selection):
        tests = {getattr(selection, "__name__", repr(selection)): selection}
    else:
        patterns = [selection] if isinstance(selection, str) else list(selection)
        tests = {p: lambda site, p=p: fnmatchcase(site.name, p) for p in patterns}
    matched = {label: [site for site in sites if test(site)] for label, test in tests.items()}
    for label, found in matched.items():
        if not found:
            names = ", ".join(site.name for site in sites[:3])
            raise ValueError(
                f"{argument}: expected to match some of the model's {len(sites)} self-attention "
                f"layers ({names}{', ...' if len(sites) > 3 else ''}), but {label!r} matched none"
            )
    return [site for site in sites if any(site in found for found in matched.values())]


def _dry_run_grids(model: nn.Module, height: int, width: int) -> dict[str, tuple[int, int]]:
    """Grid per grid owner, of a forward pass without data through a weightless copy of `model`."""
    family = family_of(model)
    grids = {}
    with torch.device("meta"), torch.no_grad():
        ghost = type(model).from_config(model.config)
        for name, owner in ghost.named_modules():
            if isinstance(owner, family.grid_owner):

                def record(module, args, kwargs, name=name):
                    grids[name] = read_grid(module, args, kwargs)

                owner.register_forward_pre_hook(record, with_kwargs=True)
        sample = torch.zeros(1, model.config.in_channels, height, width)
        timestep = torch.zeros(1, dtype=torch.long)
        ghost(sample, timestep=timestep, **family.conditioning(ghost))
    return grids
