"""Create the teacher's network, a diffusers UNet2DModel, and save and load it."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from diffusers import DDPMPipeline, UNet2DModel
from safetensors import SafetensorError

from ddpm_mnist.lab import InputError
from ddpm_mnist.lab.locks import TEMPORARY_SUFFIX
from ddpm_mnist.lab.write import write_bytes
from ddpm_mnist.scheduler import make_sampling_scheduler

PRETRAINED = Path(__file__).parent / "pretrained"


@dataclass
class UNetConfig:
    """The teacher's network."""

    block_out_channels: tuple[int, ...] = (16, 32, 64)
    """Channels at each resolution, from the images' resolution down; each next resolution is half of the previous."""
    layers_per_block: int = 1
    """Residual blocks per resolution in the down path, at least 1; the up path has one more."""
    norm_num_groups: int = 8
    """Groups of every GroupNorm; must divide every entry of `block_out_channels`."""
    attention_head_dim: int = 16
    """Channels per attention head; must divide the last of `block_out_channels`. Only that resolution has attention."""

    def __post_init__(self) -> None:
        if not self.block_out_channels:
            raise ValueError("block_out_channels needs at least one entry")
        for name in ("layers_per_block", "norm_num_groups", "attention_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for channels in self.block_out_channels:
            if channels < 1 or channels % self.norm_num_groups:
                raise ValueError(f"norm_num_groups {self.norm_num_groups} does not divide {channels} channels")
        if self.block_out_channels[-1] % self.attention_head_dim:
            raise ValueError(
                f"attention_head_dim {self.attention_head_dim} does not divide {self.block_out_channels[-1]} channels"
            )


def make_unet(config: UNetConfig, channels: int = 1, size: int | tuple[int, int] = 28) -> UNet2DModel:
    """Create a denoiser: `eps = unet(x_t, t).sample` with x_t float (N, C, H, W), t long (N,) or scalar.

    Args:
        channels: C, of the images and of ε.
        size: (H, W), or one number for both.

    Raises:
        InputError: H and W are not divisible by 2 for every resolution of `config` but the last.
    """
    height, width = (size, size) if isinstance(size, int) else size
    depth = len(config.block_out_channels)
    multiple = 2 ** (depth - 1)  # an odd side would come out of the up path one pixel longer
    if height % multiple or width % multiple:
        raise InputError(
            f"images of {height}×{width} pixels cannot be halved {depth - 1} times, as {depth} block_out_channels "
            f"ask: height and width must be multiples of {multiple} (image_size resizes), or the channels fewer"
        )
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        attention_head_dim=config.attention_head_dim,
        down_block_types=("DownBlock2D",) * (depth - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (depth - 1),
    )


def save_teacher(unet: UNet2DModel, folder: Path, eps_scale: float = 1.0) -> None:
    """Write a folder for `DDPMPipeline.from_pretrained`: model_index.json, unet/ and scheduler/."""
    pipeline = DDPMPipeline(unet=unet, scheduler=make_sampling_scheduler(eps_scale))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=TEMPORARY_SUFFIX, dir=folder) as beside:
        try:
            pipeline.save_pretrained(beside)
        except SafetensorError as error:  # e.g. on a full disk
            raise InputError(f"cannot write {folder}: {error}") from error
        # Weights first, so that a folder with a config is complete. Files are copied instead of moved, because
        # safetensors creates them readable by their owner only.
        for path in sorted(Path(beside).rglob("*.*"), key=lambda path: path.suffix == ".json"):
            write_bytes(folder / path.relative_to(beside), path.read_bytes())


def load_teacher(folder: Path = PRETRAINED) -> UNet2DModel:
    """Load the teacher in `folder`, by default the released one, in evaluation mode with frozen parameters."""
    return UNet2DModel.from_pretrained(folder, subfolder="unet").eval().requires_grad_(False)
