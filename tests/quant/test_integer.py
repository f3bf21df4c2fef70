import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel
from torch import nn
from torch.nn import functional as F

from ddpm_mnist.sampler import SamplerConfig, make_scheduler, sample
from eval.exactness import flipped_shares, line_codes
from quant import QuantConfig, calibrate, freeze, functional, integer, quantize, to_integer
from quant.integer import ATTENTION, NORM_SILU, Instruction, IntegerLayer, Quantizer
from quant.layers import QuantConv2d
from quant.quantizers import Clock

fused = pytest.mark.skipif(integer.fused_operator() is None, reason="needs AVX-512 VNNI and a C++ compiler")
WAYS = [pytest.param("fused", marks=fused), "oneDNN", "exact float"]


@pytest.fixture
def use(monkeypatch):
    """Make the integer models that are built from here on run in one of `WAYS`."""

    def choose(way):
        if way != "fused":
            monkeypatch.setattr(integer, "fused_operator", lambda: None)
        if way == "exact float":
            monkeypatch.setattr(integer, "has_onednn", lambda: False)

    return choose


@pytest.fixture
def frozen(student):
    torch.manual_seed(0)
    for _, layer in student.layers():
        nn.init.normal_(layer.lora_b, std=0.01)
    return freeze(student)


@pytest.mark.parametrize("way", WAYS)
def test_a_sampling_on_integers_is_the_simulations(frozen, use, way):
    use(way)
    config = SamplerConfig(num_steps=6)
    model = to_integer(frozen)
    ways = {layer.way for layer in model.layers.values()}
    # Where a processor adds products of 8-bit codes in 16 bits, oneDNN leaves the layers that would saturate to floats.
    falls_back = way == "oneDNN" and not integer.sums_are_exact()
    assert ways == {"VNNI" if way == "fused" else way} | ({"exact float"} if falls_back else set())
    ours, theirs = (sample(denoiser, config, 24).float() for denoiser in (model, frozen))
    # A float on the boundary of a code may go the other way, and what follows differs: few images may.
    equal = (ours == theirs).flatten(1).float().mean(1)
    assert equal.median() > 0.97
    assert (ours - theirs).square().mean() < 0.01 * theirs.square().mean()


@fused
def test_plain_quantization_rounds_as_the_simulation(frozen, buffer):
    """The inputs of every layer in the simulation: no code differs."""
    model, t = to_integer(frozen), frozen.clock.timesteps[2]
    model(buffer.x[:, 2], t)
    inputs, step = [], model.moments[t]
    names = {layer.name for layer in model.layers.values()}
    layers = [layer for name, layer in frozen.layers() if name in names]
    hooks = [layer.register_forward_pre_hook(lambda at, x: inputs.append((layers.index(at), x[0]))) for layer in layers]
    with torch.no_grad():
        frozen(buffer.x[:, 2], t)
    for hook in hooks:
        hook.remove()
    assert len(inputs) == len(layers)
    for number, x in inputs:
        x = x.transpose(1, 2)[..., None] if x.dim() == 3 else x
        quantizer = step.quantizers[number]
        scale, zero_point = torch.tensor(quantizer.scale), torch.tensor(quantizer.zero_point)
        expected = functional.quantize(x, scale, zero_point, 0, quantizer.qmax)
        line = Instruction(0, 0, -1, -1, x.shape[1], -1, 0, -1, -1, *x.shape[2:], 1, 0)
        assert torch.equal(line_codes(line, x, quantizer), expected)


@fused
def test_every_line_of_the_program_makes_the_codes_of_torch(frozen, buffer, use):
    """The program up to each line, fused and line by line: a float on a code's border may round the other way."""
    fast = to_integer(frozen)
    use("oneDNN")
    slow = to_integer(frozen)
    x, t = buffer.x[:, 2].contiguous(memory_format=torch.channels_last), frozen.clock.timesteps[2]
    slow(x, t), fast(x, t)
    (program,), (other,), moment = fast.programs.values(), slow.programs.values(), fast.moments[t]
    instructions, placed = other.instructions, program.placed
    unequal = 0
    for count in range(1, len(instructions) + 1):
        other.instructions = [*instructions[: count - 1], instructions[count - 1]._replace(target=-1)]
        program.placed = placed[:count].clone()
        program.placed[-1, Instruction._fields.index("target")] = -1
        expected = slow._run_line_by_line(other, moment, x)
        actual = fast._run_fused(program, moment, x)
        assert actual.shape == expected.shape
        error = (actual - expected).abs()
        assert error.mean() < 0.02 * expected.abs().mean(), instructions[count - 1]
        unequal += (error > 1e-5 * expected.abs().max()).float().mean().item()
    assert unequal / len(instructions) < 0.2


@fused
def test_from_equal_inputs_codes_differ_from_the_simulation_only_on_a_border(frozen, buffer):
    frozen.requires_grad_(False)
    shares = [flipped_shares(frozen, buffer.x[:, step], frozen.clock.timesteps[step]) for step in (0, 3, 5)]
    assert {len(share) for share in shares} == {len(to_integer(frozen).layers)}
    assert max(value for share in shares for value in share.values()) < 1e-4


@fused
def test_a_wrong_zero_point_is_seen_as_flipped_codes(frozen, buffer, monkeypatch):
    read = integer._read_quantizer
    monkeypatch.setattr(integer, "_read_quantizer", lambda q: read(q)._replace(zero_point=read(q).zero_point + 1))
    shares = flipped_shares(frozen, buffer.x[:, 3], frozen.clock.timesteps[3])
    assert min(shares.values()) > 0.5, "in every layer, all codes but those at the end of the range"


def test_states_that_are_needed_at_once_do_not_overlap(frozen, buffer):
    model = to_integer(frozen)
    model(buffer.x[:1, 0], 999)
    (program,) = model.programs.values()
    names = ("source", "skip", "residual")
    reads = [[getattr(line, name) for name in names] for line in program.instructions]
    where = {-1: None} | {
        line.target: placed[Instruction._fields.index("target")]
        for line, placed in zip(program.instructions, program.placed.tolist(), strict=True)
    }
    for at, line in enumerate(program.instructions):
        needed = {state for later in reads[at:] for state in later} & {old.target for old in program.instructions[:at]}
        needed.add(line.target)
        spans = []
        for state in needed - {-1}:
            channels, height, width = program.shapes[state]
            spans.append((where[state], where[state] + channels * height * width))
        spans.sort()
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
        assert spans == [] or spans[-1][1] <= program.memory


@pytest.mark.parametrize(("channels", "size"), [(2, (28, 28)), (1, (27, 27)), (1, (1, 1))])
@pytest.mark.parametrize("way", WAYS)
def test_images_that_do_not_fit_are_refused(frozen, use, way, channels, size):
    use(way)
    with pytest.raises(ValueError, match=r"must have 1 channels|do not divide|meets"):
        to_integer(frozen)(torch.randn(1, channels, *size), 999)


@fused
@pytest.mark.parametrize("channels", [8, 16, 24, 40])
@pytest.mark.parametrize("size", [(7, 7), (5, 9)])
def test_normalisation_and_silu_make_the_codes_of_torch(channels, size):
    torch.manual_seed(channels)
    x = torch.randn(6, channels, *size) * 3 + 2
    norm = nn.GroupNorm(4, channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    quantizer = Quantizer(0.02, 14, 255)
    line = Instruction(NORM_SILU, 0, 0, -1, channels, -1, 0, -1, -1, *size, 1, 0)
    with torch.no_grad():
        ours = line_codes(line, x, quantizer, norm)
        exact = F.silu(norm(x)) / quantizer.scale + quantizer.zero_point
    expected = exact.round().clamp(0, 255)
    border = (exact - exact.floor() - 0.5).abs() < 1e-3
    assert torch.equal(ours[~border], expected[~border])
    assert (ours - expected).abs().max() <= 1
    assert (ours != expected).float().mean() < 1e-4


@fused
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (4, 8), (3, 20), (2, 40)])
@pytest.mark.parametrize("size", [(7, 7), (1, 3), (5, 9)])
def test_attention_makes_the_codes_of_torch(heads, width, size):
    torch.manual_seed(width)
    qkv = torch.randn(3, 3 * heads * width, *size) * 2
    quantizer = Quantizer(0.03, 128, 255)
    ours = line_codes(Instruction(ATTENTION, 0, -1, -1, qkv.shape[1], -1, 0, -1, -1, *size, 1, heads), qkv, quantizer)
    q, k, v = qkv.double().view(3, 3, heads, width, -1).transpose(-1, -2).unbind(1)
    exact = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(3, -1, *size)
    exact = exact / quantizer.scale + quantizer.zero_point
    expected = exact.round().clamp(0, 255)
    assert (ours - expected).abs().max() <= 1
    border = (exact - exact.floor() - 0.5).abs() < 1e-3
    assert torch.equal(ours[~border], expected[~border].float())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"kernel_size": 3, "padding": 1}, (9, 7)),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, (10, 14)),
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, (9, 15)),
        ({"kernel_size": 1}, (6, 5)),
        ({"kernel_size": (1, 5), "padding": (0, 2), "stride": (2, 1)}, (6, 30)),
    ],
)
@pytest.mark.parametrize(("inside", "outside"), [(1, 16), (18, 37), (64, 1)])
def test_products_of_codes_are_exact(way, bits, options, size, inside, outside):
    """Against the same convolution of the codes in float64, to 1e-5 of the largest value."""
    torch.manual_seed(bits)
    layer = QuantConv2d(nn.Conv2d(inside, outside, **options), bits, bits, 1, Clock([0]))
    layer.weight_quantizer.initialise(layer.weight)
    layer.freeze()
    quantizer = Quantizer(0.07, 3, layer.act_quantizer.qmax)
    codes = torch.randint(0, quantizer.qmax + 1, (5, inside, *size))
    weight = layer.codes.double() * layer.weight_quantizer.scale.double()[:, None, None, None]
    expected = F.conv2d((codes - 3).double() * 0.07, weight, layer.bias.double(), *layer.geometry)
    line = IntegerLayer(0, "", layer, 0, fused=way == "fused")
    if way == "fused":
        x = (codes - 3).float() * 0.07
        shape = (inside, *line.stride, *line.dilation, *line.padding)
        actual = integer.fused_operator()(
            x.contiguous(memory_format=torch.channels_last),
            torch.tensor([Instruction(0, 0, -1, -1, inside, -1, 0, -1, -1, *size, 1, 0)]),
            [line.weight], [line.weight_sum], [line.scales], torch.tensor([shape]), [], [], [], [],
            torch.tensor([quantizer], dtype=torch.float64), [layer.bias], 0,
        )  # fmt: skip
    else:
        if way == "exact float":
            line.way, line.weight = way, layer.codes.double()
        actual = line(codes.byte().contiguous(memory_format=torch.channels_last), quantizer, layer.bias)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


@fused
def test_an_image_depends_neither_on_its_batch_nor_on_the_threads(frozen):
    model, config = to_integer(frozen), SamplerConfig(num_steps=6)
    expected = sample(model, config, 20, batch_size=64)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for batch_size in (1, 7, 64):
                assert torch.equal(sample(model, config, 20, batch_size=batch_size), expected), (count, batch_size)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("way", WAYS[:2])
def test_threads_may_share_a_model(frozen, buffer, use, way):
    use(way)
    x, timesteps = buffer.x[:1, 2], range(0, 960, 20)
    expected = [to_integer(frozen)(x, t).sample for t in timesteps]
    shared, interval = to_integer(frozen), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda t: shared(x, t).sample, timesteps))
    finally:
        sys.setswitchinterval(interval)
    assert all(map(torch.equal, answers, expected))


def test_timesteps_may_be_mixed_in_a_batch(frozen, buffer):
    model, t = to_integer(frozen), torch.tensor([999, 3, 500, 999, 3, 3, 640, 999])
    x = buffer.x[:, 1]
    together = model(x, t).sample
    apart = torch.cat([model(x[i : i + 1], t[i]).sample for i in range(len(t))])
    assert torch.equal(together, apart)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"block_out_channels": (8, 16, 24), "layers_per_block": 2, "attention_head_dim": 4}, (16, 16)),
        ({"block_out_channels": (20, 20), "norm_num_groups": 5, "attention_head_dim": 10}, (12, 20)),
        ({"block_out_channels": (8, 16), "downsample_padding": 0, "norm_num_groups": 4}, (16, 12)),
        ({"block_out_channels": (8, 8), "mid_block_type": None, "norm_num_groups": 2}, (8, 8)),
    ],
)
@pytest.mark.parametrize("split_skips", [True, False])
def test_other_unets_are_followed_by_their_structure(options, size, split_skips, use, way):
    use(way)
    torch.manual_seed(0)
    depth = len(options["block_out_channels"])
    unet = UNet2DModel(
        sample_size=size, in_channels=3, out_channels=3,
        down_block_types=("DownBlock2D",) * (depth - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (depth - 1),
        **{"norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8, **options},
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, *size)
    student = quantize(unet, QuantConfig(8, 8, split_skips=split_skips), [700])
    calibrate(student, {700: x})
    frozen = freeze(student)
    with torch.no_grad():
        expected = frozen(x, 700).sample
    actual = to_integer(frozen)(x, 700).sample
    assert (actual - expected).square().mean().sqrt() < 3e-2 * expected.square().mean().sqrt()


def test_layers_that_would_saturate_run_in_exact_float_and_are_named(frozen, buffer, use, monkeypatch):
    use("oneDNN")
    monkeypatch.setattr(integer, "sums_are_exact", lambda: False)
    model = to_integer(frozen)
    shortcut = "up_blocks.1.resnets.1.conv_shortcut"
    edges = f"conv_in, {shortcut}.hidden, {shortcut}.skip, conv_out"
    assert model.summary() == f"4 layers by exact float, {len(model.layers) - 4} layers by oneDNN ({edges})"
    t = frozen.clock.timesteps[1]
    with torch.no_grad():
        expected = frozen(buffer.x[:, 1], t).sample
    assert (model(buffer.x[:, 1], t).sample - expected).abs().mean() < 0.02 * expected.abs().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, 'time_embedding_norm "scale_shift" is not supported'),
        ({"center_input_sample": True}, "unet: center_input_sample is not supported"),
        ({"num_class_embeds": 3}, "unet: class conditioning is not supported"),
        ({"act_fn": "gelu"}, "down_blocks.0.resnets.0: a GELU is not supported"),
        ({"mid_block_scale_factor": 2.0}, "mid_block.* 2.0 is not supported"),
        (
            {"downsample_type": "resnet", "down_block_types": ("AttnDownBlock2D",) * 2},
            "resampling inside a residual block is not supported",
        ),
        ({"down_block_types": ("SkipDownBlock2D",) * 2}, "a SkipDownBlock2D is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options, message):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(16, 1, 1, block_out_channels=(16, 16), norm_num_groups=4, **blocks | options)
    student = quantize(unet, QuantConfig(), [9])
    for _, layer in student.layers():
        nn.init.constant_(layer.act_quantizer.scale, 0.1)
    student = freeze(student)
    with pytest.raises(ValueError, match=message):
        to_integer(student)


def test_only_a_frozen_student_runs_on_integers(student):
    with pytest.raises(ValueError, match=r"call quant\.freeze first"):
        to_integer(student)


def test_without_a_compiler_a_message_says_what_runs(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler: the integer layers run one by one, slower"):
        assert integer.fused_operator.__wrapped__() is None


def test_it_goes_into_diffusers_pipeline(frozen):
    pipeline = DDIMPipeline(unet=to_integer(frozen), scheduler=make_scheduler(SamplerConfig("ddim", num_steps=6)))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, num_inference_steps=6, use_clipped_model_output=True, output_type="np").images
    assert images.shape == (2, 28, 28, 1)
