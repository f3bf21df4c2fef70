import copy
import gc
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_mnist.sampling.noise_schedule import default_schedule
from ddpm_mnist.sampling.sampler import sample
from ddpm_mnist.sampling.solver import SamplerConfig, Solver, make_scheduler
from eval.exactness import flipped_shares
from quant import to_integer
from quant.integer import binding
from quant.integer import model as model_module
from quant.integer.binding import VARIABLE, available


@pytest.fixture
def threads():
    """Sets the number of PyTorch's threads; afterwards it is what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_sampling_on_integers_is_the_simulations(frozen, isa):
    config, model = SamplerConfig(num_steps=6), to_integer(frozen, isa)
    assert model.core.isa == isa
    ours, theirs = (sample(denoiser, Solver(config), 24).float() for denoiser in (model, frozen))
    # A float on the boundary of a code may go the other way, and what follows differs: few images may.
    equal = (ours == theirs).flatten(1).float().mean(1)
    assert equal.median() > 0.97
    assert (ours - theirs).square().mean() < 0.01 * theirs.square().mean()


def test_every_instruction_set_draws_the_same_images(frozen, isa):
    config = SamplerConfig(num_steps=6)
    ours, theirs = (sample(to_integer(frozen, name), Solver(config), 5) for name in (isa, "portable"))
    assert torch.equal(ours, theirs)


def flipped_too_often(student, x, t):
    """Layers, with the share of their codes that differ: the finer the codes, the more numbers lie on a border."""
    shares, layers = flipped_shares(student, x, t), dict(student.layers())
    assert shares.keys() == layers.keys()
    limits = {name: 1e-4 if layer.act_quantizer.qmax < 256 else 1e-3 for name, layer in layers.items()}
    return {name: share for name, share in shares.items() if share >= limits[name]}


def test_from_equal_inputs_codes_differ_from_the_simulation_only_on_a_border(frozen, buffer, isa, monkeypatch):
    """At timesteps of the tables, and between two."""
    monkeypatch.setenv(VARIABLE, isa)
    timesteps = frozen.clock.timesteps
    for step, t in ((0, timesteps[0]), (3, timesteps[3]), (5, timesteps[5]), (3, timesteps[3] + 40)):
        assert flipped_too_often(frozen, buffer.x[:, step], t) == {}


def test_learned_zero_points_count_as_in_the_simulation(frozen, buffer):
    """Those between two codes are rounded, halves to even; those outside of the range are its end."""
    student, t = copy.deepcopy(frozen), frozen.clock.timesteps[3]
    for number, (_, layer) in enumerate(student.layers()):
        largest = layer.act_quantizer.qmax
        layer.act_quantizer.zero_point.copy_(torch.tensor([-3.0, 1.5, 2.5, 4.7, largest + 2.0])[number % 5])
    x = buffer.x[:, 3]
    assert flipped_too_often(student, x, t) == {}
    error = (to_integer(student)(x, t).sample - student(x, t).sample).abs()
    assert error.median() < 1e-5


def test_a_wrong_zero_point_is_seen_as_flipped_codes(frozen, buffer, monkeypatch):
    right = model_module.Moment
    monkeypatch.setattr(
        model_module, "Moment", lambda scales, zero_points, *rest: right(scales, zero_points + 1, *rest)
    )
    shares = flipped_shares(frozen, buffer.x[:, 3], frozen.clock.timesteps[3])
    assert min(shares.values()) > 0.5, "in every layer, all codes but those at the end of the range"


@pytest.mark.parametrize("t", [750, 431, 80.5, 0, 5000])
def test_timesteps_between_and_beyond_the_tables_rows_agree_with_the_simulation(frozen, buffer, t):
    assert t not in frozen.clock.timesteps
    x, t = buffer.x[:, 2], torch.tensor(t)
    with torch.no_grad():
        expected = frozen(x, t).sample
    error = (to_integer(frozen)(x, t).sample - expected).abs()
    assert error.mean() < 0.1 * expected.abs().mean()
    assert error.median() < 1e-6, "a code may fall to the other side of a border, and change what lies behind it"


def test_an_image_depends_neither_on_its_batch_nor_on_the_threads(frozen, isa, threads):
    model, config = to_integer(frozen, isa), SamplerConfig(num_steps=6)
    expected = sample(model, Solver(config), 20, batch_size=64)
    for count in (1, 2):
        threads(count)
        for batch_size in (1, 3, 20):
            assert torch.equal(sample(model, Solver(config), 20, batch_size=batch_size), expected), (count, batch_size)


def test_the_bytes_of_an_answer_depend_on_nothing_but_the_image_and_its_timestep(frozen, buffer, isa, threads):
    """Before they are rounded to a picture."""
    model, t = to_integer(frozen, isa), torch.tensor([999, 3, 500, 999, 3, 3.5, 640, 999])
    x = buffer.x[:, 1]
    threads(2)
    together = model(x, t).sample
    threads(1)
    apart = torch.cat([model(x[i : i + 1], t[i]).sample for i in range(len(t))])
    assert torch.equal(together, apart)
    assert torch.equal(to_integer(frozen, "portable")(x, t).sample, together)


def test_memory_may_lie_in_any_order(frozen, buffer):
    model, x = to_integer(frozen), buffer.x[:, 1].contiguous()
    (expected,) = model(x, 500, return_dict=False)
    assert torch.equal(model(x.repeat(1, 2, 1, 1)[:, 1:], 500).sample, expected)
    assert torch.equal(model(x.mT.contiguous().mT, 500).sample, expected)
    assert torch.equal(model(x.double(), 500).sample, expected)
    assert torch.equal(model(x.to(memory_format=torch.channels_last), 500).sample, expected)
    assert torch.equal(model(torch.complex(x, -x).conj().imag, 500).sample, expected), "whose sign is a mark alone"
    assert model(x[:0], 500).sample.shape == (0, 1, 10, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sample_of_half_precision_is_what_it_holds(frozen, buffer, dtype):
    model, x = to_integer(frozen), buffer.x[:2, 1].to(dtype)
    eps = model(x, 500).sample
    assert eps.dtype == torch.float32
    assert torch.equal(eps, model(x.float(), 500).sample)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.zeros(1, 10, 10), r"the sample must be \(N, 1, height, width\), not \(1, 10, 10\)"),
        (torch.zeros(1, 1, 1, 10, 10), r"the sample must be \(N, 1, height, width\), not "),
        (torch.zeros(1, 3, 10, 10), "the sample must have 1 channels, not 3"),
        (torch.zeros(1, 1, 0, 0), "too small"),
        (torch.zeros(1, 1, 10, 10, dtype=torch.uint8), "the sample must be a tensor of floats"),
        (torch.zeros(1, 1, 10, 10, dtype=torch.complex64), "the sample must be a tensor of floats"),
        ([[0.0]], "the sample must be a tensor of floats"),
        (torch.zeros(1, 1, 10, 10, device="meta"), "the sample must lie on the CPU, where integers run, not on meta"),
    ],
)
def test_a_sample_of_another_kind_gets_one_line(frozen, sample, message):
    with pytest.raises(ValueError, match=message) as caught:
        to_integer(frozen)(sample, 500)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "t", [250.6, np.float64(250.6), np.float32(250.6), torch.tensor(250.6), torch.tensor([250.6] * 3), [250.6],
          torch.tensor(250.6, dtype=torch.float64), np.array([250.6] * 3)]
)  # fmt: skip
def test_a_timestep_may_be_any_kind_of_number(frozen, buffer, t):
    x, model = buffer.x[:3, 2], to_integer(frozen)
    assert torch.equal(model(x, t).sample, model(x, torch.tensor([250.6])).sample)
    assert len(model.moments) == 1
    with torch.no_grad():
        expected = frozen(x, torch.tensor([250.6])).sample
    assert (model(x, t).sample - expected).abs().median() < 1e-6


@pytest.mark.parametrize("t", [500, 500.0, np.int64(500), np.int32(500), torch.tensor(500, dtype=torch.int32)])
def test_a_timestep_may_be_any_kind_of_integer(frozen, buffer, t):
    x, model = buffer.x[:3, 2], to_integer(frozen)
    assert torch.equal(model(x, t).sample, model(x, torch.tensor([500] * 3)).sample)
    assert len(model.moments) == 1


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (float("nan"), "the timestep must be a finite number"),
        (torch.tensor([3.0, float("inf")]), "the timestep must be a finite number"),
        (1e300, "the timestep must be a finite number"),
        (-2e6, "the timestep must lie within ±1,048,576, not -2000000.0"),
        (10**30, "the timestep must be numbers"),
        (None, "the timestep must be numbers, not a NoneType"),
        ("500", "the timestep must be numbers, not a str"),
        (True, "the timestep must be a number, or one for each of 2 samples"),
        (1j, "the timestep must be a number, or one for each of 2 samples"),
        ([1, 2, 3], r"the timestep must be a number, or one for each of 2 samples, not int64 \(3,\)"),
        ([[1, 2]], "the timestep must be a number, or one for each of 2 samples"),
        (torch.tensor([], dtype=torch.long), "the timestep must be a number, or one for each of 2 samples"),
    ],
)
def test_a_timestep_of_another_kind_gets_one_line(frozen, buffer, t, message):
    with pytest.raises(ValueError, match=message) as caught:
        to_integer(frozen)(buffer.x[:2, 2], t)
    assert "\n" not in str(caught.value)


def test_a_network_without_classes_takes_no_labels(frozen, buffer):
    with pytest.raises(ValueError, match="this network has no classes: class_labels must be None"):
        to_integer(frozen)(buffer.x[:2, 2], 500, torch.tensor([0, 0]))
    assert to_integer(frozen)(buffer.x[:2, 2], 500, None, False)[0].shape == (2, 1, 10, 10)


def test_threads_may_share_a_model(frozen, buffer):
    x, timesteps = buffer.x[:1, 2], range(0, 960, 60)
    expected = [to_integer(frozen)(x, t).sample for t in timesteps]
    shared, interval = to_integer(frozen), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda t: shared(x, t).sample, timesteps))
    finally:
        sys.setswitchinterval(interval)
    assert all(map(torch.equal, answers, expected))


def test_few_timesteps_are_kept(frozen, buffer, monkeypatch):
    x, t = buffer.x[:, 1], torch.arange(0, 800, 100)
    expected = to_integer(frozen)(x, t).sample
    monkeypatch.setattr(model_module, "MAX_STEPS", 3)
    model = to_integer(frozen)
    assert torch.equal(model(x, t).sample, expected)
    assert len(model.moments) <= 3


def test_an_image_that_is_not_finite_is_answered_with_none(frozen, buffer):
    model, x = to_integer(frozen), buffer.x[:, 1].clone()
    expected = model(x, 500).sample
    x[2, 0, 9, 9], x[5, 0, 0, 3] = torch.nan, torch.inf
    actual = model(x, 500).sample
    assert actual[[2, 5]].isnan().all()
    rest = [0, 1, 3, 4, 6, 7]
    assert torch.equal(actual[rest], expected[rest])


def test_only_a_frozen_student_runs_on_integers(student):
    with pytest.raises(ValueError, match=r"call quant\.freeze first"):
        to_integer(student)


def test_a_student_of_half_precision_is_refused(frozen):
    """The core would read its numbers as others."""
    with pytest.raises(ValueError, match=r"computes in float32, not in torch\.float16: its values were rounded"):
        to_integer(copy.deepcopy(frozen).half())


def test_an_instruction_set_that_lacks_is_refused(frozen):
    with pytest.raises(ValueError, match=f'this processor has no "mmx", only {", ".join(available())}'):
        to_integer(frozen, "mmx")


def test_what_becomes_of_its_student_does_not_matter(frozen, buffer):
    student = copy.deepcopy(frozen)
    model = to_integer(student)
    for _, layer in student.layers():
        layer.bias += 1
        layer.codes.zero_()
        layer.act_quantizer.scale *= 2
    assert torch.equal(model(buffer.x[:, 1], 500).sample, to_integer(frozen)(buffer.x[:, 1], 500).sample)


def zero(student):
    for parameter in student.parameters():
        parameter.data = torch.zeros_like(parameter)


@pytest.mark.parametrize(
    "happens",
    [
        lambda model: model.share_memory(),
        lambda model: model.student.share_memory(),
        lambda model: model.student.half(),
        lambda model: zero(model.student),
        lambda model: model.student.load_state_dict({k: 0 * v for k, v in model.student.state_dict().items()}),
        lambda model: torch.optim.swa_utils.AveragedModel(model).update_parameters(model.half()),
    ],
    ids=["share_memory", "student.share_memory", "student.half", "data", "load_state_dict", "average"],
)
def test_what_becomes_of_a_tensor_does_not_move_what_the_core_reads(happens, frozen, buffer):
    student = copy.deepcopy(frozen)
    model, x = to_integer(student), buffer.x[:, 1]
    expected = model(x, 500).sample
    happens(model)
    del student
    gc.collect()
    torch.randn(1 << 20)  # takes memory that was freed
    model.moments.clear()
    model.programs.clear()
    assert torch.equal(model(x, 500).sample, expected)


@pytest.mark.slow
def test_a_spawned_process_and_its_parent_have_the_same_model(frozen, buffer):
    """Sending a tensor moves its storage to shared memory."""
    model, x = to_integer(frozen), buffer.x[:2, 1]
    expected = model(x, 500).sample
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.apply(model, (x, 500)).sample, expected)
    torch.randn(1 << 20)
    model.moments.clear()
    assert torch.equal(model(x, 500).sample, expected)


def test_it_has_no_parameters_and_takes_no_numbers_as_a_part_either(frozen):
    model = torch.nn.Sequential(to_integer(frozen))
    assert not list(model.parameters())
    state = model.state_dict()
    assert {f"0.student.{name}" for name in frozen.state_dict()} == state.keys()
    with pytest.raises(ValueError, match="call to_integer on the other student"):
        model.load_state_dict(state)


def test_it_runs_uncompiled_in_a_compiled_program_and_is_not_traced(frozen):
    model, x = to_integer(frozen), torch.randn(2, 1, 10, 10)
    assert torch.equal(torch.compile(model, backend="eager")(x, 500).sample, model(x, 500).sample)
    with pytest.raises(ValueError, match="cannot be traced or exported: export the frozen student"):
        torch.jit.trace(lambda x: model(x, 500, return_dict=False)[0], x)


def test_hooks_are_not_lost_without_a_word(frozen):
    student = copy.deepcopy(frozen)
    student.unet.conv_in.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match=r"conv_in: it has hooks \(forward_hooks\), which"):
        to_integer(student)


def test_it_goes_into_diffusers_pipeline(frozen):
    scheduler = make_scheduler(SamplerConfig("ddim", num_steps=6), default_schedule())
    pipeline = DDIMPipeline(unet=to_integer(frozen), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, num_inference_steps=6, use_clipped_model_output=True, output_type="np").images
    assert images.shape == (2, 10, 10, 1)


def test_nothing_that_a_module_can_be_told_changes_it(frozen):
    """Nor PyTorch's own defaults: the core reads and writes floats of 32 bits."""
    x, t = torch.randn(2, 1, 10, 10), torch.tensor([431.3, 20.0])
    model = to_integer(frozen)
    expected = model(x, t).sample
    for changed in (model.half(), model.double(), model.to("meta"), model.to(torch.bfloat16)):
        model.moments.clear()
        assert torch.equal(changed(x, t).sample, expected)
    with pytest.raises(ValueError, match="call to_integer on the other student"):
        model.load_state_dict(model.state_dict())
    try:
        for dtype in (torch.float64, torch.float16):
            torch.set_default_dtype(dtype)
            model.moments.clear()
            assert torch.equal(model(x, t).sample, expected)
            assert torch.equal(to_integer(frozen)(x, t).sample, expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_copies_and_pickles_are_the_same_model(frozen):
    model, x = to_integer(frozen, "portable"), torch.randn(2, 1, 10, 10)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.core.isa == "portable"
        assert torch.equal(other(x, 499).sample, model(x, 499).sample)


def test_a_pickle_runs_on_what_its_reader_has_unless_an_instruction_set_was_asked_for(frozen, monkeypatch):
    pickled = pickle.dumps(to_integer(frozen))
    monkeypatch.setenv(VARIABLE, "portable")
    assert pickle.loads(pickled).core.isa == "portable"


def test_libraries_of_other_sources_are_not_used(monkeypatch, capsys):
    monkeypatch.setattr(binding, "_sources", lambda: "of another day")
    binding.available.cache_clear()
    try:
        assert binding.available() == {}
    finally:
        binding.available.cache_clear()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(binding.built())
    assert all("install the package again: it was built from other sources" in line for line in said)


def test_too_little_memory_is_told(frozen, monkeypatch):
    model = to_integer(frozen)
    model(torch.randn(1, 1, 10, 10), 499)
    model.programs[10, 10].structure.memory = 1 << 58  # floats that a thread would need
    with pytest.raises(MemoryError, match="not enough memory"):
        model(torch.randn(3, 1, 10, 10), 499)


def test_a_sample_without_memory_is_refused(frozen):
    integer = to_integer(frozen)
    freed = torch.randn(1, 1, 10, 10)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="the sample must have memory"):
        integer(freed, 500)
    with FakeTensorMode():
        fake = torch.randn(1, 1, 10, 10)
    with pytest.raises(ValueError, match="the sample must have memory"):
        integer(fake, 500)


@pytest.mark.parametrize("t", [Fraction(1001, 2), Decimal("500.5"), np.float64(500.5)])
def test_a_timestep_may_be_any_number_of_python(t, frozen):
    x = torch.randn(1, 1, 10, 10)
    integer = to_integer(frozen)
    assert torch.equal(integer(x, t).sample, integer(x, 500.5).sample)
    for model in (frozen, integer):
        with pytest.raises(ValueError):
            model(x, [True])
