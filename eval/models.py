"""A model argument → a denoiser, with the schedule that it was trained for."""

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
from quant.structure import EMA_FIELDS, check_config, is_of_ema, try_out

STUDENTS = ("w8a8", "w4a8", "w4a4", "w2a4")
RELEASED = {"teacher": PRETRAINED, **{name: PRETRAINED / name for name in STUDENTS}}
# How a student runs: on the CPU's integers, or simulated in float, on the accelerator if there is one.
RUNTIMES = ("integer", "simulated")
# A pipeline's or a training's folders of the network, beside which its scheduler lies.
NETWORKS = ("unet", "unet_ema")
# Files of LoRA that others lay beside a network.
ADAPTERS = ("adapter_config.json", "pytorch_lora_weights.safetensors")
# The files of diffusers' weights by their variant: whole, or the index of several.
WEIGHTS = {
    None: (SAFETENSORS_WEIGHTS_NAME, f"{SAFETENSORS_WEIGHTS_NAME}.index.json"),
    "fp16": ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
}


@dataclass
class Model:
    """A denoiser with its name and bits."""

    name: str
    denoiser: Any
    """`answer = denoiser(x_t, t).sample`"""
    schedule: Schedule
    """What it was trained for."""
    weight_bits: float = 32
    """32 for full precision; for a student the bits of its inner layers."""
    act_bits: int = 32
    folder: Path | None = None

    @property
    def title(self) -> str:
        """Its name in pictures: the last part, and the one before a number, for a ladder's students are RUNG/SEED."""
        path = Path(self.name)
        return "/".join(path.parts[-2:]) if path.name.isdecimal() else path.name

    @property
    def bits(self) -> str:
        """ "W4A4", or "full precision"."""
        return "full precision" if self.weight_bits == 32 else bits_label(self.weight_bits, self.act_bits)

    @property
    def runtime(self) -> str:
        """ "float", or one of `RUNTIMES`."""
        if isinstance(self.denoiser, IntegerUNet):
            return "integer"
        return "simulated" if isinstance(self.denoiser, QuantizedUNet) else "float"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of its images."""
        return image_shape(self.denoiser)

    def check_pictures(self) -> None:
        """InputError unless its images can be drawn as a picture."""
        if self.shape[0] not in (1, 3):
            raise InputError(f'model "{self.name}" has images of {self.shape[0]} channels: a picture has 1 or 3')

    def solver(self, config: SamplerConfig) -> Solver:
        """The sampler of `config` over the model's own schedule; InputError where the two do not fit."""
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
        """The first 12 digits of its weights' SHA-256."""
        return digest(self.denoiser.state_dict())


def digest(tensors: Mapping[Any, torch.Tensor]) -> str:
    """Return the first 12 digits of the SHA-256 of `tensors`, in their order."""
    content = hashlib.sha256()
    for tensor in tensors.values():
        content.update(tensor.cpu().numpy().tobytes())
    return content.hexdigest()[:12]


def device() -> torch.device:
    """The accelerator, if there is one: each process has its own."""
    return processes.state().device


def check_runtime(runtime: str) -> None:
    """ValueError where there is no such runtime."""
    if runtime not in RUNTIMES:
        raise ValueError(f'runtime must be {" or ".join(RUNTIMES)}, not "{runtime}"')


def runnable(student: QuantizedUNet, runtime: str) -> IntegerUNet | QuantizedUNet:
    """The frozen `student` as `runtime`, one of `RUNTIMES`, runs it; ValueError where integers do not follow it."""
    return to_integer(student) if runtime == "integer" else student.to(device())


@contextmanager
def _named(argument: str) -> Iterator[None]:
    """Inside, an InputError says which model it speaks of."""
    try:
        yield
    except InputError as error:
        raise InputError(f'model "{argument}": {error}') from error


@plain_torch()
def load_model(argument: str, runtime: str = "simulated") -> Model:
    """Load a released model by its name, a run folder, a folder of diffusers (a pipeline's or a UNet's), or one of
    these on the Hugging Face hub by its name there.

    Args:
        runtime: for a student, one of `RUNTIMES`.

    Raises:
        InputError: there is no such model, its files are broken, or it says something that is not supported.
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
            try_out(denoiser)
            model = Model(argument, denoiser, schedule, folder=folder)
        _check_network(model)
    except Exception as error:  # whatever diffusers, safetensors or torch have to say of a broken file
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
    """InputError for images that the network cannot halve as often as it does, and for weights that are no numbers."""
    unet = model.denoiser
    unet = unet if isinstance(unet, UNet2DModel) else getattr(unet, "student", unet).unet
    halvings = sum(bool(getattr(b, "downsamplers", None) or getattr(b, "resnet_down", None)) for b in unet.down_blocks)
    if any(side % 2**halvings for side in model.shape[1:]):
        raise InputError(f"its sample_size {model.shape[1:]} cannot be halved {halvings} times, as its network does")
    if not all(x.isfinite().all() for x in unet.parameters() if x.is_floating_point()):
        raise InputError("its weights hold what is no finite number")


def _from_hub(name: str) -> Path:
    """The folder of the model of that name on the hub, in its cache: configs and safetensors alone."""
    wanted = ["*.json", "*.safetensors", "unet/*.json", "unet/*.safetensors", "scheduler/*.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # of the hub's library, of the one below it, or of the system
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f'no model "{name}", neither here nor on the Hugging Face hub ({reason})') from error


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError if there is none."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return config


def _refuse_latents(place: Path) -> None:
    """ValueError where a pipeline has more than the network and its scheduler: its network draws something else."""
    for path in (folder / "model_index.json" for folder in _beside(place)):
        if path.is_file():
            parts = {name for name, value in read_config(path).items() if isinstance(value, list) and any(value)}
            if others := sorted(parts - {"unet", "scheduler"}):
                raise ValueError(
                    f"its pipeline has a {others[0]} beside the network; only networks of pixels are drawn"
                )


def _beside(place: Path) -> list[Path]:
    """Where a pipeline's other parts lie: in the folder of the network itself, or above it, as it was named and, where
    that is a link, as it is."""
    folders: list[Path] = []
    for path in (place.absolute(), place.resolve()):
        folders += [path, path.parent] if path.name in NETWORKS else [path]
    return list(dict.fromkeys(folders))


def _load_schedule(place: Path) -> Schedule | None:
    """What the scheduler beside the network in `place` says; None where there is none.

    Raises:
        ValueError: its pipeline names one, but it is not there.
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
    """ValueError where a file of weights holds anything but floats: codes mean nothing without their scales."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            # Floats of 8 bits have scales beside them, as integers do.
            if (dtype := file.get_slice(name).get_dtype()).lstrip("B")[0] != "F" or dtype.startswith("F8"):
                raise ValueError(f"{name} in {path.name} is of {dtype}, not of floats")


def _load_unet(place: Path) -> UNet2DModel:
    """A UNet of diffusers; its library logs what it finds wrong and loads it all the same."""
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
    for parameter in unet.parameters():  # as the file is mapped they lie at odd addresses, on which last bits depend
        parameter.data = parameter.data.clone()
    return unet.eval()
