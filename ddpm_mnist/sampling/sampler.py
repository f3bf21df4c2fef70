"""Sample images from a denoiser: draw seeded noise, take the solver's steps, round to bytes."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ddpm_mnist.lab import InputError
from ddpm_mnist.lab.processes import share_out
from ddpm_mnist.sampling.noise import draw_noise, image_generators
from ddpm_mnist.sampling.solver import Conditions, Denoiser, SamplerConfig, Solver
from quant.context import plain_torch

# Seeds of images lie in 0…2^31 - 1, seeds of training trajectories in 2^31…2^32 - 1.
SEED_LIMIT = 1 << 31


# Largest class label that is embedded as a timestep: the integer runtime computes sines up to this argument.
LARGEST_TIME = 1 << 20


class Step(NamedTuple):
    """One denoising step of a batch: its number, the state before, the denoiser's output, the state after."""

    number: int
    x: Tensor
    output: Tensor
    x_next: Tensor


def image_shape(denoiser: Any) -> tuple[int, int, int]:
    """Return channels, height and width of a model's images, from its config (fields as in UNet2DModel).

    Raises:
        InputError: the config has no valid sample_size, or in_channels and out_channels differ.
    """
    config = denoiser.config
    size, channels = config.sample_size, config.in_channels
    if size is None:
        raise InputError("its config has no sample_size: the height and width of the images must stand there")
    if channels != config.out_channels:
        raise InputError(
            f"it answers {config.out_channels} channels to {channels}: a learned variance is not supported"
        )
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise InputError(f"its config has sample_size = {size!r}, which is neither a number of pixels nor two")
    return channels, *sides


def choose_conditions(denoiser: Any, config: SamplerConfig, seeds: range) -> dict[str, Tensor]:
    """Return {"class_labels": long (N,)}, the class of each image by its seed, or {} for an unconditional model.

    Raises:
        InputError: the config names classes that the model does not have.
    """
    options, null = denoiser.config, config.null_class
    kind, count = options.get("class_embed_type"), options.get("num_class_embeds")
    if kind not in (None, "timestep"):
        raise InputError(f'class_embed_type "{kind}" is not supported here, only num_class_embeds and "timestep"')
    if kind is None and count is None:
        if config.labels or null is not None:
            raise InputError("it has no classes: labels and null_class must be left out")
        return {}
    first, kinds = 0, "classes"
    if kind == "timestep":
        embedding, kinds = options.time_embedding_type, "times as classes (class_embed_type)"
        first = int(embedding == "fourier")  # it takes the logarithm
        count = (options.num_train_timesteps or 0) if embedding == "learned" else LARGEST_TIME + 1
    kinds = f"it has the {kinds} {first}…{count - 1}"
    named = config.labels if null is None else (*config.labels, null)
    if not all(first <= label < count for label in named):
        raise InputError(f"{kinds}: labels and null_class must lie there")
    classes = config.labels or [label for label in range(0 if kind else count) if label != null]
    if not classes:
        raise InputError(f"{kinds}: labels must name those to draw")
    return {"class_labels": torch.tensor([classes[seed % len(classes)] for seed in seeds])}


@torch.no_grad()
def denoise(
    denoiser: Denoiser,
    solver: Solver,
    seeds: range,
    device: str | torch.device = "cpu",
    conditions: Conditions | None = None,
) -> Iterator[Step]:
    """Denoise one batch from the noise of `seeds` and yield every step; the last `x_next` is the image.

    Args:
        conditions: further arguments of the denoiser, each (N, …). None: the result of `choose_conditions`.
    """
    generators, shape = image_generators(seeds), image_shape(denoiser)
    if conditions is None:
        conditions = choose_conditions(denoiser, solver.config, seeds)
    conditions = {name: value.to(device) for name, value in conditions.items()}
    x = draw_noise(generators, shape).to(device)
    x0_prev = torch.zeros_like(x)
    for number in range(len(solver.timesteps)):
        step = torch.full((len(x),), number, device=device)
        output = solver.model_output(denoiser, step, x, conditions)
        x0 = solver.predict_x0(step, x, output)
        z = draw_noise(generators, shape).to(device) if solver.is_stochastic else None
        x_next = solver.advance(step, x, x0, x0_prev, z)
        yield Step(number, x, output, x_next)
        x, x0_prev = x_next, x0


def batches(seed: int, count: int, batch_size: int) -> Iterator[range]:
    """Yield the seeds `seed` … `seed + count - 1` in ranges of at most `batch_size`."""
    for start in range(seed, seed + count, batch_size):
        yield range(start, min(start + batch_size, seed + count))


@plain_torch()
def sample(
    denoiser: Denoiser,
    solver: Solver,
    num_images: int,
    seed: int = 0,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Sample images: uint8 (num_images, H, W), or (num_images, H, W, C) for C > 1, on the CPU.

    Image i starts from the noise of seed + i. The batches are distributed over the processes; each gets all images.

    Args:
        progress: called after each batch with the number of finished images.

    Raises:
        InputError: the model's output is not finite.
    """

    def draw(seeds: range) -> Tensor:
        for step in denoise(denoiser, solver, seeds, device):
            x = step.x_next
        if not x.isfinite().all():
            raise InputError("the model's outputs are not finite")
        return to_uint8(x)

    parts = list(batches(seed, num_images, batch_size))
    return torch.cat(share_out(draw, parts, lambda done: progress(min(done * batch_size, num_images))))


def to_float(images: Tensor) -> Tensor:
    """Convert images uint8 (N, H, W) or (N, H, W, C) to float (N, C, H, W) in [-1, 1]."""
    images = images if images.dim() == 4 else images.unsqueeze(-1)
    return rearrange(images, "n h w c -> n c h w").float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Convert images float (N, C, H, W) in [-1, 1] to uint8 (N, H, W) for C = 1, else (N, H, W, C), on the CPU."""
    images = rearrange(((x.clamp(-1, 1) + 1) * 127.5).round().byte(), "n c h w -> n h w c").cpu()
    return images[..., 0] if images.shape[-1] == 1 else images
