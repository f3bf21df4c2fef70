"""One seeded sampler for teacher and student: diffusers' solvers, every step of them written as four numbers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from ddpm_mnist.noise import Array, draw_noise, image_generators, log
from ddpm_mnist.unet import make_ddim_scheduler

# Seeds of images lie in 0…2^31 - 1; as many more, from there on, belong to training.
SEED_LIMIT = 1 << 31

# A denoiser is called as `eps = denoiser(x_t, t).sample`: x_t float (N, 1, 28, 28), t long (N,).
Denoiser = Callable[[Tensor, Tensor], Any]


@dataclass
class SamplerConfig:
    solver: str = "dpm++"
    """"ddim": DDIM with the clipped model output. "dpm++": DPM-Solver++ (2M) with clipped x0."""
    num_steps: int = 20
    """Denoising steps, spaced over the 1000 training timesteps from the last one down ("trailing")."""
    eta: float = 0.0
    """DDIM's η (arXiv 2010.02502, eq. 16): 0 is deterministic, 1 adds as much noise as DDPM. "ddim" only."""

    def __post_init__(self) -> None:
        if self.solver not in ("ddim", "dpm++"):
            raise ValueError(f'solver must be "ddim" or "dpm++", not "{self.solver}"')
        if not 1 <= self.num_steps <= 1000:
            raise ValueError(f"num_steps must lie in 1…1000, not {self.num_steps}")
        if len(np.arange(1000, 0, -1000 / self.num_steps).round()) != self.num_steps:
            # Some numbers, 61 the first of them, miss their own count in diffusers' "trailing" spacing.
            raise ValueError(f"num_steps {self.num_steps} cannot be spaced over 1000 timesteps; a neighbour can")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], not {self.eta}")
        if self.eta and self.solver != "ddim":
            raise ValueError('eta is DDIM\'s: with solver "dpm++" it must be 0')


def make_scheduler(config: SamplerConfig) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """The diffusers scheduler that `config` names, over the teacher's noise schedule, its timesteps set."""
    if config.solver == "ddim":
        scheduler = make_ddim_scheduler()
    else:
        scheduler = DPMSolverMultistepScheduler(
            beta_schedule="linear",
            timestep_spacing="trailing",
            final_sigmas_type="zero",
            thresholding=True,  # with these three: x0 clipped to [-1, 1]
            dynamic_thresholding_ratio=1.0,
            sample_max_value=1.0,
        )
    scheduler.set_timesteps(config.num_steps)
    return scheduler


class Solver:
    """A linear solver: every step is x' = a·x + b·x0 + c·x0_prev + s·z.

    x0 = clip((x − σ_t·ε) / α_t) to [-1, 1] is what the denoiser's ε implies, x0_prev the same of the step
    before, z fresh noise. DDIM (with the clipped model output, at any η) and DPM-Solver++ (2M) are of this
    form, and samples of one batch may stand at different steps, which no scheduler of diffusers allows.

    The numbers are worked out in float64 from + − × ÷ and √ alone, then rounded: the same bytes on every processor,
    which those of diffusers, float32 by vectorised functions, are not. The steps keep to one operation at a time for
    the same reason: what fuses a product with a sum (addcmul, lerp) rounds once on one processor, twice on another.

    Attributes:
        timesteps: long (T,), the training timestep of each step, falling.
        coefficients: float (T, 4), the rows (a, b, c, s).
        is_stochastic: whether any step adds noise.
    """

    def __init__(self, config: SamplerConfig):
        self.timesteps: Tensor = make_scheduler(config).timesteps.clone()
        t = self.timesteps.numpy()
        alphas_cumprod = _make_alphas_cumprod()
        self._alpha = _to_tensor(np.sqrt(alphas_cumprod[t]))
        self._sigma = _to_tensor(np.sqrt(1 - alphas_cumprod[t]))
        self.coefficients = _to_tensor(_make_coefficients(config, t, alphas_cumprod))
        self.is_stochastic = bool(self.coefficients[:, 3].any())

    def predict_x0(self, step: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        """The clipped x0 of `eps` at `step` long (N,); x and eps float (N, C, H, W)."""
        alpha, sigma = (_per_sample(table, step, x) for table in (self._alpha, self._sigma))
        return ((x - sigma * eps) / alpha).clamp(-1, 1)

    def add_noise(self, step: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        """The state of `x0` at `step` long (N,) under the noise `eps`; x0 and eps float (N, C, H, W)."""
        return _per_sample(self._alpha, step, x0) * x0 + _per_sample(self._sigma, step, x0) * eps

    def advance(self, step: Tensor, x: Tensor, x0: Tensor, x0_prev: Tensor, z: Tensor | None = None) -> Tensor:
        """The state after `step` long (N,); at step 0 the value of `x0_prev` does not count."""
        a, b, c, s = (_per_sample(column, step, x) for column in self.coefficients.T)
        x = a * x + b * x0 + c * x0_prev
        return x if z is None else x + s * z


def _per_sample(table: Tensor, step: Tensor, x: Tensor) -> Tensor:
    return table.to(x.device)[step].view(-1, 1, 1, 1)


def _to_tensor(array: Array) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _make_alphas_cumprod() -> Array:
    """ᾱ_t of DDPM (arXiv 2006.11239, section 4), t = 0 … 999, then the image's own, 1, at t = -1; float64 (1001,)."""
    betas = 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999
    return np.append(np.multiply.accumulate(1 - betas), 1.0)  # one factor after the other


def _make_coefficients(config: SamplerConfig, t: NDArray[np.int64], alphas_cumprod: Array) -> Array:
    """The rows (a, b, c, s) of the steps from the timesteps `t`, float64 (T, 4).

    DDIM (arXiv 2010.02502, eq. 12 and 16) with the ε that the clipped x0 implies, (x - α·x0) / σ. DPM-Solver++ (2M)
    (arXiv 2211.01095, algorithm 2) is the same step at η = 0, but for an x0 that is extrapolated from the step before
    in λ = ln(α/σ). The first step has none before it; the last has no λ to go to, as no noise is left.
    """
    t_next = np.append(t[1:], -1)
    if config.solver == "ddim":
        # diffusers goes down by the whole part of 1000 / T, though the next timestep may lie one further.
        t_next = np.maximum(t - 1000 // config.num_steps, -1)
    now, after = alphas_cumprod[t], alphas_cumprod[t_next]
    alpha, sigma = np.sqrt(now), np.sqrt(1 - now)
    s = config.eta * np.sqrt((1 - after) / (1 - now) * (1 - now / after))
    a = np.sqrt(1 - after - s * s) / sigma
    b = np.sqrt(after) - a * alpha
    c = np.zeros_like(b)
    if config.solver == "dpm++":
        h = np.diff(log(alpha / sigma))
        c[1:-1] = -b[1:-1] * h[1:] / (2 * h[:-1])
    return np.stack([a, b - c, c, s], axis=1)


class Step(NamedTuple):
    """One denoising step of a batch: its number, the state before, the denoiser's answer, the state after."""

    number: int
    x: Tensor
    eps: Tensor
    x_next: Tensor


@torch.no_grad()
def denoise(denoiser: Denoiser, solver: Solver, seeds: range, device: str | torch.device = "cpu") -> Iterator[Step]:
    """Denoise one batch from the noise of `seeds`, yielding every step; the last `x_next` is the image."""
    generators = image_generators(seeds)
    x = draw_noise(generators).to(device)
    x0_prev = torch.zeros_like(x)
    for number, t in enumerate(solver.timesteps.tolist()):
        step = torch.full((len(x),), number, device=device)
        eps = denoiser(x, torch.full_like(step, t)).sample
        x0 = solver.predict_x0(step, x, eps)
        z = draw_noise(generators).to(device) if solver.is_stochastic else None
        x_next = solver.advance(step, x, x0, x0_prev, z)
        yield Step(number, x, eps, x_next)
        x, x0_prev = x_next, x0


def batches(seed: int, count: int, batch_size: int) -> Iterator[range]:
    """The seeds `seed` … `seed + count - 1`, at most `batch_size` at a time."""
    for start in range(seed, seed + count, batch_size):
        yield range(start, min(start + batch_size, seed + count))


def sample(
    denoiser: Denoiser,
    config: SamplerConfig,
    num_images: int,
    seed: int = 0,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Images uint8 (num_images, 28, 28) on the CPU; image i starts from the noise of seed + i.

    `progress` is called after each batch with the number of images that are done.
    """
    solver, done, images = Solver(config), 0, []
    for seeds in batches(seed, num_images, batch_size):
        for step in denoise(denoiser, solver, seeds, device):
            x = step.x_next
        images.append(to_uint8(x))
        done += len(seeds)
        progress(done)
    return torch.cat(images)


def to_float(images: Tensor) -> Tensor:
    """Images uint8 (N, 28, 28) → float (N, 1, 28, 28) in [-1, 1]."""
    return rearrange(images, "n h w -> n 1 h w").float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Images float (N, 1, 28, 28) in [-1, 1] → uint8 (N, 28, 28) on the CPU."""
    return rearrange(((x.clamp(-1, 1) + 1) * 127.5).round().byte(), "n 1 h w -> n h w").cpu()
