"""Distillation without data: objectives, parameter groups, loop."""

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
    """How the student learns."""

    objective: str = "rollout"
    """"rollout": K student steps against the teacher's trajectory. "per-step": the paper's loss on ε (eq. 7), over
    mixed timesteps; "per-step-in-order": one timestep per update, in the order of the denoising, as published.
    "denoising": DDPM's own loss on images instead (needs the data), at the sampler's timesteps, to compare with."""
    learn: str = "adapters"
    """"adapters": B·A beside the frozen weights (QALoRA). "weights": all weights, biases and normalisations."""
    num_updates: int = 300
    """Optimiser updates, at least 0, which leaves the calibrated student as it is."""
    batch_size: int = 40
    """Trajectories ("rollout") or states ("per-step") per update and process, at least 1: p processes learn as one with
    p times as many."""
    rollout_steps: int = 2
    """K, the student's steps per rollout, from 1 to the sampler's number of steps."""
    lr_adapters: float = 3e-2
    """Learning rate of A and B as a factor of the mean weight step size, at least 0: see scale_aware."""
    scale_aware: bool = True
    """Take that mean over each layer, for a learning rate of its own (eq. 8), or over the mean of all layers."""
    lr_weights: float = 0.02
    """Learning rate of the weights as a factor of the same mean, at least 0, if they are what is learned."""
    lr_affine: float = 7e-3
    """Learning rate of what stays in float beside the adapters, at least 0: of biases as a factor of the mean step size
    of their layer's input, of normalisations as a factor of the mean over all layers. Finer codes ask for less."""
    lr_weight_scales: float = 1e-3
    """Learning rate of the weight step sizes as a factor of the layer's mean one, at least 0."""
    lr_act_scales: float = 5e-3
    """Learning rate of the activation step sizes as a factor of the layer's mean one, at least 0."""
    lr_zero_points: float = 1e-2
    """Learning rate of the zero points, in codes, at least 0."""
    warmup_updates: int = 20
    """Updates over which the learning rates rise, at least 0; they fall to zero along a cosine from there."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, above 0."""
    log_every: int = 10
    """Updates between two lines of log.jsonl, at least 1. A saved state has a line as well."""
    save_every: int = 50
    """Updates between two saved states, at least 1."""

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
    """The trajectories and the steps, each long (batch_size,), that the update of that number looks at.

    Here and below the config's batch_size is that of all processes together.
    """
    count, num_steps = buffer.outputs.shape[:2]
    in_order = config.objective == "per-step-in-order"  # one pass of T updates follows the same trajectories
    generator = update_generator(seed, update // num_steps if in_order else update)
    who = torch.randint(count, (config.batch_size,), generator=generator)
    if in_order:
        step = torch.full_like(who, update % num_steps)
    elif config.objective == "per-step":
        step = torch.randint(num_steps, (config.batch_size,), generator=generator)
    else:
        # Windows that overlap an end are pushed inside: with starts drawn from the inside alone, the first and the
        # last step of the sampler would be seen K times less than those in the middle, and the last makes the image.
        step = torch.randint(1 - config.rollout_steps, num_steps, (config.batch_size,), generator=generator)
        step = step.clamp(0, num_steps - config.rollout_steps)
    return who.to(buffer.x.device), step.to(buffer.x.device)


def per_step_loss(student: QuantizedUNet, solver: Solver, buffer: Trajectories, who: Tensor, step: Tensor) -> Tensor:
    """‖ε_θ(x_t, t) − ε̂(x_t, t)‖² (EfficientDM, eq. 7), averaged over the batch; v or x0 where that is the answer."""
    output = solver.model_output(student, step, buffer.x[who, step], buffer.conditions_of(who))
    return (output - buffer.outputs[who, step]).square().mean()


def rollout_loss(
    student: QuantizedUNet, solver: Solver, buffer: Trajectories, who: Tensor, step: Tensor, rollout_steps: int
) -> Tensor:
    """Σ_k ‖x̂_k − x_k‖² / K along K student steps from a state of the teacher's trajectory.

    Each sample of the batch starts at a step of its own. A solver with memory (DPM-Solver++) starts from the
    teacher's x0 of the step before, and hands on the student's own after that.
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
    """‖ε − ε̂(√ᾱ_t·x₀ + √(1−ᾱ_t)·ε, t)‖² (DDPM, arXiv 2006.11239, eq. 14) at the sampler's timesteps.

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
    """The loss of the update of that number, for the objectives that need no data, over this process's part of it."""
    who, step = map(processes.own_part, draw_batch(config, buffer, seed, update))
    if config.objective == "rollout":
        return rollout_loss(student, solver, buffer, who, step, config.rollout_steps)
    return per_step_loss(student, solver, buffer, who, step)


def parameter_groups(student: QuantizedUNet, config: DistillConfig) -> list[dict[str, Any]]:
    """What is learned, each with its learning rate; nothing else is. Sets `requires_grad` accordingly.

    Under Adam a factor on the gradient changes nothing, so the update of B·A is kept in proportion to the layer's
    mean weight step size s̄ (scale-aware, EfficientDM, eq. 8) by its learning rate, one per layer.

    Raises:
        ValueError: the student is frozen.
    """
    if any(layer.codes is not None for _, layer in student.layers()):
        raise ValueError("a frozen student learns no more: take the student that was frozen")
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
    """What the learning rates are multiplied with: linear warm-up, then a cosine to zero."""
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
    """Train `student` in place on the teacher's `buffer`, or go on from the state in `run`.

    Args:
        images: uint8 (M, H, W) or (M, H, W, C), for the objective "denoising" alone.
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
    """Minimise `loss_of` over the parameters of `groups`, or go on from the state in `run`.

    What an update draws must be a function of its number, so that a resumed run equals an uninterrupted one. Several
    processes begin with the same student; `loss_of` is over a process's own part of the batch.
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
            if done % config.log_every == 0 or saves:  # a run that goes on knows no losses before its state
                mean = processes.average(torch.stack(losses).mean()).item()
                losses.clear()
                run.log(update=done, loss=mean, learning_rate_factor=factor, seconds=seconds)
                run.tracker.log({"update": done, **mean_step_sizes(student)})
                advance(done, f"loss {mean:.5f}")
            if saves:
                save(done, seconds)


def mean_step_sizes(student: QuantizedUNet) -> dict[str, float]:
    """The mean step size of each layer's weight, over channels, and of its input, over denoising steps."""
    means = {}
    for name, layer in student.layers():
        means[f"weight_step_size/{name}"] = layer.weight_quantizer.scale.mean().item()
        means[f"act_step_size/{name}"] = layer.act_quantizer.scale.mean().item()
    return means


@torch.no_grad()
def keep_step_sizes_positive(groups: list[dict[str, Any]]) -> None:
    """Stop a step size that heads for zero at its group's floor: beyond it codes change their sign."""
    for group in groups:
        if group["floor"] is not None:
            for parameter in group["params"]:
                parameter.clamp_(min=group["floor"])
