"""Round tensors to integer codes, with straight-through gradients for training.

A tensor is represented by integer codes q in [qmin, qmax], a step size s and an integer zero point z:

    q = clamp(round(x / s) + z, qmin, qmax)        x̂ = (q − z) · s

Mid-rise codes are odd numbers: no level is zero, and as many levels are negative as positive. Levels are 2·s apart, and
z is 0:

    q = clamp(2·⌊x / (2·s)⌋ + 1, qmin, qmax)       x̂ = q · s

Step sizes and zero points have one value per slice of dimension 0: per output channel for weights, per sample for
activations, where they depend on the sample's timestep.
"""

from typing import Any

import torch
from torch import Tensor

# Bit-width of ternary codes: log2(3), rounded as in the literature.
TERNARY = 1.58

# Bit-widths of signed codes that are mid-rise: with so few levels, a code for zero would leave one side a level short.
MID_RISE = (1, 2)

# Bit-widths other than 2…8: LOW_WEIGHT_BITS for weights, TWO_DIGIT_BITS for inputs of edge layers, whose codes are
# two digits of 8 bits.
LOW_WEIGHT_BITS: tuple[float, ...] = (1, TERNARY)
TWO_DIGIT_BITS = 16


def check_bits(name: str, bits: float, also: tuple[float, ...] = ()) -> None:
    """Raise ValueError, with `name` in the message, unless `bits` is an integer in 2…8 or one of `also`."""
    if type(bits) is int and 2 <= bits <= 8:
        return
    if not any(type(bits) is type(other) and bits == other for other in also):
        others = "".join(f"{other}, " for other in also[:-1]) + f"{also[-1]} or " if also else ""
        raise ValueError(f"{name} must be {others}a whole number in 2…8, not {bits}")


def code_range(bits: float, signed: bool) -> range:
    """Return the codes of bit-width b, in ascending order.

    ================ ======== =====================================
    unsigned         2…8, 16  0, 1, …, 2^b − 1
    signed           3…8      −2^(b−1), …, −1, 0, 1, …, 2^(b−1) − 1
    signed, ternary  1.58     −1, 0, 1
    signed, mid-rise 1, 2     −(2^b − 1), …, −1, 1, …, 2^b − 1
    ================ ======== =====================================
    """
    check_bits("bits", bits, LOW_WEIGHT_BITS if signed else (TWO_DIGIT_BITS,))
    if bits == TERNARY:
        return range(-1, 2)
    count = 1 << int(bits)
    if not signed:
        return range(count)
    return range(1 - count, count, 2) if bits in MID_RISE else range(-count // 2, count // 2)


def round_zero_point(zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Round a learned zero point to an integer in [qmin, qmax]: inside this range 0.0 has a code, as padding needs."""
    return zero_point.round().clamp(qmin, qmax)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, codes: range) -> Tensor:
    """Return the codes of x, as floats.

    Args:
        x: float (C, …).
        scale: float, positive, broadcastable to x.
        zero_point: float with integer values, broadcastable to x; zeros for mid-rise codes.
        codes: all valid codes, from `code_range`.
    """
    return _round(x, scale, zero_point, codes).clamp_(codes[0], codes[-1])


def _round(x: Tensor, scale: Tensor, zero_point: Tensor, codes: range) -> Tensor:
    """Return the codes of x before clamping. All rounding to codes in PyTorch happens here."""
    steps = x * scale.reciprocal()
    rounded = steps.round_() if codes.step == 1 else steps.mul_(0.5).floor_().mul_(2).add_(1)
    return rounded.add_(zero_point)


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize, with explicit gradients: those of clamp at its bounds differ between versions of torch.

    x is inside the range if its code before clamping is one of `codes`. With the mask m of the elements inside, the
    gradients are (LSQ, arXiv 1902.08153, eq. 3 and 5, and the same for z)

        ∂x̂/∂x = m        ∂x̂/∂s = (x̂ − m·x) / s        ∂x̂/∂z = −s·(1 − m)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, codes: range) -> Tensor:
        z = round_zero_point(zero_point, codes[0], codes[-1])
        y = quantize(x, scale, z, codes).sub_(z).mul_(scale)
        ctx.save_for_backward(x, y, scale, z)
        ctx.codes = codes
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, z = ctx.saved_tensors
        unclamped = _round(x, scale, z, ctx.codes)
        bounds = ctx.codes[0] - 0.5, ctx.codes[-1] + 0.5  # half-integers, so no code lies on a bound

        def masked(tensor: Tensor) -> Tensor:
            # m·tensor in one pass; boolean masks take three times as long.
            return torch.ops.aten.hardtanh_backward(tensor, unclamped, *bounds)

        grad_x = masked(grad)
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            slope = masked(x).sub_(y).mul_(grad)  # −s·∂x̂/∂s, in place: these tensors are as large as the activations
            grad_scale = slope.flatten(1).sum(1).view_as(scale) / -scale
        if ctx.needs_input_grad[2]:
            grad_zero = (grad_x - grad).flatten(1).sum(1).view_as(scale) * scale
        return grad_x, grad_scale, grad_zero, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, codes: range) -> Tensor:
    """Quantize and dequantize x, with the straight-through gradients of LSQ.

    The gradients are those of `torch._fake_quantize_learnable_per_channel_affine` with axis 0 and grad_factor 1:
    1 for x inside the range; (q − z) − x/s inside and q − z outside for the step size; −s outside for the zero point;
    and 0 otherwise. Mid-rise quantization equals this operator applied to x − s with step size 2·s, plus s.

    Args:
        x: float (C, …).
        scale: float (C,), positive.
        zero_point: float (C,); it is rounded and clamped to the range, with a straight-through gradient. Zeros for
            mid-rise codes.
        codes: all valid codes, from `code_range`.

    Returns:
        float, the shape of x.
    """
    shape = (-1,) + (1,) * (x.dim() - 1)
    return _FakeQuantize.apply(x, scale.view(shape), zero_point.view(shape), codes)
