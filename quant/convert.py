"""Convert a float UNet into a quantized one, and freeze the result."""

import copy
import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from quant.context import plain_torch
from quant.integer.program import refuse_unsupported
from quant.quantizers import MIN_SCALE
from quant.replace import QuantConfig
from quant.structure import check_structure, refuse_hooks
from quant.student import QuantizedUNet, require_student


@plain_torch()
def quantize(unet: nn.Module, config: QuantConfig, timesteps: Sequence[float] | Tensor) -> QuantizedUNet:
    """Return a quantized copy of `unet` with initial weight step sizes; `calibrate` sets those of the activations.

    Every convolution and linear layer is replaced, including shortcuts, down- and upsampling and attention projections.
    The edge layers, which get `config.edge_bits`, are found from the network's structure. The projections to query, key
    and value become one layer with one input quantizer, because they share their input; in cross-attention, those to
    key and value do. With `config.split_skips`, a shortcut over a skip concatenation becomes two layers, one for each
    half, because the halves differ in range.

    The copy is in float32 and in evaluation mode. If integer inference does not support a part of it, a warning names
    the part.

    Args:
        unet: a UNet2DModel or UNet2DConditionModel of diffusers, with the structure that its config describes.
        timesteps: the training timesteps of the T sampling steps, such as a scheduler's `timesteps`.

    Raises:
        ValueError: `unet` has a part that cannot be quantized or that its config does not describe.
    """
    if not isinstance(config, QuantConfig):
        raise ValueError(f"the config must be a QuantConfig, not a {type(config).__name__}")
    check_structure(unet)
    model = QuantizedUNet(unet, config, timesteps)
    for _, layer in model.layers():
        layer.weight_quantizer.initialise(layer.weight, config.search)
    try:
        refuse_unsupported(model.unet)
    except ValueError as error:
        warnings.warn(f"this student can be simulated and exported, but: {error}", stacklevel=2)
    return model


@plain_torch()
def freeze(model: QuantizedUNet) -> QuantizedUNet:
    """Return a copy of `model` with merged adapters, and with codes as weights.

    The parameters that stay float (step sizes, zero points, biases, normalisations) are rounded to half precision, in
    which they are saved, before the codes are computed. A saved student therefore computes the same bits as the frozen
    one.

    Raises:
        ValueError: `model` is not a `QuantizedUNet` in float32, none of its activation step sizes was set, or it has
            hooks.
    """
    require_student(model)
    refuse_hooks(model)
    if all((layer.act_quantizer.scale == 1).all() for _, layer in model.layers()):
        raise ValueError("only a calibrated student can be frozen: quant.calibrate sets its activations' step sizes")
    return _freeze(model)


def _freeze(model: QuantizedUNet) -> QuantizedUNet:
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    frozen.is_calibrated = True
    for _, layer in frozen.layers():
        for quantizer in (layer.weight_quantizer, layer.act_quantizer):
            quantizer.scale.clamp_(min=MIN_SCALE)
        _round_to_half(layer.weight_quantizer)
        layer.freeze()
    for part in frozen.unet.children():
        if part is not frozen.unet.time_proj:  # at late timesteps a rounded frequency is many turns off
            _round_to_half(part)
    return frozen


def _round_to_half(module: nn.Module) -> None:
    for parameter in module.parameters():
        half = parameter.half()
        if half.isfinite().all():
            parameter.copy_(half)
