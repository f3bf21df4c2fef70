"""The config of a run: how a student is trained, scored and sampled."""

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
    """How a student is trained, scored and sampled."""

    output: Path = Path("runs/student")
    """Run folder. An interrupted run resumes from its last saved state."""
    teacher: str = "teacher"
    """The full-precision model: the name of a released model, or a diffusers folder."""
    seed: int = 0
    """Seed of the adapters, of the trajectories' noise and, with the number of the update, of its random numbers: 0 to
    8191."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    student: QuantConfig = field(default_factory=QuantConfig)
    recipe: str = "distill"
    """"distill": the settings of the sections student and distill. "published": the paper's training code
    (finetune/baselines.py), with the bits, rank, batch size and number of updates of these sections."""
    lr_factor: float = 1.0
    """Factor on the learning rates of the recipe "published", above 0."""
    teacher_steps: int = 1
    """Teacher steps per student step, at least 1."""
    num_trajectories: int = 1024
    """Teacher trajectories to train on, from 1 to 2^18."""
    calibration_trajectories: int = 64
    """Number of these trajectories that calibrate the activation ranges, at least 1."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    data: str = "mnist"
    """Training images for distill.objective "denoising", as in the config of `efficientdm teacher`."""
    num_images: int = 2000
    """Images to score each model on, at least 2 and at least grid_columns."""
    features: str | None = None
    """Feature network of the scores (the ruler): a folder of `efficientdm features`, or "inception". None: the released
    one, for MNIST. Images of another shape are only compared with the teacher's."""
    score_seed: int = 0
    """First seed of the scored images, 0 to 2^31 - num_images."""
    batch_size: int = 64
    """Images to sample at once, at least 1."""
    grid_columns: int = 12
    """Images per row of the grid, at least 1."""
    runtime: str = "integer"
    """Runtime of the student when it is scored: "integer", or "simulated" in float."""
    tracker: str = "none"
    """Experiment tracker for loss, step sizes and grid: "none", "tensorboard", "wandb" or "trackio"."""

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
        """Whether the student is trained on images instead of the teacher's trajectories."""
        return self.recipe == "distill" and self.distill.objective == "denoising"

    @property
    def teacher_sampler(self) -> SamplerConfig:
        """The sampler of the teacher's trajectories."""
        if self.recipe == "published":
            return dataclasses.replace(self.sampler, solver="ddim", eta=1.0, eps_scale=1.0)
        return dataclasses.replace(self.sampler, num_steps=self.sampler.num_steps * self.teacher_steps)


def student_fields(config: RunConfig) -> dict[str, Any]:
    """Return the fields of `config` that determine the student, and the name of the noise generator."""
    fields = dataclasses.asdict(config)
    for free in ("output", "teacher", "num_images", "features", "score_seed", "grid_columns", "tracker"):
        del fields[free]
    for free in ("log_every", "save_every"):
        del fields["distill"][free]
    return {**fields, "noise": STREAM}


def fingerprint(config: RunConfig, teacher: Model) -> dict[str, Any]:
    """Return everything that determines the student: `student_fields`, and the teacher's weights and scheduler."""
    of_teacher = {"teacher's weights": teacher.weights_digest(), "teacher's scheduler": teacher.schedule.fields}
    return student_fields(config) | of_teacher
