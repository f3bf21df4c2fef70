"""Recompute the weights and biases of all layers to compensate for quantization errors.

In execution order, each layer is fitted so that its output on the quantized network's inputs matches the float layer's
output on the float network's inputs (GPTAQ, arXiv 2504.02692). First, least squares give its weight. Then the columns
are rounded one after another, and the columns not yet rounded compensate for each rounding error (GPTQ, arXiv
2210.17323). Both are closed forms without gradients, and need no data but the teacher's states.
"""

from typing import Any

import torch
from torch import Tensor

from quant.functional import fake_quantize
from quant.layers import QuantLayer
from quant.quantizers import MIN_SCALE

# Number of rows, drawn at random, in the least-squares problem of a layer: per unknown, and the minimum.
ROWS_PER_COLUMN, FEWEST_ROWS = 8, 8192

# Strength of the regularisation towards the original weight, relative to the mean variance of the inputs.
DAMPING = 0.1


@torch.no_grad()
def reconstruct(search: str, layer: QuantLayer, inputs: tuple[Tensor], _: Any) -> Tensor:
    """Recompute the weight, the weight step sizes (by the method `QuantConfig.search`) and the bias; a forward hook.

    The batch has every state twice: the first half are activations of the float network, the second half those of the
    quantized network. The returned output has the same order.
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
    damping = DAMPING * variances.mean() + MIN_SCALE
    variances += damping
    factor, before = torch.linalg.cholesky(gram), layer.weight.view_as(cross)
    best = torch.cholesky_solve((cross + damping * before).mT, factor).mT.float()
    layer.weight_quantizer.initialise(best.reshape(layer.weight_shape), search)
    layer.weight.copy_(_round_sequentially(layer, best, torch.cholesky_inverse(factor)).view_as(layer.weight))

    weight = layer.quantized_weight()
    layer.bias.copy_((target_mean - mean @ weight.view_as(before).mT).flatten())
    return torch.cat([exact, layer.apply_weight(x, weight)])


def _pairs(layer: QuantLayer, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs (G, M, n) and the values (G, M, c_out / G) of M positions of the output y, drawn at random.

    G is the number of groups of a convolution, and n the number of inputs of each output.
    """
    y = y.movedim(1, -1) if layer.weight.dim() == 4 else y
    places = y[..., 0].numel()
    count = max(ROWS_PER_COLUMN * layer.weight[0].numel(), FEWEST_ROWS)
    at = torch.randperm(places, generator=torch.Generator().manual_seed(0))[:count].to(y.device)
    pairs = layer.inputs_of(x, at), y.flatten(0, -2)[at]
    rows, targets = (part.unflatten(1, (layer.groups, -1)).transpose(0, 1) for part in pairs)
    return rows, targets


def _round_sequentially(layer: QuantLayer, weight: Tensor, inverse: Tensor) -> Tensor:
    """Apply GPTQ to the weight (G, c_out / G, n), and return each column as it is immediately before rounding.

    Args:
        inverse: inverse of the damped Gram matrix of the inputs, (G, n, n).
    """
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    weight = weight.clone()
    for column in range(weight.shape[-1]):
        now = weight[..., column]
        left = now - layer.weight_quantizer(now.flatten()[:, None]).view_as(now)
        left = left / factor[:, column, column, None]
        weight[..., column + 1 :] -= left[..., None] * factor[:, None, column, column + 1 :]
    return weight
