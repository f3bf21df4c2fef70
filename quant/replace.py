"""Replace the convolutions and linear layers of a UNet by quantized ones."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.models.unets.unet_2d_blocks import (
    AttnUpBlock2D,
    CrossAttnUpBlock2D,
    ResnetUpsampleBlock2D,
    UpBlock2D,
)
from torch import nn
from torch.nn.modules.conv import _ConvNd

from quant.functional import LOW_WEIGHT_BITS, TWO_DIGIT_BITS, check_bits
from quant.layers import QuantConv2d, QuantLinear, SkipConv2d
from quant.quantizers import Clock

# Parts of a UNet that get `edge_bits`. Not every network has the last two.
EDGES = ("conv_in", "conv_out", "time_embedding", "class_embedding", "add_embedding")


# Up-sampling blocks whose residual blocks all take a concatenation [hidden, skip] as input.
SKIP_UP_BLOCKS = (UpBlock2D, AttnUpBlock2D, ResnetUpsampleBlock2D, CrossAttnUpBlock2D)


@dataclass
class QuantConfig:
    """Bit-widths of the student, and initialisation of its quantizers."""

    weight_bits: int | float = 4
    """Bits of all weights except those of the edge layers: 2…8, 1.58 (-1, 0 and 1 times the step size) or 1 (plus or
    minus the step size)."""
    act_bits: int = 4
    """Bits of the inputs of all convolutions and linear layers except the edge layers: 2…8."""
    edge_bits: int = 8
    """Weight bits of the edge layers: the first and the last convolution, the shortcut over the last skip, and the time
    and class embeddings. 2…8."""
    edge_act_bits: int = 16
    """Bits of the inputs of the edge layers: 2…8 or 16, which integer inference computes as two digits of 8 bits."""
    rank: int = 16
    """Rank of the QALoRA adapters, at least 1."""
    per_step: bool = True
    """Use an activation step size and zero point for every denoising step (TALSQ), instead of one for all steps."""
    search: str = "error"
    """Initialisation of the step sizes: "error" minimises the squared error over a grid of ranges, "min-max" covers the
    whole range. Inputs of 16 bits always start with twice the whole range."""

    edge_shortcut: bool = True
    """Treat the shortcut over the last skip as an edge layer."""
    split_skips: bool = True
    """Use separate quantizers for the two halves of a shortcut over a skip concatenation."""
    bias_correction: bool = True
    """Correct the biases during calibration, so that each layer's output keeps its mean."""
    reconstruction: bool = False
    """Recompute each layer's weight and bias during calibration to compensate for rounding errors (GPTAQ); this
    includes `bias_correction`."""

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits, also=LOW_WEIGHT_BITS)
        check_bits("act_bits", self.act_bits)
        check_bits("edge_bits", self.edge_bits)
        check_bits("edge_act_bits", self.edge_act_bits, also=(TWO_DIGIT_BITS,))
        if self.search not in ("error", "min-max"):
            raise ValueError(f'search must be "error" or "min-max", not "{self.search}"')
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")


def replace_layers(network: nn.Module, config: QuantConfig, clock: Clock) -> Any:
    """Return a copy of the UNet `network`, in float32, with quantized layers whose step sizes are not yet set.

    Raises:
        ValueError: a layer cannot be quantized.
    """
    unet: Any = copy.deepcopy(network).requires_grad_(False).float().eval()
    for module in unet.modules():
        vars(module).pop("forward", None)  # accelerate's `unwrap_model` sets it to the class's own forward
    if unet.is_gradient_checkpointing:
        unet.disable_gradient_checkpointing()
    edges: set[nn.Module] = set()
    for name in EDGES:
        if (part := getattr(unet, name, None)) is not None:
            edges.update(part.modules())
    for name, module in list(unet.named_modules()):
        if isinstance(module, Attention):
            _fuse_projections(name, module)
    if config.split_skips:
        _split_skips(unet)
    if config.edge_shortcut:
        edges.update(_last_shortcut(unet))
    for name, module in list(unet.named_modules()):
        layer = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}.get(type(module))
        if layer is None:
            if isinstance(module, _ConvNd | nn.Linear | nn.Bilinear):
                raise ValueError(f"{name}: a {type(module).__name__} cannot be quantized")
            continue
        bits = config.weight_bits, config.act_bits
        if module in edges:
            bits = config.edge_bits, config.edge_act_bits
        unet.set_submodule(name, layer(module, *bits, config.rank, clock, config.per_step))
    return unet.to(unet.device).eval()


def _fuse_projections(name: str, attention: Attention) -> None:
    if attention.added_kv_proj_dim is not None:
        raise ValueError(f"{name}: attention with added keys and values is not supported")
    attention.fuse_projections()
    attention.set_processor(FusedAttnProcessor2_0())
    if not attention.is_cross_attention:
        del attention.to_q
    del attention.to_k, attention.to_v


def _last_shortcut(unet: Any) -> Iterator[nn.Module]:
    """Return the modules of the shortcut over the last skip, which carries the output of the first convolution."""
    shortcut = unet.up_blocks[-1].resnets[-1].conv_shortcut
    return iter(()) if shortcut is None else shortcut.modules()


def _split_skips(unet: Any) -> None:
    """Replace every shortcut over a concatenation [hidden, skip] by a `SkipConv2d`."""
    skips = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        skips += [resnet.out_channels for resnet in block.resnets]
        skips += [block.resnets[-1].out_channels] * len(block.downsamplers or [])
    if not all(isinstance(block, SKIP_UP_BLOCKS) for block in unet.up_blocks):
        return  # other blocks keep their shortcuts
    for block in unet.up_blocks:
        for resnet in block.resnets:
            hidden = resnet.in_channels - skips.pop()
            if resnet.conv_shortcut is not None:
                resnet.conv_shortcut = SkipConv2d(resnet.conv_shortcut, hidden)
