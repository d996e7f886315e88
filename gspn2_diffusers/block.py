"""The GSPN-2 block: what stands in for self-attention (arXiv 2512.07884, section 3)."""

from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .config import GSPN2Config
from .grid import grid_sizes
from .kernels import gspn2_scan_lines, gspn2_scan_tokens
from .kernels.layout import TokenLayout
from .lift import Lift


class GSPN2Block(nn.Module):
    """Token mixing by four line scans in a compact proxy space, ``[B, N, C]`` to ``[B, N, C]``.

    The tokens are never put into another layout: `to_params` writes what the scan reads, in the
    columns of a TokenLayout. Its rows for columns that nobody reads stay zero.

    The directions are summed as they are: a learned merge weight per direction would only rescale
    that direction's rows of u and skip.

    A new block adds nothing but what uniform attention would (the mean path, if it inherited
    one): u and skip start at zero, the propagation weights near 1/3.

    Every line adds lam x to a hidden state that loses nothing, since the weights of a position sum
    to one: h is an integral along the direction, and a line is a step of it. Away from the size
    that the block was made for, lam is therefore multiplied by native lines / lines, so that the
    same picture at another resolution gives the same h. A local scan is left alone: it adds up the
    same number of lines at every size.

    Args:
        channels: C, the width of the tokens.
        config: the block's options.
        native_grid: (H, W) of the tokens at the model's own size; None leaves lam as it is.

    Attributes:
        backend: what runs the scan, as in :func:`gspn2_scan`; no part of config or weights.
        to_lines, down_and_params: while :func:`fuse_gspn2` is in force, one of the two in place of
            `down` and `to_params`; else None.

    Raises:
        ValueError: the config does not fit this width.
    """

    def __init__(
        self,
        channels: int,
        config: GSPN2Config,
        native_grid: Sequence[int] | None = None,
    ):
        super().__init__()
        proxy_dim = config.proxy_dim_for(channels)
        self.config = config
        self.layout = TokenLayout(proxy_dim, config.groups_for(channels))
        self.backend = "auto"
        self.native_grid = None if native_grid is None else tuple(native_grid)
        self.grid: Tensor | None = None

        inputs = channels if config.parameters_from == "tokens" else proxy_dim
        self.down = nn.Linear(channels, proxy_dim, bias=False)
        self.to_params = nn.Linear(inputs, self.layout.width)
        self.register_module("to_lines", None)
        self.register_module("down_and_params", None)
        self.up = Lift(proxy_dim, channels)
        self.mean = nn.Linear(channels, channels, bias=False) if config.mean_path else None
        self._reset_parameters()

    def forward(self, tokens: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Mix `tokens` ``[B, N, C]`` that lie row by row on `grid` (H, W), N = H * W.

        Without `grid` the block uses the one that the model's forward pass left here.

        Raises:
            ValueError: no grid is known, or it does not match N.
            RuntimeError: the backend that was asked for cannot run here.
        """
        grid = grid_sizes(self.grid if grid is None else grid, tokens)
        chunk_size = self.config.chunk_size
        options = {
            "groups": self.layout.groups,
            "chunk_size": chunk_size,
            "native_grid": self.native_grid if chunk_size is None else None,
            "backend": self.backend,
        }
        if self.to_lines is None:
            y = gspn2_scan_tokens(*self._project(tokens), grid, **options)
        else:
            lines = self.to_lines(tokens, grid)
            y = gspn2_scan_lines(*lines, grid, proxy_dim=self.layout.proxy_dim, **options)
        return self.up(y, None if self.mean is None else self.mean(tokens.mean(dim=1)))

    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The proxy features ``[B, N, P]`` and the scan's parameters ``[B, N, K]``."""
        if self.down_and_params is not None:
            both = self.down_and_params(tokens)
            width = self.layout.width
            return both[..., width : width + self.layout.proxy_dim], both[..., :width]
        x = self.down(tokens)
        return x, self.to_params(tokens if self.config.parameters_from == "tokens" else x)

    @torch.no_grad()
    def inherit(self, attention: Attention) -> None:
        """Start from the value path of `attention`, as far as the block can hold it.

        With W = W_out W_value, `down` and `up` become the best rank-P factors of W, `mean` W itself
        and the bias of `up` the layer's own: under uniform attention weights the block then
        equals the layer. The layers are called, not read, so that quantised and offloaded ones
        work too.
        """
        like = self.up.weight
        channels = self.up.out_features
        weight = next(attention.to_v.parameters())
        probe = torch.eye(channels + 1, channels, dtype=weight.dtype, device=weight.device)
        response = attention.to_out[0](attention.to_v(probe)).float()
        bias = response[-1]
        value_path = (response[:-1] - bias).T  # [C, C], applied to column vectors

        left, scale, right = torch.linalg.svd(value_path)
        proxy_dim = self.down.out_features
        root = scale[:proxy_dim].sqrt()
        self.down.weight.copy_((root[:, None] * right[:proxy_dim]).to(like))
        self.up.weight.copy_((left[:, :proxy_dim] * root).to(like))
        self.up.bias.copy_(bias.to(like))
        if self.mean is not None:
            self.mean.weight.copy_(value_path.to(like))

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        nn.init.zeros_(self.up.bias)
        if self.mean is not None:
            nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.to_params.weight)
        nn.init.zeros_(self.to_params.bias)
        logits, lam, _, _ = self.layout.split(self.to_params.weight.T)
        nn.init.normal_(logits, std=0.02)
        nn.init.normal_(lam, std=0.02)
        nn.init.ones_(self.layout.split(self.to_params.bias)[1])
