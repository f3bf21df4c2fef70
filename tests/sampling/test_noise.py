import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from ddpm_mnist.sampling.noise import draw_noise, image_generators, log, normal_quantile


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (
            "0000000000000000 0000000000000000 0000000000000000 0000000000000000",
            "0000000000000000 0000000000000000",
            "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b",
        ),
        (
            "ffffffffffffffff ffffffffffffffff ffffffffffffffff ffffffffffffffff",
            "ffffffffffffffff ffffffffffffffff",
            "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
        ),
        (
            "243f6a8885a308d3 13198a2e03707344 a4093822299f31d0 082efa98ec4e6c89",
            "452821e638d01377 be5466cf34e90c6c",
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    """philox4x64-10 of Random123's tests/kat_vectors; NumPy counts up before the first block."""
    counter, key = (
        sum(int(word, 16) << 64 * place for place, word in enumerate(text.split())) for text in (counter, key)
    )
    generator = np.random.Philox(counter=(counter - 1) % 2**256, key=key)
    assert " ".join(f"{word:016x}" for word in generator.random_raw(4)) == words


def test_quantiles_equal_scipys():
    near_zero = np.unique(np.geomspace(1, 2**51, 200_000).astype(np.int64)) / 2**53  # extreme tails among them
    u = np.concatenate([np.arange(1, 2**20) / 2**20, near_zero, 1 - near_zero])
    assert u.min() == 2**-53
    assert u.max() == 1 - 2**-53
    np.testing.assert_allclose(normal_quantile(u), special.ndtri(u), rtol=2e-15, atol=0)
    np.testing.assert_array_equal(normal_quantile(1 - u), -normal_quantile(u))


def test_logarithms_equal_the_librarys():
    x = np.concatenate([np.geomspace(1e-300, 1e300, 100_000), np.linspace(0.4, 3, 100_000), [2**-53, 1.0, 0.5**0.5]])
    np.testing.assert_allclose(log(x), [math.log(value) for value in x], rtol=5e-16, atol=0)


def test_a_million_numbers_are_normal():
    z = draw_noise(image_generators(range(1000)), (1000,)).double()
    assert stats.kstest(z.flatten(), "norm").pvalue > 0.01
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        spread = (stats.norm.moment(2 * power) - moment**2) ** 0.5
        assert abs((z**power).mean() - moment) < 3 * spread / 1000
    for one, other in ((z[:, 1:], z[:, :-1]), (z[1:], z[:-1])):  # of one image, of neighbouring seeds
        assert abs((one * other).mean()) < 3 / 1000


def test_the_noise_of_a_seed_stays_what_it_is():
    noise = draw_noise(image_generators(range(4)), (1, 28, 28))
    assert noise.shape == (4, 1, 28, 28)
    assert noise.dtype == torch.float32
    digest = hashlib.sha256(noise.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "db6a976e301a1d2463607159b4ff7078d12eb1c1c74d1cbf519bcfd5496dc3b4"


def test_the_noise_of_an_image_goes_on():
    generators = image_generators(range(5, 8))
    first, second = draw_noise(generators, (1, 28, 28)), draw_noise(generators, (1, 28, 28))
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat([first, second], dim=2), draw_noise(image_generators(range(5, 8)), (1, 56, 28)))


def test_noise_depends_on_its_seed_alone():
    seeds = range(2**32 - 5, 2**32)  # the last that a buffer may ask for
    whole = draw_noise(image_generators(seeds), (1, 28, 28))
    assert torch.equal(
        whole, torch.cat([draw_noise(image_generators(part), (1, 28, 28)) for part in (seeds[:2], seeds[2:])])
    )
    assert len(whole.flatten(1).unique(dim=0)) == 5
