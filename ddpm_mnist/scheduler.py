"""The scheduler of this project's models: diffusers' DPM-Solver++ with a factor on ε, for diffusers' pipelines.

Import this module before a pipeline's `from_pretrained`: diffusers only finds classes of imported modules.
"""

import inspect
from typing import Any

from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor

# diffusers' pipelines look up a component's base class, which defines how to load it, in the component's module.
__all__ = ["EpsilonScalingScheduler", "SchedulerMixin"]
DPM_FIELDS = inspect.signature(DPMSolverMultistepScheduler).parameters.keys()


def check_eps_scale(eps_scale: Any) -> None:
    """Raise ValueError unless `eps_scale` is a finite number of at least 1e-6."""
    number = isinstance(eps_scale, int | float) and not isinstance(eps_scale, bool)
    if not number or not 1e-6 <= eps_scale < float("inf"):
        raise ValueError(f"eps_scale must be a number of at least 1e-06, not {eps_scale!r}")


class EpsilonScalingScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver++ that multiplies the network's ε by a factor before each step.

    A deterministic sampler with few steps reaches states that the network was not trained on, where the norm of ε is
    wrong. One constant factor corrects much of this error (epsilon scaling, Ning et al., arXiv 2308.15321).

    Args:
        eps_scale: the factor, at least 1e-6.
        options: arguments of `DPMSolverMultistepScheduler`; prediction_type must be "epsilon".

    Raises:
        ValueError: eps_scale or prediction_type is invalid.
    """

    def __init__(self, eps_scale: float = 1.0, **options: Any):
        check_eps_scale(eps_scale)
        super().__init__(**options)
        self.register_to_config(eps_scale=eps_scale)
        if self.config.prediction_type != "epsilon":
            raise ValueError(f"eps_scale is a factor on ε, and the network answers {self.config.prediction_type}")

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        # The fields that from_config accepts. diffusers reads them from the signature, where `options` hides them.
        keys = DPMSolverMultistepScheduler._get_init_keys(input_class)
        return keys | DPM_FIELDS if issubclass(input_class, EpsilonScalingScheduler) else keys

    def step(self, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take diffusers' step with `model_output`, ε, multiplied by the factor."""
        return super().step(self.config.eps_scale * model_output, *args, **kwargs)


def make_noise_schedule() -> DDPMScheduler:
    """Return the forward process of DDPM (arXiv 2006.11239, section 4): 1000 steps, β linear from 1e-4 to 0.02."""
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")


def make_sampling_scheduler(eps_scale: float = 1.0) -> EpsilonScalingScheduler:
    """Return DPM-Solver++ for DDPM's forward process, with "trailing" timestep spacing and x0 clipped to [-1, 1]."""
    options = {"dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0, "timestep_spacing": "trailing"}
    return EpsilonScalingScheduler(eps_scale, beta_schedule="linear", thresholding=True, **options)
