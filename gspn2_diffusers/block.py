"""The GSPN-2 block: what stands in for self-attention (arXiv 2512.07884, section 3)."""

from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .config import GSPN2Config
from .grid import grid_sizes
from .kernels import DIRECTIONS, gspn2_scan


class GSPN2Block(nn.Module):
    """Token mixing by four line scans in a compact proxy space, ``[B, N, C]`` to ``[B, N, C]``.

    The directions are summed as they are: a learned merge weight per direction would only rescale
    that direction's rows of u and skip.

    A new block adds nothing but what uniform attention would (the mean path, if it inherited
    one): u and skip start at zero, the propagation weights near 1/3.

    Args:
        channels: C, the width of the tokens.
        config: the block's options.

    Raises:
        ValueError: the config does not fit this width.
    """

    def __init__(self, channels: int, config: GSPN2Config):
        super().__init__()
        proxy_dim = config.proxy_dim_for(channels)
        groups = config.groups_for(channels)
        self.config = config
        self.split_sizes = [3 * len(DIRECTIONS) * groups] + 3 * [len(DIRECTIONS) * proxy_dim]
        self.grid: Tensor | None = None

        inputs = channels if config.parameters_from == "tokens" else proxy_dim
        self.down = nn.Linear(channels, proxy_dim, bias=False)
        self.to_params = nn.Linear(inputs, sum(self.split_sizes))
        self.up = nn.Linear(proxy_dim, channels)
        self.mean = nn.Linear(channels, channels, bias=False) if config.mean_path else None
        self._reset_parameters()

    def forward(self, tokens: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Mix `tokens` ``[B, N, C]`` that lie row by row on `grid` (H, W), N = H * W.

        Without `grid` the block uses the one that the model's forward pass left here.

        Raises:
            ValueError: no grid is known, or it does not match N.
        """
        height, width = grid_sizes(self.grid if grid is None else grid, tokens)
        x = self.down(tokens)
        params = self.to_params(tokens if self.config.parameters_from == "tokens" else x)
        logits, lam, u, skip = _to_image(params, height, width).split(self.split_sizes, dim=1)
        y = gspn2_scan(
            _to_image(x, height, width),
            logits.unflatten(1, (len(DIRECTIONS), -1, 3)),
            *(gate.unflatten(1, (len(DIRECTIONS), -1)) for gate in (lam, u, skip)),
            chunk_size=self.config.chunk_size,
        )
        mixed = self.up(y.flatten(2).transpose(1, 2))
        if self.mean is not None:
            mixed = mixed + self.mean(tokens.mean(dim=1, keepdim=True))
        return mixed

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
        weights = self.to_params.weight.split(self.split_sizes)
        biases = self.to_params.bias.split(self.split_sizes)
        for weight, bias, std, start in zip(
            weights, biases, (0.02, 0.02, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), strict=True
        ):
            nn.init.normal_(weight, std=std)
            nn.init.constant_(bias, start)


def _to_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """``[B, H * W, K]`` to ``[B, K, H, W]``, a view."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))
