"""The same image on every processor: the bytes of two released students' images, written down."""

import hashlib

import pytest
import torch

from ddpm_mnist.sampler import SamplerConfig, Solver, sample
from eval.models import load_model
from quant import to_integer
from quant.integer.core import ISAS, available

# SHA-256 of the images of the first seeds, DPM-Solver++ in 20 steps, uint8 (N, 28, 28): so many as a processor draws in
# seconds; what runs on any is several times as slow.
EXPECTED = {
    "w4a4": {
        256: "447811528e026ae782d59dc424e7f6952c1e358e24c5caa687f775aa05940ad4",
        64: "b6dff2b822e251be7d667165a1d4db9e20c1cb908bad85b24453b5c6e7ad6c9e",
    },
    "w2a4": {
        256: "42c88297dcdba3cee8f7c54d19ea7fa831b629b5a7bf86680f448b5db6616dd5",
        64: "d4341b55cf7d9b6a798b60bfeaabe519006042a03f877aa4cf8be1b190e1f7da",
    },
}
EVERY_ISA = [
    pytest.param(isa, marks=pytest.mark.skipif(isa not in available(), reason=f"this processor has no {isa}"))
    for isa in ISAS
]


@pytest.fixture(params=EXPECTED)
def student(request):
    return request.param, load_model(request.param).denoiser


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_the_bytes_of_images(student, isa):
    name, denoiser = student
    count = 64 if isa == "portable" else 256
    images = sample(to_integer(denoiser, isa), Solver(SamplerConfig()), count)
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest() == EXPECTED[name][count]


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize(("batch_size", "threads"), [(1, 1), (1, 2), (3, 1), (3, 2), (64, 1)])
def test_neither_batch_nor_threads_change_a_byte(student, isa, batch_size, threads):
    _, denoiser = student
    before = torch.get_num_threads()
    expected = sample(to_integer(denoiser), Solver(SamplerConfig()), 7)
    try:
        torch.set_num_threads(threads)
        images = sample(to_integer(denoiser, isa), Solver(SamplerConfig()), 7, batch_size=batch_size)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(images, expected)
