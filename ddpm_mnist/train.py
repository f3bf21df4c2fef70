"""Train the teacher: DDPM with ε-prediction on MNIST or other images. A resumed run is bitwise identical."""

import dataclasses
import hashlib
import io
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torchvision.utils import save_image

from ddpm_mnist.data import load_images
from ddpm_mnist.lab import InputError, processes
from ddpm_mnist.lab.config_file import save_config
from ddpm_mnist.lab.locks import require_folder
from ddpm_mnist.lab.run_state import RunState, restore_optimizer, update_generator
from ddpm_mnist.lab.terminal import progress
from ddpm_mnist.lab.tracking import check_tracker
from ddpm_mnist.lab.write import write_bytes
from ddpm_mnist.muon import Muon
from ddpm_mnist.sampling.sampler import sample, to_float
from ddpm_mnist.sampling.solver import SamplerConfig, Solver
from ddpm_mnist.scheduler import check_eps_scale, make_noise_schedule
from ddpm_mnist.unet import UNetConfig, make_unet, save_teacher
from quant.context import plain_torch


@dataclass
class TeacherConfig:
    output: Path = Path("runs/teacher")
    """Run folder. An interrupted run resumes from its last saved state."""
    data: str = "mnist"
    """Training images: "mnist", "fashion-mnist", "kmnist" or "emnist-letters"; a folder of images; or a .npy file,
    uint8 (N, H, W) or (N, H, W, 3). They determine the network's channels and image size."""
    image_size: int | tuple[int, int] | None = None
    """Height and width in pixels to which images are cropped and resized; one number for both. None: images keep
    their size."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    eps_scale: float = 1.0
    """Factor on ε in sampling, at least 1e-6, saved in the scheduler (ddpm_mnist/scheduler.py). It does not affect
    training."""
    total_updates: int = 20_000
    """Optimizer updates until the learning rate is zero, at least 1."""
    batch_size: int = 64
    """Images per update and process, at least 1. p processes train with p times this batch size, which config.yaml
    records."""
    learning_rate: float = 2e-3
    """Learning rate between warm-up and decay, above 0: of Muon for the inner weights, of Adam for all others."""
    warmup_updates: int = 500
    """Updates over which the learning rate rises linearly from zero, at least 0."""
    decay_fraction: float = 0.4
    """Fraction of total_updates, 0 to 1, at their end, in which the learning rate falls linearly to zero."""
    restart_updates: int = 0
    """Further updates after total_updates, at least 0, in which the learning rate falls linearly from half of
    learning_rate to zero (a warm restart, arXiv 1608.03983)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm, above 0."""
    snr_gamma: float | None = 5.0
    """γ, above 0, of the Min-SNR loss weight min(SNR, γ) / SNR (arXiv 2303.09556, eq. 8 for ε). None: the unweighted
    loss of DDPM."""
    ema_decay: float = 0.999
    """Decay, 0 to 1, of the exponential moving average (EMA) of the weights. The EMA weights are used for sampling."""
    average_at: tuple[int, ...] = ()
    """Updates, in increasing order, after which the EMA weights are kept; the saved model is the mean of all kept
    weights (arXiv 1803.05407). Empty: the EMA weights of the last update."""
    mixed_precision: str = "no"
    """accelerate's mixed precision: "no", or "bf16" for autocast to bfloat16."""
    seed: int = 0
    """Seed of the initial weights and, with the number of the update, of its random numbers: 0 to 2^32 - 1."""
    log_every: int = 50
    """Updates between lines of log.jsonl, at least 1. Every saved state has a line as well."""
    save_every: int = 500
    """Updates between saved states, at least 1."""
    grid_every: int = 2_500
    """Updates between grids of samples, `samples/<update>.png`, at least 1."""
    tracker: str = "none"
    """Experiment tracker for losses, learning rates and grids: "none", "tensorboard", "wandb" or "trackio"."""

    def __post_init__(self) -> None:
        check_eps_scale(self.eps_scale)
        positive = ("total_updates", "batch_size", "learning_rate", "max_grad_norm", "snr_gamma")
        for name in (*positive, "log_every", "save_every", "grid_every"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("decay_fraction", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        if any(side is not None and side < 1 for side in sides):
            raise ValueError(f"image_size must be positive, not {self.image_size}")
        for name in ("warmup_updates", "restart_updates"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        updates = (0, *self.average_at, self.total_updates + self.restart_updates + 1)
        if any(left >= right for left, right in itertools.pairwise(updates)):
            raise ValueError(
                f"average_at must name updates of 1…{updates[-1] - 1} in their order, not {list(self.average_at)}"
            )
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed must lie in 0…2^32 - 1, not {self.seed}")
        check_tracker(self.tracker)
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f'mixed_precision must be "no" or "bf16", not "{self.mixed_precision}"')


def learning_rate(config: TeacherConfig, update: int) -> float:
    """Return the learning rate: warm-up, plateau and linear decay (arXiv 2405.18392), then the warm restart."""
    if update >= config.total_updates:
        left = config.total_updates + config.restart_updates - update
        return config.learning_rate / 2 * left / config.restart_updates
    rise = (update + 1) / max(config.warmup_updates, 1)
    fall = (config.total_updates - update) / max(config.decay_fraction * config.total_updates, 1)
    return config.learning_rate * min(rise, fall, 1.0)


def draw_batch(images: Tensor, batch_size: int, seed: int, update: int) -> tuple[Tensor, ...]:
    """Draw the images, noises and timesteps of one update; they depend on the arguments only.

    Args:
        images: uint8 (M, H, W) or (M, H, W, C).
        batch_size: N, the sum over all processes.

    Returns:
        x0 float (N, C, H, W) in [-1, 1]; eps the same shape; t long (N,), spread over 0…999.
    """
    generator = update_generator(seed, update)
    index = torch.randint(len(images), (batch_size,), generator=generator)
    x0 = to_float(images[index])
    eps = torch.randn(x0.shape, generator=generator)
    # Stratified: one timestep from each of N equal intervals, which reduces the variance of the loss (arXiv 2107.00630,
    # appendix I.1).
    place = torch.randperm(batch_size, generator=generator) + torch.rand(batch_size, generator=generator)
    return x0, eps, (place * (1000 / batch_size)).long().clamp(max=999)


def make_optimizers(unet: nn.Module) -> tuple[Muon, torch.optim.Adam]:
    """Return Muon for the inner weights, and Adam for the first and last convolution, biases and normalisations."""
    inner: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in unet.named_parameters():
        edge = name.startswith(("conv_in", "conv_out"))
        (rest if edge or parameter.dim() < 2 else inner).append(parameter)
    return Muon(inner, lr=0.0), torch.optim.Adam(rest, lr=0.0, betas=(0.9, 0.99), fused=True)


def loss_weight(alphas_cumprod: Tensor, snr_gamma: float | None) -> Tensor:
    """Return the loss weight of each of the 1000 timesteps, (1000,), for the squared error of ε."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return torch.ones_like(snr) if snr_gamma is None else snr.clamp(max=snr_gamma) / snr


def restore_ema(ema: EMAModel, saved: dict[str, Any]) -> None:
    """Load the averages and the step count of `saved`, a `state_dict()`, into `ema`; raise ValueError if the shapes
    differ."""
    shapes = [[mean.shape for mean in means] for means in (ema.shadow_params, saved["shadow_params"])]
    if shapes[0] != shapes[1]:
        raise ValueError("the moving average is of other parameters")
    taken = {name: saved[name] for name in ("shadow_params", "optimization_step")}
    ema.load_state_dict({**ema.state_dict(), **taken})


def restore_kept(saved: list[list[Tensor]], like: list[nn.Parameter], count: int) -> list[list[Tensor]]:
    """Return the `count` saved sets of weights to average, on the devices of `like`; raise ValueError if their number
    or shapes differ."""
    if len(saved) != count or any([x.shape for x in weights] != [x.shape for x in like] for weights in saved):
        raise ValueError("what was kept to be averaged is of other parameters")
    return [[weight.to(at) for weight, at in zip(weights, like, strict=True)] for weights in saved]


@plain_torch()
@torch.enable_grad()
def train_teacher(config: TeacherConfig) -> Path:
    """Train a teacher on images, or resume the run in its folder.

    With several processes each takes an equal part of every batch, and the gradients are averaged. This is simpler
    than DistributedDataParallel, which overlaps communication and computation, and costs little here (docs/scale.md).

    Writes config.yaml, log.jsonl, samples/*.png and state/, and at the end the folder of a diffusers `DDPMPipeline`:
    model_index.json, unet/ and scheduler/.

    Raises:
        InputError: the images cannot be loaded, are too few, or do not fit the network; or the folder belongs to
            another configuration or to other images.
    """
    config = dataclasses.replace(config, batch_size=config.batch_size * processes.count())
    fingerprint = dataclasses.asdict(config)
    for free in ("output", "eps_scale", "log_every", "save_every", "grid_every", "tracker"):
        del fingerprint[free]
    images = processes.from_main(lambda: load_images(config.data, "train", config.image_size))
    if len(images) < config.batch_size:
        raise InputError(
            f"{config.data} has {len(images)} images, fewer than a batch of {config.batch_size}: "
            "give more, or a smaller batch_size"
        )
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    device = accelerator.device
    torch.manual_seed(config.seed)
    channels = images.shape[3] if images.dim() == 4 else 1
    unet = make_unet(config.unet, channels, (images.shape[1], images.shape[2])).to(device)
    processes.copy_from_main(unet)
    optimizers = make_optimizers(unet)
    ema = EMAModel(unet.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=3 / 4)

    run = RunState(config.output, {**fingerprint, "optimizer": "muon"}, config.tracker)
    kept: list[list[Tensor]] = []  # the sets of EMA weights whose mean is saved at the end
    num_updates = config.total_updates + config.restart_updates
    average_at = config.average_at or (num_updates,)
    first, seconds_before = run.progress(num_updates)
    if (state := run.state) is not None:
        with run.restoring():
            if state["images"] != digest:
                raise InputError(
                    f"{config.output} was begun with other images than {config.data} holds now: "
                    "choose another output folder, or delete this one"
                )
            unet.load_state_dict(state["unet"])
            moments = ({"mean"}, {"step", "exp_avg", "exp_avg_sq"})
            for optimizer, saved, names in zip(optimizers, state["optimizers"], moments, strict=True):
                restore_optimizer(optimizer, saved, names)
            restore_ema(ema, state["ema"])
            kept = restore_kept(state["kept"], list(unet.parameters()), sum(at <= first for at in average_at))

    save_config(config, config.output / "config.yaml")
    ema.to(device)
    schedule = make_noise_schedule()
    weight = loss_weight(schedule.alphas_cumprod, config.snr_gamma).to(device)
    start = time.monotonic()
    losses: list[Tensor] = []
    with progress("teacher", num_updates, first) as advance:
        for update in range(first, num_updates):
            batch = draw_batch(images, config.batch_size, config.seed, update)
            x0, eps, t = (processes.own_part(tensor).to(device) for tensor in batch)
            with accelerator.autocast():
                prediction = unet(schedule.add_noise(x0, eps, t), t).sample
            loss = (weight[t] * (prediction.float() - eps).square().mean((1, 2, 3))).mean()
            unet.zero_grad()
            loss.backward()
            processes.average_gradients(unet.parameters())
            nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, update)
                optimizer.step()
            ema.step(unet.parameters())
            losses.append(loss.detach())

            done = update + 1
            seconds = seconds_before + time.monotonic() - start
            last = done == num_updates
            saves = done % config.save_every == 0 or last
            if done in average_at:
                kept.append([mean.clone() for mean in ema.shadow_params])
            if done % config.log_every == 0 or saves:  # at each save too: a resumed run lacks the earlier losses
                mean = processes.average(torch.stack(losses).mean()).item()
                losses.clear()
                run.log(update=done, loss=mean, learning_rate=learning_rate(config, update), seconds=seconds)
                advance(done, f"loss {mean:.4f}")
            if done % config.grid_every == 0 or last:
                ema.store(unet.parameters())
                ema.copy_to(unet.parameters())
                pictures = sample(unet, Solver(SamplerConfig(eps_scale=config.eps_scale)), num_images=64, device=device)
                png = io.BytesIO()
                save_image((to_float(pictures) + 1) / 2, png, format="png")
                write_bytes(config.output / "samples" / f"{done:06d}.png", png.getvalue())
                run.tracker.picture("samples", png.getvalue(), done)
                ema.restore(unet.parameters())
            if saves:
                run.save(
                    {
                        "unet": unet.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                        "ema": ema.state_dict(),
                        "kept": kept,
                        "images": digest,
                        "update": done,
                        "seconds": seconds,
                    }
                )
    with torch.no_grad():
        for parameter, weights in zip(unet.parameters(), zip(*kept, strict=True), strict=True):
            parameter.copy_(torch.stack(weights).mean(0))
    if processes.is_main():
        require_folder(config.output / "unet")
        save_teacher(unet, config.output, config.eps_scale)
    run.finish()
    return config.output
