"""Read a denoiser's noise schedule and prediction type from the config of its diffusers scheduler."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpm_mnist.lab import InputError
from ddpm_mnist.sampling.exact import Array, cosine
from ddpm_mnist.scheduler import EpsilonScalingScheduler, make_sampling_scheduler

# diffusers' schedulers for the variance-preserving process of DDPM; others (VE, EDM, flow matching) are refused.
CLASSES = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler", "DEISMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", EpsilonScalingScheduler.__name__,
)  # fmt: skip

# Fields that are accepted with any value: those of the training process and of the clipping of x0 (HONOURED), and those
# of solvers that are not used here (OF_OTHER_SOLVERS).
HONOURED = {
    "num_train_timesteps", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr", "clip_sample",
    "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value", "steps_offset",
    "set_alpha_to_one",
}  # fmt: skip
OF_OTHER_SOLVERS = {
    "solver_order", "solver_type", "solver_p", "algorithm_type", "lower_order_final", "euler_at_final",
    "lambda_min_clipped", "skip_prk_steps", "predict_x0", "disable_corrector", "interpolation_type", "flow_shift",
    "time_shift_type", "tensor_format",
}  # fmt: skip
BOOLEANS = {
    "rescale_betas_zero_snr",
    "clip_sample",
    "thresholding",
    "set_alpha_to_one",
    "lower_order_final",
    "euler_at_final",
}
# Numeric fields and their minimum values.
NUMBERS = {"beta_start": 0, "beta_end": 0, "steps_offset": 0, "clip_sample_range": 1e-6, "eps_scale": 1e-6}
# Fields that change the process itself, with their supported values.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "timestep_type": ("discrete",),
    **dict.fromkeys(("sigma_min", "sigma_max", "shift_terminal", "timestep_values"), (None,)),
    **dict.fromkeys(
        ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), (False, None)
    ),
    **dict.fromkeys(("use_flow_sigmas", "use_dynamic_shifting"), (False, None)),
    "predict_epsilon": (True, None),
}


@dataclass(frozen=True)
class Schedule:
    """A noise schedule, x_t = √ᾱ_t·x0 + √(1 − ᾱ_t)·ε (DDPM, arXiv 2006.11239, eq. 4), and a network's prediction type.

    Attributes:
        config: the scheduler's config, as in its file.
        alphas_cumprod: ᾱ_t, float64 (num_train_timesteps,).
        prediction_type: "epsilon", "v_prediction" (√ᾱ_t·ε − √(1 − ᾱ_t)·x0, arXiv 2202.00512) or "sample" (x0).
    """

    config: Mapping[str, Any]
    alphas_cumprod: Array
    prediction_type: str

    @property
    def fields(self) -> dict[str, Any]:
        """The config without diffusers' private keys, which begin with "_"."""
        return _fields(self.config)

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps that the network was trained on."""
        return len(self.alphas_cumprod)

    @property
    def eps_scale(self) -> float:
        """Factor on ε in sampling (see `EpsilonScalingScheduler`)."""
        return float(self.fields.get("eps_scale", 1.0))

    def scaled(self, eps_scale: float) -> dict[str, Any]:
        """Return the scheduler config with the factor `eps_scale` on ε."""
        if eps_scale == self.eps_scale:
            return dict(self.config)
        clips = {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0}
        clips = clips if self.clip_range("dpm++") == 1 else {}
        return {**self.config, **clips, "_class_name": EpsilonScalingScheduler.__name__, "eps_scale": eps_scale}

    def clip_range(self, solver: str) -> float | None:
        """Return the bound at which sampling clips |x0|, or None; by default that of diffusers' `solver`."""
        if self.fields.get("thresholding"):
            return 1.0
        clips = self.fields.get("clip_sample", solver == "ddim")
        return float(self.fields.get("clip_sample_range", 1.0)) if clips else None


def read_schedule(config: Mapping[str, Any]) -> Schedule:
    """Return the schedule that the config of a diffusers scheduler describes.

    Raises:
        InputError: a field is unknown, or its value is not supported; the message names it.
    """
    name, defaults = config.get("_class_name", "no class"), config.get("_use_default_values", [])
    if not isinstance(defaults, list):
        raise InputError(f"its scheduler has _use_default_values = {defaults!r}, which is not a list")
    # As in diffusers, fields that were left at their defaults take the defaults of the class that reads the config.
    config = {key: value for key, value in config.items() if key not in [*defaults, "_use_default_values"]}
    if name not in CLASSES:
        raise InputError(
            f"its scheduler, {name}, has no noise schedule of DDPM's kind; supported: {', '.join(CLASSES)}"
        )
    fields = _fields(config)
    for key, least in NUMBERS.items():
        value = fields.get(key, least)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
            if key == "clip_sample_range" and not fields.get("clip_sample", True):
                continue
            raise InputError(f"its scheduler has {key} = {value!r}, which is not a number of at least {least:g}")
    if int(offset := fields.get("steps_offset", 0)) != offset:
        raise InputError(f"its scheduler has steps_offset = {offset!r}, which is not a whole number")
    for key in BOOLEANS & fields.keys():
        if not isinstance(fields[key], bool):
            raise InputError(f"its scheduler has {key} = {fields[key]!r}, which must be true or false")
    for key, value in fields.items():
        if key in SUPPORTED and value not in SUPPORTED[key]:
            values = ", ".join(map(str, SUPPORTED[key]))
            raise InputError(f"its scheduler has {key} = {value}, which is not supported, only {values}")
        known = HONOURED | OF_OTHER_SOLVERS | SUPPORTED.keys()
        if key not in known and not (key == "eps_scale" and name == EpsilonScalingScheduler.__name__):
            raise InputError(f"its scheduler has {key} = {value}, which is not known here")
    if fields.get("thresholding") and (
        fields.get("dynamic_thresholding_ratio", 0.995) != 1 or fields.get("sample_max_value", 1.0) != 1
    ):
        raise InputError(
            "its scheduler has thresholding = True, which is not supported: no linear solver can follow it"
        )
    try:
        with np.errstate(all="ignore"):  # NaN and infinity are refused by the check of the betas
            alphas_cumprod = _alphas_cumprod(fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"its scheduler cannot be used: {error}") from error
    return Schedule(config, alphas_cumprod, fields.get("prediction_type", "epsilon"))


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def default_schedule() -> Schedule:
    """Return the schedule of `train_teacher`'s models, which folders without a scheduler get.

    It has DDPM's 1000 linear steps and ε-prediction, "trailing" timestep spacing, and x0 clipped to [-1, 1].
    """
    return read_schedule({"_class_name": EpsilonScalingScheduler.__name__, **make_sampling_scheduler().config})


def _alphas_cumprod(fields: Mapping[str, Any]) -> Array:
    count, kind = fields.get("num_train_timesteps", 1000), fields.get("beta_schedule", "linear")
    start, end = fields.get("beta_start", 1e-4), fields.get("beta_end", 0.02)
    if type(count) is not int or not 1 <= count <= 100_000:
        raise ValueError(f"num_train_timesteps must be a number from 1 to 100,000, not {count}")
    fraction = np.arange(count) / max(count - 1, 1)
    if fields.get("trained_betas") is not None:
        betas = np.asarray(fields["trained_betas"], np.float64)
    elif kind == "linear":
        betas = start + (end - start) * fraction
    elif kind == "scaled_linear":
        betas = (np.sqrt(start) + (np.sqrt(end) - np.sqrt(start)) * fraction) ** 2
    else:  # "squaredcos_cap_v2" (arXiv 2102.09672, eq. 17): ᾱ is a cosine squared, and β at most 0.999
        alpha_bar = cosine((np.arange(count + 1) / count + 0.008) / 1.008 * (np.pi / 2)) ** 2
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    if betas.shape != (count,) or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(f"its betas must be {count:,} numbers between 0 and 1")
    alphas_cumprod = np.multiply.accumulate(1 - betas)  # sequential, so that the rounding is fixed
    if fields.get("rescale_betas_zero_snr"):  # arXiv 2305.08891, algorithm 1: zero terminal SNR
        signal = np.sqrt(alphas_cumprod)
        alphas_cumprod = ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2
    return alphas_cumprod
