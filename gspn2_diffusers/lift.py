"""The layer that writes a block's output."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Elements of one image's output from which a kernel launch costs less than two passes over it.
LARGE_OUTPUT = 1 << 22


class Lift(nn.Linear):
    """A linear layer that adds one vector per image to all of that image's tokens.

    The vector goes in as the bias of the matrix product, which saves a pass over the output.
    """

    def forward(self, y: Tensor, shift: Tensor | None = None) -> Tensor:
        """`y` ``[B, N, P]`` and `shift` ``[B, C]`` to ``[B, N, C]``."""
        if shift is None:
            return super().forward(y)
        bias = shift if self.bias is None else self.bias + shift
        if y.shape[0] == 1:
            return F.linear(y, self.weight, bias[0])
        if self._is_plain_inference(y):
            return self._lift_batch(y, bias)
        lifted = F.linear(y, self.weight)
        return lifted + bias[:, None].to(lifted.dtype)  # autocast leaves the bias in float32

    def _lift_batch(self, y: Tensor, bias: Tensor) -> Tensor:
        if y.is_cuda and y.shape[1] * self.out_features >= LARGE_OUTPUT:
            # There, baddbmm first writes the bias to every token and then reads it back.
            result = y.new_empty(*y.shape[:-1], self.out_features)
            for image_bias, image, part in zip(bias, y, result, strict=True):
                torch.addmm(image_bias, image, self.weight.T, out=part)
            return result
        return torch.baddbmm(bias[:, None], y, self.weight.T.expand(y.shape[0], -1, -1))

    def _is_plain_inference(self, y: Tensor) -> bool:
        """Whether batched products and `out=` work and pay.

        They do not know the tensors of quantisers, gradients or autocast, and a compiler fuses an
        addition with what comes after it.
        """
        return (
            type(self.weight) is nn.Parameter
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(y.device.type)
            and not torch.compiler.is_compiling()
        )
