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
    """The codes of x, as floats. The one place where a number becomes a code.

    Args:
        x: float (C, …).
        scale: float, positive, broadcastable to x.
        zero_point: float with integer values, broadcastable to x.
    """
    return (x * scale.reciprocal()).round_().add_(zero_point).clamp_(qmin, qmax)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
    ) -> Tensor:
        z = round_zero_point(zero_point, qmin, qmax)
        codes = quantize(x, scale, z, qmin, qmax)
        ctx.save_for_backward(x, scale, z, codes)
        ctx.range = qmin, qmax
        return (codes - z).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale, z, codes = ctx.saved_tensors
        qmin, qmax = ctx.range
        # Whether x was inside the range is asked of its code before the clamp. The end codes belong to the
        # inside: clamp's own gradient at its bounds differs between versions of torch and is not used.
        position = x * scale.reciprocal()
        unclamped = position.round().add_(z)
        inside = (unclamped >= qmin) & (unclamped <= qmax)
        grad_x = grad * inside
        dims = list(range(1, x.dim()))
        # ∂x̂/∂s = (q − z) − x/s inside, q − z outside (LSQ, arXiv 1902.08153, eq. 3).
        grad_scale = (codes - z).sub_(position.mul_(inside)).mul_(grad).sum(dims, keepdim=True)
        # ∂x̂/∂z = 0 inside, −s outside.
        grad_zero = None
        if ctx.needs_input_grad[2]:
            grad_zero = (grad_x - grad).sum(dims, keepdim=True).mul_(scale)
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
