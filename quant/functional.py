"""Rounding to codes, and the straight-through function that training sees in its place.

A tensor is represented by integer codes q in [qmin, qmax], a step size s and an integer zero point z:

    q = clamp(round(x / s) + z, qmin, qmax)        x̂ = (q − z) · s

Step sizes and zero points carry one value per slice of dimension 0: for a weight that is the output channel,
for an activation the sample, whose timestep decides them.
"""

from typing import Any

import torch
from torch import Tensor


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """The smallest and the largest code: [−2^(b−1), 2^(b−1) − 1] if `signed`, else [0, 2^b − 1]."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must lie in 2…8, not {bits}")
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


def round_zero_point(zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """The integer that a learned zero point stands for. Inside the range, so that 0.0 has a code: padding needs it."""
    return zero_point.round().clamp(qmin, qmax)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """The codes of x, as floats.

    Args:
        x: float (C, …).
        scale: float, positive, broadcastable to x.
        zero_point: float with integer values, broadcastable to x.
    """
    return _round(x, scale, zero_point).clamp_(qmin, qmax)


def _round(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The codes of x without their range: the one place where a number is rounded to a code."""
    return (x * scale.reciprocal()).round_().add_(zero_point)


class _FakeQuantize(torch.autograd.Function):
    """x̂ with its three gradients by hand: clamp's own at its bounds differ between versions of torch.

    Whether x lies inside the range is asked of its code before the clamp; the end codes belong to the inside.
    With that mask m, the gradients are (LSQ, arXiv 1902.08153, eq. 3 and 5, and the same for z)

        ∂x̂/∂x = m        ∂x̂/∂s = (x̂ − m·x) / s        ∂x̂/∂z = −s·(1 − m)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
        z = round_zero_point(zero_point, qmin, qmax)
        y = quantize(x, scale, z, qmin, qmax).sub_(z).mul_(scale)
        ctx.save_for_backward(x, y, scale, z)
        ctx.bounds = qmin - 0.5, qmax + 0.5
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, z = ctx.saved_tensors
        unclamped = _round(x, scale, z)

        def masked(tensor: Tensor) -> Tensor:
            # m·tensor in one pass; no integer lies on these bounds. Boolean masks cost three times as much.
            return torch.ops.aten.hardtanh_backward(tensor, unclamped, *ctx.bounds)

        grad_x = masked(grad)
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            slope = masked(x).sub_(y).mul_(grad)  # −s·∂x̂/∂s, in place: these tensors are as large as the activations
            grad_scale = slope.flatten(1).sum(1).view_as(scale) / -scale
        if ctx.needs_input_grad[2]:
            grad_zero = (grad_x - grad).flatten(1).sum(1).view_as(scale) * scale
        return grad_x, grad_scale, grad_zero, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Quantize and dequantize: x̂ of this module's docstring, with the straight-through gradients of LSQ.

    The gradients are those of `torch._fake_quantize_learnable_per_channel_affine` with axis 0 and grad_factor 1:
    to x they pass inside the range; the step size gets (q − z) − x/s inside and q − z outside; the zero point
    gets −s outside.

    Args:
        x: float (C, …).
        scale: float (C,), positive.
        zero_point: float (C,); used rounded and clamped to the range, the gradient goes straight through both.
        qmin, qmax: the range of codes.

    Returns:
        float, the shape of x.
    """
    shape = (-1,) + (1,) * (x.dim() - 1)
    return _FakeQuantize.apply(x, scale.view(shape), zero_point.view(shape), qmin, qmax)
