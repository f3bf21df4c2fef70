"""Translate a UNet into a program: one line per layer, in execution order.

Every option of diffusers' blocks that changes their output is either supported here or rejected by name.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import FirDownsample2D, KDownsample2D, downsample_2d
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from diffusers.models.normalization import AdaGroupNorm
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, ResnetBlockCondNorm2D, Upsample2D
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.upsampling import FirUpsample2D, KUpsample2D, upsample_2d
from torch import Tensor, nn
from torch.nn import functional as F

from quant.context import plain_torch
from quant.integer.binding import (
    ATTENTION,
    ENLARGE,
    FILTER_DOWN,
    FILTER_UP,
    GELU,
    KEEP,
    MIRROR_DOWN,
    MIRROR_UP,
    MISH,
    POOL,
    QUANTIZE,
    RELU,
    SILU,
)
from quant.integer.layers import Layers
from quant.integer.lines import Program
from quant.layers import SkipConv2d

ACTIVATIONS = {nn.SiLU: SILU, nn.GELU: GELU, nn.ReLU: RELU, nn.Mish: MISH}

DOWN_BLOCKS = (
    blocks.DownBlock2D, blocks.AttnDownBlock2D, blocks.ResnetDownsampleBlock2D, blocks.SkipDownBlock2D,
    blocks.AttnSkipDownBlock2D, blocks.KDownBlock2D,
)  # fmt: skip
UP_BLOCKS = (
    blocks.UpBlock2D, blocks.AttnUpBlock2D, blocks.ResnetUpsampleBlock2D, blocks.SkipUpBlock2D,
    blocks.AttnSkipUpBlock2D, blocks.KUpBlock2D,
)  # fmt: skip
RESIDUAL_BLOCKS = (ResnetBlock2D, ResnetBlockCondNorm2D)

# Reference functions of the resamplings, for images (1, C, H, W).
FILTER = (1, 3, 3, 1)
with plain_torch():  # the modules hold tensors, whose dtype and device depend on torch's defaults
    MIRRORS = KDownsample2D(), KUpsample2D()
RESAMPLINGS: dict[int, Any] = {
    POOL: partial(F.avg_pool2d, kernel_size=2, stride=2),
    ENLARGE: partial(F.interpolate, scale_factor=2.0, mode="nearest"),
    FILTER_DOWN: partial(downsample_2d, kernel=FILTER),
    FILTER_UP: partial(upsample_2d, kernel=FILTER),
    MIRROR_DOWN: MIRRORS[0],
    MIRROR_UP: MIRRORS[1],
}


class _Follower:
    """Appends the lines of a UNet's parts to a program. Methods take and return numbers of states."""

    def __init__(self, program: Program):
        self.program = program

    def residual(self, block: Any, x: int, skip: int = -1) -> int:
        emit, change = self.program.emit, self.program.change
        activation, resampling = ACTIVATIONS[type(block.nonlinearity)], block_resampling(block)
        if resampling == KEEP:
            hidden = emit(block.conv1, x, activation, block.norm1, skip)
        elif resampling == ENLARGE:  # enlarging the codes gives the same, and they are smaller
            hidden = emit(block.conv1, x, activation, block.norm1, factor=2)
        elif resampling == POOL:
            hidden = emit(block.conv1, change(x, activation, block.norm1, POOL))
        else:  # a filter reads every value several times, so the activation is computed first
            hidden = emit(block.conv1, change(change(x, activation, block.norm1), resampling=resampling))
        if resampling != KEEP:
            x = change(x, resampling=resampling)
        shortcut = block.conv_shortcut
        if isinstance(shortcut, SkipConv2d):
            x = emit(shortcut.skip, skip, residual=emit(shortcut.hidden, x))
        elif shortcut is not None:
            x = emit(shortcut, x, skip=skip)
        return self.divide(emit(block.conv2, hidden, activation, block.norm2, residual=x), block.output_scale_factor)

    def attend(self, block: Any, x: int) -> int:
        if block is None:
            return x
        qkv = self.program.emit(block.to_qkv, x, norm=block.group_norm)
        residual = x if block.residual_connection else -1
        y = self.program.emit(block.to_out[0], qkv, ATTENTION, residual=residual, heads=block.heads)
        return self.divide(y, block.rescale_output_factor)

    def divide(self, x: int, divisor: float) -> int:
        return x if divisor == 1 else self.program.change(x, divisor=float(divisor))

    def resample(self, sampler: Any, x: int) -> int:
        if isinstance(sampler, RESIDUAL_BLOCKS):
            return self.residual(sampler, x)
        if isinstance(sampler, Downsample2D) and sampler.use_conv:
            return self.program.emit(sampler.conv, x)
        if isinstance(sampler, Upsample2D) and sampler.use_conv:
            return self.program.emit(sampler.conv if sampler.name == "conv" else sampler.Conv2d_0, x, factor=2)
        return self.program.change(x, resampling=resampling_of(sampler, self.program.shapes[x][0]))


def follow_unet(unet: UNet2DModel, layers: Layers, height: int, width: int) -> Program:
    """Return the program from a sample (in_channels, height, width) to ε.

    Raises:
        ValueError: the network does not support images of this size.
    """
    parts: Any = unet
    program = Program(layers, (parts.config.in_channels, height, width))
    follow = _Follower(program)
    # Blocks with a `skip_conv` also process an image: down blocks downsample the input, up blocks sum up the output.
    image = program.change(0, centre=0.5, divisor=0.5) if parts.config.center_input_sample else 0
    x = program.emit(parts.conv_in, image)
    skips = [x]
    for block in parts.down_blocks:
        for resnet, attention in _pairs(block):
            x = follow.attend(attention, follow.residual(resnet, x))
            skips.append(x)
        if getattr(block, "skip_conv", None) is not None:
            x = follow.residual(block.resnet_down, x)
        for sampler in block.downsamplers or []:
            if hasattr(block, "skip_conv"):
                image = follow.resample(sampler, image)
                x = program.emit(block.skip_conv, image, residual=x)
            else:
                x = follow.resample(sampler, x)
            if not isinstance(block, blocks.KDownBlock2D):
                skips.append(x)
    if parts.mid_block is not None:
        first, *rest = parts.mid_block.resnets
        x = follow.residual(first, x)
        for resnet, attention in zip(rest, parts.mid_block.attentions, strict=True):
            x = follow.residual(resnet, follow.attend(attention, x))
    image = -1
    for block in parts.up_blocks:
        count = len(block.resnets)
        theirs, skips = skips[-count:], skips[:-count]
        for number, (resnet, attention) in enumerate(_pairs(block)):
            skip = -1 if isinstance(block, blocks.KUpBlock2D) and number > 0 else theirs.pop()
            x = follow.attend(attention, follow.residual(resnet, x, skip))
        if hasattr(block, "skip_conv"):
            image = -1 if image < 0 else follow.resample(block.upsampler, image)
            if block.skip_conv is not None:
                image = program.emit(block.skip_conv, x, SILU, block.skip_norm, residual=image)
                x = follow.residual(block.resnet_up, x)
        else:
            for sampler in block.upsamplers or []:
                x = follow.resample(sampler, x)
    return program.place([program.emit(parts.conv_out, x, SILU, parts.conv_norm_out, residual=image)])


def _pairs(block: Any) -> list[tuple[Any, Attention | None]]:
    """Return the residual blocks of an up- or down-sampling block, each with the attention after it."""
    attentions = list(getattr(block, "attentions", [None] * len(block.resnets)))
    if isinstance(block, blocks.AttnSkipUpBlock2D):  # has one attention, after the last residual block
        attentions = [None] * (len(block.resnets) - 1) + attentions
    return list(zip(block.resnets, attentions, strict=True))


@dataclass
class TimeProgram:
    """Program of the time embedding and the class embedding.

    Attributes:
        program: its first state is the output of `time_proj` for the timestep. For networks with classes, the second is
            the class's row of the embedding table, or the output of `time_proj` for the class.
        added: for each layer, the state that is added to its output.
        modulated: for each normalisation, the state of the scale and shift of its output.
    """

    program: Program
    added: dict[Any, int]
    modulated: dict[Any, int]


def follow_time_embedding(unet: UNet2DModel, layers: Layers) -> TimeProgram:
    """Return the program of the part of `unet` that does not depend on the sample."""
    parts: Any = unet
    embeds, classes = parts.time_embedding, parts.class_embedding
    given = [(layers[embeds.linear_1].in_channels, 1, 1)]
    if classes is not None:
        embedded = isinstance(classes, nn.Embedding)
        given.append((classes.embedding_dim if embedded else layers[classes.linear_1].in_channels, 1, 1))
    program = Program(layers, *given)
    of_class = -1
    if classes is not None:
        of_class = 1 if embedded else _embed(program, classes, 1)
    embedding = _embed(program, embeds, 0, of_class)
    added, modulated = {}, {}
    for block in unet.modules():
        parts = block
        if isinstance(block, ResnetBlock2D) and parts.time_emb_proj is not None:
            kind = QUANTIZE if block.skip_time_act else ACTIVATIONS[type(parts.nonlinearity)]
            state = program.emit(parts.time_emb_proj, embedding, kind)
            if block.time_embedding_norm == "scale_shift":
                modulated[parts.norm2] = state
            else:
                added[parts.conv1] = state
        elif isinstance(block, AdaGroupNorm):
            kind = QUANTIZE if parts.act is None else ACTIVATIONS[type(parts.act)]
            modulated[block] = program.emit(parts.linear, embedding, kind)
    return TimeProgram(program.place([*added.values(), *modulated.values()]), added, modulated)


def _embed(program: Program, embedding: Any, source: int, residual: int = -1) -> int:
    hidden = program.emit(embedding.linear_1, source)
    return program.emit(embedding.linear_2, hidden, ACTIVATIONS[type(embedding.act)], residual=residual)


def block_resampling(block: Any) -> int:
    """Return the resampling of a residual block."""
    function = block.upsample or block.downsample
    return KEEP if function is None else resampling_of(function, block.in_channels)


def resampling_of(function: Any, channels: int) -> int:
    """Return the resampling of `function` for images (1, `channels`, H, W).

    diffusers stores it as a lambda, so its output for a test image is compared with the reference functions.

    Raises:
        ValueError: it is none of the known resamplings.
    """
    image = torch.arange(36.0).square().fmod(11).view(1, 1, 6, 6)
    with torch.no_grad():
        answer: Tensor = function(image.expand(1, channels, 6, 6))[:, :1]
        for resampling, known in RESAMPLINGS.items():
            expected: Tensor = known(image)
            if answer.shape == expected.shape and torch.allclose(answer, expected, atol=1e-4):
                return resampling
    raise ValueError("a resampling of its own kind is not supported on integers")


def refuse_unsupported(unet: UNet2DModel) -> None:
    """Raise ValueError naming the first part of `unet` that integer inference does not support."""

    def require(condition: bool, name: str, what: str) -> None:
        if not condition:
            raise ValueError(f"{name}: {what} is not supported on integers")

    def known(activation: Any, name: str) -> None:
        kind = type(activation)
        require(kind in ACTIVATIONS, name, f"a {kind.__name__}")
        require(kind is not nn.GELU or activation.approximate == "none", name, "a GELU by tanh")

    require(type(unet) is UNet2DModel, "unet", f"a {type(unet).__name__}")
    parts: Any = unet
    proj, classes = parts.time_proj, parts.class_embedding
    require(
        isinstance(proj, Timesteps | GaussianFourierProjection | nn.Embedding), "time_proj", f"a {type(proj).__name__}"
    )
    require(not isinstance(proj, Timesteps) or proj.scale == 1, "time_proj", "a scale")
    if isinstance(proj, GaussianFourierProjection):  # angles stay within 2^20, because |log t| ≤ 104 for floats
        require(proj.log, "time_proj", "Fourier features of t itself, not of its logarithm,")
        require(proj.weight.abs().max().item() < 1600, "time_proj", "a frequency of 1,600 or more")
    require(
        isinstance(classes, nn.Embedding | TimestepEmbedding | None), "class_embedding", f"a {type(classes).__name__}"
    )
    for place, kinds in {"down_blocks": DOWN_BLOCKS, "up_blocks": UP_BLOCKS}.items():
        for number, block in enumerate(getattr(unet, place)):
            require(type(block) in kinds, f"{place}.{number}", f"a {type(block).__name__}")
    mid = parts.mid_block
    require(isinstance(mid, blocks.UNetMidBlock2D | None), "mid_block", f"a {type(mid).__name__}")
    require(type(parts.conv_act) is nn.SiLU, "conv_act", f"a {type(parts.conv_act).__name__}")
    for name, module in unet.named_modules():
        parts = module
        if isinstance(module, TimestepEmbedding):
            known(parts.act, name)
            require(parts.cond_proj is None and parts.post_act is None, name, "a condition or a second activation")
        elif isinstance(module, RESIDUAL_BLOCKS):
            known(parts.nonlinearity, name)
            norm = parts.time_embedding_norm
            require(norm in ("default", "scale_shift", "ada_group"), name, f'time_embedding_norm "{norm}"')
            require(_followed(partial(block_resampling, module)), name, "a resampling of its own kind")
        elif isinstance(module, AdaGroupNorm):
            if parts.act is not None:
                known(parts.act, name)
        elif isinstance(module, Attention):
            require(parts.spatial_norm is None, name, "spatial_norm")
            require(parts.norm_q is None and parts.norm_k is None, name, "a norm of queries or keys")
        elif isinstance(module, Downsample2D | Upsample2D):
            require(module.norm is None, name, "resampling with a norm")
        elif isinstance(module, FirDownsample2D | FirUpsample2D):
            require(not module.use_conv, name, "a filter with a convolution")
            require(tuple(module.fir_kernel) == FILTER, name, f"the filter {tuple(module.fir_kernel)}")
        if isinstance(module, Upsample2D):
            require(module.interpolate and not module.use_conv_transpose, name, "a transposed convolution")


def _followed(resampling: Any) -> bool:
    try:
        resampling()
    except ValueError:
        return False
    return True
