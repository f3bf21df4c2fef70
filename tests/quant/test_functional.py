import pytest
import torch

from quant.functional import code_range, fake_quantize

WIDTHS = [(bits, signed) for bits in range(2, 9) for signed in (False, True)]


def oracle(x, scale, zero_point, qmin, qmax):
    return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, 0, qmin, qmax, 1.0)


def outputs_and_gradients(function, tensors, qmin, qmax):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    y = function(*leaves, qmin, qmax)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(upstream)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(("bits", "signed"), WIDTHS)
def test_output_and_gradients_equal_torchs_fused_operator(bits, signed):
    qmin, qmax = code_range(bits, signed)
    generator = torch.Generator().manual_seed(bits)
    scale = torch.rand(7, generator=generator) + 0.1
    zero_point = (
        torch.randint(qmin, qmax + 1, (7,), generator=generator) + 0.8 * torch.rand(7, generator=generator) - 0.4
    )
    x = torch.randn(7, 3, 40, generator=generator) * scale.view(-1, 1, 1) * (qmax - qmin)
    ours = outputs_and_gradients(fake_quantize, (x, scale, zero_point), qmin, qmax)
    theirs = outputs_and_gradients(oracle, (x, scale, zero_point), qmin, qmax)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    for mine, other in zip(ours[2:], theirs[2:], strict=True):
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("bits", "signed"), WIDTHS)
def test_the_ends_of_the_range(bits, signed):
    """Every code's own value, and the values half a step and a whole step beyond the end codes."""
    qmin, qmax = code_range(bits, signed)
    steps = torch.cat([torch.arange(qmin, qmax + 1.0), torch.tensor([qmin - 1, qmin - 0.5, qmax + 0.5, qmax + 1])])
    x = (0.25 * steps).expand(2, -1)
    tensors = (x, torch.full((2,), 0.25), torch.zeros(2))
    ours = outputs_and_gradients(fake_quantize, tensors, qmin, qmax)
    theirs = outputs_and_gradients(oracle, tensors, qmin, qmax)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    inside = ours[1][:, : qmax - qmin + 1]
    assert (inside != 0).all(), "the end codes are inside: their gradient passes"
    assert (ours[1][:, [-4, -1]] == 0).all(), "a whole step outside nothing passes"


def test_the_end_codes_keep_their_gradient():
    """After rounding, every end code sits on clamp's bound, where its gradient is 1, 0.5 or 0 by version of torch."""
    x = torch.tensor([[-8.0, 7.0]], requires_grad=True)
    fake_quantize(x, torch.ones(1), torch.zeros(1), -8, 7).sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("bits", [1, 0, 9, 40])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must lie in 2…8, not {bits}"):
        code_range(bits, signed=True)
