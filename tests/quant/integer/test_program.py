import itertools
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import GaussianFourierProjection
from diffusers.models.resnet import Downsample2D, Upsample2D
from torch import nn

from eval.exactness import flipped_shares
from quant import QuantConfig, QuantizedUNet, calibrate, freeze, quantize, to_integer
from quant.integer.binding import MIRROR_UP, POOL, available
from quant.integer.layers import IntegerLayer, Layers, dense, pad_to_lanes
from quant.integer.lines import Program
from quant.integer.program import follow_unet, refuse_unsupported
from quant.layers import QuantConv2d, QuantLinear
from quant.quantizers import Clock


def make_unet(size, *down, up=None, **options):
    """A UNet of three channels with blocks of these types."""
    torch.manual_seed(0)
    up = up or [kind.replace("Down", "Up") for kind in reversed(down)]
    defaults = {"norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8}
    return UNet2DModel(size, 3, 3, down_block_types=down, up_block_types=up, **defaults | options).eval()


def make_frozen(unet, config=None, x=None):
    """A frozen student; calibrated on x at timestep 700, if x is given."""
    student = quantize(unet, config or QuantConfig(), [700])
    if x is not None:
        calibrate(student, {700: x})
    else:
        uncalibrated(student)
    return freeze(student)


def uncalibrated(student):
    for _, layer in student.layers():
        nn.init.constant_(layer.act_quantizer.scale, 0.1)
    return student


def by_hand(unet):
    """A frozen student of a UNet that its config does not describe."""
    student = QuantizedUNet(unet, QuantConfig(8, 8), [700])
    for _, layer in student.layers():
        layer.weight_quantizer.initialise(layer.weight)
    return freeze(uncalibrated(student))


def test_whole_skips_are_followed():
    """Those of a student whose shortcuts have one quantizer for both halves."""
    unet, x = make_unet(8, "DownBlock2D", "AttnDownBlock2D", block_out_channels=(8, 16)), torch.randn(4, 3, 8, 8)
    frozen = make_frozen(unet, QuantConfig(8, 8, split_skips=False), x)
    assert not any(name.endswith(".skip") for name, _ in frozen.layers())
    with torch.no_grad():
        expected = frozen(x, 700).sample
    actual = to_integer(frozen)(x, 700).sample
    assert (actual - expected).square().mean().sqrt() < 3e-2 * expected.square().mean().sqrt()
    shares = flipped_shares(frozen, x, 700)
    assert shares.keys() == dict(frozen.layers()).keys()
    assert np.mean([*shares.values()]) < 1e-3


@pytest.mark.parametrize(
    ("weight_bits", "act_bits"),
    [(1, 2), (1, 4), (1.58, 2), (2, 2), (2, 3)],
)
def test_few_bits_run_as_the_simulation_from_the_disk(weight_bits, act_bits, tmp_path):
    """But for what a code on the other side of a border changes. On every instruction set with the same bytes."""
    unet, x = make_unet(8, "DownBlock2D", "AttnDownBlock2D", block_out_channels=(8, 24)), torch.randn(12, 3, 8, 8)
    frozen = make_frozen(unet, QuantConfig(weight_bits, act_bits, edge_bits=4, edge_act_bits=4, search="min-max"), x)
    assert max(flipped_shares(frozen, x, 700).values()) < 1e-3
    with torch.no_grad():
        simulated = frozen(x, 700).sample
    expected = to_integer(frozen, "portable")(x, 700).sample
    errors = (expected - simulated).flatten(1).norm(dim=1) / simulated.flatten(1).norm(dim=1)
    assert errors.median() < 1e-5
    frozen.save_pretrained(tmp_path)
    for isa in available():
        assert torch.equal(to_integer(QuantizedUNet.from_pretrained(tmp_path), isa)(x, 700).sample, expected)


@pytest.mark.parametrize(
    ("weight_bits", "act_bits", "fan_in"),
    [(1, 8, 4_210_752), (1.58, 8, 4_210_752), (2, 8, 1_403_584), (8, 8, 32_896), (8, 2, 65_535), (8, 16, 32_896)],
)
def test_sums_that_leave_32_bits_are_refused(weight_bits, act_bits, fan_in):
    """Twice the largest weight times 255, or times the 128 that codes may be stored less: from 2³¹ on."""
    layers = [QuantLinear(nn.Linear(size, 1), weight_bits, act_bits, 1, Clock([0])) for size in (fan_in, fan_in + 1)]
    for layer in layers:
        layer.freeze()
    IntegerLayer(0, "", layers[0], 0, 0)
    with pytest.raises(ValueError, match=f"^last: sums of {fan_in + 1:,} products are too large for integers of 32"):
        IntegerLayer(0, "last", layers[1], 0, 0)


@pytest.mark.parametrize(("weight_bits", "largest"), [(1, 1), (1.58, 1), (2, 3), (3, 4), (8, 128)])
def test_the_largest_product_is_that_of_the_codes(weight_bits, largest):
    layer = QuantLinear(nn.Linear(5, 3), weight_bits, 3, 1, Clock([0]))
    layer.freeze()
    assert IntegerLayer(0, "", layer, 0, 0).largest_product == 7 * largest


def test_16_bits_are_two_digits_of_8():
    layers = [QuantLinear(nn.Linear(5, 3), 4, bits, 1, Clock([0])) for bits in (16, 8)]
    for layer in layers:
        layer.freeze()
    integers = Layers([("fine", layers[0]), ("coarse", layers[1])], [])
    low, coarse = integers.values()
    assert integers.numbered == [low, low.high, coarse]
    assert [layer.number for layer in integers.numbered] == [0, 1, 2]
    assert [layer.first_channel for layer in integers.numbered] == [0, 16, 32]
    assert [layer.largest_product for layer in integers.numbered] == [255 * 8] * 3
    assert low.high.weight is low.weight
    assert not low.high.bias.any()
    assert coarse.high is None


@pytest.mark.parametrize(
    "options", [{}, {"flip_sin_to_cos": False}, {"freq_shift": 1}, {"block_out_channels": (9, 15)}]
)
def test_the_time_embedding_is_followed(options):
    defaults = {"block_out_channels": (8, 24), "norm_num_groups": 1}
    unet = make_unet(8, "DownBlock2D", "DownBlock2D", **defaults | options)
    student = make_frozen(unet, QuantConfig(8, 8, search="min-max"), torch.randn(2, 3, 8, 8))
    model = to_integer(student)
    for t in map(torch.tensor, (0, 3, 431.25, 999)):
        added = {}
        for name, module in student.unet.named_modules():
            if name.endswith("time_emb_proj"):
                keep = partial(added.__setitem__, name.replace("time_emb_proj", "conv1"))
                module.register_forward_hook(lambda _, inputs, output, keep=keep: keep(output[0]))
        with torch.no_grad():
            student(torch.zeros(1, 3, 8, 8), t)
        model(torch.zeros(1, 3, 8, 8), t)
        moment = model.moments[t.item(), None]
        assert len(added) == 8
        for layer in model.layers.values():
            actual = torch.from_numpy(moment.offsets[layer.channels] - layer.bias)
            expected = added.get(layer.name, torch.zeros(layer.out_channels))
            assert (actual - expected).abs().max() < 0.02 * max(added[name].abs().max() for name in added), layer.name


def spans(program, states):
    """From where to where each of `states` lies in memory, in order."""
    sizes = [pad_to_lanes(channels) * height * width for channels, height, width in program.shapes]
    return sorted((program.offsets[state], program.offsets[state] + sizes[state]) for state in states)


def check_places(program, results, given=(0,)):
    """Of every line the states that it or a later one needs, or that a result is, lie apart, and inside the memory."""
    for at, line in enumerate(program.lines):
        made = {*given, *(earlier.target for earlier in program.lines[: at + 1])}
        later = {state for rest in program.lines[at:] for state in (rest.source, rest.skip, rest.residual)}
        places = spans(program, made & (later | {*results, line.target}))
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(places))
        assert places[-1][1] <= program.memory


def test_states_that_are_needed_at_once_do_not_overlap(frozen):
    model = to_integer(frozen)
    program = follow_unet(model.student.unet, model.layers, 10, 10)
    last = program.lines[-1].target
    check_places(program, [last])
    check_places(model.time.program, model.time.added.values())
    reused = program.memory
    everything = range(len(program.shapes))
    check_places(program.place([*everything]), everything)
    assert program.memory >= sum(end - start for start, end in spans(program, everything)) > 4 * reused


@pytest.mark.parametrize("options", [{"num_class_embeds": 3}, {"class_embed_type": "timestep"}])
def test_states_that_are_given_do_not_overlap(options):
    unet = make_unet(16, "DownBlock2D", "DownBlock2D", block_out_channels=(8, 16), **options)
    unet.class_embedding.requires_grad_(False)
    time = to_integer(make_frozen(unet)).time
    check_places(time.program, time.added.values(), given=(0, 1))


@pytest.mark.parametrize(
    ("channels", "size", "message"),
    [
        (2, (10, 10), "the sample must have 1 channels, not 2"),
        (1, (9, 9), r"a skip of \(9, 9\) pixels meets \(10, 10\)"),
        (1, (1, 1), r"a skip of \(1, 1\) pixels meets \(2, 2\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(frozen, channels, size, message):
    with pytest.raises(ValueError, match=message):
        to_integer(frozen)(torch.randn(1, channels, *size), 999)


def make_conv(inside, outside, **options):
    layer = QuantConv2d(nn.Conv2d(inside, outside, **options), 8, 8, 1, Clock([0]))
    layer.freeze()
    layer.codes.random_(-128, 128)
    return layer


def test_an_image_smaller_than_a_kernel_is_refused():
    conv = make_conv(1, 1, kernel_size=3)
    with pytest.raises(ValueError, match=r"last: images of \(1, 2, 9\) are too small or do not divide"):
        Program(Layers([("last", conv)], []), (1, 2, 9)).emit(conv, 0)


def test_an_image_smaller_than_a_pool_is_refused():
    with pytest.raises(ValueError, match=r"images of \(1, 1, 9\) are too small"):
        Program(Layers([], []), (1, 1, 9)).change(0, resampling=POOL)


@pytest.mark.parametrize("size", [(1, 4), (4, 1)])
def test_an_image_smaller_than_a_mirror_is_refused(size):
    with pytest.raises(ValueError, match="too small for a border in a mirror"):
        Program(Layers([], []), (1, *size)).change(0, resampling=MIRROR_UP)


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_groups_become_zeros(groups):
    """Against PyTorch's own convolution in groups."""
    conv, x = nn.Conv2d(6, 12, 3, groups=groups), torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        expected, actual = conv(x), nn.functional.conv2d(x, dense(conv.weight, groups), conv.bias)
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize("outside", [1, 16, 37])
@pytest.mark.parametrize("inside", [1, 4, 18])
def test_weights_are_packed_as_the_core_reads_them(inside, outside):
    layer = make_conv(inside, outside, kernel_size=(3, 2))
    packed = IntegerLayer(0, "", layer, 0, 0)
    assert packed.weight.shape == (pad_to_lanes(outside) // 16, 3, 2, (inside + 3) // 4, 16, 4)
    assert packed.weight.flags.c_contiguous
    for o, c, y, x in np.ndindex(*layer.codes.shape):
        assert packed.weight[o // 16, y, x, c // 4, o % 16, c % 4] == layer.codes[o, c, y, x]
    assert np.count_nonzero(packed.weight) == layer.codes.count_nonzero(), "the rest is zero"
    assert packed.weight_sum.tolist() == layer.codes.int().sum((1, 2, 3)).tolist()


def test_a_linear_layer_is_a_convolution_of_one_pixel():
    layer = QuantLinear(nn.Linear(5, 3), 4, 4, 1, Clock([0]))
    layer.freeze()
    packed = IntegerLayer(0, "", layer, 0, 0)
    assert packed.weight.shape == (1, 1, 1, 2, 16, 4)
    assert (packed.weight[0, 0, 0, 1, :3, 0] == layer.codes[:, 4].numpy()).all()


@pytest.mark.parametrize("pad_end", [0, 1])
@pytest.mark.parametrize(
    "options", [{"kernel_size": 3, "padding": 1, "stride": 2}, {"kernel_size": (2, 5), "dilation": (3, 1)}]
)
def test_the_size_of_an_output_is_torchs(options, pad_end):
    layer = make_conv(1, 1, **options)
    for size in ((10, 10), (9, 7), (5, 12)):
        padded = nn.functional.pad(torch.zeros(1, 1, *size), (0, pad_end, 0, pad_end))
        expected = nn.functional.conv2d(padded, layer.codes.float(), None, *layer.geometry).shape[2:]
        assert IntegerLayer(0, "", layer, pad_end, 0).output_size(*size) == expected


@pytest.mark.parametrize(
    ("part", "other", "message"),
    [
        ("class_embedding", nn.Identity(), "class_embedding: a Identity is not supported"),
        ("time_proj", nn.Identity(), "time_proj: a Identity is not supported"),
        ("time_proj", GaussianFourierProjection(8, log=False), "time_proj: Fourier features of t itself, not of its"),
        ("time_embedding.act", nn.ELU(), "time_embedding: a ELU is not supported"),
        ("conv_act", nn.ReLU(), "conv_act: a ReLU is not supported"),
        ("mid_block", nn.Identity(), "mid_block: a Identity is not supported"),
        ("up_blocks.0", nn.Identity(), r"up_blocks\.0: a Identity is not supported"),
        ("mid_block.resnets.1.nonlinearity", nn.GELU("tanh"), r"mid_block\.resnets\.1: a GELU by tanh is not"),
        ("mid_block.attentions.0.norm_q", nn.Identity(), r"mid_block\.attentions\.0: a norm of queries or keys"),
        ("down_blocks.0.downsamplers.0.norm", nn.Identity(), r"down_blocks\.0\.downsamplers\.0: resampling with a"),
        ("mid_block.resnets.0.upsample", nn.Upsample(scale_factor=3), r"mid_block\.resnets\.0: a resampling of its"),
        ("mid_block.resnets.0.downsample", nn.MaxPool2d(2), r"mid_block\.resnets\.0: a resampling of its own kind"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(part, other, message):
    unet = make_unet(16, "DownBlock2D", "DownBlock2D", block_out_channels=(16, 16))
    refuse_unsupported(unet)
    parent, _, name = part.rpartition(".")
    setattr(unet.get_submodule(parent), name, other)
    with pytest.raises(ValueError, match=message):
        refuse_unsupported(unet)


def test_a_network_of_another_class_is_refused_by_name():
    with pytest.raises(ValueError, match="unet: a Linear is not supported on integers"):
        refuse_unsupported(nn.Linear(1, 1))


def test_what_only_hands_can_change_is_followed():
    """Convolutions in groups, samplers without a convolution, attention that adds nothing to its input."""
    unet = make_unet(16, "DownBlock2D", "AttnDownBlock2D", block_out_channels=(16, 16))
    unet.down_blocks[0].resnets[0].conv1 = nn.Conv2d(16, 16, 3, padding=1, groups=4)
    unet.conv_out = nn.Conv2d(16, 3, 3, padding=1, bias=False)
    unet.down_blocks[0].downsamplers[0] = Downsample2D(16)
    unet.up_blocks[0].upsamplers[0] = Upsample2D(16)
    unet.mid_block.attentions[0].residual_connection = False
    frozen, x = by_hand(unet), torch.randn(6, 3, 16, 16)
    with torch.no_grad():
        expected = frozen(x, 700).sample
    errors = (to_integer(frozen)(x, 700).sample - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert errors.median() < 1e-5
    shares = flipped_shares(frozen, x, 700)
    assert shares.keys() == dict(frozen.layers()).keys()
    assert max(shares.values()) < 1e-3


def test_padding_that_is_a_word_is_refused_by_name():
    unet = make_unet(16, "DownBlock2D", "DownBlock2D", block_out_channels=(16, 16))
    unet.down_blocks[0].resnets[0].conv1 = nn.Conv2d(16, 16, 3, padding="same")
    message = r'down_blocks\.0\.resnets\.0\.conv1: padding "same" is not supported on integers'
    with pytest.raises(ValueError, match=message):
        to_integer(by_hand(unet))
