"""Convert a float UNet into a quantized one, and save and load the result."""

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.models.unets.unet_2d_blocks import (
    AttnUpBlock2D,
    CrossAttnUpBlock2D,
    ResnetUpsampleBlock2D,
    UpBlock2D,
)
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from quant.checkpoint import read_checkpoint, write_checkpoint
from quant.context import plain_torch
from quant.functional import FEW, FINE, check_bits
from quant.integer.program import refuse_unsupported
from quant.layers import QuantConv2d, QuantLayer, QuantLinear, SkipConv2d
from quant.quantizers import SMALLEST, Clock, as_number
from quant.structure import check_structure, make, own_fields, refuse_hooks, try_out

# Names of an activation quantizer's tables in the state dict.
ACT_TABLES = ("scale", "zero_point")

# Parts of a UNet that get `edge_bits`. Not every network has the last two.
EDGES = ("conv_in", "conv_out", "time_embedding", "class_embedding", "add_embedding")

# Up-sampling blocks whose residual blocks all take a concatenation [hidden, skip] as input.
SKIPPED_TO = (UpBlock2D, AttnUpBlock2D, ResnetUpsampleBlock2D, CrossAttnUpBlock2D)


@dataclass
class QuantConfig:
    """Bit-widths of the student, and initialisation of its quantizers."""

    weight_bits: int | float = 4
    """Bits of all weights except those of the edge layers: 2…8, 1.58 (-1, 0 and 1 times the step size) or 1 (plus or
    minus the step size)."""
    act_bits: int = 4
    """Bits of the inputs of all convolutions and linear layers except the edge layers: 2…8."""
    edge_bits: int = 8
    """Weight bits of the edge layers: the first and the last convolution, the shortcut over the last skip, and the time
    and class embeddings. 2…8."""
    edge_act_bits: int = 16
    """Bits of the inputs of the edge layers: 2…8 or 16, which integer inference computes as two digits of 8 bits."""
    rank: int = 16
    """Rank of the QALoRA adapters, at least 1."""
    per_step: bool = True
    """Use an activation step size and zero point for every denoising step (TALSQ), instead of one for all steps."""
    search: str = "error"
    """Initialisation of the step sizes: "error" minimises the squared error over a grid of ranges, "min-max" covers the
    whole range. Inputs of 16 bits always start with twice the whole range."""

    edge_shortcut: bool = True
    """Treat the shortcut over the last skip as an edge layer."""
    split_skips: bool = True
    """Use separate quantizers for the two halves of a shortcut over a skip concatenation."""
    bias_correction: bool = True
    """Correct the biases during calibration, so that each layer's output keeps its mean."""
    reconstruction: bool = False
    """Recompute each layer's weight and bias during calibration to compensate for rounding errors (GPTAQ); this
    includes `bias_correction`."""

    def __post_init__(self) -> None:
        check_bits("weight_bits", self.weight_bits, also=FEW)
        check_bits("act_bits", self.act_bits)
        check_bits("edge_bits", self.edge_bits)
        check_bits("edge_act_bits", self.edge_act_bits, also=(FINE,))
        if self.search not in ("error", "min-max"):
            raise ValueError(f'search must be "error" or "min-max", not "{self.search}"')
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")


class QuantizedUNet(nn.Module):
    """Quantized denoiser: `model(x_t, t).sample`, with the arguments of the UNet it was converted from.

    Each forward pass sets the clock from t; samples of one batch may have different t. For a t between two of
    `clock.timesteps`, step sizes and zero points are interpolated. The model computes in float32, regardless of
    autocast and the default dtype.

    Attributes:
        is_calibrated: whether `calibrate` has run; it can run only once.
    """

    def __init__(self, unet: nn.Module, config: QuantConfig, clock: Clock):
        super().__init__()
        self.unet: Any = unet
        self.quant_config = config
        self.clock = clock
        self.is_calibrated = False

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
            raise ValueError("gradient checkpointing is not supported: it would ask the clock after the forward pass")
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
            mend = "call .float() on it" if self.dtype == torch.float64 else "its numbers are rounded, make it anew"
            raise ValueError(f"a student computes in float32, not in {self.dtype}: {mend}")
        if any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError("a student on the meta device has no numbers (accelerate's offload puts it there)")

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
            try_out(model)
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
    model = _convert(unet, dataclasses.replace(options, rank=1), config["timesteps"])  # adapters are not saved
    model.quant_config, model.is_calibrated = options, True
    return model.requires_grad_(False)


def _check(tensors: dict[str, Tensor], model: QuantizedUNet, config: dict[str, Any]) -> None:
    """Raise ValueError unless the saved `tensors` match those of `model` after freezing.

    In `tensors`, replace the stacked activation tables by one table per layer.
    """
    bits = {f"{name}.codes": layer.weight_quantizer.bits for name, layer in model.layers()}
    if bits != {name: code["bits"] for name, code in config["codes"].items()}:
        raise ValueError("codes have other bits than the layers that they are of")
    for name, x in tensors.items():
        if name not in bits and x.dtype not in (torch.half, torch.float32):
            raise ValueError(f"{name} is of {x.dtype}")
        if not x.isfinite().all():
            raise ValueError(f"{name} holds what is no finite number")
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


@plain_torch()
def quantize(unet: nn.Module, config: QuantConfig, timesteps: Sequence[float] | Tensor) -> QuantizedUNet:
    """Return a quantized copy of `unet` with initial weight step sizes; `calibrate` sets those of the activations.

    Every convolution and linear layer is replaced, including shortcuts, down- and upsampling and attention projections.
    The edge layers, which get `config.edge_bits`, are found from the network's structure. The projections to query, key
    and value become one layer with one input quantizer, because they share their input; in cross-attention, those to
    key and value do. With `config.split_skips`, a shortcut over a skip concatenation becomes two layers, one for each
    half, because the halves differ in range.

    The copy is in float32 and in evaluation mode. If integer inference does not support a part of it, a warning names
    the part.

    Args:
        unet: a UNet2DModel or UNet2DConditionModel of diffusers, with the structure that its config describes.
        timesteps: the training timesteps of the T sampling steps, such as a scheduler's `timesteps`.

    Raises:
        ValueError: `unet` has a part that cannot be quantized or that its config does not describe.
    """
    if not isinstance(config, QuantConfig):
        raise ValueError(f"the config must be a QuantConfig, not a {type(config).__name__}")
    check_structure(unet)
    model = _convert(unet, config, timesteps)
    for _, layer in model.layers():
        layer.weight_quantizer.initialise(layer.weight, config.search)
    try:
        refuse_unsupported(model.unet)
    except ValueError as error:
        warnings.warn(f"this student can be simulated and exported, but: {error}", stacklevel=2)
    return model


@plain_torch()
def freeze(model: QuantizedUNet) -> QuantizedUNet:
    """Return a copy of `model` with merged adapters, and with codes as weights.

    The parameters that stay float (step sizes, zero points, biases, normalisations) are rounded to half precision, in
    which they are saved, before the codes are computed. A saved student therefore computes the same bits as the frozen
    one.

    Raises:
        ValueError: `model` is not a `QuantizedUNet` in float32, none of its activation step sizes was set, or it has
            hooks.
    """
    require_student(model)
    refuse_hooks(model)
    if all((layer.act_quantizer.scale == 1).all() for _, layer in model.layers()):
        raise ValueError("only a calibrated student can be frozen: quant.calibrate sets its activations' step sizes")
    return _freeze(model)


def require_student(model: Any) -> None:
    """Raise ValueError unless `model` is a `QuantizedUNet` in float32."""
    if not isinstance(model, QuantizedUNet):
        raise ValueError(f"a {type(model).__name__} is no student: quant.quantize makes one")
    model.require_float32()


def _freeze(model: QuantizedUNet) -> QuantizedUNet:
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    frozen.is_calibrated = True
    for _, layer in frozen.layers():
        for quantizer in (layer.weight_quantizer, layer.act_quantizer):
            quantizer.scale.clamp_(min=SMALLEST)
        _round_to_half(layer.weight_quantizer)
        layer.freeze()
    for part in frozen.unet.children():
        if part is not frozen.unet.time_proj:  # at late timesteps a rounded frequency is many turns off
            _round_to_half(part)
    return frozen


def _round_to_half(module: nn.Module) -> None:
    for parameter in module.parameters():
        half = parameter.half()
        if half.isfinite().all():
            parameter.copy_(half)


def _in_half(x: Tensor) -> Tensor:
    """Return `x` in half precision if the conversion is exact, else `x` itself."""
    half = x.half() if x.is_floating_point() else x
    return half if torch.equal(half.to(x.dtype), x) else x


def _convert(network: nn.Module, config: QuantConfig, timesteps: Sequence[float] | Tensor) -> QuantizedUNet:
    """Return the quantized model of `network`, before its step sizes are initialised."""
    unet: Any = copy.deepcopy(network).requires_grad_(False).float().eval()
    for module in unet.modules():
        vars(module).pop("forward", None)  # accelerate's `unwrap_model` sets it to the class's own forward
    if unet.is_gradient_checkpointing:
        unet.disable_gradient_checkpointing()
    clock = Clock(timesteps)
    edges: set[nn.Module] = set()
    for name in EDGES:
        if (part := getattr(unet, name, None)) is not None:
            edges.update(part.modules())
    for name, module in list(unet.named_modules()):
        if isinstance(module, Attention):
            _fuse_projections(name, module)
    if config.split_skips:
        _split_skips(unet)
    if config.edge_shortcut:
        edges.update(_last_shortcut(unet))
    for name, module in list(unet.named_modules()):
        layer = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}.get(type(module))
        if layer is None:
            if isinstance(module, _ConvNd | nn.Linear | nn.Bilinear):
                raise ValueError(f"{name}: a {type(module).__name__} cannot be quantized")
            continue
        bits = config.weight_bits, config.act_bits
        if module in edges:
            bits = config.edge_bits, config.edge_act_bits
        unet.set_submodule(name, layer(module, *bits, config.rank, clock, config.per_step))
    return QuantizedUNet(unet, config, clock).to(unet.device).eval()


def _fuse_projections(name: str, attention: Attention) -> None:
    if attention.added_kv_proj_dim is not None:
        raise ValueError(f"{name}: attention with added keys and values is not supported")
    attention.fuse_projections()
    attention.set_processor(FusedAttnProcessor2_0())
    if not attention.is_cross_attention:
        del attention.to_q
    del attention.to_k, attention.to_v


def _last_shortcut(unet: Any) -> Iterator[nn.Module]:
    """Return the modules of the shortcut over the last skip, which carries the output of the first convolution."""
    shortcut = unet.up_blocks[-1].resnets[-1].conv_shortcut
    return iter(()) if shortcut is None else shortcut.modules()


def _split_skips(unet: Any) -> None:
    """Replace every shortcut over a concatenation [hidden, skip] by a `SkipConv2d`."""
    skips = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        skips += [resnet.out_channels for resnet in block.resnets]
        skips += [block.resnets[-1].out_channels] * len(block.downsamplers or [])
    if not all(isinstance(block, SKIPPED_TO) for block in unet.up_blocks):
        return  # other blocks keep their shortcuts
    for block in unet.up_blocks:
        for resnet in block.resnets:
            hidden = resnet.in_channels - skips.pop()
            if resnet.conv_shortcut is not None:
                resnet.conv_shortcut = SkipConv2d(resnet.conv_shortcut, hidden)
