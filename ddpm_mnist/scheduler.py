"""The scheduler of the house: diffusers' DPM-Solver++ with a factor on ε, for its pipelines.

`import ddpm_mnist.scheduler` before a pipeline's `from_pretrained`: diffusers takes no class from a module that was not
imported, and says so.
"""

import inspect
from typing import Any

from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor

# diffusers' pipelines ask a component's module for the base class that tells how to load it.
__all__ = ["EpsilonScalingScheduler", "SchedulerMixin"]
DPM_FIELDS = inspect.signature(DPMSolverMultistepScheduler).parameters.keys()


def check_eps_scale(eps_scale: Any) -> None:
    """ValueError for what is no factor on ε."""
    number = isinstance(eps_scale, int | float) and not isinstance(eps_scale, bool)
    if not number or not 1e-6 <= eps_scale < float("inf"):
        raise ValueError(f"eps_scale must be a number of at least 1e-06, not {eps_scale!r}")


class EpsilonScalingScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver++ that multiplies the network's ε before each step.

    A deterministic sampler of few steps leaves the states that the network was trained on, and ε's size is off there;
    one factor takes much of it back (epsilon scaling, Ning et al., arXiv 2308.15321).

    Args:
        eps_scale: the factor, at least 1e-6.
        options: those of `DPMSolverMultistepScheduler`; prediction_type must be "epsilon".

    Raises:
        ValueError: one of them is something else.
    """

    def __init__(self, eps_scale: float = 1.0, **options: Any):
        check_eps_scale(eps_scale)
        super().__init__(**options)
        self.register_to_config(eps_scale=eps_scale)
        if self.config.prediction_type != "epsilon":
            raise ValueError(f"eps_scale is a factor on ε, and the network answers {self.config.prediction_type}")

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        # What diffusers' from_config takes over: it reads the names off the signature, where `options` hides them.
        keys = DPMSolverMultistepScheduler._get_init_keys(input_class)
        return keys | DPM_FIELDS if issubclass(input_class, EpsilonScalingScheduler) else keys

    def step(self, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        """diffusers' own step, from ε times the factor."""
        return super().step(self.config.eps_scale * model_output, *args, **kwargs)


def make_noise_schedule() -> DDPMScheduler:
    """The forward process of DDPM (arXiv 2006.11239, section 4): 1000 steps, β linear from 1e-4 to 0.02."""
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")


def make_sampling_scheduler(eps_scale: float = 1.0) -> EpsilonScalingScheduler:
    """DPM-Solver++ over that forward process, steps from the last timestep down ("trailing"), x0 clipped to [-1, 1]."""
    options = {"dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0, "timestep_spacing": "trailing"}
    return EpsilonScalingScheduler(eps_scale, beta_schedule="linear", thresholding=True, **options)
