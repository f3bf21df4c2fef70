"""Draw normal noise that is bitwise identical on every processor.

The normal numbers of torch and NumPy are not: they use vectorised or library functions whose last bits depend on the
machine. Here Philox's random integers go through the inverse normal CDF, computed with exactly rounded operations only
(`ddpm_mnist.sampling.exact`).
"""

import math

import numpy as np
import torch
from torch import Tensor

from ddpm_mnist.sampling.exact import Array, log

# Name of the noise generator, stored with images and students so that results from different noise are not mixed.
STREAM = "Philox4x64-10, AS 241"

# AS 241, PPND16: numerator and denominator of three rational functions, from the highest power down to the constant.
CENTRE = (
    (2.5090809287301226727e3, 5.2264952788528545610e3),
    (3.3430575583588128105e4, 2.8729085735721942674e4),
    (6.7265770927008700853e4, 3.9307895800092710610e4),
    (4.5921953931549871457e4, 2.1213794301586595867e4),
    (1.3731693765509461125e4, 5.3941960214247511077e3),
    (1.9715909503065514427e3, 6.8718700749205790830e2),
    (1.3314166789178437745e2, 4.2313330701600911252e1),
    (3.3871328727963666080e0, 1.0),
)
TAIL = (
    (7.74545014278341407640e-4, 1.05075007164441684324e-9),
    (2.27238449892691845833e-2, 5.47593808499534494600e-4),
    (2.41780725177450611770e-1, 1.51986665636164571966e-2),
    (1.27045825245236838258e0, 1.48103976427480074590e-1),
    (3.64784832476320460504e0, 6.89767334985100004550e-1),
    (5.76949722146069140550e0, 1.67638483018380384940e0),
    (4.63033784615654529590e0, 2.05319162663775882187e0),
    (1.42343711074968357734e0, 1.0),
)
FAR_TAIL = (
    (2.01033439929228813265e-7, 2.04426310338993978564e-15),
    (2.71155556874348757815e-5, 1.42151175831644588870e-7),
    (1.24266094738807843860e-3, 1.84631831751005468180e-5),
    (2.65321895265761230930e-2, 7.86869131145613259100e-4),
    (2.96560571828504891230e-1, 1.48753612908506148525e-2),
    (1.78482653991729133580e0, 1.36929880922735805310e-1),
    (5.46378491116411436990e0, 5.99832206555887937690e-1),
    (6.65790464350110377720e0, 1.0),
)


def image_generators(seeds: range) -> list[np.random.Philox]:
    """Return one generator per image, so that an image depends on its own seed only.

    Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed as its key.
    NumPy guarantees its stream of words.
    """
    return [np.random.Philox(key=seed) for seed in seeds]


def draw_noise(generators: list[np.random.Philox], shape: tuple[int, ...]) -> Tensor:
    """Draw the next noise of every image: float (N, *shape), on the CPU.

    Each number uses one 64-bit integer: its upper 52 bits k give u = (k + 1/2) / 2^52 in (0, 1), without rounding.
    """
    words = np.stack([generator.random_raw(math.prod(shape)) for generator in generators])
    u = ((words >> 12) + 0.5) / 2**52
    return torch.from_numpy(normal_quantile(u).astype(np.float32)).view(-1, *shape)


def normal_quantile(u: Array) -> Array:
    """Return the quantile z of the standard normal distribution at probability u, to a relative error of about 1e-15.

    Algorithm AS 241, PPND16 (Wichura, Applied Statistics 37, 1988).

    Args:
        u: multiples of 2^-53 in (0, 1), so that both u - 1/2 and the smaller of u and 1 - u are exact.
    """
    q = u - 0.5
    size = np.abs(q)
    return np.copysign(np.piecewise(size, [size <= 0.425], [_central, _outer]), q)


def _central(size: Array) -> Array:
    return size * _ratio(CENTRE, 0.180625 - size * size)


def _outer(size: Array) -> Array:
    r = np.sqrt(-log(0.5 - size))
    return np.piecewise(r, [r <= 5], [lambda r: _ratio(TAIL, r - 1.6), lambda r: _ratio(FAR_TAIL, r - 5)])


def _ratio(coefficients: tuple[tuple[float, float], ...], r: Array) -> Array:
    """Evaluate a rational function at r by Horner's rule."""
    above, below = np.zeros_like(r), np.zeros_like(r)
    for numerator, denominator in coefficients:
        above, below = above * r + numerator, below * r + denominator
    return above / below
