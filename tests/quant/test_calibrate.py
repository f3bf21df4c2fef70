"""Calibration: once, in evaluation mode, at the timesteps as they are, in the memory of a forward pass."""

import dataclasses
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from finetune.distill import DistillConfig, parameter_groups
from quant import QuantConfig, QuantizedUNet, calibrate, freeze, quantize, to_integer

SMALL = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
MIN_MAX = QuantConfig(rank=2, search="min-max")
BLOCKS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}


def make(**options):
    torch.manual_seed(0)
    return UNet2DModel(**{"sample_size": 8, "in_channels": 1, "out_channels": 1, **SMALL, **BLOCKS, **options}).eval()


def calibrated(unet, timesteps=(900, 300), count=4, **options):
    size = unet.config.sample_size
    generator = torch.Generator().manual_seed(0)
    states = {t: torch.randn(count, unet.config.in_channels, size, size, generator=generator) for t in timesteps}
    student = quantize(unet, dataclasses.replace(MIN_MAX, **options), list(timesteps))
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
    student = quantize(unet, MIN_MAX, [900, 300])
    assert not student.training
    student.train()
    generator = torch.Generator().manual_seed(0)
    calibrate(student, {t: torch.randn(4, 1, 8, 8, generator=generator) for t in (900, 300)})
    assert student.training
    assert all(map(torch.equal, tables(student), expected))


@pytest.mark.parametrize("convert", [UNet2DModel.half, UNet2DModel.bfloat16, UNet2DModel.double])
def test_a_network_of_another_precision_makes_a_student_of_float32(convert):
    unet = convert(make())
    student = quantize(unet, QuantConfig(8, 8, rank=2, search="min-max"), [900])
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
    student = quantize(make(), MIN_MAX, scheduler.timesteps)
    calibrate(student, {t: torch.randn(4, 1, 8, 8) for t in scheduler.timesteps})
    freeze(student).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["timesteps"] == [666, 333, 0]


def test_wrong_states_are_refused():
    student = quantize(make(), MIN_MAX, [900, 300])
    with pytest.raises(ValueError, match=r"needs states at \[900, 300\], not at \[900\]"):
        calibrate(student, {900: torch.randn(4, 1, 8, 8)})
    with pytest.raises(ValueError, match="a timestep must be a number"):
        calibrate(student, {"late": torch.randn(4, 1, 8, 8)})


def test_verbs_out_of_order_are_refused_in_a_sentence():
    unet = make()
    student = calibrated(unet)
    with pytest.raises(ValueError, match="a frozen student cannot be trained"):
        parameter_groups(freeze(student), DistillConfig())
    with pytest.raises(ValueError, match="only a frozen student runs on integers"):
        to_integer(student)
    for other in (unet, student.unet):
        with pytest.raises(ValueError, match="a UNet2DModel"):
            to_integer(other)


MEASURE = """
import sys
import torch
from diffusers import UNet2DModel
from eval.bench.memory import peak_memory
from quant import QuantConfig, calibrate, quantize

torch.set_num_threads(1)
unet = UNet2DModel(
    32, 1, 1, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
).eval()
config = QuantConfig(rank=2, per_step=sys.argv[1] == "True", reconstruction=sys.argv[2] == "True")
timesteps, x = [20 * number for number in range(5)], torch.randn(8 if config.reconstruction else 16, 1, 32, 32)
student = quantize(unet, config, timesteps)
calibrate(quantize(unet, config, [0]), {0: x})
with torch.no_grad():
    forward = peak_memory(lambda: unet(x.repeat(8 if config.reconstruction else 1, 1, 1, 1), 0))
print(forward, peak_memory(lambda: calibrate(student, dict.fromkeys(timesteps, x))))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("per_step", "reconstruction"), [(True, False), (False, False), (True, True)])
def test_its_memory_is_that_of_a_forward_pass(per_step, reconstruction):
    """Whatever the number of layers and of timesteps: nothing of the activations is kept. In a process of its own."""
    command = [sys.executable, "-c", MEASURE, str(per_step), str(reconstruction)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    forward, peak = run.stdout.split()
    if forward == "None":
        pytest.skip("this system does not tell a process's peak of memory")
    # MiB. It was ten times a forward pass, and grew with the timesteps; 32 are for what the allocator keeps.
    assert float(peak) < (2.25 if reconstruction else 1.5) * float(forward) + 32


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.randn(4, 1, 15, 15), r"the states at 300 must be \(N, 1, H, W\), alike at all timesteps"),
        (torch.randn(4, 3, 8, 8), r"the states at 300 must be \(N, 1, H, W\)"),
        (torch.randn(0, 1, 8, 8), "the states at 300 must be"),
        (torch.full((4, 1, 8, 8), torch.nan), "the states at 300 contain a value that is not finite"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), "the states at 300 must be a tensor of floats"),
        ([0.0], "the states at 300 must be a tensor of floats"),
    ],
)
def test_states_of_no_use_are_refused_and_change_nothing(bad, message):
    student, good = quantize(make(), MIN_MAX, [900, 300]), torch.randn(4, 1, 8, 8)
    with pytest.raises(ValueError, match=message):
        calibrate(student, {900: good, 300: bad})
    with pytest.raises(ValueError, match="only a calibrated student"):
        freeze(student)
    calibrate(student, {900: good, 300: good})
    freeze(student)


def test_a_calibration_that_fails_leaves_the_student_as_it_was(monkeypatch):
    student, states = quantize(make(), MIN_MAX, [900, 300]), torch.randn(4, 1, 8, 8)
    before = [x.clone() for x in tables(student)]
    calls = iter(range(7))

    def fail_late(*_):
        if next(calls) == 5:
            raise RuntimeError("no memory is left")

    handle = student.unet.conv_out.register_forward_hook(fail_late)
    with pytest.raises(RuntimeError, match="no memory is left"):
        calibrate(student, {900: states, 300: states})
    handle.remove()
    assert all(map(torch.equal, tables(student), before))
    calibrate(student, {900: states, 300: states})


@pytest.mark.parametrize("options", [{}, {"per_step": False}, {"reconstruction": True}])
@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_runs_once_or_the_student_stays_as_it_was(times, options):
    student = quantize(make(), dataclasses.replace(MIN_MAX, **options), [900])
    before, block = {name: x.clone() for name, x in student.state_dict().items()}, student.unet.mid_block
    if times:
        block.register_forward_hook(lambda _, inputs, output: block.resnets[0].conv1(output) * 0 + output)
    else:
        block.forward = lambda x, emb: x
    with pytest.raises(
        ValueError, match=rf"mid_block\.\S+ runs {times} times in a forward pass, not once: turn chunked"
    ):
        calibrate(student, {900: torch.randn(4, 1, 8, 8)})
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())


def test_conditions_need_a_row_for_each_state():
    student, states = quantize(make(num_class_embeds=3), MIN_MAX, [900]), torch.randn(4, 1, 8, 8)
    for labels in (torch.tensor([1]), [0, 1, 2, 0], 1):
        with pytest.raises(ValueError, match="class_labels must be a tensor with a row for each of 4 states"):
            calibrate(student, {900: states}, class_labels=labels)
    with pytest.raises(ValueError, match="class_labels contains a value that is not finite"):
        calibrate(student, {900: states}, class_labels=torch.full((4,), torch.nan))
    calibrate(student, {900: states}, class_labels=torch.tensor([0, 1, 2, 0]))


def test_a_simulated_student_may_be_shared_by_threads():
    frozen, x = freeze(calibrated(make())), torch.randn(2, 1, 8, 8)
    expected = {t: frozen(x, t).sample for t in (900, 300, 620)}

    def ask(t):
        return all(torch.equal(frozen(x, t).sample, expected[t]) for _ in range(10))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(ask, expected))


def test_autocast_changes_nothing_and_doubles_are_taken():
    frozen, x = freeze(calibrated(make())), torch.randn(2, 1, 8, 8)
    expected = frozen(x, 900).sample
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x, 900).sample, expected)
    assert torch.equal(frozen(x.double(), 900).sample, expected)


def test_what_is_no_student_is_refused_in_a_sentence():
    unet = make()
    for verb in (freeze, lambda model: calibrate(model, {})):
        with pytest.raises(ValueError, match="a UNet2DModel is not a student"):
            verb(unet)
    for options in ({"weight_bits": 4.0}, {"act_bits": 3.5}, {"rank": 2.5}):
        with pytest.raises(ValueError, match="must"):
            QuantConfig(**options)
    for config in (None, {"weight_bits": 4}):
        with pytest.raises(ValueError, match="the config must be a QuantConfig"):
            quantize(unet, config, [900])
    for timesteps in (None, 500, torch.tensor(500), ["1", "2"], [True, False]):
        with pytest.raises(ValueError, match="timestep"):
            quantize(unet, QuantConfig(rank=2), timesteps)
    unet.conv_in.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"conv_in\.weight: it contains a value that is not finite"):
        quantize(unet, QuantConfig(rank=2), [900])


def test_of_two_threads_that_calibrate_a_student_one_is_refused(unet):
    student = quantize(unet, QuantConfig(rank=1), [500])
    states, together, refused = {500: torch.randn(2, 1, 10, 10)}, threading.Barrier(2), []

    def work():
        together.wait()
        try:
            calibrate(student, states)
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1 and "calibrat" in refused[0]
