"""A UNet's forward pass that needs little memory, for latents that the model's own cannot take.

Besides its weights it holds the skip connections (not even these with `offload_skips`), the input
and the output of one layer, and pieces of bounded size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from gspn2_diffusers.pipelines import strips


@dataclass(frozen=True)
class LeanOptions:
    """How a :class:`LeanUNet` saves memory.

    Args:
        max_elements: largest number of elements of a temporary piece. A layer whose tensors are
            no larger runs as it is.
        offload_skips: skip connections, and deep features to be reused, wait in CPU memory while
            the UNet is on a CUDA device.

    Raises:
        ValueError: max_elements below 1.
    """

    max_elements: int = 2**30
    offload_skips: bool = False

    def __post_init__(self):
        if self.max_elements < 1:
            raise ValueError(f"max_elements: expected at least 1, got {self.max_elements}")


class DeepFeatures:
    """What a full pass computed below a UNet's first level, for later passes to reuse.

    It changes slowly from step to step (DeepCache, arXiv 2312.00858). An empty one is filled by
    the next pass; a filled one spares the following passes all but the first level. Passes with
    other prompts or other guidance need their own.
    """

    def __init__(self):
        self._parked: Parked | None = None
        self._sample_shape: torch.Size | None = None
        self._buffer: Tensor | None = None

    @property
    def filled(self) -> bool:
        return self._parked is not None

    def clear(self) -> None:
        """Forget the features: the next pass is a full one."""
        self._parked = None

    def keep(self, hidden: Tensor, sample_shape: torch.Size, away: bool) -> None:
        """Fill with what the last up block received in a pass over latents of this shape."""
        self._parked = Parked(hidden, away, self._buffer)
        self._buffer, self._sample_shape = self._parked.buffer, sample_shape

    def fetch(self) -> Tensor:
        """What was kept, on its device."""
        return self._parked.fetch()

    def check(self, sample_shape: torch.Size) -> None:
        """Raises ValueError if it is filled, but by a pass over latents of another shape."""
        if self.filled and sample_shape != self._sample_shape:
            raise ValueError(
                f"deep: expected latents of shape {tuple(self._sample_shape)}, as in the pass "
                f"that filled these features, got {tuple(sample_shape)}: clear() them first"
            )


class LeanUNet:
    """Computes the forward pass of a UNet2DConditionModel piece by piece.

    It knows the layouts of SD 1.5, SD 2 and SDXL, patched with GSPN-2 or not, and gives what the
    UNet itself gives, up to rounding. It changes nothing in the UNet, and follows what is changed
    there later (weights, LoRA, processors, accelerate's offload hooks). Forward hooks of the
    UNet and of its blocks, and compiled versions of them, are not run.

    Args:
        unet: in evaluation mode when it is called.
        options: how memory is saved.

    Raises:
        ValueError: a model of another layout.
    """

    def __init__(self, unet: UNet2DConditionModel, options: LeanOptions = LeanOptions()):
        unet = getattr(unet, "_orig_mod", unet)
        obstacle = _obstacle(unet)
        if obstacle is not None:
            raise ValueError(
                "expected a UNet2DConditionModel in the layout of SD 1.5, SD 2 or SDXL, "
                f"got {obstacle}"
            )
        self.unet = unet
        self.options = options
        # Pinned memory is slow to get: skip connections use it again, by their position.
        self._buffers: dict[int, Tensor] = {}
        self._bypassed = [m for m in unet.modules() if isinstance(m, BYPASSED)]

    @staticmethod
    def supports(model: object) -> bool:
        """Whether a model has a layout that this class knows."""
        return _obstacle(getattr(model, "_orig_mod", model)) is None

    @torch.no_grad()
    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        *,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        """What ``unet(sample, timestep, ...)`` returns as its sample, without gradients.

        Args:
            sample, timestep, encoder_hidden_states, added_cond_kwargs: as the UNet takes them.
            deep: filled by this pass if empty, else reused by it.

        Raises:
            ValueError: the UNet is in training mode, or something has changed its forward pass;
                `deep` was filled for latents of another shape.
        """
        self._check_state()
        if deep is not None:
            deep.check(sample.shape)
        hook = getattr(self.unet, "_hf_hook", None)
        args = sample, timestep, encoder_hidden_states, added_cond_kwargs
        if hook is None:
            return self._run(*args, deep)
        args, _ = hook.pre_forward(self.unet, *args)
        return hook.post_forward(self.unet, self._run(*args, deep))

    def _run(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        text: Tensor,
        added: dict[str, Tensor] | None,
        deep: DeepFeatures | None,
    ) -> Tensor:
        unet = self.unet
        if unet.config.center_input_sample:
            sample = 2 * sample - 1.0
        temb, text = _embed(unet, sample, timestep, text, added)
        state = _Pass(self.options, self._buffers, temb, text)
        first, *rest = unet.down_blocks
        *blocks, last = unet.up_blocks

        state.enter(unet.conv_in, sample, unet.config.block_out_channels[0])
        if deep is not None and deep.filled:
            state.down(first, downsample=False)
            state.hidden = None  # before its successor is fetched
            state.hidden = deep.fetch()
        else:
            for block in (first, *rest):
                state.down(block)
            if unet.mid_block is not None:
                state.mid(unet.mid_block)
            for block in blocks:
                state.up(block)
            if deep is not None:
                deep.keep(state.hidden, sample.shape, self.options.offload_skips)
        state.up(last)
        return state.leave(unet)

    def _check_state(self) -> None:
        if self.unet.training:
            raise ValueError(
                "expected a UNet in evaluation mode, got one in training mode: call unet.eval()"
            )
        if any(getattr(block, "s1", None) for block in self.unet.up_blocks):
            raise ValueError("expected a UNet without FreeU: call unet.disable_freeu()")
        for module in self._bypassed:
            if _forward_is_replaced(module, self.unet):
                raise ValueError(
                    f"expected a {type(module).__name__} with its own forward pass, got one that "
                    "an extension replaced (of the offloading methods, "
                    "enable_model_cpu_offload() is supported)"
                )


def _embed(
    unet: UNet2DConditionModel,
    sample: Tensor,
    timestep: Tensor | float | int,
    text: Tensor,
    added: dict[str, Tensor] | None,
) -> tuple[Tensor, Tensor | tuple]:
    """The embedding that every resnet gets, and what every cross-attention attends to."""
    temb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
    extra = unet.get_aug_embed(emb=temb, encoder_hidden_states=text, added_cond_kwargs=added)
    if extra is not None:
        temb = temb + extra
    if unet.time_embed_act is not None:
        temb = unet.time_embed_act(temb)
    text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added)
    return temb, text


class _Pass:
    """One forward pass: the map on its way, `hidden`, and the skip connections that wait.

    `hidden` is handed over to each layer, so that nothing else keeps it alive.
    """

    def __init__(
        self,
        options: LeanOptions,
        buffers: dict[int, Tensor],
        temb: Tensor,
        text: Tensor | tuple,
    ):
        self.limit = options.max_elements
        self.away = options.offload_skips
        self.buffers = buffers
        self.temb = temb
        self.text = text
        self.hidden: Tensor | None = None
        self.skips: list[Parked] = []

    def enter(self, conv_in: nn.Module, sample: Tensor, channels: int) -> None:
        self.hidden = strips.convolve_in(conv_in, sample, channels, self.limit)
        self._keep()

    def down(self, block: nn.Module, downsample: bool = True) -> None:
        for resnet, attention in _layers(block):
            self._layer(resnet, attention, [self._take()])
            self._keep()
        for sampler in (block.downsamplers or ()) if downsample else ():
            self.hidden = strips.downsample(sampler, self._take(), self.limit)
            self._keep()

    def mid(self, block: nn.Module) -> None:
        for resnet, attention in _layers(block):
            self._layer(resnet, attention, [self._take()])

    def up(self, block: nn.Module) -> None:
        for resnet, attention in _layers(block):
            self._layer(resnet, attention, [self._take(), self.skips.pop().fetch()])
        for sampler in block.upsamplers or ():
            # Of an odd size, half of which was rounded up, twice the half is one too many.
            size = self.skips[-1].shape[2:]
            self.hidden = strips.upsample(sampler, self._take(), size, self.limit)

    def leave(self, unet: UNet2DConditionModel) -> Tensor:
        norm, activation = unet.conv_norm_out, unet.conv_act
        return strips.convolve_out(norm, activation, unet.conv_out, self._take(), self.limit)

    def _layer(
        self, resnet: ResnetBlock2D, attention: Transformer2DModel | None, parts: list[Tensor]
    ) -> None:
        self.hidden = strips.resnet(resnet, parts, self.temb, self.limit)
        parts.clear()
        if attention is not None:
            self.hidden = strips.transformer(attention, self._take(), self.text, self.limit)

    def _take(self) -> Tensor:
        hidden, self.hidden = self.hidden, None
        return hidden

    def _keep(self) -> None:
        position = len(self.skips)
        skip = Parked(self.hidden, self.away, self.buffers.get(position))
        if skip.buffer is not None:
            self.buffers[position] = skip.buffer
        self.skips.append(skip)


class Parked:
    """A tensor that waits until it is needed again, on its device or in CPU memory.

    Args:
        tensor: is not to be changed from here on.
        away: whether it waits in CPU memory if it is a CUDA tensor. A meta tensor is dropped and
            made anew, as if it were one; others stay.
        spare: CPU memory of an earlier tensor, used again if it fits.

    Attributes:
        shape: of the tensor.
        buffer: the CPU memory in use, or None.
    """

    def __init__(self, tensor: Tensor, away: bool, spare: Tensor | None = None):
        self.shape = tensor.shape
        self.buffer: Tensor | None = None
        self._stride, self._dtype, self._device = tensor.stride(), tensor.dtype, tensor.device
        self._tensor = None if away and tensor.device.type in ("cuda", "meta") else tensor
        if self._tensor is None and tensor.is_cuda:
            self._send(tensor, spare)

    def _send(self, tensor: Tensor, spare: Tensor | None) -> None:
        self.buffer = spare if self._fits(spare) else self._pinned()
        stream = _copy_stream(self._device)
        # Also for the buffer's sake: what it held may still be on its way to the device.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self.buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        self._sent = stream.record_event()

    def _fits(self, spare: Tensor | None) -> bool:
        return (
            spare is not None
            and spare.shape == self.shape
            and spare.stride() == self._stride
            and spare.dtype == self._dtype
        )

    def _pinned(self) -> Tensor:
        # A tensor made in inference mode could not be written to by a later pass outside it.
        with torch.inference_mode(False):
            return torch.empty_strided(self.shape, self._stride, dtype=self._dtype, pin_memory=True)

    def fetch(self) -> Tensor:
        """The tensor, on its device."""
        if self._tensor is not None:
            return self._tensor
        tensor = torch.empty_strided(
            self.shape, self._stride, dtype=self._dtype, device=self._device
        )
        if self.buffer is not None:
            torch.cuda.current_stream(self._device).wait_event(self._sent)
            tensor.copy_(self.buffer, non_blocking=True)
        return tensor


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


# ---- what it knows

DOWN_BLOCKS = (DownBlock2D, CrossAttnDownBlock2D)
UP_BLOCKS = (UpBlock2D, CrossAttnUpBlock2D)
# Modules whose own forward passes are not called, or not always.
BYPASSED = (
    UNet2DConditionModel,
    *DOWN_BLOCKS,
    UNetMidBlock2DCrossAttn,
    *UP_BLOCKS,
    ResnetBlock2D,
    Transformer2DModel,
    BasicTransformerBlock,
    Downsample2D,
    Upsample2D,
)


def _layers(block: nn.Module) -> Iterator[tuple[ResnetBlock2D, Transformer2DModel | None]]:
    """The resnets of a block, each with the transformer that follows it."""
    return zip_longest(block.resnets, getattr(block, "attentions", ()))


def _obstacle(model: object) -> str | None:
    """What in a model `LeanUNet` does not know, in words; None if it can run it.

    Types are compared exactly: a subclass may compute otherwise.
    """
    if type(model) is not UNet2DConditionModel:
        return f"a {type(model).__name__}"
    config = model.config
    if model.class_embedding is not None or config.addition_embed_type == "image_hint":
        return "one with class labels or image hints"
    if (config.conv_in_kernel, config.conv_out_kernel) != (3, 3):
        return f"one with {config.conv_in_kernel} and {config.conv_out_kernel} as its end kernels"
    mid_blocks = [] if model.mid_block is None else [model.mid_block]
    for blocks, known in (
        (model.down_blocks, DOWN_BLOCKS),
        (mid_blocks, (UNetMidBlock2DCrossAttn,)),
        (model.up_blocks, UP_BLOCKS),
    ):
        for block in blocks:
            if type(block) not in known:
                return f"one with a {type(block).__name__}"
            unknown = [part for part in _parts(block) if not _is_known(part)]
            if unknown:
                return f"one with a {type(unknown[0]).__name__} of another kind"
    return None


def _parts(block: nn.Module) -> Iterator[nn.Module]:
    for resnet, attention in _layers(block):
        yield resnet
        if attention is not None:
            yield attention
            yield from getattr(attention, "transformer_blocks", ())
    for samplers in ("downsamplers", "upsamplers"):
        yield from getattr(block, samplers, None) or ()


def _is_known(part: nn.Module) -> bool:
    kind = type(part)
    if kind is ResnetBlock2D:
        plain = not part.up and not part.down and part.time_emb_proj is not None
        return plain and part.time_embedding_norm in ("default", "scale_shift")
    if kind is Transformer2DModel:
        return part.is_input_continuous and part.out_channels == part.in_channels
    if kind is BasicTransformerBlock:
        plain = part.pos_embed is None and not part.double_self_attention
        return plain and part.norm_type == "layer_norm"
    if kind is Downsample2D:
        return part.use_conv and part.padding == 1 and part.norm is None
    if kind is Upsample2D:
        plain = part.use_conv and not part.use_conv_transpose and part.name == "conv"
        return plain and part.interpolate and part.norm is None
    return False


def _forward_is_replaced(module: nn.Module, unet: UNet2DConditionModel) -> bool:
    """Whether something put another `forward` on this very module, or changed its class."""
    if type(module) not in BYPASSED:
        return True
    forward = vars(module).get("forward")
    if forward is None or getattr(forward, "__func__", None) is type(module).forward:
        return False
    return not (module is unet and hasattr(module, "_hf_hook"))
