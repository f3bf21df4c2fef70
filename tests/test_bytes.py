"""The same image on every processor: the bytes of two released students' images, written down."""

import hashlib

import pytest
import torch

from ddpm_mnist.sampling.sampler import sample
from ddpm_mnist.sampling.solver import SamplerConfig, Solver
from eval.models import load_model
from quant import to_integer
from quant.integer.binding import available

# SHA-256 of the images of the first seeds, DPM-Solver++ in 20 steps, uint8 (N, 28, 28): so many as an instruction set
# draws in a second or two.
EXPECTED = {
    "w4a4": {
        256: "d593f56311c9beb11d62b0d14af6bb0412681515995e125fe6719070169badc1",
        64: "94328692285c03d329090ddef83cd4dfa8f8aa5eff6e4683eea1e11328820c72",
        8: "7c523245c8ebac60e1a47f001ec86367549183566428cac175bd5270e6a2f06e",
    },
    "w2a4": {
        256: "d58551085a58083179ff4f9c8a0388f1e31d3b00a59680a5eccb46d848e33d70",
        64: "0c159f135c441cf1602e99e32d1329674e401646770050a4638149f102003376",
        8: "c2256f087aef0d0c3b7b6479987fe4a5650fef891a48ab02a7592bfa0b0267a3",
    },
}
COUNTS = {"portable": 8, "avx2": 64}


@pytest.mark.parametrize("isa", available())
@pytest.mark.parametrize("name", EXPECTED)
def test_the_bytes_of_images(name, isa):
    count = COUNTS.get(isa, 256)
    images = sample(to_integer(load_model(name).denoiser, isa), Solver(SamplerConfig()), count)
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest() == EXPECTED[name][count]


@pytest.mark.parametrize("isa", available())
def test_neither_batch_nor_threads_change_a_byte(isa):
    denoiser, solver = load_model("w4a4").denoiser, Solver(SamplerConfig(num_steps=3))
    before, expected = torch.get_num_threads(), sample(to_integer(denoiser), solver, 4)
    try:
        for threads, batch_size in ((1, 3), (2, 1), (2, 3)):
            torch.set_num_threads(threads)
            assert torch.equal(sample(to_integer(denoiser, isa), solver, 4, batch_size=batch_size), expected)
    finally:
        torch.set_num_threads(before)
