import contextlib
import copy
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: what is equal bit for bit is so on the CPU

from types import SimpleNamespace

import pytest
import torch

from ddpm_mnist.lab.command import run_command
from ddpm_mnist.sampling.solver import SamplerConfig, Solver
from ddpm_mnist.unet import UNetConfig, make_unet, save_teacher
from finetune.trajectories import make_trajectories
from quant import QuantConfig, calibrate, quantize

TINY = UNetConfig(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8)
# A reason to skip a test in CI begins with one of these: what an installation could bring is no reason.
OF_THE_MACHINE = ("this machine ", "this processor ", "this system ", "this user ")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where FAIL_ON_SKIP is set, a test that is skipped for another reason fails."""
    report = yield
    if report.skipped and os.environ.get("FAIL_ON_SKIP"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(OF_THE_MACHINE):
            report.outcome, report.longrepr = "failed", f"{item.nodeid} was skipped, which CI does not allow: {reason}"
    return report


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_models():
    """A function that makes `unet`, `buffer` and `student` for images of a size."""

    def make(size):
        torch.manual_seed(0)
        unet, solver = make_unet(TINY, size=size).eval().requires_grad_(False), Solver(SamplerConfig(num_steps=6))
        buffer = make_trajectories(unet, solver, count=8, seed=0)
        student = quantize(unet, QuantConfig(rank=2), solver.timesteps.tolist())
        calibrate(student, {t: buffer.x[:, step] for step, t in enumerate(solver.timesteps.tolist())})
        return SimpleNamespace(unet=unet, buffer=buffer, student=student)

    return make


@pytest.fixture(scope="session")
def made_once(make_models):
    """`unet`, `buffer` and `student` of images of the released ruler's size, for tests that change none of them."""
    return make_models(28)


@pytest.fixture
def solver():
    return Solver(SamplerConfig(num_steps=6))


@pytest.fixture
def unet(made_once):
    """A small UNet with random weights."""
    return copy.deepcopy(made_once.unet)


@pytest.fixture
def buffer(made_once):
    return copy.deepcopy(made_once.buffer)


@pytest.fixture
def student(made_once):
    """A calibrated W4A4 copy of `unet`."""
    return copy.deepcopy(made_once.student)


@pytest.fixture
def strange_surroundings():
    """A context with other defaults than torch's, autocast and inference mode."""

    @contextlib.contextmanager
    def strange():
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
                yield
        finally:
            torch.set_default_dtype(torch.float32)

    return strange


@pytest.fixture(scope="session")
def write_config(made_once):
    """Write `unet` as a teacher and config.yaml, whose {teacher} and {output} lie beside it; the path of the latter."""

    def write(folder, text):
        save_teacher(made_once.unet, folder / "teacher")
        path = folder / "config.yaml"
        path.write_text(text.format(teacher=folder / "teacher", output=folder / "run"))
        return path

    return write


@pytest.fixture
def refuse(capsys):
    """Run a command that must refuse its words: exit code 2, one line to stderr; that line.

    Nothing goes to stdout, unless `late` says that it begins before it can know.
    """

    def refuse(function, config_class, arguments, late=False):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_command("prog", function, config_class, arguments)
        assert caught.value.code == 2
        captured = capsys.readouterr()
        assert late or captured.out == ""
        assert captured.err.startswith("prog: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return refuse
