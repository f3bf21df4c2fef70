import jsonargparse
import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_mnist.sampling.noise_schedule import default_schedule
from ddpm_mnist.sampling.solver import SamplerConfig, Solver, make_scheduler
from eval.models import load_model
from finetune.trajectories import make_trajectories
from quant import QuantConfig, QuantLayer, calibrate, freeze, quantize
from quant.layers import SkipConv2d
from quant.summary import shares, summarise


def test_bits_are_found_by_structure(unet):
    model = quantize(unet, QuantConfig(weight_bits=2, act_bits=5, edge_bits=7, edge_act_bits=6), [9])
    bits = {name: (layer.weight_quantizer.bits, layer.act_quantizer.bits) for name, layer in model.layers()}
    edges = {name for name in bits if bits[name] == (7, 6)}
    shortcut = "up_blocks.1.resnets.1.conv_shortcut"
    assert edges == {
        "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2",
        f"{shortcut}.hidden", f"{shortcut}.skip",
    }  # fmt: skip
    assert all(bits[name] == (2, 5) for name in bits.keys() - edges)
    assert any("shortcut" in name for name in bits)
    assert any("samplers" in name for name in bits)
    assert any("to_qkv" in name for name in bits)
    assert not any(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())


def test_parts_can_be_switched_off(unet):
    bits = {
        options: {
            name: layer.act_quantizer.bits
            for name, layer in quantize(unet, QuantConfig(4, 4, **dict(options)), [9]).layers()
        }
        for options in ((), (("edge_shortcut", False),), (("split_skips", False),))
    }
    whole, no_edge, no_split = bits.values()
    shortcut = "up_blocks.1.resnets.1.conv_shortcut"
    assert {name for name in whole if whole[name] != no_edge[name]} == {f"{shortcut}.hidden", f"{shortcut}.skip"}
    assert no_split[shortcut] == 16
    assert not any(name.endswith(".skip") for name in no_split)


def test_the_unet_that_was_given_is_left_alone(unet):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    quantize(unet, QuantConfig(), [9])
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
    assert not any(isinstance(module, QuantLayer) for module in unet.modules())


def test_another_unet_at_8_bits_is_close_to_float():
    torch.manual_seed(0)
    unet = UNet2DModel(
        8, 3, 3, norm_num_groups=4, block_out_channels=(8, 16, 16), layers_per_block=1,
        resnet_time_scale_shift="scale_shift", down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([700, 20, 20, 700])
    model = quantize(unet, QuantConfig(weight_bits=8, act_bits=8), [700, 20])
    calibrate(model, {700: x, 20: x})
    with torch.no_grad():
        expected, actual = unet(x, t).sample, model(x, t).sample
    error = ((actual - expected).square().mean() / expected.square().mean()).sqrt()
    assert 0 < error < 0.05


def test_a_shortcut_over_a_skip_has_quantizers_for_each_half(unet, student):
    """Each resnet of the way up: the halves have the channels of what was there before and of the skip's origin."""
    layers = dict(student.layers())
    halves = {name: layer.weight_shape[1] for name, layer in layers.items() if "conv_shortcut." in name}
    assert list(halves.values()) == [16, 16, 16, 8, 16, 8, 8, 8]
    assert all(name.endswith((".hidden", ".skip")) for name in halves)
    # On the way down there is nothing to concatenate.
    assert "down_blocks.1.resnets.0.conv_shortcut" in layers


def test_the_halves_of_a_split_convolution_add_up_to_it():
    conv, x = nn.Conv2d(7, 5, 3, stride=2, padding=1), torch.randn(2, 7, 9, 9)
    torch.testing.assert_close(SkipConv2d(conv, 4)(x), conv(x), rtol=1e-5, atol=1e-6)


def test_calibration_takes_back_the_shift_of_every_layers_mean(unet, solver, buffer):
    states = {t: buffer.x[:, step] for step, t in enumerate(solver.timesteps[:2].tolist())}
    student = quantize(unet, QuantConfig(weight_bits=2, act_bits=3), list(states))
    before = {name: layer.bias.clone() for name, layer in student.layers()}
    calibrate(student, states)
    x, t = torch.cat(list(states.values())), solver.timesteps[:2].repeat_interleave(len(buffer.x))
    with torch.no_grad():
        expected, corrected = unet(x, t).sample.mean(), student(x, t).sample.mean()
        for name, layer in student.layers():
            assert not torch.equal(layer.bias, before[name]), name
            layer.bias.copy_(before[name])
        shift = (student(x, t).sample.mean() - expected).abs()
        assert (corrected - expected).abs() < 0.1 * shift


@pytest.mark.parametrize("field", ["act_bits", "edge_bits"])
@pytest.mark.parametrize("bits", [1, 1.58, 4.0, True, 40])
def test_bits_outside_2_to_8_are_refused_by_name(field, bits):
    with pytest.raises(ValueError, match=f"{field} must be a whole number in 2…8, not {bits}"):
        QuantConfig(**{field: bits})


@pytest.mark.parametrize("bits", [1, 9, 15, 16.0, 17, True])
def test_inputs_of_the_edges_have_16_bits_too(bits):
    with pytest.raises(ValueError, match=f"edge_act_bits must be 16 or a whole number in 2…8, not {bits}"):
        QuantConfig(edge_act_bits=bits)
    assert QuantConfig(edge_act_bits=16) == QuantConfig()


@pytest.mark.parametrize("bits", [0, 1.0, 1.6, 4.0, True, 40, "1.58"])
def test_bits_that_no_weights_have_are_refused(bits):
    with pytest.raises(ValueError, match=rf"weight_bits must be 1, 1\.58 or a whole number in 2…8, not {bits}"):
        QuantConfig(weight_bits=bits)


@pytest.mark.parametrize(("word", "bits"), [("1", 1), ("1.58", 1.58), ("2", 2)])
def test_bits_are_read_as_they_are_written(word, bits):
    config = jsonargparse.auto_cli(QuantConfig, args=["--weight_bits", word])
    assert config.weight_bits == bits
    assert type(config.weight_bits) is type(bits)


@pytest.mark.parametrize(
    ("weight_bits", "act_bits", "name"),
    [(1, 4, "W1A4"), (1.58, 2, "W1.58A2"), (2, 3, "W2A3")],
)
def test_few_bits_are_named_in_the_summary(unet, weight_bits, act_bits, name):
    model = quantize(unet, QuantConfig(weight_bits, act_bits), [9])
    parts = shares(summarise(model, (1, 10, 10)))
    assert set(parts) == {name, "W8A16", "float"}
    assert next(iter(parts)) == name, "in the order of their bits"


@pytest.mark.parametrize("weight_bits", [1, 1.58])
def test_a_student_of_few_bits_learns_to_be_closer_to_its_teacher(unet, weight_bits):
    """All that is learned has a gradient, and 15 updates lower the error."""
    torch.manual_seed(0)
    x, t = torch.randn(8, 1, 10, 10), torch.tensor([700, 20] * 4)
    model = quantize(unet, QuantConfig(weight_bits, 4), [700, 20])
    calibrate(model, {700: x, 20: x})
    target = unet(x, t).sample
    groups = {key: [p for n, p in model.named_parameters() if key in n] for key in ("lora", "weight_quantizer")}
    for parameter in (parameter for group in groups.values() for parameter in group):
        parameter.requires_grad_()
    optimizer = torch.optim.Adam([{"params": groups["lora"], "lr": 2e-3}, {"params": groups["weight_quantizer"]}], 1e-4)
    losses = []
    for _ in range(15):
        loss = (model(x, t).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad.abs().max() > 0 for group in groups.values() for parameter in group)
    assert losses[-1] < 0.9 * losses[0]


def test_calibration_needs_the_clocks_timesteps(unet):
    with pytest.raises(ValueError, match=r"calibration needs states at \[9, 5\], not at \[9\]"):
        calibrate(quantize(unet, QuantConfig(), [9, 5]), {9: torch.randn(2, 1, 10, 10)})


def test_only_a_calibrated_student_can_be_frozen(unet):
    with pytest.raises(ValueError, match="calibrated"):
        freeze(quantize(unet, QuantConfig(), [10, 20]))


def test_calibration_runs_the_network_in_float(student, unet, buffer):
    """Searched on float activations: the input of the last layer, whose range the quantized network would change."""
    captured = []
    hook = unet.conv_out.register_forward_hook(lambda _, inputs, __: captured.append(inputs[0]))
    for step, t in enumerate(student.clock.timesteps):
        unet(buffer.x[:, step], torch.tensor(t))
    hook.remove()
    quantizer = dict(student.layers())["conv_out"].act_quantizer
    for x, scale in zip(captured, quantizer.scale, strict=True):
        assert scale.item() * 65535 / (x.max() - x.min().clamp(max=0)).item() == pytest.approx(2, abs=0.4)


def test_one_step_size_for_all_timesteps_where_talsq_is_off(unet, solver, buffer):
    states = {t: buffer.x[:, step] for step, t in enumerate(solver.timesteps.tolist())}
    student = quantize(unet, QuantConfig(per_step=False), solver.timesteps.tolist())
    calibrate(student, states)
    assert {layer.act_quantizer.scale.shape for _, layer in student.layers()} == {(1,)}
    x, t = torch.cat([buffer.x[:2, 0], buffer.x[:2, 5]]), solver.timesteps[[0, 0, 5, 5]]
    with torch.no_grad():
        apart = torch.cat([student(x[:2], t[0]).sample, student(x[2:], t[2]).sample])
        torch.testing.assert_close(student(x, t).sample, apart, rtol=0, atol=1e-5)


def test_min_max_keeps_the_whole_range(unet, solver, buffer):
    states = {t: buffer.x[:, step] for step, t in enumerate(solver.timesteps.tolist())}
    student = quantize(unet, QuantConfig(search="min-max"), solver.timesteps.tolist())
    calibrate(student, states)
    layer = dict(student.layers())["conv_in"]
    torch.testing.assert_close(layer.weight_quantizer.scale * 127, layer.weight.flatten(1).abs().amax(1))
    ranges = torch.stack([x.amax() - x.amin() for x in states.values()])
    torch.testing.assert_close(layer.act_quantizer.scale * 65535, 2 * ranges)


def test_a_student_goes_into_diffusers_pipeline(student):
    scheduler = make_scheduler(SamplerConfig("ddim", num_steps=6), default_schedule())
    pipeline = DDIMPipeline(unet=student, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, num_inference_steps=6, use_clipped_model_output=True, output_type="np").images
    assert images.shape == (2, 10, 10, 1)


def test_multiply_accumulates_equal_torchs_flop_counter(student, unet):
    rows = summarise(student, (1, 10, 10))
    # The counter sees attention's products only where they are plain matrix products.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        unet(torch.zeros(1, 1, 10, 10), 5)
    products = sum(row.macs for row in rows if row.kind == "attention products")
    assert products > 0
    assert 2 * sum(row.macs for row in rows) == counter.get_total_flops()
    convs_and_linears = [m for m in unet.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    added = sum(len(layer.bias) for name, layer in student.layers() if name.endswith("conv_shortcut.skip"))
    parameters = sum(p.numel() for m in convs_and_linears for p in m.parameters())
    assert sum(row.parameters for row in rows) == parameters + added
    totals = shares(rows)
    assert set(totals) == {"W4A4", "W8A16", "float"}
    for column in zip(*totals.values(), strict=True):
        assert sum(column) == pytest.approx(1)


def test_16_bits_at_the_edges_take_most_of_the_error_of_8_bits():
    """Of the released teacher, calibrated and not trained, on images that calibration did not see."""
    teacher, solver = load_model("teacher").denoiser, Solver(SamplerConfig(num_steps=2))
    states, errors = make_trajectories(teacher, solver, count=8, seed=0).x, []
    steps = solver.timesteps.tolist()
    for bits in (8, 16):
        student = quantize(teacher, QuantConfig(8, 8, edge_act_bits=bits), steps)
        calibrate(student, {t: states[:4, step] for step, t in enumerate(steps)})
        student = freeze(student)
        with torch.no_grad():
            theirs, ours = (model(states[4:, 0], steps[0]).sample for model in (teacher, student))
        errors.append((ours - theirs).square().mean())
    assert errors[0] > 3 * errors[1]
