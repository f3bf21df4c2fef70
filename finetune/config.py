"""The config of a student: how it is made, scored and drawn."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpm_mnist.lab.tracking import check_tracker
from ddpm_mnist.sampling.noise import STREAM
from ddpm_mnist.sampling.sampler import SEED_LIMIT
from ddpm_mnist.sampling.solver import SamplerConfig
from eval.models import Model, check_runtime
from finetune.distill import DistillConfig
from finetune.trajectories import MAX_SEED, NOISES
from quant import QuantConfig


@dataclass
class RunConfig:
    """A student: made, scored and drawn."""

    output: Path = Path("runs/student")
    """Run folder. A run that was interrupted goes on from its last state."""
    teacher: str = "teacher"
    """The full-precision model: a released name, or a folder of diffusers."""
    seed: int = 0
    """Seeds the adapters, the noise of the buffer and, with the update's number, what an update draws: 0 to 8191."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    student: QuantConfig = field(default_factory=QuantConfig)
    recipe: str = "distill"
    """"distill": as the sections student and distill say. "published": as the paper's training code has it
    (finetune/baselines.py), with their bits, rank, batch and number of updates."""
    lr_factor: float = 1.0
    """What the published learning rates are multiplied with, above 0, under that recipe alone."""
    teacher_steps: int = 1
    """Steps of the teacher that one step of the student stands for, at least 1."""
    num_trajectories: int = 1024
    """Trajectories of the teacher in the buffer, from 1 to 2^18."""
    calibration_trajectories: int = 64
    """How many of them the calibration of the activations looks at, at least 1."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    data: str = "mnist"
    """For distill.objective "denoising" alone: the images, as the teacher's config names them."""
    num_images: int = 2000
    """Images to score each model on, at least 2 and grid_columns."""
    features: str | None = None
    """The ruler: a folder of `efficientdm features`, or "inception". None: the released one, of MNIST. Images that it
    does not fit are compared with the teacher's alone."""
    score_seed: int = 0
    """The first seed of the images that are scored, 0 to 2^31 - num_images."""
    batch_size: int = 64
    """Images that are sampled at once, at least 1."""
    grid_columns: int = 12
    """Images per row of the grid, at least 1."""
    runtime: str = "integer"
    """How the student runs when it is scored: "integer", or "simulated" in float."""
    tracker: str = "none"
    """Where the loss, step sizes and the grid are shown besides: "none", "tensorboard", "wandb" or "trackio"."""

    def __post_init__(self) -> None:
        if self.recipe not in ("distill", "published"):
            raise ValueError(f'recipe must be "distill" or "published", not "{self.recipe}"')
        if self.lr_factor <= 0:
            raise ValueError(f"lr_factor must be positive, not {self.lr_factor}")
        if self.lr_factor != 1 and self.recipe != "published":
            raise ValueError('lr_factor must be 1 but for the recipe "published"')
        for name in ("teacher_steps", "num_trajectories", "calibration_trajectories", "batch_size", "grid_columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        check_runtime(self.runtime)
        check_tracker(self.tracker)
        if self.calibration_trajectories > self.num_trajectories:
            raise ValueError(f"calibration_trajectories must be at most num_trajectories, {self.num_trajectories}")
        if self.num_images < max(2, self.grid_columns):
            raise ValueError(f"num_images must be at least 2 and grid_columns, not {self.num_images}")
        if self.num_trajectories > NOISES:
            raise ValueError(f"num_trajectories must be at most 2^18, {NOISES}, not {self.num_trajectories}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed must lie in 0…{MAX_SEED}, not {self.seed}")
        if self.num_images > SEED_LIMIT:
            raise ValueError(f"num_images must be at most 2^31, not {self.num_images}")
        if not 0 <= self.score_seed <= SEED_LIMIT - self.num_images:
            raise ValueError(f"score_seed must lie in 0…2^31 - num_images, not {self.score_seed}")
        if self.distill.rollout_steps > self.sampler.num_steps and self.distill.objective == "rollout":
            raise ValueError(f"distill.rollout_steps must be at most sampler.num_steps, {self.sampler.num_steps}")
        if self.sampler.eta:
            raise ValueError("sampler.eta must be 0: distillation needs the teacher's exact trajectory")

    @property
    def uses_data(self) -> bool:
        """Whether the student learns from images instead of the teacher's trajectories."""
        return self.recipe == "distill" and self.distill.objective == "denoising"

    @property
    def teacher_sampler(self) -> SamplerConfig:
        """How the teacher fills the buffer."""
        if self.recipe == "published":
            return dataclasses.replace(self.sampler, solver="ddim", eta=1.0, eps_scale=1.0)
        return dataclasses.replace(self.sampler, num_steps=self.sampler.num_steps * self.teacher_steps)


def student_fields(config: RunConfig) -> dict[str, Any]:
    """Return the fields of `config` that decide the student, and the rule of the noise that it starts from."""
    fields = dataclasses.asdict(config)
    for free in ("output", "teacher", "num_images", "features", "score_seed", "grid_columns", "tracker"):
        del fields[free]
    for free in ("log_every", "save_every"):
        del fields["distill"][free]
    return {**fields, "noise": STREAM}


def fingerprint(config: RunConfig, teacher: Model) -> dict[str, Any]:
    """Return everything that decides the student: its part of the config, the teacher's weights and schedule."""
    of_teacher = {"teacher's weights": teacher.weights_digest(), "teacher's scheduler": teacher.schedule.fields}
    return student_fields(config) | of_teacher
