"""Load a model by name or path: a denoiser and its noise schedule."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, logging
from huggingface_hub import snapshot_download
from safetensors import safe_open

from ddpm_mnist.lab import InputError, processes
from ddpm_mnist.lab.read import read_json
from ddpm_mnist.sampling.noise_schedule import Schedule, default_schedule, read_schedule
from ddpm_mnist.sampling.sampler import choose_conditions, image_shape
from ddpm_mnist.sampling.solver import SamplerConfig, Solver
from ddpm_mnist.unet import PRETRAINED
from eval.table import bits_label
from quant import IntegerUNet, QuantizedUNet, to_integer
from quant.context import plain_torch
from quant.structure import EMA_FIELDS, check_config, check_forward, is_of_ema

STUDENTS = ("w8a8", "w4a8", "w4a4", "w2a4")
RELEASED = {"teacher": PRETRAINED, **{name: PRETRAINED / name for name in STUDENTS}}
# Runtimes of a student: with integers on the CPU, or simulated in float, on the accelerator if there is one.
RUNTIMES = ("integer", "simulated")
# Names of a network's folder in a pipeline or training folder, which also contains its scheduler.
NETWORKS = ("unet", "unet_ema")
# LoRA files that other programs write into a network's folder.
ADAPTERS = ("adapter_config.json", "pytorch_lora_weights.safetensors")
# Weight files of diffusers by variant: a single file, or the index of several.
WEIGHTS = {
    None: (SAFETENSORS_WEIGHTS_NAME, f"{SAFETENSORS_WEIGHTS_NAME}.index.json"),
    "fp16": ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
}


@dataclass
class Model:
    """A denoiser with its name and bits."""

    name: str
    denoiser: Any
    """Called as `denoiser(x_t, t).sample`."""
    schedule: Schedule
    """The noise schedule and prediction type that it was trained with."""
    weight_bits: float = 32
    """32 for full precision; for a student the bits of its inner layers."""
    act_bits: int = 32
    folder: Path | None = None

    @property
    def title(self) -> str:
        """The name in figures: the last part of the path, or the last two for a ladder's students, RUNG/SEED."""
        path = Path(self.name)
        return "/".join(path.parts[-2:]) if path.name.isdecimal() else path.name

    @property
    def bits(self) -> str:
        """The bit-widths, e.g. "W4A4", or "full precision"."""
        return "full precision" if self.weight_bits == 32 else bits_label(self.weight_bits, self.act_bits)

    @property
    def runtime(self) -> str:
        """One of `RUNTIMES`, or "float" for full precision."""
        if isinstance(self.denoiser, IntegerUNet):
            return "integer"
        return "simulated" if isinstance(self.denoiser, QuantizedUNet) else "float"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of its images."""
        return image_shape(self.denoiser)

    def check_pictures(self) -> None:
        """Raise InputError unless the images have 1 or 3 channels, as a picture needs."""
        if self.shape[0] not in (1, 3):
            raise InputError(f'model "{self.name}" has images of {self.shape[0]} channels: a picture has 1 or 3')

    def solver(self, config: SamplerConfig) -> Solver:
        """Return the solver of `config` for the model's schedule; raise InputError if the model does not support it."""
        with _named(self.name):
            choose_conditions(self.denoiser, config, range(0))
            solver, options = Solver(config, self.schedule), self.denoiser.config
            last, first = solver.timesteps.max().item(), solver.timesteps.min().item()
            if options.time_embedding_type == "learned" and last >= (options.num_train_timesteps or 0):
                raise InputError(
                    f"it has learned {options.num_train_timesteps} timesteps, and its scheduler asks for {last}"
                )
            if options.time_embedding_type == "fourier" and first <= 0:
                raise InputError("it takes the logarithm of its timesteps, and its scheduler asks for 0")
            return solver

    def weights_digest(self) -> str:
        """Return the first 12 hex digits of the SHA-256 of the weights."""
        return digest(self.denoiser.state_dict())


def digest(tensors: Mapping[Any, torch.Tensor]) -> str:
    """Return the first 12 hex digits of the SHA-256 of `tensors`, in their order."""
    content = hashlib.sha256()
    for tensor in tensors.values():
        content.update(tensor.cpu().numpy().tobytes())
    return content.hexdigest()[:12]


def device() -> torch.device:
    """Return this process's accelerator, or the CPU if there is none."""
    return processes.state().device


def check_runtime(runtime: str) -> None:
    """Raise ValueError unless `runtime` is one of `RUNTIMES`."""
    if runtime not in RUNTIMES:
        raise ValueError(f'runtime must be {" or ".join(RUNTIMES)}, not "{runtime}"')


def runnable(student: QuantizedUNet, runtime: str) -> IntegerUNet | QuantizedUNet:
    """Return the frozen `student` in `runtime`; raise ValueError if the integer runtime does not support it."""
    return to_integer(student) if runtime == "integer" else student.to(device())


@contextmanager
def _named(argument: str) -> Iterator[None]:
    """Context manager that adds the model's name to the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f'model "{argument}": {error}') from error


@plain_torch()
def load_model(argument: str, runtime: str = "simulated") -> Model:
    """Load a model.

    Args:
        argument: the name of a released model, a run folder, a diffusers folder (of a pipeline or a UNet), or the name
            of a repository with one of these on the Hugging Face Hub.
        runtime: for a student, one of `RUNTIMES`.

    Raises:
        InputError: the model does not exist, is damaged, or has an unsupported option.
    """
    folder = RELEASED.get(argument, Path(argument))
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", argument):
        folder = _from_hub(argument)
    place = next((p for p in (folder, folder / "unet") if (p / "config.json").is_file()), None)
    if place is None:
        names = ", ".join(RELEASED)
        raise InputError(f'no model "{argument}": neither released ({names}) nor a folder with a config.json')
    try:
        config = read_config(place / "config.json")
        if config.get("class", config.get("_class_name")) == "UNet2DConditionModel":
            raise InputError("a UNet2DConditionModel needs text beside the noise: quant takes it, the commands do not")
        _refuse_latents(place)
        own_schedule = _load_schedule(place)
        schedule = own_schedule or default_schedule()
        if "quantization" in config:
            student = QuantizedUNet.from_pretrained(place)
            bits = student.quant_config
            model = Model(argument, runnable(student, runtime), schedule, bits.weight_bits, bits.act_bits, folder)
        else:
            check_config(config.get("_class_name"), config)
            denoiser = _load_unet(place).requires_grad_(False).to(device())
            check_forward(denoiser)
            model = Model(argument, denoiser, schedule, folder=folder)
        _check_network(model)
    except Exception as error:  # diffusers, safetensors and torch raise many types of exceptions for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f'model "{argument}" cannot be loaded from {place}: {reason}') from error
    adapters = [name for name in ADAPTERS if (place / name).exists() or (folder / name).exists()]
    if adapters:
        print(f"{folder} has {adapters[0]} beside the network: it is ignored, diffusers' fuse_lora merges it")
    if is_of_ema(config):
        print(f"{place} is diffusers' EMAModel: its fields {', '.join(sorted(EMA_FIELDS))} are ignored")
    if own_schedule is None:
        print(f"{place} has no scheduler: DDPM's 1000 linear steps and ε are taken for granted")
    return model


def _check_network(model: Model) -> None:
    """Raise InputError if the image size is not divisible by the network's downsampling, or a weight is not finite."""
    unet = model.denoiser
    unet = unet if isinstance(unet, UNet2DModel) else getattr(unet, "student", unet).unet
    halvings = sum(bool(getattr(b, "downsamplers", None) or getattr(b, "resnet_down", None)) for b in unet.down_blocks)
    if any(side % 2**halvings for side in model.shape[1:]):
        raise InputError(f"its sample_size {model.shape[1:]} cannot be halved {halvings} times, as its network does")
    if not all(x.isfinite().all() for x in unet.parameters() if x.is_floating_point()):
        raise InputError("its weights contain a value that is not finite")


def _from_hub(name: str) -> Path:
    """Download configs and safetensors of a repository on the Hugging Face Hub; return its folder in the cache."""
    wanted = ["*.json", "*.safetensors", "unet/*.json", "unet/*.safetensors", "scheduler/*.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # from huggingface_hub, its HTTP library or the system
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f'no model "{name}", neither here nor on the Hugging Face hub ({reason})') from error


def read_config(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`; raise ValueError if it contains none."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return config


def _refuse_latents(place: Path) -> None:
    """Raise ValueError if a pipeline has further components (e.g. a VAE): its network does not generate pixels."""
    for path in (folder / "model_index.json" for folder in _beside(place)):
        if path.is_file():
            parts = {name for name, value in read_config(path).items() if isinstance(value, list) and any(value)}
            if others := sorted(parts - {"unet", "scheduler"}):
                raise ValueError(
                    f"its pipeline has a {others[0]} beside the network; only networks of pixels are drawn"
                )


def _beside(place: Path) -> list[Path]:
    """Return the folders that may contain the pipeline's other components: the network's folder and its parent, both
    as given and with links resolved."""
    folders: list[Path] = []
    for path in (place.absolute(), place.resolve()):
        folders += [path, path.parent] if path.name in NETWORKS else [path]
    return list(dict.fromkeys(folders))


def _load_schedule(place: Path) -> Schedule | None:
    """Read the schedule of the scheduler that belongs to the network in `place`; None if there is none.

    Raises:
        ValueError: the pipeline names a scheduler whose config is missing.
    """
    for folder in _beside(place):
        for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
            if path.is_file():
                return read_schedule(read_config(path))
            if path.is_symlink() or (path.parent != folder and path.parent.exists()):
                raise ValueError(f"{path} is missing, where its scheduler should be")
        index = folder / "model_index.json"
        if index.is_file() and (named := read_config(index).get("scheduler")) and any(named):
            raise ValueError(f"its pipeline names the scheduler {named[-1]}, but has no scheduler_config.json")
    return None


def _refuse_codes(path: Path) -> None:
    """Raise ValueError if a weight file contains other types than floats: quantized codes are useless without their
    scales."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            # 8-bit floats have separate scales, as integers do.
            if (dtype := file.get_slice(name).get_dtype()).lstrip("B")[0] != "F" or dtype.startswith("F8"):
                raise ValueError(f"{name} in {path.name} is of {dtype}, not of floats")


def _load_unet(place: Path) -> UNet2DModel:
    """Load a diffusers UNet; raise ValueError for missing or unexpected weights, which diffusers only logs."""
    variants = [variant for variant, files in WEIGHTS.items() if any((place / file).is_file() for file in files)]
    if not variants:
        raise ValueError(
            f"it has no {SAFETENSORS_WEIGHTS_NAME}; weights in other formats are not read: "
            "diffusers' save_pretrained writes them as safetensors"
        )
    for path in place.glob("diffusion_pytorch_model*.safetensors"):
        _refuse_codes(path)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "variant": variants[0]}
        unet, found = UNet2DModel.from_pretrained(place, torch_dtype=torch.float32, **options)
    finally:
        logging.set_verbosity(verbosity)
    if found["missing_keys"] or found["unexpected_keys"]:
        names = [*found["missing_keys"], *found["unexpected_keys"]]
        raise ValueError(f"its weights do not fit its config: {names[0]} and {len(names) - 1} more")
    for parameter in unet.parameters():  # memory-mapped weights are unaligned, which changes the last bits of results
        parameter.data = parameter.data.clone()
    return unet.eval()
