"""The core of every instruction set: against the portable one bit for bit, and against PyTorch."""

import ctypes
import math
import runpy
import sys
from dataclasses import dataclass
from threading import Thread

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import GaussianFourierProjection, get_timestep_embedding
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from quant import functional
from quant.integer import binding
from quant.integer.binding import (
    ATTENTION,
    GELU,
    ISAS,
    KEEP,
    MIRROR_UP,
    MISH,
    QUANTIZE,
    RELU,
    SILU,
    VARIABLE,
    available,
    choose,
)
from quant.integer.layers import Layers, pad_to_lanes
from quant.integer.lines import DOUBLING, HALVING, Program
from quant.integer.model import Moment
from quant.integer.program import RESAMPLINGS
from quant.layers import QuantConv2d
from quant.quantizers import Clock

ACTIVATIONS = {QUANTIZE: lambda x: x, SILU: F.silu, GELU: F.gelu, RELU: F.relu, MISH: F.mish}
GUARD = 1024  # numbers behind an array that must stay as they were


@dataclass
class Step:
    """A line of a program, with its layer. States are numbered, the first is given; -1 is no skip or no residual."""

    outside: int = 16
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Top, left, bottom, right."""
    kind: int = QUANTIZE
    groups: int = 0
    """Of a normalisation; 0: none."""
    source: int = 0
    skip: int = -1
    residual: int = -1
    factor: int = 1
    heads: int = 0
    weight_bits: float = 8
    act_bits: int = 8
    zero_point: float = 0.5
    """As a fraction of the largest code."""
    resampling: int | None = None
    """Of a line without a layer, which has but a kind, groups and a source; None: a line with one."""
    centre: float = 0
    divisor: float = 1
    extreme: bool = False
    """Whether the weights are the ends of their range: of the first output channel the smallest, of the second the
    largest, of the third both in turn, and so on."""

    def size(self, height, width):
        """Of what it makes of an image."""
        if self.resampling is not None:
            factor = 2 if self.resampling in DOUBLING else 0.5 if self.resampling in HALVING else 1
            return int(height * factor), int(width * factor)
        spans = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(self.dilation, self.kernel, strict=True)]
        top, left, bottom, right = self.padding
        return (
            (height * self.factor + top + bottom - spans[0]) // self.stride[0] + 1,
            (width * self.factor + left + right - spans[1]) // self.stride[1] + 1,
        )


class Case:
    """A program of random weights whose states, the first of that shape, all stay in memory."""

    def __init__(self, shape, steps, seed=0):
        torch.manual_seed(seed)
        shapes, convs, norms = [shape], [], []
        for step in steps:
            channels, height, width = shapes[step.source]
            channels = channels // 3 if step.kind == ATTENTION else channels
            channels += 0 if step.skip < 0 else shapes[step.skip][0]
            layered = step.resampling is None
            convs.append(self._convolution(channels, step) if layered else None)
            norms.append(self._normalisation(channels, step.groups) if step.groups else None)
            shapes.append((step.outside if layered else channels, *step.size(height, width)))
        self.steps, self.norms, self.convs = steps, norms, convs
        self.layers = Layers([("", conv) for conv in convs if conv], [norm for norm in norms if norm])
        layered = [step for step in steps if step.resampling is None]
        for layer, step in zip(self.layers.values(), layered, strict=True):
            for digit in digits(layer):
                digit.padding = list(step.padding)
                self.layers.table[digit.number] = digit.structure()
        self.program = Program(self.layers, shape)
        self.states, self.lines = [0], []  # of the program: the state behind each step, and the last of its lines
        for conv, norm, step in zip(convs, norms, steps, strict=True):
            if conv is None:
                options = step.kind, norm, step.resampling, step.centre, step.divisor
                self.states.append(self.program.change(self.states[step.source], *options))
            else:
                skip, residual = (-1 if state < 0 else self.states[state] for state in (step.skip, step.residual))
                options = step.kind, norm, skip, residual, step.factor, step.heads
                self.states.append(self.program.emit(conv, self.states[step.source], *options))
            self.lines.append(len(self.program.lines) - 1)
        assert [self.program.shapes[state] for state in self.states] == shapes
        self.program.place(list(range(len(self.program.shapes))))
        self.largest = torch.tensor([conv.act_quantizer.qmax for conv in convs if conv], dtype=torch.int32)
        # Of states of some standard deviation of 1 some are outside of the codes' range.
        self.scales = 3 * (torch.rand(len(layered)) + 0.5) / self.largest
        self.zero_points = (torch.tensor([step.zero_point for step in layered]) * self.largest).round().int()

    @staticmethod
    def _convolution(channels, step):
        conv = nn.Conv2d(channels, step.outside, step.kernel, step.stride, 0, step.dilation)
        layer = QuantConv2d(conv, step.weight_bits, step.act_bits, 1, Clock([0]))
        layer.freeze()
        known = torch.tensor(layer.weight_quantizer.codes, dtype=torch.int8)
        layer.codes.copy_(known[torch.randint(len(known), layer.codes.shape)])
        smallest, largest = layer.weight_quantizer.qmin, layer.weight_quantizer.qmax
        if step.extreme:
            layer.codes[0::3], layer.codes[1::3] = smallest, largest
            layer.codes[2::3, 0::2], layer.codes[2::3, 1::2] = smallest, largest
        # Outputs of some standard deviation of 1.
        size = 2 / -smallest / layer.codes[0].numel() ** 0.5
        layer.weight_quantizer.scale.copy_((torch.rand(step.outside) + 0.5) * size)
        nn.init.normal_(layer.bias)
        return layer

    @staticmethod
    def _normalisation(channels, groups):
        norm = nn.GroupNorm(groups, channels)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        return norm.requires_grad_(False)

    def moment(self, core):
        return Moment(self.scales, self.zero_points, self.largest, self.layers, core.code_offset)

    def run(self, core, x):
        """The memory behind the program for x (C, H, W), and the codes int32 (H, W, C) of each line with a layer."""
        memory = np.full(self.program.memory + GUARD, np.nan, np.float32)
        pixels = self.pixels(memory, 0)
        pixels[...] = 0
        pixels[..., : len(x)] = rearrange(x, "c h w -> h w c")
        moment = self.moment(core)
        core.execute(self.program.structure, moment.structure, memory.ctypes.data)
        assert np.isnan(memory[-GUARD:]).all(), "nothing is written past the last state"
        codes = []
        for number, (conv, step) in enumerate(zip(self.convs, self.steps, strict=True)):
            if conv is None:
                codes.append(None)
                continue
            layer = self.layers[conv]
            _, height, width = self.program.shapes[self.states[step.source]]
            shape = (height * step.factor, width * step.factor, layer.in_channels)
            codes.append(np.zeros(shape, np.int32))
            for digit in digits(layer):
                guarded = np.full(math.prod(shape) + GUARD, 0xAB, np.uint8)
                line = self.program.structure.lines[self.lines[number]]
                quantizer = moment.quantizers[digit.number :].ctypes.data
                core.encode(line, moment.norm_table, quantizer, memory.ctypes.data, guarded.ctypes.data)
                assert (guarded[-GUARD:] == 0xAB).all(), "nothing is written past the last code"
                codes[-1] += guarded[:-GUARD].reshape(shape).astype(np.int32) << digit.shift
        return memory, codes

    def row(self, number):
        """Which row of `scales`, `zero_points` and `largest` is that of a step's layer."""
        return list(self.layers).index(self.convs[number])

    def pixels(self, memory, number):
        """A state as it lies in memory, (H, W, C filled up to 16)."""
        channels, height, width = self.program.shapes[self.states[number]]
        start = self.program.offsets[self.states[number]]
        return memory[start : start + height * width * pad_to_lanes(channels)].reshape(height, width, -1)

    def state(self, memory, number):
        """float32 (1, C, H, W)."""
        pixels, channels = self.pixels(memory, number), self.program.shapes[self.states[number]][0]
        assert not pixels[..., channels:].any(), "channels are filled up with zeros"
        return rearrange(torch.from_numpy(pixels[..., :channels]), "h w c -> 1 c h w")


def digits(layer):
    """The integer layers for the high digit and for the low one, or the only one."""
    return [layer] if layer.high is None else [layer.high, layer]


def exact_numbers(case, number, memory):
    """What a line makes of its source first, float64 (1, C, H, W); and the error that float32 may make in it."""
    step, norm = case.steps[number], case.norms[number]
    x = case.state(memory, step.source).double()
    if step.skip >= 0:
        x = torch.cat([x, case.state(memory, step.skip).double()], 1)
    error = 1e-6 * x.abs().max()
    if norm is not None:
        weight, bias = norm.weight.double(), norm.bias.double()
        # Where a group's mean is far larger than its spread, digits cancel in what is normalised, not in its variance.
        variance, mean = torch.var_mean(x.reshape(norm.num_groups, -1), 1, correction=0)
        ratio = (mean.square() / (variance + norm.eps)).repeat_interleave(x.shape[1] // norm.num_groups)[:, None, None]
        size = torch.group_norm(x, norm.num_groups, eps=norm.eps).abs()
        error = 1e-6 * (1 + ratio.sqrt() + size) * weight.abs()[:, None, None] + 1e-6 * bias.abs().max()
        x = torch.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    if step.kind != ATTENTION:
        x = ACTIVATIONS[step.kind](x)
    else:
        q, k, v = rearrange(x, "1 (three heads c) h w -> three heads (h w) c", three=3, heads=step.heads)
        score = (q @ k.mT).abs().max() / q.shape[-1] ** 0.5
        error = 1e-6 * (1 + score) * v.abs().max()
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = rearrange(mixed, "heads (h w) c -> 1 (heads c) h w", h=x.shape[2])
    return x, error + torch.zeros_like(x)


def exact_codes(case, number, memory):
    """What a line rounds, clamped, float64 (1, C, H, W); and the error that the float32 of the core may make in it."""
    step, layer = case.steps[number], case.row(number)
    zero_point, largest, scale = case.zero_points[layer], case.largest[layer], case.scales[layer].double()
    x, error = exact_numbers(case, number, memory)
    exact, error = (x / scale + zero_point).clamp(0, largest), 1e-4 + error / scale + torch.zeros_like(x)
    return [of.repeat_interleave(step.factor, 2).repeat_interleave(step.factor, 3) for of in (exact, error)]


def check_codes(case, number, memory, codes):
    """Each code is the nearest to the exact number, but for what lies on the border of two."""
    exact, error = exact_codes(case, number, memory)
    codes = rearrange(torch.from_numpy(codes), "h w c -> 1 c h w")
    assert ((codes - exact).abs() <= 0.5 + error).all()


def check_change(case, number, memory):
    """What a line without a layer made is what PyTorch and diffusers make."""
    step, (x, error) = case.steps[number], exact_numbers(case, number, memory)
    resample = RESAMPLINGS.get(step.resampling, lambda x: x)
    exact = (resample(x.float()).double() - step.centre) / step.divisor
    error = (resample(error.float()).double() + 3e-6 * x.abs().max() + 1e-6 * abs(step.centre)) / abs(step.divisor)
    assert ((case.state(memory, number + 1) - exact).abs() <= error).all()


def exact_output(case, number, memory, codes):
    """What a line makes of its codes, float32 (1, C, H, W): sums by PyTorch in float64, then rounded as written."""
    step, layer = case.steps[number], case.convs[number]
    integer = case.layers[layer]
    top, left, bottom, right = step.padding
    codes = rearrange(torch.from_numpy(codes), "h w c -> 1 c h w")
    zero_point, scale = case.zero_points[case.row(number)], case.scales[case.row(number)]
    y = None if step.residual < 0 else case.state(memory, step.residual)
    for base in (256, 1) if integer.high else (1,):
        padded = F.pad((codes // base % 256 - zero_point // base % 256).double(), (left, right, top, bottom))
        sums = F.conv2d(padded, layer.codes.double(), None, step.stride, 0, step.dilation)
        of_digit = sums.float() * (torch.tensor(integer.scales) * (scale * base))[:, None, None]
        if base == 1:
            of_digit += layer.bias[:, None, None]
        y = of_digit if y is None else of_digit + y
    return y


def check_exactly(case, memory, codes):
    """Every state of `memory`, and the codes that lead to it."""
    for number, of_line in enumerate(codes):
        if of_line is None:
            check_change(case, number, memory)
            continue
        check_codes(case, number, memory, of_line)
        assert torch.equal(case.state(memory, number + 1), exact_output(case, number, memory, of_line))


@st.composite
def cases(draw):
    """A random program of a few lines: the shape of its first state, the lines, the seed of all numbers, a mean."""

    def between(low, high):
        return draw(st.integers(low, high))

    def pair(low, high):
        return between(low, high), between(low, high)

    shapes, steps = [(between(1, 40), *pair(1, 9))], []
    for _ in range(between(2, 5)):
        # The newest state more often than others, so that lines build on one another.
        source = draw(st.sampled_from([*range(len(shapes)), *[len(shapes) - 1] * len(shapes)]))
        channels, height, width = shapes[source]
        step = Step(source=source, kind=draw(st.sampled_from([QUANTIZE, *ACTIVATIONS])))
        if between(0, 3) == 0:
            resamplings = [KEEP] if max(height, width) > 20 else [KEEP, *RESAMPLINGS]
            least = {
                resampling: 2 if resampling in HALVING or resampling == MIRROR_UP else 1 for resampling in resamplings
            }
            step.resampling = draw(st.sampled_from([r for r in resamplings if min(height, width) >= least[r]]))
            step.groups = draw(st.sampled_from([0, *divisors(channels)]))
            step.centre, step.divisor = draw(st.sampled_from([(0, 1), (0.5, 0.5), (0, 2**0.5)]))
            steps.append(step)
            shapes.append((channels, *step.size(height, width)))
            continue
        if channels % 3 == 0 and between(0, 2) == 0:
            step.kind = ATTENTION
            step.heads = draw(st.sampled_from(divisors(channels // 3)))
        else:
            step.skip = draw(st.sampled_from([-1, *(i for i, s in enumerate(shapes) if s[1:] == (height, width))]))
            inside = channels + (0 if step.skip < 0 else shapes[step.skip][0])
            step.groups = draw(st.sampled_from([0, *divisors(inside)]))
            step.factor = between(1, 3) if height * width <= 30 else 1
        if draw(st.booleans()):  # of the size of its input, so that a residual fits
            step.kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (5, 1)]))
            y, x = (k // 2 for k in step.kernel)
            step.padding = (y, x, y, x)
        else:
            step.kernel, step.stride, step.dilation = pair(1, 5), pair(1, 3), pair(1, 3)
            top, left = pair(0, 3)
            spans = (d * (k - 1) + 1 for d, k in zip(step.dilation, step.kernel, strict=True))
            sizes = (height * step.factor + top, width * step.factor + left)
            lacking = [max(0, span - size) for span, size in zip(spans, sizes, strict=True)]
            step.padding = (top, left, *(between(least, least + 3) for least in lacking))
        size = step.size(height, width)
        step.residual = draw(st.sampled_from([-1, *(i for i, s in enumerate(shapes) if s[1:] == size)]))
        outside = st.integers(1, 40) | st.integers(1, 20).map(lambda n: 3 * n)
        step.outside = draw(outside) if step.residual < 0 else shapes[step.residual][0]
        widths = st.tuples(st.sampled_from([1, 1.58, *range(2, 9)]), st.sampled_from([*range(2, 9), 16, 16]))
        step.weight_bits, step.act_bits = draw(st.sampled_from([(8, 8), (4, 4), (1, 2)]) | widths)
        step.zero_point = draw(st.sampled_from([0, 0.1, 0.5, 1, 1e-4]))
        step.extreme = between(0, 3) == 0
        steps.append(step)
        shapes.append((step.outside, *size))
    return shapes[0], steps, between(0, 1 << 30), draw(st.sampled_from([0, 0, 0, 2, 100, 3000]))


def divisors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


def same_bytes(ours, theirs):
    return np.array_equal(ours.view(np.int32), theirs.view(np.int32))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_random_programs_are_exact_and_leave_the_same_bytes_on_every_instruction_set(example):
    shape, steps, seed, mean = example
    case, x = Case(shape, steps, seed), torch.randn(shape) + mean
    expected, expected_codes = case.run(available()["portable"], x)
    check_exactly(case, expected, expected_codes)
    for isa in available().keys() - {"portable"}:
        memory, codes = case.run(available()[isa], x)
        for number, step in enumerate(case.steps):
            if codes[number] is not None:
                assert np.array_equal(codes[number], expected_codes[number]), f"{isa}: codes of {step}"
            ours, theirs = (case.pixels(of, number + 1) for of in (memory, expected))
            assert same_bytes(ours, theirs), f"{isa}: state behind {step}"
        assert same_bytes(memory, expected), isa


def check_saturation(isa, weight_bits, act_bits, kernel, inside, zero_point):
    """Weights at the ends of their range times the largest code are summed exactly."""
    border = (kernel // 2,) * 4
    options = {"weight_bits": weight_bits, "act_bits": act_bits, "zero_point": zero_point, "extreme": True}
    case = Case((inside, 5, 7), [Step(19, (kernel, kernel), padding=border, **options)])
    memory, (codes,) = case.run(available()[isa], torch.full((inside, 5, 7), 1e9))
    assert (codes == case.largest.item()).all()
    assert torch.equal(case.state(memory, 1), exact_output(case, 0, memory, codes))


@pytest.mark.parametrize(
    ("weight_bits", "act_bits"),
    [(1, 8), (1.58, 8), (2, 8), (4, 4), (4, 8), (5, 7), (7, 7), (8, 2), (8, 4), (8, 8), (8, 16)],
)
def test_the_largest_codes_and_weights_do_not_saturate(isa, weight_bits, act_bits):
    """A fan-in of 576 and of 512 codes: 16 bits would not hold the sum of any of these widths."""
    for zero_point in (0, 1):
        check_saturation(isa, weight_bits, act_bits, 3, 64, zero_point)
        check_saturation(isa, weight_bits, act_bits, 1, 512, zero_point)


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(1, 2), (1, 4), (1.58, 2), (2, 2), (2, 3), (2, 4)])
def test_sums_of_few_bits_do_not_saturate(isa, weight_bits, act_bits):
    """A fan-in of 86,528 codes, all the largest: 16 bits would not hold half of the sum of any of these widths."""
    check_saturation(isa, weight_bits, act_bits, kernel=13, inside=512, zero_point=1)


GEOMETRIES = [
    {"kernel": (3, 3), "padding": (1, 1, 1, 1)},
    {"kernel": (3, 3), "padding": (0, 0, 1, 1), "stride": (2, 2)},
    {"kernel": (3, 3), "padding": (2, 2, 2, 2), "dilation": (2, 2)},
    {"kernel": (1, 1)},
    {"kernel": (1, 1), "padding": (1, 0, 0, 2)},
    {"kernel": (1, 5), "padding": (0, 3, 1, 0), "stride": (2, 1)},
    {"kernel": (4, 2), "padding": (1, 2, 3, 0), "dilation": (1, 3), "factor": 2},
]
WIDTHS = [(1, 2), (1, 4), (1.58, 2), (2, 2), (2, 4), (4, 4), (8, 8), (4, 16), (8, 16)]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_products_of_codes_are_exact(isa, geometry):
    for number, (weight_bits, act_bits) in enumerate(WIDTHS):
        inside, outside = [(1, 16), (18, 37), (64, 1)][number % 3]
        options = {"weight_bits": weight_bits, "act_bits": act_bits, "zero_point": 0.3, **geometry}
        case = Case((inside, 7, 29), [Step(outside, **options)])
        given = torch.randint(0, 2**act_bits, (inside, 7, 29))
        memory, (codes,) = case.run(available()[isa], (given - case.zero_points) * case.scales)
        factor = case.steps[0].factor
        assert np.array_equal(codes[::factor, ::factor], rearrange(given, "c h w -> h w c"))
        assert torch.equal(case.state(memory, 1), exact_output(case, 0, memory, codes)), (weight_bits, act_bits)


@pytest.mark.parametrize("bits", [*range(2, 9), 16])
def test_plain_quantization_rounds_as_the_simulation(isa, bits):
    """Numbers near every border of two codes, on it, and far outside of the range."""
    for zero_point in (0, 0.4, 1):
        case = Case((5, 16, 24), [Step(act_bits=bits, zero_point=zero_point)])
        near = 1 + torch.randint(-2, 3, (5, 16, 24)) * 2**-23
        x = torch.randint(-300, 301, (5, 16, 24)) * (case.scales / 2) * near
        x.view(-1)[:6] = torch.tensor([0.0, -0.0, 1e30, -1e30, 1e-40, 4e9])
        _, (codes,) = case.run(available()[isa], x)
        expected = functional.quantize(x, case.scales, case.zero_points, range(case.largest.item() + 1))
        assert torch.equal(rearrange(torch.from_numpy(codes), "h w c -> c h w").float(), expected)


@pytest.mark.parametrize(
    ("channels", "size", "kind"),
    [(8, (7, 7), QUANTIZE), (16, (5, 9), SILU), (24, (9, 16), QUANTIZE), (40, (7, 7), SILU)],
)
def test_normalisation_makes_the_codes_of_torch(isa, channels, size, kind):
    """Over two states, the second of 12 channels: a group lies in both."""
    case = Case((channels, *size), [Step(12), Step(kind=kind, groups=4, skip=1, zero_point=0.2)], seed=channels)
    memory, (_, codes) = case.run(available()[isa], torch.randn(channels, *size) * 3 + 2)
    check_codes(case, 1, memory, codes)
    assert codes.std() > 20


def test_silu_makes_the_codes_of_torch(isa):
    """Where it bends, with codes 1/64 apart; and for numbers that e^x does not hold."""
    x = torch.linspace(-12, 3, 40 * 25).view(1, 40, 25)
    case = Case(x.shape, [Step(kind=SILU, zero_point=0.1)])
    case.scales[:] = 1 / 64
    memory, (codes,) = case.run(available()[isa], x)
    check_codes(case, 0, memory, codes)
    assert codes.min() == 26 - 18, "its lowest point is at -0.278"
    case.scales[:] = 1000
    memory, (codes,) = case.run(available()[isa], x * 1e4)
    check_codes(case, 0, memory, codes)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_are_those_of_torch(isa, kind):
    """To some units of the last place of a number near 1, wherever they bend; and far away."""
    x = torch.cat([torch.linspace(-20, 20, 4000), torch.tensor([0.0, 1e-30, -1e-30, 90, -90, 1e4, -1e4, 1e18, -1e18])])
    case = Case((1, 1, len(x)), [Step(kind=kind, resampling=KEEP)])
    memory, _ = case.run(available()[isa], x.view(1, 1, -1))
    exact = ACTIVATIONS[kind](x.double())
    assert ((case.state(memory, 1).flatten() - exact).abs() <= 3e-7 * exact.abs().clamp(min=1)).all()


@pytest.mark.parametrize("resampling", RESAMPLINGS)
def test_resampling_is_that_of_torch_and_diffusers(isa, resampling):
    for shape in ((1, 2, 2), (16, 5, 8), (35, 9, 3)):
        case, x = Case(shape, [Step(resampling=resampling)]), torch.randn(shape)
        memory, _ = case.run(available()[isa], x)
        assert (case.state(memory, 1) - RESAMPLINGS[resampling](x[None])).abs().max() < 1e-6


def test_centring_and_division_are_exactly_those_of_torch(isa):
    x, factor = torch.randn(5, 4, 7) * 3, 2**0.5
    for options, expected in (({"centre": 0.5, "divisor": 0.5}, 2 * x - 1), ({"divisor": factor}, x / factor)):
        case = Case(x.shape, [Step(resampling=KEEP, **options)])
        memory, _ = case.run(available()[isa], x)
        assert torch.equal(case.state(memory, 1)[0], expected)


@pytest.mark.parametrize(("heads", "width"), [(1, 16), (4, 8), (3, 20), (2, 40), (5, 3), (1, 1)])
def test_attention_makes_the_codes_of_torch(isa, heads, width):
    for size in ((7, 7), (1, 3), (5, 9), (1, 1), (4, 4)):
        case = Case((3 * heads * width, *size), [Step(kind=ATTENTION, heads=heads)], seed=width)
        memory, (codes,) = case.run(available()[isa], torch.randn(3 * heads * width, *size) * 2)
        check_codes(case, 0, memory, codes)


def test_the_exponential_is_exact_to_a_few_units_of_its_last_place(isa):
    """Of two tokens with scores x and 0 and values 1 and -e^x the weighted mean is 0, but for the error of e^-x."""
    x = torch.linspace(0, 80, 1000)
    q, k, v = x.expand(2, -1), torch.ones(2, 1000), torch.stack([torch.ones(1000), -x.double().exp().float()])
    k[1] = 0
    case = Case((3000, 1, 2), [Step(kind=ATTENTION, heads=1000)])
    case.scales[:] = 2**-24
    _, (codes,) = case.run(available()[isa], rearrange(torch.cat([q, k, v], 1), "w c -> c 1 w"))
    errors = codes.astype(int) - case.zero_points.item()
    assert 0 < abs(errors).max() <= 3


def sinusoids(core, t, half, shift, cosine_first):
    guarded = np.full(2 * half + 1, np.nan, np.float32)
    core.sinusoids(t, half, shift, cosine_first, guarded.ctypes.data)
    assert np.isnan(guarded[-1])
    return guarded[:-1]


@pytest.mark.parametrize(("half", "shift", "cosine_first"), [(3, 1, True), (16, 0, False), (64, 0, True)])
def test_sinusoids_equal_diffusers(isa, half, shift, cosine_first):
    """To 1e-6, and what the last bit of a frequency, of which PyTorch is not sure, makes of an angle."""
    t = np.arange(1001)
    ours = np.stack([sinusoids(available()[isa], each, half, shift, cosine_first) for each in t])
    theirs = get_timestep_embedding(torch.from_numpy(t), 2 * half, cosine_first, shift).numpy()
    assert (abs(ours - theirs) <= 1e-6 + t[:, None] * 2**-24).all()


@pytest.mark.parametrize(("half", "shift"), [(3, 1), (16, 0), (64, 0.5)])
def test_sinusoids_are_those_of_their_angles(isa, half, shift):
    exponents = np.float32(-9.21034037) * np.arange(half, dtype=np.float32) / np.float32(half - shift)
    frequencies = np.float32([math.exp(exponent) for exponent in exponents])
    for t in (*range(0, 1001, 4), 0.5, 431.25, 1e5, -3):
        ours = sinusoids(available()[isa], t, half, shift, False)
        angles = np.float32(t) * frequencies
        exact = [function(float(angle)) for function in (math.sin, math.cos) for angle in angles]
        assert np.array_equal(ours, np.float32(exact))


@pytest.mark.parametrize("cosine_first", [False, True])
def test_fourier_features_are_those_of_their_angles(isa, cosine_first):
    frequencies = np.float32(16) * np.random.default_rng(0).standard_normal(40, np.float32)
    for t in (1, 2, 0.5, 250.6, 999, 1e-30, 3e38, math.sqrt(0.5)):
        guarded = np.full(81, np.nan, np.float32)
        available()[isa].fourier(t, 40, frequencies.ctypes.data, cosine_first, guarded.ctypes.data)
        assert np.isnan(guarded[-1])
        angles = np.float32(math.log(np.float32(t))) * frequencies * np.float32(2) * np.float32(math.pi)
        functions = (math.cos, math.sin) if cosine_first else (math.sin, math.cos)
        exact = [function(float(angle)) for function in functions for angle in angles]
        assert np.array_equal(guarded[:-1], np.float32(exact))


@pytest.mark.parametrize("flip", [False, True])
def test_fourier_features_equal_diffusers(isa, flip):
    torch.manual_seed(0)
    projection = GaussianFourierProjection(16, scale=16, flip_sin_to_cos=flip)
    for t in (3, 250.6, 999):
        ours = np.empty(32, np.float32)
        available()[isa].fourier(t, 16, projection.weight.numpy().ctypes.data, flip, ours.ctypes.data)
        theirs = projection(torch.tensor([t]))[0].numpy()
        assert abs(ours - theirs).max() < 1e-3, "what the last bit of the logarithm makes of an angle"


def images_case():
    """A program with all kinds of lines."""
    normalised = Step(9, (3, 3), padding=(1, 1, 1, 1), kind=SILU, groups=3, source=1, skip=1, weight_bits=4, act_bits=4)
    attention = Step(9, kind=ATTENTION, heads=3, source=2, residual=1)
    return Case((2, 6, 5), [Step(9, (3, 3), padding=(1, 1, 1, 1)), normalised, attention, Step(2, source=3, factor=2)])


def denoise(core, case, x, moments, parallel=None, threads=1, seconds=None):
    """x float (N, C, H, W) → the last state of each image."""
    guarded = np.full((len(x) + 1, *case.program.shapes[-1]), 7, np.float32)
    pointers = (ctypes.c_void_p * len(x))(*(ctypes.addressof(moment.structure) for moment in moments))
    addresses = x.data_ptr(), guarded.ctypes.data, len(x), parallel, threads
    core.denoise(case.program.structure, pointers, *addresses, None if seconds is None else seconds.ctypes.data)
    assert (guarded[-1] == 7).all()
    return torch.from_numpy(guarded[:-1])


@pytest.fixture
def images(isa):
    """A program, images, their moments, and what the program makes of them one by one."""
    case, core = images_case(), available()[isa]
    x, moments = torch.randn(20, 2, 6, 5), []
    for _ in x:
        case.scales *= 1.05
        moments.append(case.moment(core))
    expected = torch.cat([denoise(core, case, x[i : i + 1], moments[i : i + 1]) for i in range(len(x))])
    return core, case, x, moments, expected


def test_an_image_is_the_last_state_of_its_program(isa):
    case, core = images_case(), available()[isa]
    x = torch.randn(1, 2, 6, 5)
    memory, codes = case.run(core, x[0])
    check_exactly(case, memory, codes)
    assert torch.equal(denoise(core, case, x, [case.moment(core)]), case.state(memory, 4))


@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("threads", [1, 2])
def test_images_depend_neither_on_their_batch_nor_on_threads(images, count, threads):
    core, case, x, moments, expected = images
    actual = denoise(core, case, x[:count], moments[:count], binding.openmp(), threads)
    assert torch.equal(actual, expected[:count])
    assert len(expected.unique(dim=0)) == 20


def test_images_are_shared_among_as_many_threads_as_are_asked_for(images):
    core, case, x, moments, expected = images
    asked, task = [], ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, task, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def parallel(work, data, threads, flags):
        asked.append(threads)
        pool = [Thread(target=work, args=(data,)) for _ in range(threads)]
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()

    address = ctypes.cast(parallel, ctypes.c_void_p)
    for count, threads in ((20, 4), (3, 4), (20, 1), (1, 4)):
        assert torch.equal(denoise(core, case, x[:count], moments[:count], address, threads), expected[:count])
    assert asked == [4, 3], "one image, or one thread, needs no other"


@pytest.mark.skipif(sys.platform != "linux", reason="this system may have OpenMP threads of another kind")
def test_pytorchs_own_threads_are_found():
    assert binding.openmp() is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_its_image_none_and_no_other(images, bad):
    core, case, x, moments, expected = images
    x[[1, 4, 19], 1, 5, 4] = bad
    actual = denoise(core, case, x, moments)
    assert actual[[1, 4, 19]].isnan().all()
    rest = [i for i in range(20) if i not in (1, 4, 19)]
    assert torch.equal(actual[rest], expected[rest])


def test_no_images_are_none(images):
    core, case, x, _, _ = images
    assert denoise(core, case, x[:0], [], binding.openmp(), 2).shape == (0, 2, 12, 10)


def test_threads_tell_what_codes_and_products_take(images):
    core, case, x, moments, _ = images
    seconds = np.zeros(2)
    for threads in (1, 2):
        before = seconds.copy()
        denoise(core, case, x, moments, binding.openmp(), threads, seconds)
        assert (seconds > before).all()


def test_this_processor_runs_what_it_has():
    """Without a compiler at the installation there would be nothing to test here."""
    assert "portable" in available()
    if torch.cpu.get_capabilities().get("avx2"):
        assert "avx2" in available()


def test_the_best_instruction_set_is_chosen_unless_another_is_asked_for(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    best = next(isa for isa in ISAS if isa in available())
    assert choose().isa == best
    for name in available():
        monkeypatch.setenv(VARIABLE, name)
        assert choose().isa == name
        assert choose("portable").isa == "portable"
    monkeypatch.setenv(VARIABLE, "")
    assert choose().isa == best


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_an_instruction_set_that_lacks_gets_one_line(by, monkeypatch):
    monkeypatch.setenv(VARIABLE, "mmx" if by == "environment" else "portable")
    with pytest.raises(ValueError, match=f'this processor has no "mmx", only {", ".join(available())}') as caught:
        choose("mmx" if by == "argument" else None)
    assert "\n" not in str(caught.value)


def test_an_installation_without_a_core_names_the_other_runtime(monkeypatch, capsys):
    monkeypatch.setattr(binding, "available", dict)
    monkeypatch.setattr(binding, "built", dict)
    for isa in (None, "portable"):
        with pytest.raises(ValueError, match=r'not built, .* C\+\+ compiler .* the runtime "simulated"') as caught:
            choose(isa)
        assert "\n" not in str(caught.value)
    runpy.run_module("quant.integer", run_name="__main__")
    assert "--runtime simulated" in capsys.readouterr().out


def test_cores_that_are_of_no_use_are_not_said_to_lack_a_compiler(monkeypatch, capsys):
    monkeypatch.setattr(binding, "available", dict)
    with pytest.raises(ValueError, match="none of the integer cores can be used here: install the pack"):
        choose()


def test_the_installation_says_what_it_built(capsys):
    runpy.run_module("quant.integer", run_name="__main__")
    assert capsys.readouterr().out.endswith(f"this processor runs {next(iter(available()))}.\n")
