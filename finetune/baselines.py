"""The baseline "published": EfficientDM as in its authors' training code (arXiv 2310.03270), for the same teacher.

Differences from `finetune.distill`:

- The trajectories have η = 1 and no factor on ε.
- All denoising steps of a layer start with the same range, searched over mixed timesteps.
- The adapters are added to weights that are already rounded to their codes; biases are not trained.
- Each update trains one timestep; T consecutive updates follow the same trajectories in order.
- The learning rates are those below, with linear decay, without warm-up and gradient clipping.

Differences from the authors' code: Adam without weight decay instead of AdamW, a mean loss instead of a sum (to which
Adam is invariant), and quantized shortcuts. Bits, rank, batch size and number of updates are those of the run, so that
baselines are compared at equal cost.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ddpm_mnist.lab.run_state import RunState
from ddpm_mnist.sampling.solver import Solver
from finetune.distill import DistillConfig, distillation_loss, fit, parameter_groups
from finetune.trajectories import Trajectories
from quant import QuantConfig, QuantizedUNet, calibrate, quantize

# Learning rates: for the adapters relative to the layer's mean weight step size, for the others absolute.
LR_ADAPTERS = 1 / 2500
LEARNING_RATES = {"weight_scale": 1e-6, "act_scale": 5e-4, "act_zero_point": 5e-4}


@torch.no_grad()
def published_start(
    unet: UNet2DModel,
    config: QuantConfig,
    timesteps: Sequence[int],
    states: Mapping[int, Tensor],
    **conditions: Tensor,
) -> QuantizedUNet:
    """Return a calibrated student with the same activation range at all denoising steps, and with rounded weights."""
    config = dataclasses.replace(config, bias_correction=False, reconstruction=False)
    common = quantize(unet, dataclasses.replace(config, per_step=False), timesteps)
    calibrate(common, states, **conditions)
    student = quantize(unet, config, timesteps)
    for (_, layer), (_, source) in zip(student.layers(), common.layers(), strict=True):
        layer.weight.copy_(layer.weight_quantizer(layer.weight))
        layer.act_quantizer.scale.copy_(source.act_quantizer.scale.expand_as(layer.act_quantizer.scale))
        layer.act_quantizer.zero_point.copy_(source.act_quantizer.zero_point.expand_as(layer.act_quantizer.zero_point))
    return student


def published_distill(
    student: QuantizedUNet,
    solver: Solver,
    buffer: Trajectories,
    config: DistillConfig,
    run: RunState,
    seed: int,
    lr_factor: float,
) -> None:
    """Train `student` in place.

    Args:
        lr_factor: factor on all learning rates, which the authors chose for 16,000 updates.
    """
    config = dataclasses.replace(
        config,
        objective="per-step-in-order",
        learn="adapters",
        scale_aware=True,
        lr_adapters=lr_factor * LR_ADAPTERS,
        lr_affine=0,
        lr_weight_scales=1,  # these three only enable the groups; the rates are set below
        lr_act_scales=1,
        lr_zero_points=1,
        max_grad_norm=math.inf,
    )
    groups = parameter_groups(student, config)
    for group in groups:
        kind = group["name"].rpartition(".")[2]
        if kind in LEARNING_RATES:
            group["peak_lr"] = lr_factor * LEARNING_RATES[kind]

    def loss(update: int) -> Tensor:
        return distillation_loss(student, solver, buffer, config, seed, update)

    fit(student, groups, loss, config, run, decay=lambda config, update: 1 - update / config.num_updates)
