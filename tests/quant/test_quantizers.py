import copy

import numpy as np
import pytest
import scipy.optimize
import torch
from diffusers import DDIMScheduler

from quant.quantizers import ActivationQuantizer, Clock, WeightQuantizer


def make_quantizer(timesteps=(999, 499, 99), bits=4):
    clock = Clock(timesteps)
    quantizer = ActivationQuantizer(bits, clock)
    with torch.no_grad():
        quantizer.scale.copy_(torch.linspace(0.1, 0.5, len(timesteps)))
        quantizer.zero_point.copy_(torch.linspace(1, 5, len(timesteps)))
    return quantizer


def test_mixed_timesteps_equal_batches_of_one_timestep():
    quantizer, x, t = make_quantizer(), torch.randn(6, 3, 5), torch.tensor([999, 99, 499, 499, 99, 999])
    quantizer.clock.set(t)
    mixed = quantizer(x)
    mixed.square().sum().backward()
    mixed_grads = [p.grad.clone() for p in quantizer.parameters()]
    quantizer.zero_grad()
    for value in t.unique():
        quantizer.clock.set(value.reshape(1).expand(int((t == value).sum())))
        alone = quantizer(x[t == value])
        assert torch.equal(alone, mixed[t == value])
        alone.square().sum().backward()
    for mixed_grad, parameter in zip(mixed_grads, quantizer.parameters(), strict=True):
        torch.testing.assert_close(mixed_grad, parameter.grad)


def test_a_timestep_may_be_shared_by_the_batch(student, buffer):
    x, t = buffer.x[:, 1], student.clock.timesteps[1]
    with torch.no_grad():
        each = student(x, torch.full((len(x),), t)).sample
        for shared in (t, torch.tensor(t), torch.tensor([t])):
            assert torch.equal(student(x, shared).sample, each)


@pytest.mark.parametrize(("t", "expected"), [(999, 1.0), (749, 1.5), (499, 2.0), (299, 2.5), (99, 3.0), (0, 3.0)])
def test_tables_are_interpolated_between_their_rows(t, expected):
    clock = Clock([999, 499, 99])
    clock.set(torch.tensor([t]))
    assert clock.read(torch.tensor([1.0, 2.0, 3.0])).item() == pytest.approx(expected)


def test_an_unset_clock_raises():
    with pytest.raises(RuntimeError, match="clock is not set"):
        make_quantizer()(torch.randn(2, 3))


def test_the_model_unsets_its_clock_behind_itself(student, buffer):
    student(buffer.x[:, 0], 999)
    _, layer = next(student.layers())
    with pytest.raises(RuntimeError, match="clock is not set"):
        layer(buffer.x[:, 0])


def test_a_deep_copy_has_a_clock_of_its_own_shared_inside_the_copy(student):
    twin = copy.deepcopy(student)
    clocks = {id(layer.act_quantizer.clock) for _, layer in twin.layers()}
    assert clocks == {id(twin.clock)}
    assert twin.clock is not student.clock
    twin.clock.set(torch.tensor([999]))
    with pytest.raises(RuntimeError):
        student.clock.read(torch.ones(6))


def test_the_clock_is_no_part_of_the_state_dict(student):
    kinds = {key.rsplit(".", 1)[-1] for key in student.state_dict()}
    assert kinds == {"weight", "bias", "lora_a", "lora_b", "scale", "zero_point"}
    assert not any("clock" in key for key in student.state_dict())


@pytest.mark.parametrize("timesteps", [[], [3, 3]])
def test_a_clock_needs_different_timesteps(timesteps):
    with pytest.raises(ValueError, match="different timesteps"):
        Clock(timesteps)


@pytest.mark.parametrize("weight_bits", [1, 1.58, 2, 3, 4, 8])
def test_the_search_for_weights_finds_what_scipy_finds(weight_bits):
    weight = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(weight_bits, 3)
    quantizer.initialise(weight)
    searched = (quantizer(weight) - weight).square().sum(1).tolist()

    def error(scale, row):
        codes = np.array(quantizer.codes)
        nearest = codes[np.searchsorted((codes[1:] + codes[:-1]) / 2, row / scale)]
        return np.square(nearest * scale - row).sum()

    for row, ours in zip(weight.double().numpy(), searched, strict=True):
        bound = np.abs(row).max() / -quantizer.qmin
        grid = [(0.05 * bound, 1.2 * bound)]
        best = scipy.optimize.brute(lambda s, row=row: error(s[0], row), grid, Ns=2000, full_output=True)[1]
        assert best * 0.999 <= ours <= best * 1.03 < error(bound, row) * 1.03


@pytest.mark.parametrize("fan_in", [9, 200, 4608])
@pytest.mark.parametrize("outlier", [1, 10])
def test_the_search_for_binary_weights_finds_their_mean_magnitude(fan_in, outlier):
    """The optimum of XNOR-Net (arXiv 1603.05279, eq. 6), to half of the distance of two candidates."""
    weight = torch.randn(5, fan_in, generator=torch.Generator().manual_seed(0))
    weight[:, 0] *= outlier
    quantizer = WeightQuantizer(1, 5)
    quantizer.initialise(weight)
    magnitudes = weight.abs()
    assert ((quantizer.scale - magnitudes.mean(1)).abs() <= 0.0026 * magnitudes.amax(1)).all()
    assert torch.equal(quantizer(weight).sign(), weight.sign())


@pytest.mark.parametrize("weight_bits", [1, 1.58, 2, 4])
@pytest.mark.parametrize("search", ["error", "min-max"])
def test_codes_stand_for_what_training_saw(weight_bits, search):
    weight = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(weight_bits, 3)
    quantizer.initialise(weight, search)
    codes = quantizer.quantize(weight)
    assert codes.dtype == torch.int8
    assert set(codes.unique().tolist()) <= set(quantizer.codes)
    assert torch.equal(quantizer.dequantize(codes), quantizer(weight))
    if search == "min-max":
        torch.testing.assert_close(quantizer.scale * quantizer.qmax, weight.abs().amax((1, 2, 3)))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_search_for_activations_is_done_for_each_step_on_its_own(bits):
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.silu(torch.randn(3, 4000, generator=generator)) * torch.tensor([[0.1], [1.0], [7.0]])
    quantizer = make_quantizer(bits=bits)
    for number, row in enumerate(rows):
        quantizer.initialise(row, row=number)
    assert quantizer.scale[0] < quantizer.scale[1] < quantizer.scale[2]
    for row, t in zip(rows, quantizer.clock.timesteps, strict=True):
        quantizer.clock.set(torch.tensor([t]))
        error = (quantizer(row[None]) - row).square().mean()
        low, high = row.min(), row.max()
        step = (high - low) / quantizer.qmax
        min_max = torch.fake_quantize_per_tensor_affine(
            row, step.item(), round((-low / step).item()), 0, quantizer.qmax
        )
        assert error <= (min_max - row).square().mean() * 1.001


def test_the_clock_takes_what_schedulers_give():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    expected = [800, 600, 400, 200, 0]
    for timesteps in (scheduler.timesteps, list(scheduler.timesteps), scheduler.timesteps.numpy(), np.array(expected)):
        clock = Clock(timesteps)
        assert clock.timesteps == expected
        assert all(type(t) is int for t in clock.timesteps)
    assert Clock(torch.tensor([80.0, 0.5])).timesteps == [80, 0.5]


@pytest.mark.parametrize("timesteps", [[float("nan"), 1], [float("inf")], ["late"], [None], [torch.zeros(2)], []])
def test_what_is_no_timestep_is_refused(timesteps):
    with pytest.raises(ValueError, match="timestep"):
        Clock(timesteps)


def test_a_clock_of_fractional_timesteps_reads_its_own_rows():
    timesteps = [1.1, 0.5, 0.1]
    clock, table = Clock(timesteps), torch.tensor([10.0, 20.0, 30.0])
    clock.set(torch.tensor(timesteps))
    assert clock.read(table).tolist() == [10, 20, 30]
    clock.set(torch.tensor([0.3, 0.8, 5.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(clock.read(table), torch.tensor([25.0, 15.0, 10.0, 30.0]))
