"""Calibration: once, in evaluation mode, at the timesteps as they are, in the memory of a forward pass."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from eval.memory import peak_memory
from finetune.distill import DistillConfig, parameter_groups
from quant import QuantConfig, QuantizedUNet, calibrate, freeze, quantize, to_integer

SMALL = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8}
BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}


def make(**options):
    torch.manual_seed(0)
    return UNet2DModel(**{"sample_size": 8, "in_channels": 1, "out_channels": 1, **SMALL, **BLOCKS, **options}).eval()


def calibrated(unet, timesteps=(900, 300), count=4, **options):
    size = unet.config.sample_size
    generator = torch.Generator().manual_seed(0)
    states = {t: torch.randn(count, unet.config.in_channels, size, size, generator=generator) for t in timesteps}
    student = quantize(unet, QuantConfig(rank=2, **options), list(timesteps))
    calibrate(student, states)
    return student


def tables(student):
    return [x for name, x in student.state_dict().items() if "act_quantizer" in name or name.endswith("bias")]


def test_a_student_is_calibrated_once():
    student = calibrated(make())
    for model in (student, freeze(student)):
        before = [x.clone() for x in tables(model)]
        with pytest.raises(ValueError, match="calibrated already"):
            calibrate(model, {900: torch.randn(4, 1, 8, 8), 300: torch.randn(4, 1, 8, 8)})
        assert all(map(torch.equal, tables(model), before))


def test_dropout_has_no_part_in_it():
    unet = make(dropout=0.5)
    expected = tables(calibrated(unet))
    unet.train()
    student = quantize(unet, QuantConfig(rank=2), [900, 300])
    assert not student.training
    student.train()
    generator = torch.Generator().manual_seed(0)
    calibrate(student, {t: torch.randn(4, 1, 8, 8, generator=generator) for t in (900, 300)})
    assert student.training
    assert all(map(torch.equal, tables(student), expected))


@pytest.mark.parametrize("convert", [UNet2DModel.half, UNet2DModel.bfloat16, UNet2DModel.double])
def test_a_network_of_another_precision_makes_a_student_of_float32(convert):
    unet = convert(make())
    student = quantize(unet, QuantConfig(8, 8, rank=2), [900])
    calibrate(student, {900: torch.randn(4, 1, 8, 8).to(unet.dtype)})
    x = torch.randn(2, 1, 8, 8)
    answer, expected = (model(x.to(model.dtype), torch.tensor(900)).sample.float() for model in (freeze(student), unet))
    assert (answer - expected).abs().max() < 0.1 * expected.abs().max()
    assert unet.dtype != torch.float32, "the network itself stays as it is"
    with pytest.raises(ValueError, match="computes in float32, not in torch"):
        student.half()(x.half(), 900)


def test_gradient_checkpointing_is_left_behind_or_refused():
    unet = make()
    unet.enable_gradient_checkpointing()
    student = calibrated(unet)
    student(torch.randn(2, 1, 8, 8), 900).sample.sum().backward()
    student.unet.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="gradient checkpointing is not supported"):
        student(torch.randn(2, 1, 8, 8), 900)


def test_a_student_learns_under_autocast():
    student = calibrated(make(), weight_bits=8, act_bits=8)
    groups = parameter_groups(student, DistillConfig())
    x = torch.randn(2, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        answer = student(x, 900).sample
    assert (answer - student(x, 900).sample).abs().max() < 0.2 * answer.abs().max()
    answer.float().square().sum().backward()
    for group in groups:
        for parameter in group["params"]:
            assert parameter.grad is None or parameter.grad.isfinite().all(), group["name"]


@pytest.mark.parametrize("timesteps", [(80.0, 2.5, 0.3), (1.1, 0.5, 0.1)])
def test_fractional_timesteps_are_not_cut_to_integers(timesteps):
    """NCSN++ divides by its timestep, so that 0 in place of 0.3 would make no numbers at all."""
    unet = make(time_embedding_type="fourier")
    student = calibrated(unet, timesteps, weight_bits=8, act_bits=8)
    frozen = freeze(student)
    x = torch.randn(3, 1, 8, 8)
    expected = unet(x, torch.tensor(timesteps)).sample
    answer = frozen(x, torch.tensor(timesteps)).sample
    assert (answer - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.equal(frozen(x[:1], timesteps[1]).sample, frozen(x[:1], torch.tensor(timesteps[1])).sample)
    assert torch.equal(frozen.unet.time_proj.weight, unet.time_proj.weight), "frequencies stay in float32"


def test_a_students_file_keeps_fourier_frequencies_and_large_numbers(tmp_path):
    unet = make(time_embedding_type="fourier")
    unet.conv_out.bias.data.fill_(1e6)  # more than half precision holds
    frozen = freeze(calibrated(unet, (8.0, 0.5)))
    frozen.save_pretrained(tmp_path)
    loaded = QuantizedUNet.from_pretrained(tmp_path)
    for name, tensor in frozen.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], tensor), name
    assert loaded.unet.conv_out.bias.item() == pytest.approx(1e6, rel=1e-3)


def test_what_schedulers_give_goes_through_to_the_file(tmp_path):
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    student = quantize(make(), QuantConfig(rank=2), scheduler.timesteps)
    calibrate(student, {t: torch.randn(4, 1, 8, 8) for t in scheduler.timesteps})
    freeze(student).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["timesteps"] == [666, 333, 0]


def test_wrong_states_are_refused():
    student = quantize(make(), QuantConfig(rank=2), [900, 300])
    with pytest.raises(ValueError, match=r"needs states at \[900, 300\], not at \[900\]"):
        calibrate(student, {900: torch.randn(4, 1, 8, 8)})
    with pytest.raises(ValueError, match="a timestep must be a number"):
        calibrate(student, {"late": torch.randn(4, 1, 8, 8)})


def test_verbs_out_of_order_are_refused_in_a_sentence():
    unet = make()
    student = calibrated(unet)
    with pytest.raises(ValueError, match="a frozen student learns no more"):
        parameter_groups(freeze(student), DistillConfig())
    with pytest.raises(ValueError, match="only a frozen student runs on integers"):
        to_integer(student)
    for other in (unet, student.unet):
        with pytest.raises(ValueError, match="a UNet2DModel"):
            to_integer(other)


@pytest.mark.parametrize("per_step", [True, False])
def test_its_memory_is_that_of_a_forward_pass(per_step):
    """Whatever the number of layers and of timesteps: nothing of the activations is kept."""
    unet = make(sample_size=32, block_out_channels=(32, 64), layers_per_block=2)
    timesteps = [20 * number for number in range(40)]
    x = torch.randn(16, 1, 32, 32)
    student = quantize(unet, QuantConfig(rank=2, per_step=per_step), timesteps)
    calibrate(quantize(unet, QuantConfig(rank=2), [0]), {0: x})  # the allocator's first pages
    with torch.no_grad():
        forward = peak_memory(lambda: unet(x, 0))
    peak = peak_memory(lambda: calibrate(student, dict.fromkeys(timesteps, x)))
    if peak is None:
        pytest.skip("this system does not tell a process's peak of memory")
    assert peak < 1.5 * forward + 16, "MiB; sixteen for what Python and the allocator keep"
