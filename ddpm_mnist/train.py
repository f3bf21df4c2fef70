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


def draw_examples(images: Tensor, batch_size: int, seed: int, update: int) -> tuple[Tensor, ...]:
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


class _Training:
    """The network, its optimizers and its moving average, and one update of them.

    Attributes:
        unet: the network.
        kept: the sets of averaged weights whose mean becomes the teacher.
    """

    def __init__(self, config: TeacherConfig, images: Tensor):
        self.config, self.images = config, images
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        self.device = self.accelerator.device
        torch.manual_seed(config.seed)
        channels = images.shape[3] if images.dim() == 4 else 1
        self.unet = make_unet(config.unet, channels, (images.shape[1], images.shape[2])).to(self.device)
        processes.copy_from_main(self.unet)
        self.optimizers = make_optimizers(self.unet)
        self.ema = EMAModel(self.unet.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=3 / 4)
        self.ema.to(self.device)
        self.kept: list[list[Tensor]] = []
        self.schedule = make_noise_schedule()
        self.weight = loss_weight(self.schedule.alphas_cumprod, config.snr_gamma).to(self.device)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to continue after this update."""
        return {
            "unet": self.unet.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema.state_dict(),
            "kept": self.kept,
        }

    def restore(self, state: dict[str, Any], num_kept: int) -> None:
        """Load a `state()` with `num_kept` sets of weights.

        Raises:
            ValueError, RuntimeError, KeyError: the state is of another network.
        """
        self.unet.load_state_dict(state["unet"])
        moments = ({"mean"}, {"step", "exp_avg", "exp_avg_sq"})
        for optimizer, saved, names in zip(self.optimizers, state["optimizers"], moments, strict=True):
            restore_optimizer(optimizer, saved, names)
        shapes = [parameter.shape for parameter in self.unet.parameters()]
        averages = {name: state["ema"][name] for name in ("shadow_params", "optimization_step")}
        for weights in (averages["shadow_params"], *state["kept"]):
            if [weight.shape for weight in weights] != shapes:
                raise ValueError("the averaged weights are of another network")
        if len(state["kept"]) != num_kept:
            raise ValueError(f"{len(state['kept'])} sets of averaged weights are saved, not {num_kept}")
        self.ema.load_state_dict({**self.ema.state_dict(), **averages})
        self.ema.to(self.device)
        self.kept = [[weight.to(self.device) for weight in weights] for weights in state["kept"]]

    def update(self, number: int) -> Tensor:
        """Do the update `number`, from 0, and return its loss."""
        batch = draw_examples(self.images, self.config.batch_size, self.config.seed, number)
        x0, eps, t = (processes.own_part(tensor).to(self.device) for tensor in batch)
        with self.accelerator.autocast():
            prediction = self.unet(self.schedule.add_noise(x0, eps, t), t).sample
        loss = (self.weight[t] * (prediction.float() - eps).square().mean((1, 2, 3))).mean()
        self.unet.zero_grad()
        loss.backward()
        processes.average_gradients(self.unet.parameters())
        nn.utils.clip_grad_norm_(self.unet.parameters(), self.config.max_grad_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config, number)
            optimizer.step()
        self.ema.step(self.unet.parameters())
        return loss.detach()

    def keep_average(self) -> None:
        """Add the averaged weights to `kept`."""
        self.kept.append([mean.clone() for mean in self.ema.shadow_params])

    def samples(self) -> bytes:
        """Return a PNG of 64 images from the averaged weights."""
        self.ema.store(self.unet.parameters())
        self.ema.copy_to(self.unet.parameters())
        solver = Solver(SamplerConfig(eps_scale=self.config.eps_scale))
        pictures = sample(self.unet, solver, num_images=64, device=self.device)
        self.ema.restore(self.unet.parameters())
        png = io.BytesIO()
        save_image((to_float(pictures) + 1) / 2, png, format="png")
        return png.getvalue()

    @torch.no_grad()
    def teacher(self) -> nn.Module:
        """Return the network with the mean of the `kept` weights."""
        for parameter, weights in zip(self.unet.parameters(), zip(*self.kept, strict=True), strict=True):
            parameter.copy_(torch.stack(weights).mean(0))
        return self.unet


def _load(config: TeacherConfig) -> tuple[Tensor, str]:
    """Return the training images, uint8, and the SHA-256 of their pixels."""
    images = processes.from_main(lambda: load_images(config.data, "train", config.image_size))
    if len(images) < config.batch_size:
        raise InputError(
            f"{config.data} has {len(images)} images, fewer than a batch of {config.batch_size}: "
            "give more, or a smaller batch_size"
        )
    return images, hashlib.sha256(images.numpy().tobytes()).hexdigest()


def _fingerprint(config: TeacherConfig) -> dict[str, Any]:
    """Return the settings that a resumed run must share with the interrupted one."""
    free = ("output", "eps_scale", "log_every", "save_every", "grid_every", "tracker")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    return {**settings, "optimizer": "muon"}


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
    images, digest = _load(config)
    training = _Training(config, images)
    run = RunState(config.output, _fingerprint(config), config.tracker)
    num_updates = config.total_updates + config.restart_updates
    average_at = config.average_at or (num_updates,)
    first, seconds_before = run.progress(num_updates)
    if run.state is not None:
        with run.restoring():
            if run.state["images"] != digest:
                raise InputError(
                    f"{config.output} was begun with other images than {config.data} holds now: "
                    "choose another output folder, or delete this one"
                )
            training.restore(run.state, num_kept=sum(at <= first for at in average_at))
    save_config(config, config.output / "config.yaml")

    start, losses = time.monotonic(), []
    with progress("teacher", num_updates, first) as advance:
        for done in range(first + 1, num_updates + 1):
            losses.append(training.update(done - 1))
            last = done == num_updates
            saves = done % config.save_every == 0 or last
            seconds = seconds_before + time.monotonic() - start
            if done in average_at:
                training.keep_average()
            if done % config.log_every == 0 or saves:  # at each save too: a resumed run lacks the earlier losses
                mean = processes.average(torch.stack(losses).mean()).item()
                losses.clear()
                run.log(update=done, loss=mean, learning_rate=learning_rate(config, done - 1), seconds=seconds)
                advance(done, f"loss {mean:.4f}")
            if done % config.grid_every == 0 or last:
                png = training.samples()
                write_bytes(config.output / "samples" / f"{done:06d}.png", png)
                run.tracker.picture("samples", png, done)
            if saves:
                run.save({**training.state(), "images": digest, "update": done, "seconds": seconds})
    teacher = training.teacher()
    if processes.is_main():
        require_folder(config.output / "unet")
        save_teacher(teacher, config.output, config.eps_scale)
    run.finish()
    return config.output
