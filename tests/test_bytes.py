"""The same image on every processor: the bytes of two released students' images, written down."""

import hashlib

import pytest
import torch

from ddpm_mnist.sampler import SamplerConfig, Solver, sample
from eval.models import load_model
from quant import to_integer
from quant.integer.core import ISAS, available

# SHA-256 of the images of seeds 0 to 255, DPM-Solver++ in 20 steps, uint8 (256, 28, 28).
EXPECTED = {
    "w4a4": "447811528e026ae782d59dc424e7f6952c1e358e24c5caa687f775aa05940ad4",
    "w2a4": "42c88297dcdba3cee8f7c54d19ea7fa831b629b5a7bf86680f448b5db6616dd5",
}
EVERY_ISA = [
    pytest.param(isa, marks=pytest.mark.skipif(isa not in available(), reason=f"this processor has no {isa}"))
    for isa in ISAS
]


@pytest.fixture(params=EXPECTED)
def student(request):
    return request.param, load_model(request.param).denoiser


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_the_bytes_of_256_images(student, isa):
    name, denoiser = student
    images = sample(to_integer(denoiser, isa), Solver(SamplerConfig()), 256)
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest() == EXPECTED[name]


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
