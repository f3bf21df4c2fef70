"""Teacher and student as standard ONNX graphs, with inputs `sample` and `timestep`."""

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from quant.convert import QuantizedUNet
from quant.functional import round_zero_point
from quant.quantizers import ActivationQuantizer

OPSET = 21


def export_onnx(model: UNet2DModel | QuantizedUNet, path: Path, num_train_timesteps: int = 1000) -> None:
    """Write `model` to `path`: sample float (N, C, H, W), any N, and timestep int64 () → eps float (N, C, H, W).

    A student's weights are int8 codes behind a DequantizeLinear with an axis of channels; its activations pass
    QuantizeLinear, Clip to their bits and DequantizeLinear, whose step sizes and zero points are looked up in tables
    over the timesteps. One timestep serves the batch: ONNX Runtime has no integer products with a zero point per row.

    Args:
        num_train_timesteps: a student's tables answer timesteps 0 … num_train_timesteps - 1.

    Raises:
        ValueError: a student that is not frozen.
    """
    config: Any = model.config
    if isinstance(model, QuantizedUNet):
        if any(layer.codes is None for _, layer in model.layers()):
            raise ValueError("only a frozen student has its weights as codes: call quant.freeze first")
        model = _with_onnx_quantizers(model, num_train_timesteps)
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    sample = torch.randn(2, config.in_channels, height, width)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Denoiser(model).eval(),
            (sample, torch.tensor(1)),
            input_names=["sample", "timestep"],
            output_names=["eps"],
            dynamic_shapes={"sample": {0: torch.export.Dim.DYNAMIC}, "timestep": None},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph:  # the exporter's stack traces, a third of the file
        node.metadata_props.clear()
    program.save(path)


class _Denoiser(nn.Module):
    """Returns the tensor instead of diffusers' output object."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.model(sample, timestep, return_dict=False)[0]


class _OnnxClock:
    """Keeps the batch's timestep as a tensor of the graph."""

    def set(self, t: Tensor) -> None:
        self.t = t[0]

    def unset(self) -> None:
        del self.t


class _OnnxActivationQuantizer(nn.Module):
    """Looks up step size and zero point, interpolated beforehand for every training timestep."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: ActivationQuantizer, clock: _OnnxClock):
        super().__init__()
        scale, zero_point = quantizer.read()
        self.clock, self.limits = clock, (quantizer.qmin, quantizer.qmax)
        self.register_buffer("scale", scale.detach())
        self.register_buffer("zero_point", round_zero_point(zero_point.detach(), *self.limits).byte())

    def forward(self, x: Tensor) -> Tensor:
        parameters = self.scale[self.clock.t], self.zero_point[self.clock.t]
        codes = _onnx("QuantizeLinear", x, *parameters, dtype=torch.uint8)
        low, high = (torch.tensor(limit, dtype=torch.uint8) for limit in self.limits)
        codes = _onnx("Clip", codes, low, high, dtype=torch.uint8)
        return _onnx("DequantizeLinear", codes, *parameters, dtype=torch.float32)


class _OnnxWeightQuantizer(nn.Module):
    def __init__(self, scale: Tensor):
        super().__init__()
        self.scale = nn.Parameter(scale, requires_grad=False)

    def dequantize(self, codes: Tensor) -> Tensor:
        return _onnx("DequantizeLinear", codes, self.scale, axis=0, dtype=torch.float32)


def _with_onnx_quantizers(student: QuantizedUNet, num_train_timesteps: int) -> QuantizedUNet:
    student = copy.deepcopy(student).cpu()
    clock = _OnnxClock()
    student.clock.set(torch.arange(num_train_timesteps))
    for _, layer in student.layers():
        layer.act_quantizer = _OnnxActivationQuantizer(layer.act_quantizer, clock)  # type: ignore[assignment]
        layer.weight_quantizer = _OnnxWeightQuantizer(layer.weight_quantizer.scale)  # type: ignore[assignment]
    student.clock = clock  # type: ignore[assignment]
    return student


def _onnx(operator: str, x: Tensor, *inputs: Tensor, dtype: torch.dtype, **attributes: Any) -> Tensor:
    """The ONNX operator of that name in the exported graph; its output has the shape of x."""
    return torch.onnx.ops.symbolic(operator, (x, *inputs), attributes, dtype=dtype, shape=x.shape, version=OPSET)
