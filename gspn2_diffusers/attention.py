"""The attention class that a patched layer gets, and the processor it computes with.

A layer is patched by changing its class and adding a child, `gspn2`. Its projections, state-dict
keys and processor stay, so that LoRA files still load and unpatching is exact, and no later call
of `set_attn_processor` can switch the block off.
"""

from collections.abc import Sequence

from diffusers.models import attention_processor as stock
from diffusers.utils import logging
from torch import Tensor

logger = logging.get_logger(__name__)

# Processors that compute ordinary softmax attention, for which the block stands in. Others
# (perturbed-attention guidance, attention-map editing, ...) want something of self-attention that
# a scan does not have.
PLAIN_PROCESSORS = (
    stock.AttnProcessor,
    stock.AttnProcessor2_0,
    stock.AttnProcessorNPU,
    stock.FusedAttnProcessor2_0,
    stock.SlicedAttnProcessor,
    stock.XFormersAttnProcessor,
    stock.XLAFlashAttnProcessor2_0,
)
# What pipelines pass to every attention layer and self-attention ignores.
IGNORED_KWARGS = {"scale", "ip_adapter_masks", "ip_hidden_states"}


class GSPN2AttnProcessor:
    """Computes a patched self-attention layer with its GSPN-2 block. Holds no state."""

    def __call__(
        self,
        attn: "GSPN2Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        grid: Sequence[int] | None = None,
    ) -> Tensor:
        """`hidden_states` ``[B, N, C]``, or a map ``[B, C, H, W]``, to the same shape.

        Raises:
            ValueError: cross-attention inputs or a mask were passed, or the grid does not fit.
        """
        if encoder_hidden_states is not None:
            raise ValueError("expected self-attention, got encoder_hidden_states")
        if attention_mask is not None:
            raise ValueError(
                "expected no attention_mask: a GSPN-2 scan visits every token; "
                f"got one of shape {tuple(attention_mask.shape)}"
            )
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        is_map = hidden_states.ndim == 4
        if is_map:
            grid = hidden_states.shape[-2:]
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        hidden_states = attn.gspn2(hidden_states, grid)
        if attn.training:
            hidden_states = attn.to_out[1](hidden_states)  # dropout

        if is_map:
            hidden_states = hidden_states.transpose(1, 2).unflatten(2, tuple(grid))
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        if attn.rescale_output_factor != 1:  # a division is a pass over all tokens
            hidden_states = hidden_states / attn.rescale_output_factor
        return hidden_states


class GSPN2Attention(stock.Attention):
    """A patched `Attention`: its forward pass runs the child `gspn2` instead of softmax attention.

    Never constructed; layers become one by `apply_gspn2` and stop being one by `remove_gspn2`.
    """

    gspn2_enabled = True  # False on an instance: softmax attention, as if unpatched
    gspn2_min_tokens = 0  # softmax attention for fewer tokens than this

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        grid: Sequence[int] | None = None,
        **cross_attention_kwargs,
    ) -> Tensor:
        if not self.gspn2_enabled or _count_tokens(hidden_states) < self.gspn2_min_tokens:
            if temb is not None:
                cross_attention_kwargs["temb"] = temb
            return super().forward(
                hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
            )
        if not isinstance(self.processor, PLAIN_PROCESSORS):
            raise ValueError(
                "expected a processor of plain softmax attention on a layer patched with GSPN-2, "
                f"got {type(self.processor).__name__}: leave this layer as attention with "
                "keep_attention, or set another processor"
            )
        unused = cross_attention_kwargs.keys() - IGNORED_KWARGS
        if unused:
            logger.warning(f"cross_attention_kwargs {sorted(unused)} are ignored by GSPN-2 layers.")
        return GSPN2AttnProcessor()(
            self, hidden_states, encoder_hidden_states, attention_mask, temb, grid
        )


def _count_tokens(hidden_states: Tensor) -> int:
    """N of tokens ``[B, N, C]`` or of a map ``[B, C, H, W]``."""
    if hidden_states.ndim == 4:
        return hidden_states.shape[2] * hidden_states.shape[3]
    return hidden_states.shape[1]


# The class a layer of each attention class becomes; exact types, subclasses compute otherwise.
PATCHED_CLASSES = {stock.Attention: GSPN2Attention}
