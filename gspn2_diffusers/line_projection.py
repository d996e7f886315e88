"""The projections of a block as matrix products that write the lines which the scan reads."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.layout import TokenLayout, pad

ALIGNMENT = 8  # of rows of weights and proxy features: 16 bytes of 16-bit numbers


class LineProjection(nn.Module):
    """Proxy features and parameters of tokens, as :func:`gspn2_scan_lines` takes them.

    A projection of tokens puts the channels of a token beside each other, the scan wants the
    positions of a line there. A matrix product for each line, weights times proxy features
    transposed, writes them so, and no pass over all parameters is needed to transpose them.

    Proxy features carry a channel that is one, and zeros up to a whole vector: the weights that
    meet it are the biases. Where the features of a line are to be copied, weights are those of an
    identity, which is exact.

    Args:
        down: the layer from tokens to proxy features, P of C, without bias.
        to_params: the layer from proxy features to the parameters, K of P.
        layout: of the parameters.
    """

    @torch.no_grad()
    def __init__(self, down: nn.Linear, to_params: nn.Linear, layout: TokenLayout):
        super().__init__()
        self.layout = layout
        proxy_dim, weight = layout.proxy_dim, to_params.weight
        unused = -(proxy_dim + 1) % ALIGNMENT
        one = F.one_hot(torch.tensor(proxy_dim), proxy_dim + 1 + unused).to(weight)
        parameters = torch.cat(
            [weight, to_params.bias[:, None], weight.new_zeros(len(weight), unused)], dim=1
        )
        identity = torch.eye(proxy_dim, len(one), dtype=weight.dtype, device=weight.device)
        upright, sideways, unread = layout.by_line()

        def parameter(tensor: Tensor, like: Tensor) -> nn.Parameter:
            return nn.Parameter(tensor, requires_grad=like.requires_grad)

        self.down = parameter(F.pad(down.weight, (0, 0, 0, 1 + unused)), down.weight)
        self.one = parameter(one, to_params.bias)
        self.rows = parameter(torch.cat([identity, parameters[upright]]), weight)
        self.columns = parameter(torch.cat([identity, parameters[sideways]]), weight)
        self.unread = parameter(parameters[unread], weight)  # kept for weights()
        self.train(to_params.training)

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`tokens` ``[B, N, C]`` on `grid` (H, W) to rows ``[B, H, R, padded]`` and columns
        ``[B, W, R, padded]``."""
        height, width = grid
        x = F.linear(tokens, self.down, self.one)
        right, below = (pad(side, x.element_size()) - side for side in (width, height))
        high, wide, inner = height + below, width + right, x.shape[-1]
        if right or below:  # without their one, positions beyond the map have parameters of zero
            x = F.pad(x.view(-1, height, width, inner), (0, 0, 0, right, 0, below))
        x = x.view(-1, wide, inner)  # [B * H, W, X]
        rows = self.rows.expand(x.shape[0], -1, -1).bmm(x.mT)
        columns = self.columns.expand(wide, -1, -1).bmm(x.permute(1, 2, 0))
        rows = rows.view(-1, high, *rows.shape[1:])
        columns = columns.view(*columns.shape[:2], -1, high).permute(2, 0, 1, 3)
        return (rows[:, :height], columns[:, :width]) if right or below else (rows, columns)

    @torch.no_grad()
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the weight of `down`, and of weight and bias of `to_params`."""
        proxy_dim = self.layout.proxy_dim
        in_order = torch.cat([self.rows[proxy_dim:], self.columns[proxy_dim:], self.unread])
        parameters = torch.empty_like(in_order)
        parameters[torch.cat(self.layout.by_line())] = in_order
        weight, bias = parameters[:, :proxy_dim], parameters[:, proxy_dim]
        return self.down[:proxy_dim].clone(), weight.clone(), bias.clone()
