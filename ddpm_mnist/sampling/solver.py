"""diffusers' DDIM and DPM-Solver++ as linear steps, with bitwise identical results on every processor."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from numpy.typing import NDArray
from torch import Tensor

from ddpm_mnist.lab import InputError
from ddpm_mnist.sampling.exact import Array, log
from ddpm_mnist.sampling.noise_schedule import Schedule, default_schedule
from ddpm_mnist.scheduler import check_eps_scale
from quant.context import plain_torch

# Options of DPM-Solver++ (2M); other variants of diffusers' DPMSolverMultistepScheduler are refused.
DPM_OPTIONS = {
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lambda_min_clipped": -float("inf"),
}


# Values that these fields have in other schedulers only. As in diffusers, DPM-Solver++ replaces them by its defaults.
FOREIGN_VALUES = {"algorithm_type": ("deis",), "solver_type": ("logrho", "bh1", "bh2")}


# A denoiser is called as `denoiser(x_t, t, **conditions).sample`: x_t float (N, C, H, W), t long (N,). Its `config` has
# the fields of UNet2DModel's config.
Denoiser = Callable[..., Any]
# Further arguments of a denoiser, one row per sample: class_labels long (N,), encoder_hidden_states (N, L, D).
Conditions = Mapping[str, Tensor]


@dataclass
class SamplerConfig:
    """How images are sampled."""

    solver: str = "dpm++"
    """"ddim": DDIM with the clipped model output. "dpm++": DPM-Solver++ (2M) with clipped x0."""
    num_steps: int = 20
    """Denoising steps, from 1 to the number of training timesteps; spaced as the model's scheduler says."""
    eta: float = 0.0
    """DDIM's η (arXiv 2010.02502, eq. 16), 0 to 1: 0 is deterministic, 1 adds as much noise as DDPM. "ddim" only."""
    eps_scale: float | None = None
    """Factor on the model's ε before each step (arXiv 2308.15321), at least 1e-6. None: that of the model's
    scheduler."""
    labels: tuple[int, ...] = ()
    """Classes of a class-conditional model, used in turn: image i gets labels[(seed + i) mod n] of the n classes.
    Empty: all classes."""
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance (arXiv 2207.12598), null + scale · (class − null), at least 0. 1: no guidance.
    Needs null_class."""
    null_class: int | None = None
    """The unconditional class, if the model was trained with one. It is not sampled unless `labels` contains it."""

    def __post_init__(self) -> None:
        if self.solver not in ("ddim", "dpm++"):
            raise ValueError(f'solver must be "ddim" or "dpm++", not "{self.solver}"')
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {self.num_steps}")
        if self.eps_scale is not None:
            check_eps_scale(self.eps_scale)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], not {self.eta}")
        if self.eta and self.solver != "ddim":
            raise ValueError('eta is DDIM\'s: with solver "dpm++" it must be 0')
        if self.guidance_scale != 1 and self.null_class is None:
            raise ValueError("guidance_scale needs null_class, the class that stands for none")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be a number of at least 0, not {self.guidance_scale}")


def make_scheduler(config: SamplerConfig, schedule: Schedule) -> DDIMScheduler | DPMSolverMultistepScheduler:
    """Return the diffusers scheduler of `config` for `schedule`, with its timesteps set.

    Raises:
        InputError: the solver does not support an option of the schedule, or this number of steps.
    """
    kind: Any = DDIMScheduler if config.solver == "ddim" else DPMSolverMultistepScheduler
    fields = {key: schedule.fields[key] for key in inspect.signature(kind).parameters if key in schedule.fields}
    fields = {key: value for key, value in fields.items() if value not in FOREIGN_VALUES.get(key, ())}
    clip_range = schedule.clip_range(config.solver)
    if config.solver == "dpm++":
        if clip_range not in (None, 1.0):
            raise InputError(f'solver "dpm++" clips x0 at 1 or not at all, not at {clip_range}; "ddim" does')
        # These options clip x0 to [-1, 1]; diffusers' DPM-Solver++ has no clip_sample.
        fields |= {"thresholding": clip_range == 1, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0}
    try:
        scheduler = kind(**fields)
    except Exception as error:  # diffusers validates few of the fields, so that errors of any type can follow
        raise InputError(f"its scheduler cannot be used: {error}") from error
    for name, value in DPM_OPTIONS.items():
        if scheduler.config.get(name, value) != value:
            now = scheduler.config[name]
            raise InputError(f'its scheduler has {name} = {now}, which "dpm++" does not support, only {value}')
    total = schedule.num_train_timesteps
    timesteps: list[int] = []
    if config.num_steps <= total:  # diffusers would allocate any number of timesteps
        with suppress(Exception):
            scheduler.set_timesteps(config.num_steps)
            timesteps = scheduler.timesteps.tolist()
    if len(set(timesteps)) != config.num_steps or not 0 <= timesteps[-1] <= timesteps[0] < total:
        # diffusers' "trailing" spacing returns a wrong number of timesteps for some num_steps, e.g. 61 of 1000.
        spacing = scheduler.config.timestep_spacing
        raise InputError(f'num_steps {config.num_steps} cannot be spaced over {total} timesteps, "{spacing}"')
    return scheduler


class Solver:
    """A linear solver: every step is x' = a·x + b·x0 + c·x0_prev + s·z.

    x0 = (u·x − v·y) / w is the prediction that follows from the denoiser's output y, clipped as the schedule says. For
    ε-prediction it is (x − σ_t·ε) / α_t, with ε multiplied by `eps_scale` first. x0_prev is the prediction of the
    previous step, z is new noise. DDIM (with clipped model output, for any η) and DPM-Solver++ (2M) have this form.
    The samples of a batch may be at different steps, which diffusers' schedulers do not allow.

    The coefficients are computed in float64 with exactly rounded operations and then rounded to float32, so they are
    bitwise identical on every processor. diffusers' are not: they use vectorised float32 functions. For the same
    reason a step uses separate operations: a fused multiply-add (addcmul, lerp) rounds once on one processor and twice
    on another.

    Attributes:
        config, schedule: the arguments; without a schedule that of `default_schedule`.
        timesteps: long (T,), the training timestep of each step, decreasing.
        eps_scale: factor on ε, from the config, or else from the schedule.
        coefficients: float (T, 4), the rows (a, b, c, s).
        is_stochastic: whether any step adds noise.

    Raises:
        InputError: the solver does not support the schedule.
    """

    @plain_torch()
    def __init__(self, config: SamplerConfig, schedule: Schedule | None = None):
        self.config = config
        self.schedule = schedule or default_schedule()
        scheduler = make_scheduler(config, self.schedule)
        self.timesteps: Tensor = scheduler.timesteps.clone()
        t = self.timesteps.numpy()
        alphas_cumprod = self.schedule.alphas_cumprod.copy()
        if config.solver == "dpm++" and self.schedule.fields.get("rescale_betas_zero_snr"):
            alphas_cumprod[-1] = 2.0**-24  # as in diffusers: λ must be finite
        if self.schedule.prediction_type == "epsilon" and not alphas_cumprod[t].all():
            raise InputError(
                f"at timestep {t[0]} x_t contains no signal, so x0 does not follow from ε: use v_prediction"
            )
        self.eps_scale = self.schedule.eps_scale if config.eps_scale is None else config.eps_scale
        if self.eps_scale != 1 and self.schedule.prediction_type != "epsilon":
            raise InputError(f"eps_scale is a factor on ε, and the model answers {self.schedule.prediction_type}")
        alpha, sigma = np.sqrt(alphas_cumprod[t]), np.sqrt(1 - alphas_cumprod[t])
        one, zero = np.ones_like(alpha), np.zeros_like(alpha)
        rows = {
            "epsilon": (one, self.eps_scale * sigma, alpha),
            "v_prediction": (alpha, sigma, one),
            "sample": (zero, -one, one),
        }
        self._to_x0 = _to_tensor(np.stack(rows[self.schedule.prediction_type], axis=1))
        self._clip_range = self.schedule.clip_range(config.solver)
        self._alpha, self._sigma = _to_tensor(alpha), _to_tensor(sigma)
        self.coefficients = _to_tensor(_make_coefficients(config, scheduler.config, t, alphas_cumprod))
        self.is_stochastic = bool(self.coefficients[:, 3].any())

    @plain_torch(inference=True)
    def model_output(self, denoiser: Denoiser, step: Tensor, x: Tensor, conditions: Conditions) -> Tensor:
        """Evaluate the denoiser at x float (N, C, H, W) and `step` long (N,), with the config's classifier-free
        guidance.

        Args:
            conditions: further arguments of the denoiser, each (N, …), such as class_labels.
        """
        t, scale = self.timesteps.to(x.device)[step], self.config.guidance_scale
        if scale == 1 or "class_labels" not in conditions:
            return denoiser(x, t, **conditions).sample
        labels = conditions["class_labels"]
        null = torch.full_like(labels, self.config.null_class)  # type: ignore[arg-type]
        both = denoiser(torch.cat([x, x]), torch.cat([t, t]), class_labels=torch.cat([labels, null])).sample
        conditional, unconditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def predict_x0(self, step: Tensor, x: Tensor, answer: Tensor) -> Tensor:
        """Return the clipped x0 for the denoiser's output `answer` at `step` long (N,); x and answer float
        (N, C, H, W)."""
        u, v, w = (_per_sample(column, step, x) for column in self._to_x0.T)
        x0 = (u * x - v * answer) / w
        return x0 if self._clip_range is None else x0.clamp(-self._clip_range, self._clip_range)

    def add_noise(self, step: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        """Return the noisy state x_t of `x0` at `step` long (N,) with the noise `eps`; both float (N, C, H, W)."""
        return _per_sample(self._alpha, step, x0) * x0 + _per_sample(self._sigma, step, x0) * eps

    def target(self, step: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        """Return the training target at the state of `add_noise`: ε, v or x0, by the prediction type."""
        alpha, sigma = (_per_sample(table, step, x0) for table in (self._alpha, self._sigma))
        answers = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}
        return answers[self.schedule.prediction_type]

    def advance(self, step: Tensor, x: Tensor, x0: Tensor, x0_prev: Tensor, z: Tensor | None = None) -> Tensor:
        """Return the state after `step` long (N,). At step 0 `x0_prev` has no effect."""
        a, b, c, s = (_per_sample(column, step, x) for column in self.coefficients.T)
        x = a * x + b * x0 + c * x0_prev
        return x if z is None else x + s * z


def _per_sample(table: Tensor, step: Tensor, x: Tensor) -> Tensor:
    return table.to(x.device)[step].view(-1, 1, 1, 1)


def _to_tensor(array: Array) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _make_coefficients(config: SamplerConfig, options: Any, t: NDArray[np.int64], alphas_cumprod: Array) -> Array:
    """Return the rows (a, b, c, s) of the steps from the timesteps `t`, float64 (T, 4).

    DDIM (arXiv 2010.02502, eq. 12 and 16) uses the ε that follows from the clipped x0, (x - α·x0) / σ. DPM-Solver++
    (2M) (arXiv 2211.01095, algorithm 2) is the same step at η = 0, with x0 extrapolated from the previous step in
    λ = ln(α/σ). The first step is of first order; so is the last if it removes all noise or if there are few steps.

    Args:
        options: the config of the diffusers scheduler.
    """
    ddim = config.solver == "ddim"
    ends_clean = options.set_alpha_to_one if ddim else options.final_sigmas_type == "zero"
    # Index -1 holds ᾱ after the last step: 1 (no noise), or the value at timestep 0.
    alphas_cumprod = np.append(alphas_cumprod, 1.0 if ends_clean else alphas_cumprod[0])
    t_next = np.append(t[1:], -1)
    if ddim:
        # diffusers subtracts the integer part of the step length, although the next timestep may be one lower.
        t_next = np.maximum(t - options.num_train_timesteps // config.num_steps, -1)
    now, after = alphas_cumprod[t], alphas_cumprod[t_next]
    alpha, sigma = np.sqrt(now), np.sqrt(1 - now)
    s = np.sqrt((1 - after) / (1 - now) * (1 - now / after)) * config.eta if config.eta else np.zeros_like(now)
    a = np.sqrt(1 - after - s * s) / sigma
    b = np.sqrt(after) - a * alpha
    c = np.zeros_like(b)
    if not ddim:
        few = options.lower_order_final and len(t) < 15  # the limit in diffusers
        count = len(t) - 1 if ends_clean or few or options.euler_at_final else len(t)
        ends = after[:count]
        h = np.diff(log(np.sqrt(np.append(now[0], ends) / (1 - np.append(now[0], ends)))))
        c[1:count] = -b[1:count] * h[1:] / (2 * h[:-1])
    return np.stack([a, b - c, c, s], axis=1)
