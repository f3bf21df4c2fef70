"""Rounding that makes up for itself: every layer's weight and bias anew, for the inputs that quantization leaves it.

Layer after layer, in the order in which they run, a layer is to give on the quantized network's inputs what the float
one gives on its own (GPTAQ, arXiv 2504.02692): first by the weight of least squares, then by rounding its columns one
after the other, where those that are yet to come take back what the last one left (GPTQ, arXiv 2210.17323). Closed
forms, no gradients; and no data but the teacher's states.
"""

from typing import Any

import torch
from torch import Tensor

from quant.functional import fake_quantize
from quant.layers import QuantLayer
from quant.quantizers import SMALLEST

# Rows that the least squares of a layer look at, drawn at random: so many for each unknown, and no fewer than this.
ROWS_PER_COLUMN, FEWEST_ROWS = 8, 8192

# A share of the inputs' variance, by which the weight is held to what it was.
DAMPING = 0.1


@torch.no_grad()
def reconstruct(search: str, layer: QuantLayer, inputs: tuple[Tensor], _: Any) -> Tensor:
    """A forward hook that sets the layer's weight, its step sizes (by `QuantConfig.search`) and its bias.

    The batch holds the states twice: the activations of the float network come first, those of the quantized one after
    them, and so they leave the layer.
    """
    exact, x = inputs[0].chunk(2)
    exact = layer.apply_weight(exact, layer.weight)
    scale, zero_point = (values.chunk(2)[1] for values in layer.act_quantizer.read())
    x = fake_quantize(x, scale, zero_point, layer.act_quantizer.codes)
    rows, targets = _pairs(layer, x, exact)
    mean, target_mean = rows.mean(1, keepdim=True), targets.mean(1, keepdim=True)
    rows -= mean
    targets -= target_mean
    gram, cross = (rows.mT @ rows).double(), (targets.mT @ rows).double()  # (G, n, n) and (G, c_out / G, n)
    variances = gram.diagonal(dim1=1, dim2=2)
    damping = DAMPING * variances.mean() + SMALLEST
    variances += damping
    factor, before = torch.linalg.cholesky(gram), layer.weight.view_as(cross)
    best = torch.cholesky_solve((cross + damping * before).mT, factor).mT.float()
    layer.weight_quantizer.initialise(best.reshape(layer.weight_shape), search)
    layer.weight.copy_(_round_in_turn(layer, best, torch.cholesky_inverse(factor)).view_as(layer.weight))

    weight = layer.quantized_weight()
    layer.bias.copy_((target_mean - mean @ weight.view_as(before).mT).flatten())
    return torch.cat([exact, layer.apply_weight(x, weight)])


def _pairs(layer: QuantLayer, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of places of the output y, drawn at random: the inputs (G, M, n) they are computed from, and y (G, M, c_out / G).

    G are a convolution's groups, n is what each of its outputs is a sum of.
    """
    y = y.movedim(1, -1) if layer.weight.dim() == 4 else y
    places = y[..., 0].numel()
    count = max(ROWS_PER_COLUMN * layer.weight[0].numel(), FEWEST_ROWS)
    at = torch.randperm(places, generator=torch.Generator().manual_seed(0))[:count].to(y.device)
    pairs = layer.inputs_of(x, at), y.flatten(0, -2)[at]
    rows, targets = (part.unflatten(1, (layer.groups, -1)).transpose(0, 1) for part in pairs)
    return rows, targets


def _round_in_turn(layer: QuantLayer, weight: Tensor, inverse: Tensor) -> Tensor:
    """GPTQ: the weight (G, c_out / G, n) as each column was when its turn to be rounded came.

    Args:
        inverse: of the damped Gram matrix of the inputs, (G, n, n).
    """
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    weight = weight.clone()
    for column in range(weight.shape[-1]):
        now = weight[..., column]
        left = now - layer.weight_quantizer(now.flatten()[:, None]).view_as(now)
        left = left / factor[:, column, column, None]
        weight[..., column + 1 :] -= left[..., None] * factor[:, None, column, column + 1 :]
    return weight
