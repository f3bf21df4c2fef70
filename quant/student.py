"""The quantized denoiser `QuantizedUNet`, and how it is saved and loaded."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant.checkpoint import read_checkpoint, write_checkpoint
from quant.context import plain_torch
from quant.layers import QuantLayer
from quant.quantizers import Clock, as_number
from quant.replace import QuantConfig, replace_layers
from quant.structure import check_forward, make, own_fields, refuse_hooks

# Names of an activation quantizer's tables in the state dict.
ACT_TABLES = ("scale", "zero_point")


class QuantizedUNet(nn.Module):
    """Quantized denoiser: `model(x_t, t).sample`, with the arguments of the UNet it was converted from.

    Each forward pass sets the clock from t; samples of one batch may have different t. For a t between two of
    `clock.timesteps`, step sizes and zero points are interpolated. The model computes in float32, regardless of
    autocast and the default dtype.

    Attributes:
        is_calibrated: whether `calibrate` has run; it can run only once.
    """

    def __init__(self, unet: nn.Module, config: QuantConfig, timesteps: Sequence[float] | Tensor):
        """Quantize a copy of `unet`; the step sizes are not yet set."""
        super().__init__()
        self.clock = Clock(timesteps)
        self.unet = replace_layers(unet, config, self.clock)
        self.quant_config = config
        self.is_calibrated = False
        self.eval()

    @plain_torch(inference=True)
    def forward(self, sample: Tensor, timestep: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        """Return the UNet's output for `sample` (N, C, H, W) and `timestep`, a number or a tensor () or (N,).

        Raises:
            ValueError: the model is not in float32, `sample` is no float tensor, or gradient checkpointing is on.
        """
        self.require_float32()
        if not isinstance(sample, Tensor) or not sample.is_floating_point():
            raise ValueError("the sample must be a tensor of floats")
        if self.unet.is_gradient_checkpointing:
            raise ValueError("gradient checkpointing is not supported: it would read the clock after the forward pass")
        if isinstance(timestep, str) or not hasattr(timestep, "__len__"):
            timestep = as_number(timestep)  # keeps fractions: diffusers would truncate them to integers
        t = torch.as_tensor(timestep, device=sample.device)
        if t.dtype == torch.bool:
            raise ValueError("a timestep must be a number, not a truth value")
        t = (t.float() if t.is_floating_point() else t).reshape(-1).expand(sample.shape[0])
        self.clock.set(t)
        try:
            return self.unet(sample.float(), t, *args, **kwargs)
        finally:
            self.clock.unset()

    def require_float32(self) -> None:
        """Raise ValueError unless the parameters are float32 and none is on the meta device."""
        if self.dtype != torch.float32:
            mend = (
                "call .float() on it"
                if self.dtype == torch.float64
                else "its values were rounded, quantize the teacher again"
            )
            raise ValueError(f"a student computes in float32, not in {self.dtype}: {mend}")
        if any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError("a student on the meta device has no values (accelerate's offload puts it there)")

    # diffusers' pipelines read these three properties.
    @property
    def config(self) -> Any:
        return self.unet.config

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def layers(self) -> Iterator[tuple[str, QuantLayer]]:
        """Yield the name and module of each quantized layer, in the order of the network's definition."""
        for name, module in self.unet.named_modules():
            if isinstance(module, QuantLayer):
                yield name, module

    @contextmanager
    def shared_weights(self) -> Iterator[None]:
        """Merge and quantize the weights only once for all forward passes inside the context, such as a rollout's."""
        layers = [layer for _, layer in self.layers()]
        try:
            for layer in layers:
                layer.shared_weight = layer.quantized_weight()
            yield
        finally:
            for layer in layers:
                layer.shared_weight = None

    @plain_torch()
    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model.safetensors`, with weights packed to their bit-width, and `config.json` into `folder`.

        Raises:
            ValueError: the model is not frozen, is not in float32, or has hooks, which would be lost.
        """
        self.require_float32()
        refuse_hooks(self)
        bits = {f"{name}.codes": layer.weight_quantizer.bits for name, layer in self.layers()}
        tensors = {name: _in_half(x) for name, x in self.unet.state_dict().items()}
        if not bits.keys() <= tensors.keys():
            raise ValueError("only a frozen model has its weights as codes: call quant.freeze first")
        for table in ACT_TABLES:  # one tensor for all layers: a tensor's header in the file is longer than T numbers
            names = [f"{name}.act_quantizer.{table}" for name, _ in self.layers()]
            tensors[f"act_quantizers.{table}"] = torch.stack([tensors.pop(name) for name in names])
        config = {
            "class": type(self.unet).__name__,
            "unet": own_fields(self.config),
            "quantization": dataclasses.asdict(self.quant_config),
            "timesteps": self.clock.timesteps,
        }
        write_checkpoint(Path(folder), tensors, bits, config)

    @classmethod
    @plain_torch()
    def from_pretrained(cls, folder: str | Path) -> "QuantizedUNet":
        """Load the frozen model that `save_pretrained` wrote into `folder`.

        Raises:
            ValueError: a file is truncated, altered or of another format, or the two files do not match.
        """
        try:
            tensors, config = read_checkpoint(Path(folder))
        except OSError:
            raise
        except Exception as error:  # a valid digest does not imply valid content
            raise ValueError(_last_line(error)) from error
        try:
            with torch.device("meta"):  # check the config's sizes before any memory is allocated for them
                _check(tensors, _structure(config), config)
            with torch.random.fork_rng(devices=[]):  # initialising a network uses random numbers
                model = _structure(config)
            for _, layer in model.layers():
                layer.freeze()
            model.unet.load_state_dict(tensors)
            check_forward(model)
        except Exception as error:  # diffusers and torch raise exceptions of many types
            message = f"config.json and model.safetensors do not fit each other: {_last_line(error)}"
            raise ValueError(message) from error
        return model


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def _structure(config: dict[str, Any]) -> QuantizedUNet:
    """Return the student that a saved `config` describes, not yet frozen and with random parameters."""
    options = QuantConfig(**config["quantization"])
    unet = make(config["class"], config["unet"])
    model = QuantizedUNet(unet, dataclasses.replace(options, rank=1), config["timesteps"])  # adapters are not saved
    model.quant_config, model.is_calibrated = options, True
    return model.requires_grad_(False)


def _check(tensors: dict[str, Tensor], model: QuantizedUNet, config: dict[str, Any]) -> None:
    """Raise ValueError unless the saved `tensors` match those of `model` after freezing.

    In `tensors`, replace the stacked activation tables by one table per layer.
    """
    bits = {f"{name}.codes": layer.weight_quantizer.bits for name, layer in model.layers()}
    if bits != {name: code["bits"] for name, code in config["codes"].items()}:
        raise ValueError("codes and their layers have different bits")
    for name, x in tensors.items():
        if name not in bits and x.dtype not in (torch.half, torch.float32):
            raise ValueError(f"{name} is of {x.dtype}")
        if not x.isfinite().all():
            raise ValueError(f"{name} contains a value that is not finite")
        if name.endswith(("weight_quantizer.scale", "act_quantizers.scale")) and not (x > 0).all():
            raise ValueError(f"{name} holds a step size that is not positive")
    for table in ACT_TABLES:
        rows = tensors.pop(f"act_quantizers.{table}")
        names = (name for name, _ in model.layers())
        tensors |= {f"{name}.act_quantizer.{table}": row for name, row in zip(names, rows, strict=True)}
    shapes = {name: x.shape for name, x in model.unet.state_dict().items()}
    for name, layer in model.layers():
        shapes[f"{name}.codes"] = layer.weight_shape
        for unsaved in ("weight", "lora_a", "lora_b"):
            del shapes[f"{name}.{unsaved}"]
    for name in sorted(shapes.keys() | tensors.keys()):
        ours, theirs = shapes.get(name), tensors[name].shape if name in tensors else None
        if ours != theirs:
            sizes = (str(None if shape is None else tuple(shape)) for shape in (theirs, ours))
            raise ValueError(f"size mismatch for {name}: {' is saved, '.join(sizes)} is asked for")


def require_student(model: Any) -> None:
    """Raise ValueError unless `model` is a `QuantizedUNet` in float32."""
    if not isinstance(model, QuantizedUNet):
        raise ValueError(f"a {type(model).__name__} is not a student: quant.quantize makes one")
    model.require_float32()


def _in_half(x: Tensor) -> Tensor:
    """Return `x` in half precision if the conversion is exact, else `x` itself."""
    half = x.half() if x.is_floating_point() else x
    return half if torch.equal(half.to(x.dtype), x) else x
