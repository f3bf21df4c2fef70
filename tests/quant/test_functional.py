import pytest
import torch

from quant.functional import code_range, fake_quantize

WIDTHS = [(bits, signed) for bits in range(2, 9) for signed in (False, True) if (bits, signed) != (2, True)]
WIDTHS += [(1.58, True), (16, False)]


def oracle(x, scale, zero_point, codes):
    if codes.step == 1:
        return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, 0, codes[0], codes[-1], 1.0)
    # Mid-rise levels are those of whole codes, shifted by half of their distance.
    half = scale.view(-1, *[1] * (x.dim() - 1))
    first, last = (code // 2 for code in (codes[0], codes[-1]))
    return half + torch._fake_quantize_learnable_per_channel_affine(
        x - half, 2 * scale, zero_point, 0, first, last, 1.0
    )


def outputs_and_gradients(function, tensors, codes):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    y = function(*leaves, codes)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(upstream)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def test_the_codes_of_each_width():
    assert [list(code_range(bits, signed=True)) for bits in (1, 1.58, 2, 3)] == [
        [-1, 1], [-1, 0, 1], [-3, -1, 1, 3], [-4, -3, -2, -1, 0, 1, 2, 3],
    ]  # fmt: skip
    assert [list(code_range(bits, signed=False)) for bits in (2, 3)] == [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert code_range(8, signed=True) == range(-128, 128)
    assert code_range(8, signed=False) == range(256)
    assert code_range(16, signed=False) == range(65536)


@pytest.mark.parametrize(("bits", "signed"), WIDTHS)
def test_output_and_gradients_equal_torchs_fused_operator(bits, signed):
    codes = code_range(bits, signed)
    generator = torch.Generator().manual_seed(int(bits))
    scale = torch.rand(7, generator=generator) + 0.1
    zero_point = (
        torch.randint(codes[0], codes[-1] + 1, (7,), generator=generator)
        + 0.8 * torch.rand(7, generator=generator)
        - 0.4
    )
    x = torch.randn(7, 3, 40, generator=generator) * scale.view(-1, 1, 1) * (len(codes) - 1)
    ours = outputs_and_gradients(fake_quantize, (x, scale, zero_point), codes)
    theirs = outputs_and_gradients(oracle, (x, scale, zero_point), codes)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    for mine, other in zip(ours[2:], theirs[2:], strict=True):
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weight_bits", [1, 2])
def test_mid_rise_output_and_gradients_equal_torchs_fused_operator_shifted(weight_bits):
    codes = code_range(weight_bits, signed=True)
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(7, generator=generator) + 0.1
    x = torch.randn(7, 3, 40, generator=generator) * scale.view(-1, 1, 1) * (codes[-1] + 1)
    ours = outputs_and_gradients(fake_quantize, (x, scale, torch.zeros(7)), codes)
    theirs = outputs_and_gradients(oracle, (x, scale, torch.zeros(7)), codes)
    for mine, other in zip(ours[:3], theirs[:3], strict=True):
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    levels = (x / scale.view(-1, 1, 1)).div(2, rounding_mode="floor").mul(2).add(1).clamp(codes[0], codes[-1])
    assert torch.equal(ours[0], levels * scale.view(-1, 1, 1))
    assert set(levels.unique().tolist()) == set(codes)
    assert torch.equal(ours[1] != 0, (x / scale.view(-1, 1, 1)).abs() < codes[-1] + 1)


@pytest.mark.parametrize(("bits", "signed"), WIDTHS)
def test_the_ends_of_the_range(bits, signed):
    """Every code's own value, and the values half a step and a whole step beyond the end codes."""
    codes = code_range(bits, signed)
    qmin, qmax = codes[0], codes[-1]
    steps = torch.cat([torch.arange(qmin, qmax + 1.0), torch.tensor([qmin - 1, qmin - 0.5, qmax + 0.5, qmax + 1])])
    x = (0.25 * steps).expand(2, -1)
    tensors = (x, torch.full((2,), 0.25), torch.zeros(2))
    ours = outputs_and_gradients(fake_quantize, tensors, codes)
    theirs = outputs_and_gradients(oracle, tensors, codes)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    inside = ours[1][:, : len(codes)]
    assert (inside != 0).all(), "the end codes are inside: their gradient passes"
    assert (ours[1][:, [-4, -1]] == 0).all(), "a whole step outside nothing passes"


@pytest.mark.parametrize("weight_bits", [1, 2])
def test_the_ends_of_a_range_that_is_mid_rise(weight_bits):
    """Every code's own value; borders, which belong to the upper code; numbers around the ends of the outer cells."""
    codes = code_range(weight_bits, signed=True)
    end = codes[-1] + 1
    steps = torch.tensor([*codes, 0, -1e-7, -end, -end - 0.01, -end - 2, end - 0.01, end, end + 2])
    x, scale = (0.25 * steps)[None], torch.full((1,), 0.25)
    y, grad_x, grad_scale, _ = outputs_and_gradients(fake_quantize, (x, scale, torch.zeros(1)), codes)
    expected = [*codes, 1, -1, codes[0], codes[0], codes[0], codes[-1], codes[-1], codes[-1]]
    assert (y / 0.25).tolist() == [expected]
    inside = [True] * (len(codes) + 3) + [False, False, True, False, False]
    assert (grad_x != 0).tolist() == [inside]
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    slopes = torch.tensor(expected) - steps * torch.tensor(inside)
    torch.testing.assert_close(grad_scale, (slopes * upstream).sum(1))


def test_the_end_codes_keep_their_gradient():
    """After rounding, every end code sits on clamp's bound, where its gradient is 1, 0.5 or 0 by version of torch."""
    x = torch.tensor([[-8.0, 7.0]], requires_grad=True)
    fake_quantize(x, torch.ones(1), torch.zeros(1), range(-8, 8)).sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("bits", [0, 1.0, 1.5, 2.0, 9, 16, 40, True, "1", float("nan")])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be 1, 1.58 or a whole number in 2…8, not {bits}"):
        code_range(bits, signed=True)


@pytest.mark.parametrize("bits", [1, 1.58, 0, 9, 16.0])
def test_unsigned_codes_have_two_bits_or_more(bits):
    with pytest.raises(ValueError, match=f"bits must be 16 or a whole number in 2…8, not {bits}"):
        code_range(bits, signed=False)
