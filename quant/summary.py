"""Summarise a student's layers: bit-widths, and shares of the parameters and the multiply-accumulates."""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from quant.context import plain_torch
from quant.layers import QuantLayer
from quant.student import QuantizedUNet

FLOAT_BITS = 32


@dataclass
class LayerSummary:
    """Row of the summary. Matrix products of attention have no weights and are computed in float."""

    name: str
    kind: str
    """"conv", "linear" or "attention products"."""
    weight_bits: float
    act_bits: int
    parameters: int
    """Number of weights and biases, without adapters, which are merged by `freeze`."""
    macs: int
    """Multiply-accumulates for one image and one denoising step."""


@torch.no_grad()
@plain_torch()
def summarise(model: QuantizedUNet, shape: tuple[int, int, int], **conditions: Tensor) -> list[LayerSummary]:
    """Return a row for every layer that multiplies, in execution order, from a forward pass of one image.

    Args:
        shape: (C, H, W) of the image.
        conditions: further arguments of the network for one image, such as class_labels (1,).
    """
    rows: list[LayerSummary] = []
    copied = copy.deepcopy(model)  # hooks in the model itself would also run in other threads
    for name, module in copied.unet.named_modules():
        if isinstance(module, QuantLayer | Attention):
            module.register_forward_hook(partial(_summarise_layer, rows, name), with_kwargs=True)
    copied(torch.zeros(1, *shape, device=model.device), model.clock.timesteps[0], **conditions)
    return rows


def _summarise_layer(
    rows: list[LayerSummary],
    name: str,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    named: dict[str, Any],
    output: Any,
) -> None:
    if isinstance(module, QuantLayer):
        weights = math.prod(module.weight_shape)
        kind = "conv" if len(module.weight_shape) == 4 else "linear"
        bits = module.weight_quantizer.bits, module.act_quantizer.bits
        macs = output.numel() // len(module.bias) * weights
        rows.append(LayerSummary(name, kind, *bits, weights + module.bias.numel(), macs))
    elif isinstance(module, Attention):
        x = inputs[0]  # (1, C, H, W) or (1, L, C)
        tokens = math.prod(x.shape[2:]) if x.dim() == 4 else x.shape[1]
        other = named.get("encoder_hidden_states")
        keys = tokens if other is None else other.shape[1]
        macs = 2 * tokens * keys * module.inner_dim  # q·kᵀ and attention·v
        rows.append(LayerSummary(name, "attention products", FLOAT_BITS, FLOAT_BITS, 0, macs))


def shares(rows: list[LayerSummary]) -> dict[str, tuple[float, float]]:
    """Return the shares of parameters and of multiply-accumulates per pair of bit-widths, such as "W4A4" or "float"."""
    parameters, macs = sum(row.parameters for row in rows), sum(row.macs for row in rows)
    totals: dict[str, tuple[float, float]] = {}
    for row in sorted(rows, key=lambda row: (row.weight_bits, row.act_bits)):
        key = "float" if row.weight_bits == FLOAT_BITS else f"W{row.weight_bits}A{row.act_bits}"
        p, m = totals.get(key, (0.0, 0.0))
        totals[key] = (p + row.parameters / parameters, m + row.macs / macs)
    return totals
