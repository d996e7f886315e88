"""The sidecar: GSPN-2 blocks as a model of their own, to train, save, publish and load."""

import json
import os
from pathlib import Path

import safetensors
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import logging
from torch import nn

from .block import GSPN2Block
from .config import GSPN2Config
from .families import find_denoiser
from .fuse import is_fused
from .sites import Selection, Site, gspn2_sites, select_sites, walk_sites

logger = logging.get_logger(__name__)

# Which rows of a block's weights mean what; to be raised when that changes.
FORMAT_VERSION = 2


class GSPN2Adapter(ModelMixin, ConfigMixin):
    """The blocks of one patched model, without the model.

    A patched model and its adapter share the block modules: what trains one trains the other.
    It is saved, loaded and published like any diffusers model (`save_pretrained`,
    `from_pretrained`, `push_to_hub`): `config.json` and safetensors.

    Args:
        base_model_class: class name of the model the blocks belong to.
        layers: ``{"name": module name, "channels": C, "grid": [H, W]}`` per replaced self-attention
            layer; grid: of its tokens at the model's own size, None or left out if unknown.
        block_config: keyword arguments of :class:`GSPN2Config`.
        format_version: of the weights, `FORMAT_VERSION` when they were written.

    Raises:
        ValueError: weights of another format, or a block_config that does not fit.
    """

    @register_to_config
    def __init__(
        self,
        base_model_class: str,
        layers: list[dict],
        block_config: dict,
        format_version: int = FORMAT_VERSION,
    ):
        super().__init__()
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version: expected {FORMAT_VERSION}, got {format_version!r}: the weights "
                "are in the order of another version of gspn2_diffusers"
            )
        config = GSPN2Config(**block_config)
        self.blocks = nn.ModuleList(
            GSPN2Block(layer["channels"], config, layer.get("grid")) for layer in layers
        )

    @classmethod
    def for_model(
        cls,
        pipe_or_model: DiffusionPipeline | nn.Module,
        config: GSPN2Config,
        sites: Selection | None = None,
        keep_attention: Selection | None = None,
        inherit: bool = True,
    ) -> "GSPN2Adapter":
        """Fresh blocks for a model, which inherit from its attention layers what they can.

        Args:
            pipe_or_model, config, sites, keep_attention: as in :func:`apply_gspn2`.
            inherit: False starts from random projections, for comparison.

        Raises:
            TypeError, ValueError: unsupported model, selection that matches nothing, or a config
                that does not fit a layer's width.
        """
        model = find_denoiser(pipe_or_model)
        grids = _native_grids(model)
        chosen = select_sites(model, sites, keep_attention)
        layers = [_layer(site, grids.get(site.name)) for site in chosen]
        adapter = cls(type(model).__name__, layers, config.to_dict())
        if inherit:
            for name, block in adapter.blocks_by_site().items():
                block.inherit(model.get_submodule(name))
        return adapter

    @classmethod
    def of_patched(cls, pipe_or_model: DiffusionPipeline | nn.Module) -> "GSPN2Adapter":
        """The blocks that live in a patched model, shared with it.

        Raises:
            TypeError, ValueError: unsupported model, or no layer is patched.
        """
        model = find_denoiser(pipe_or_model)
        patched = [site for site in select_sites(model, None, None) if site.patched]
        if not patched:
            raise ValueError(
                f"expected a model patched by apply_gspn2, got a {type(model).__name__} "
                "without GSPN-2 blocks"
            )
        blocks = [model.get_submodule(site.name).gspn2 for site in patched]
        with torch.device("meta"):  # its own blocks are only placeholders
            pairs = zip(patched, blocks, strict=True)
            layers = [_layer(site, block.native_grid) for site, block in pairs]
            adapter = cls(type(model).__name__, layers, blocks[0].config.to_dict())
        adapter.blocks = nn.ModuleList(blocks)
        return adapter

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Load a folder written by :func:`save_gspn2`, or a hub id; keywords as in diffusers.

        Raises:
            ValueError: no such folder, not a GSPN-2 sidecar, or weights that are damaged or do
                not match its config.
        """
        source = str(pretrained_model_name_or_path)
        if Path(source).is_dir():
            _check_is_sidecar(Path(source))
        elif source.startswith((".", "~", os.sep)) or source.count("/") != 1:
            raise ValueError(
                "expected a folder written by save_gspn2 or a hub id 'owner/name', "
                f"got {source!r}, which is neither"
            )
        options = kwargs | {"output_loading_info": True}
        try:
            adapter, info = super().from_pretrained(source, **options)
        except (OSError, RuntimeError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"{source}: could not load GSPN-2 weights: {error}") from error
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if info[problem]:
                raise ValueError(
                    f"{source}: expected the weights that its config.json describes, "
                    f"got {problem.replace('_', ' ')}: {', '.join(map(str, info[problem][:4]))}"
                )
        return (adapter, info) if kwargs.get("output_loading_info") else adapter

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Write ``config.json`` and safetensors; arguments as in diffusers.

        Raises:
            ValueError: the blocks are fused.
        """
        if any(map(is_fused, self.blocks)):
            raise ValueError(
                "expected blocks as they were trained, got fused ones: call unfuse_gspn2 before "
                "saving, and fuse_gspn2 again after it"
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def sites(self) -> list[str]:
        """Names of the layers the blocks belong to, in the order of `blocks`."""
        return [layer["name"] for layer in self.config.layers]

    def blocks_by_site(self) -> dict[str, GSPN2Block]:
        """The blocks by the names of their layers."""
        return dict(zip(self.sites, self.blocks, strict=True))

    def select(
        self,
        model: nn.Module,
        sites: Selection | None = None,
        keep_attention: Selection | None = None,
    ) -> list[str]:
        """Names of the layers of `model` that these blocks would replace.

        Raises:
            ValueError: the blocks belong to another model, or a selection matches nothing.
        """
        expected = self.config.base_model_class
        if type(model).__name__ != expected:
            raise ValueError(
                f"expected a {expected}, for which these GSPN-2 weights were trained, "
                f"got a {type(model).__name__}"
            )
        channels = {name: attn.query_dim for name, _, attn in walk_sites(model)}
        for layer in self.config.layers:
            name, width = layer["name"], layer["channels"]
            if channels.get(name) != width:
                got = f"{channels[name]} channels" if name in channels else "no such layer"
                raise ValueError(
                    f"expected the model these GSPN-2 weights were trained for, with "
                    f"{width} channels in {name}, got {got}"
                )
        chosen = select_sites(model, sites, keep_attention, among=self.sites)
        return [site.name for site in chosen]


def save_gspn2(
    pipe_or_model: DiffusionPipeline | nn.Module, folder: str | os.PathLike, **kwargs
) -> None:
    """Write the blocks of a patched pipeline or model to `folder`, for :func:`apply_gspn2`.

    Keywords go to diffusers' `save_pretrained` (`variant`, `max_shard_size`, `push_to_hub`, ...).

    Raises:
        TypeError, ValueError: unsupported model, no layer is patched, or the blocks are fused.
    """
    GSPN2Adapter.of_patched(pipe_or_model).save_pretrained(folder, **kwargs)


def _native_grids(model: nn.Module) -> dict[str, tuple[int, int] | None]:
    """Grids of the layers at the model's own size; none where a pass without data does not run."""
    try:
        return {site.name: site.grid for site in gspn2_sites(model)}
    except Exception as error:  # a model may want inputs of kinds that its family does not know
        logger.warning(
            f"The grids of {type(model).__name__} at its own size are unknown ({error}): "
            "its blocks do not adapt to other sizes."
        )
        return {}


def _layer(site: Site, grid: tuple[int, int] | None) -> dict:
    grid = None if grid is None else list(grid)
    return {"name": site.name, "channels": site.channels, "grid": grid}


def _check_is_sidecar(folder: Path) -> None:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{folder}: expected a config.json of GSPN-2 weights, found none")
    try:
        class_name = json.loads(config_file.read_text()).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config_file}: expected JSON, got a damaged file: {error}") from error
    if class_name != GSPN2Adapter.__name__:
        raise ValueError(
            f"{config_file}: expected the config of a {GSPN2Adapter.__name__}, got {class_name!r}"
        )
