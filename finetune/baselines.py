"""EfficientDM as its authors' training code has it (arXiv 2310.03270), on this teacher: what to compare with.

Its rules, where they differ from `finetune.distill`: trajectories with η = 1 and ε as it is; all denoising steps of a
layer start from one range, searched over mixed timesteps; the adapters sit on weights that are rounded to their codes
already, and biases stay as they are; one update sees one timestep, in order, along the same trajectories; learning
rates as below, with linear decay and neither warm-up nor clipping of gradients. Theirs is AdamW, here it is Adam
without the decay of weights. Its loss is summed instead of averaged, which means nothing to either. Bits, rank, batch
and number of updates are the run's own, so that baselines compare at equal cost; and shortcuts are quantized here.
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

# Learning rates: of the adapters as a factor of the layer's mean weight step size, the others as they are.
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
    """A calibrated student whose steps all start alike, on weights that are rounded already."""
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
    """Train `student` in place; all learning rates times `lr_factor`, for its authors' are those of 16,000 updates."""
    config = dataclasses.replace(
        config,
        objective="per-step-in-order",
        learn="adapters",
        scale_aware=True,
        lr_adapters=lr_factor * LR_ADAPTERS,
        lr_affine=0,
        lr_weight_scales=1,  # these three as below
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
