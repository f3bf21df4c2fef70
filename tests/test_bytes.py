"""The same image on every processor: the bytes of two released students' images, written down."""

import hashlib

import pytest
import torch

from ddpm_mnist.sampling.sampler import sample
from ddpm_mnist.sampling.solver import SamplerConfig, Solver
from eval.models import load_model
from quant import to_integer
from quant.integer.binding import ISAS, available

# SHA-256 of the images of the first seeds, DPM-Solver++ in 20 steps, uint8 (N, 28, 28): so many as a processor draws in
# seconds; what runs on any is several times as slow.
EXPECTED = {
    "w4a4": {
        256: "d593f56311c9beb11d62b0d14af6bb0412681515995e125fe6719070169badc1",
        64: "94328692285c03d329090ddef83cd4dfa8f8aa5eff6e4683eea1e11328820c72",
    },
    "w2a4": {
        256: "d58551085a58083179ff4f9c8a0388f1e31d3b00a59680a5eccb46d848e33d70",
        64: "0c159f135c441cf1602e99e32d1329674e401646770050a4638149f102003376",
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
    before, solver = torch.get_num_threads(), Solver(SamplerConfig(num_steps=5))
    expected = sample(to_integer(denoiser), solver, 7)
    try:
        torch.set_num_threads(threads)
        images = sample(to_integer(denoiser, isa), solver, 7, batch_size=batch_size)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(images, expected)
