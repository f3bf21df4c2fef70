"""Distil a student without data: objectives, parameter groups, training loop."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_mnist.lab import processes
from ddpm_mnist.lab.run_state import RunState, restore_optimizer, update_generator
from ddpm_mnist.lab.terminal import progress
from ddpm_mnist.sampling.sampler import to_float
from ddpm_mnist.sampling.solver import Solver
from finetune.trajectories import Trajectories
from quant import QuantizedUNet
from quant.context import plain_torch

OBJECTIVES = ("rollout", "per-step", "per-step-in-order", "denoising")


@dataclass
class DistillConfig:
    """How the student is distilled."""

    objective: str = "rollout"
    """"rollout": K student steps, compared with the teacher's trajectory. "per-step": the paper's loss on ε (eq. 7) at
    random timesteps; "per-step-in-order": at one timestep per update, in denoising order, as in the paper's code.
    "denoising": DDPM's loss on training images at the sampler's timesteps, for comparison."""
    learn: str = "adapters"
    """"adapters": the low-rank product B·A added to the frozen weights (QALoRA). "weights": all weights, biases and
    normalisations."""
    num_updates: int = 300
    """Optimizer updates, at least 0. 0: the calibrated student is not trained."""
    batch_size: int = 40
    """Trajectories ("rollout") or states (other objectives) per update and process, at least 1. p processes train with
    p times this batch size."""
    rollout_steps: int = 2
    """K, the student's steps per rollout, from 1 to the sampler's number of steps."""
    lr_adapters: float = 3e-2
    """Learning rate of A and B, as a multiple of the mean weight step size (see scale_aware), at least 0."""
    scale_aware: bool = True
    """Whether that mean is taken per layer, so that each layer has its own learning rate (eq. 8), or over all
    layers."""
    lr_weights: float = 0.02
    """Learning rate of the weights, biases and normalisations, as a multiple of the same mean, at least 0. Used if
    learn is "weights"."""
    lr_affine: float = 7e-3
    """Learning rate of biases and normalisations beside the adapters, at least 0: for biases a multiple of the mean
    step size of their layer's input, for normalisations of the mean over all layers. Smaller step sizes need a smaller
    value."""
    lr_weight_scales: float = 1e-3
    """Learning rate of the weight step sizes, as a multiple of their mean in the layer, at least 0."""
    lr_act_scales: float = 5e-3
    """Learning rate of the activation step sizes, as a multiple of their mean in the layer, at least 0."""
    lr_zero_points: float = 1e-2
    """Learning rate of the zero points, in codes, at least 0."""
    warmup_updates: int = 20
    """Updates of linear warm-up of the learning rates, at least 0. A cosine decay to zero spans the whole run."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm, above 0."""
    log_every: int = 10
    """Updates between lines of log.jsonl, at least 1. Every saved state has a line as well."""
    save_every: int = 50
    """Updates between saved states, at least 1."""

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {self.objective}")
        if self.learn not in ("adapters", "weights"):
            raise ValueError(f"learn must be adapters or weights, not {self.learn}")
        if self.num_updates < 0:
            raise ValueError(f"num_updates must not be negative, not {self.num_updates}")
        for name in ("batch_size", "rollout_steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        rates = [name for name in vars(self) if name.startswith("lr_")]
        for name in (*rates, "warmup_updates"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        idle = ("lr_weights",) if self.learn == "adapters" else ("lr_adapters", "lr_affine")
        if all(getattr(self, name) == 0 for name in rates if name not in idle):
            raise ValueError(f"{', '.join(name for name in rates if name not in idle)} must not all be 0")
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm must be positive, not {self.max_grad_norm}")


def draw_batch(config: DistillConfig, buffer: Trajectories, seed: int, update: int) -> tuple[Tensor, Tensor]:
    """Draw the trajectories and steps of one update, each long (batch_size,).

    Here and below, the config's batch_size is the sum over all processes.
    """
    count, num_steps = buffer.outputs.shape[:2]
    in_order = config.objective == "per-step-in-order"  # T consecutive updates follow the same trajectories
    generator = update_generator(seed, update // num_steps if in_order else update)
    who = torch.randint(count, (config.batch_size,), generator=generator)
    if in_order:
        step = torch.full_like(who, update % num_steps)
    elif config.objective == "per-step":
        step = torch.randint(num_steps, (config.batch_size,), generator=generator)
    else:
        # Windows of K steps that overlap an end of the trajectory are shifted inside. If starts were drawn only where
        # the window fits, the first and last step would be trained K times less often than those in the middle, and
        # the last step produces the image.
        step = torch.randint(1 - config.rollout_steps, num_steps, (config.batch_size,), generator=generator)
        step = step.clamp(0, num_steps - config.rollout_steps)
    return who.to(buffer.x.device), step.to(buffer.x.device)


def per_step_loss(student: QuantizedUNet, solver: Solver, buffer: Trajectories, who: Tensor, step: Tensor) -> Tensor:
    """Return the mean of (ε_θ(x_t, t) − ε̂(x_t, t))² (EfficientDM, eq. 7); of v or x0 for these prediction types."""
    output = solver.model_output(student, step, buffer.x[who, step], buffer.conditions_of(who))
    return (output - buffer.outputs[who, step]).square().mean()


def rollout_loss(
    student: QuantizedUNet, solver: Solver, buffer: Trajectories, who: Tensor, step: Tensor, rollout_steps: int
) -> Tensor:
    """Return Σ_k ‖x̂_k − x_k‖² / K over K student steps x̂_k from a state of the teacher's trajectory x_k.

    Each sample of the batch starts at its own step. A multistep solver (DPM-Solver++) uses the teacher's x0 of the
    previous step in the first step, and the student's after that.
    """
    before = (step - 1).clamp(min=0)
    x, conditions = buffer.x[who, step], buffer.conditions_of(who)
    x0_prev = solver.predict_x0(before, buffer.x[who, before], buffer.outputs[who, before])
    losses = []
    with student.shared_weights():
        for _ in range(rollout_steps):
            x0 = solver.predict_x0(step, x, solver.model_output(student, step, x, conditions))
            x, x0_prev, step = solver.advance(step, x, x0, x0_prev), x0, step + 1
            losses.append((x - buffer.x[who, step]).square().mean((1, 2, 3)).mean())
    return torch.stack(losses).mean()


def denoising_loss(
    student: QuantizedUNet, solver: Solver, images: Tensor, config: DistillConfig, seed: int, update: int
) -> Tensor:
    """Return ‖ε − ε̂(√ᾱ_t·x₀ + √(1−ᾱ_t)·ε, t)‖² (DDPM, arXiv 2006.11239, eq. 14) at the sampler's timesteps.

    Args:
        images: uint8 (M, H, W) or (M, H, W, C), without classes.
    """
    generator = update_generator(seed, update)
    who = torch.randint(len(images), (config.batch_size,), generator=generator)
    step = torch.randint(len(solver.timesteps), (config.batch_size,), generator=generator)
    x0 = to_float(images[who])
    eps = torch.randn(x0.shape, generator=generator)
    step, x0, eps = map(processes.own_part, (step, x0, eps))
    x, target = solver.add_noise(step, x0, eps), solver.target(step, x0, eps)
    device = next(student.parameters()).device
    output = solver.model_output(student, step.to(device), x.to(device), {})
    return (output - target.to(device)).square().mean()


def distillation_loss(
    student: QuantizedUNet, solver: Solver, buffer: Trajectories, config: DistillConfig, seed: int, update: int
) -> Tensor:
    """Return the loss of one update for an objective without data, over this process's part of the batch."""
    who, step = map(processes.own_part, draw_batch(config, buffer, seed, update))
    if config.objective == "rollout":
        return rollout_loss(student, solver, buffer, who, step, config.rollout_steps)
    return per_step_loss(student, solver, buffer, who, step)


def parameter_groups(student: QuantizedUNet, config: DistillConfig) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups with their learning rates, and set `requires_grad` accordingly.

    Adam is invariant to the scale of the gradient. So the learning rate, one per layer, keeps the update of B·A
    proportional to the layer's mean weight step size s̄ (scale-aware, EfficientDM, eq. 8).

    Raises:
        ValueError: the student is frozen.
    """
    if any(layer.codes is not None for _, layer in student.layers()):
        raise ValueError("a frozen student cannot be trained: train it before quant.freeze")
    student.requires_grad_(False)
    groups: list[dict[str, Any]] = []

    def learn(name: str, parameters: list[nn.Parameter], lr: float, floor: float | None = None) -> None:
        if lr > 0:
            learned = [parameter.requires_grad_() for parameter in parameters]
            groups.append({"name": name, "params": learned, "peak_lr": lr, "floor": floor})

    layers = [layer for _, layer in student.layers()]
    common_scale = sum(layer.weight_quantizer.scale.mean().item() for layer in layers) / len(layers)
    common_act_scale = sum(layer.act_quantizer.scale.mean().item() for layer in layers) / len(layers)
    for name, layer in student.layers():
        weights, activations = layer.weight_quantizer, layer.act_quantizer
        weight_scale, act_scale = weights.scale.mean().item(), activations.scale.mean().item()
        unit = weight_scale if config.scale_aware else common_scale
        if config.learn == "adapters":
            learn(f"{name}.lora", [layer.lora_a, layer.lora_b], config.lr_adapters * unit)
            learn(f"{name}.bias", [layer.bias], config.lr_affine * act_scale)
        else:
            learn(f"{name}.weight", [layer.weight, layer.bias], config.lr_weights * unit)
        learn(f"{name}.weight_scale", [weights.scale], config.lr_weight_scales * weight_scale, weight_scale / 100)
        learn(f"{name}.act_scale", [activations.scale], config.lr_act_scales * act_scale, act_scale / 100)
        learn(f"{name}.act_zero_point", [activations.zero_point], config.lr_zero_points)
    norms = [module for module in student.modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm)]
    lr_norms = config.lr_affine * common_act_scale if config.learn == "adapters" else config.lr_weights * common_scale
    learn("norms", [parameter for norm in norms for parameter in norm.parameters()], lr_norms)
    return groups


def cosine_decay(config: DistillConfig, update: int) -> float:
    """Return the factor on the learning rates: linear warm-up times cosine decay to zero."""
    warmup = min((update + 1) / max(config.warmup_updates, 1), 1.0)
    return warmup * 0.5 * (1 + math.cos(math.pi * update / config.num_updates))


def distill(
    student: QuantizedUNet,
    solver: Solver,
    buffer: Trajectories,
    config: DistillConfig,
    run: RunState,
    seed: int,
    images: Tensor | None = None,
) -> None:
    """Train `student` in place on the teacher's trajectories `buffer`, or resume from the state in `run`.

    Args:
        images: uint8 (M, H, W) or (M, H, W, C), for the objective "denoising" only.
    """

    def loss(update: int) -> Tensor:
        if images is not None:
            return denoising_loss(student, solver, images, config, seed, update)
        return distillation_loss(student, solver, buffer, config, seed, update)

    fit(student, parameter_groups(student, config), loss, config, run)


@plain_torch()
@torch.enable_grad()
def fit(
    student: QuantizedUNet,
    groups: list[dict[str, Any]],
    loss_of: Callable[[int], Tensor],
    config: DistillConfig,
    run: RunState,
    decay: Callable[[DistillConfig, int], float] = cosine_decay,
) -> None:
    """Minimise `loss_of` over the parameters of `groups`, or resume from the state in `run`.

    With several processes all must start with the same student.

    Args:
        loss_of: maps the number of an update to the loss of this process's part of its batch. Its random numbers must
            depend on that number only, so that a resumed run equals an uninterrupted one.
        decay: returns the factor on the learning rates for an update.
    """
    optimizer = torch.optim.Adam(groups, lr=0.0, fused=True)
    learned = [parameter for group in groups for parameter in group["params"]]
    first, seconds_before = run.progress(config.num_updates)
    if (state := run.state) is not None:
        with run.restoring():
            student.load_state_dict(state["student"])
            restore_optimizer(optimizer, state["optimizer"], {"step", "exp_avg", "exp_avg_sq"})
        print(f"Going on from update {first} of {config.num_updates}.")
    start, losses = time.monotonic(), []

    def save(update: int, seconds: float) -> None:
        saved = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
        run.save({**saved, "update": update, "seconds": seconds})

    if config.num_updates == 0:
        save(0, 0.0)
    with progress("distilling", config.num_updates, first) as advance:
        for update in range(first, config.num_updates):
            loss = loss_of(update)
            optimizer.zero_grad()
            loss.backward()
            processes.average_gradients(learned)
            nn.utils.clip_grad_norm_(learned, config.max_grad_norm)
            factor = decay(config, update)
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak_lr"]
            optimizer.step()
            keep_step_sizes_positive(groups)
            losses.append(loss.detach())

            done = update + 1
            seconds = seconds_before + time.monotonic() - start
            saves = done % config.save_every == 0 or done == config.num_updates
            if done % config.log_every == 0 or saves:  # at each save too: a resumed run lacks the earlier losses
                mean = processes.average(torch.stack(losses).mean()).item()
                losses.clear()
                run.log(update=done, loss=mean, learning_rate_factor=factor, seconds=seconds)
                run.tracker.log({"update": done, **mean_step_sizes(student)})
                advance(done, f"loss {mean:.5f}")
            if saves:
                save(done, seconds)


def mean_step_sizes(student: QuantizedUNet) -> dict[str, float]:
    """Return the mean step size of each layer's weight, over channels, and of its input, over denoising steps."""
    means = {}
    for name, layer in student.layers():
        means[f"weight_step_size/{name}"] = layer.weight_quantizer.scale.mean().item()
        means[f"act_step_size/{name}"] = layer.act_quantizer.scale.mean().item()
    return means


@torch.no_grad()
def keep_step_sizes_positive(groups: list[dict[str, Any]]) -> None:
    """Clamp step sizes to the floor of their group: a negative step size would flip the sign of the codes."""
    for group in groups:
        if group["floor"] is not None:
            for parameter in group["params"]:
                parameter.clamp_(min=group["floor"])
