"""Export teacher and student as standard ONNX graphs with the inputs `sample`, `timestep` and further conditions."""

import copy
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from quant.context import plain_torch
from quant.layers import QuantLayer
from quant.student import QuantizedUNet

OPSET = 21

# Config fields of diffusers' UNets that require inputs which the graph does not have.
UNSUPPORTED = ("addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")


@plain_torch()
def export_onnx(model: UNet2DModel | UNet2DConditionModel | QuantizedUNet, path: str | Path) -> None:
    """Write a copy of `model` in float32 to `path` as an ONNX graph.

    ====================== =========================================================================================
    sample                 float (N, C, H, W): any N; H and W are the config's `sample_size`, or if that is None,
                           any multiples of the network's stride
    timestep               int64 (), one for the whole batch, because ONNX Runtime has no integer products with a
                           zero point per row. Float for Fourier features, or if the student has fractional timesteps
    encoder_hidden_states  float (N, L, cross_attention_dim), any L; only for a UNet2DConditionModel
    class_labels           int64 (N,); only for a network with classes
    → eps                  float (N, C, H, W)
    ====================== =========================================================================================

    A student's weights are 8-bit codes with a DequantizeLinear per channel, whatever their bit-width, because ONNX
    Runtime converts ONNX's types of 2 and 4 bits to float before it multiplies. Activations pass QuantizeLinear, Clip
    to their bit-width and DequantizeLinear, with the step size and zero point of the timestep. Those of 16 bits are
    uint16, which ONNX Runtime multiplies in float.

    The file is written under a temporary name and renamed. If the graph exceeds ONNX's limit of 2 GB, weights are
    written to a separate file `<path>.data`.

    Raises:
        ValueError: the student is not frozen, the network needs other inputs, or torch.onnx cannot export it.
    """
    path = Path(path)
    model = copy.deepcopy(model).cpu().float().eval()
    inputs, shapes = _example(model)
    if isinstance(model, QuantizedUNet):
        _use_onnx_quantizers(model)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Denoiser(model, list(inputs)),
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=["eps"],
                dynamic_shapes=(tuple(shapes.values()),),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"torch.onnx cannot export this network: {reason}") from error
    finally:
        logger.setLevel(level)
    assert program is not None
    for node in program.model.graph:  # drop the exporter's stack traces, a third of the file
        node.metadata_props.clear()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        beside = Path(folder) / path.name
        program.save(beside)
        for weights in beside.parent.glob("*.data"):  # before the graph, which refers to them
            weights.replace(path.with_name(weights.name))
        beside.replace(path)


def _example(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return example inputs of the graph by name, and their dynamic dimensions."""
    config = model.config
    unet, timesteps = (model.unet, model.clock.timesteps) if isinstance(model, QuantizedUNet) else (model, [])
    if not isinstance(unet, UNet2DModel | UNet2DConditionModel):
        raise ValueError(f"a {type(unet).__name__} cannot be exported: only UNet2DModel and UNet2DConditionModel")
    for name in UNSUPPORTED:
        if config.get(name) is not None:
            raise ValueError(f"{name} = {config[name]!r}: a network with this input cannot be exported")
    if config.class_embed_type not in (None, "timestep"):
        raise ValueError(f'class_embed_type = "{config.class_embed_type}" cannot be exported: only labels')

    batch, any_size = 2, torch.export.Dim.DYNAMIC
    size, sizes = config.sample_size, {}
    if size is None:
        stride = 2 ** (len(config.block_out_channels) - 1)
        size = (2 * stride, 3 * stride)  # distinct, or the exporter would unify them
        sizes = {2: any_size, 3: any_size}
    size = (size, size) if isinstance(size, int) else tuple(size)
    fractional = config.time_embedding_type == "fourier" or any(t != int(t) for t in timesteps)
    inputs = {
        "sample": torch.zeros(batch, config.in_channels, *size),
        "timestep": torch.tensor(1.0 if fractional else 1),
    }
    shapes: dict[str, Any] = {"sample": {0: any_size, **sizes}, "timestep": None}
    if isinstance(unet, UNet2DConditionModel):
        width = config.cross_attention_dim
        inputs["encoder_hidden_states"] = torch.zeros(batch, 7, width if isinstance(width, int) else width[0])
        shapes["encoder_hidden_states"] = {0: any_size, 1: any_size}
    if unet.class_embedding is not None:
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long)
        shapes["class_labels"] = {0: any_size}
    return inputs, shapes


class _Denoiser(nn.Module):
    """Denoiser that takes tensors in the order of `names`, and returns a tensor instead of diffusers' output object."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=False)[0]


class _OnnxClock:
    """Clock that uses only operators of ONNX. It reads the tables of all L layers at once, at the batch's timestep.

    The values are bit for bit those of `Clock.read`.
    """

    def __init__(self, student: QuantizedUNet):
        quantizers = [layer.act_quantizer for _, layer in student.layers()]
        self.timesteps, order = torch.tensor(student.clock.timesteps, dtype=torch.float32).sort()
        # (2, T, L), or (2, 1, L) if all timesteps share one row
        self.tables = torch.stack([torch.stack([q.scale, q.zero_point]) for q in quantizers], dim=2).detach()
        if self.tables.shape[1] > 1:
            self.tables = self.tables[:, order]
        self.qmax = torch.tensor([float(quantizer.qmax) for quantizer in quantizers])

    def set(self, t: Tensor) -> None:
        self.scales, zero_points = self._row(t[0].float())
        self.zero_points = zero_points.round().clamp(min=0).minimum(self.qmax)  # as in `round_zero_point`

    def _row(self, t: Tensor) -> Tensor:
        if self.tables.shape[1] == 1:
            return self.tables[:, 0]
        above = (self.timesteps < t).sum().clamp(max=len(self.timesteps) - 1)
        below = (above - 1).clamp(min=0)
        gap = self.timesteps[above] - self.timesteps[below]
        fraction = torch.where(gap > 0, (t - self.timesteps[below]) / gap, 0).clamp(0, 1)
        return self.tables[:, below] * (1 - fraction) + self.tables[:, above] * fraction

    def unset(self) -> None:
        del self.scales, self.zero_points


class _OnnxActivationQuantizer(nn.Module):
    def __init__(self, qmax: int, clock: _OnnxClock, index: int):
        super().__init__()
        self.qmax, self.clock, self.index = qmax, clock, index

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.uint8 if self.qmax < 256 else torch.uint16
        parameters = self.clock.scales[self.index], self.clock.zero_points[self.index].to(dtype)
        codes = _onnx("QuantizeLinear", x, *parameters, dtype=dtype)
        if self.qmax < 255:
            limits = (torch.tensor(limit, dtype=torch.uint8) for limit in (0, self.qmax))
            codes = _onnx("Clip", codes, *limits, dtype=torch.uint8)
        return _onnx("DequantizeLinear", codes, *parameters, dtype=torch.float32)


class _OnnxWeightQuantizer(nn.Module):
    """Dequantizes codes that are int8, or uint8 with zero point 128."""

    def __init__(self, scale: Tensor):
        super().__init__()
        self.scale = nn.Parameter(scale, requires_grad=False)

    def dequantize(self, codes: Tensor) -> Tensor:
        zero_points = [] if codes.dtype == torch.int8 else [torch.full_like(self.scale, 128, dtype=torch.uint8)]
        return _onnx("DequantizeLinear", codes, self.scale, *zero_points, axis=0, dtype=torch.float32)


def _use_onnx_quantizers(student: QuantizedUNet) -> None:
    """Replace the quantizers of `student` by operators of ONNX."""
    if any(layer.codes is None for _, layer in student.layers()):
        raise ValueError("only a frozen student has its weights as codes: call quant.freeze first")
    clock = _OnnxClock(student)
    for index, (_, layer) in enumerate(student.layers()):
        assert layer.codes is not None
        if _may_saturate(layer):
            layer.codes = (layer.codes.short() + 128).byte()
        layer.act_quantizer = _OnnxActivationQuantizer(layer.act_quantizer.qmax, clock, index)  # type: ignore[assignment]
        layer.weight_quantizer = _OnnxWeightQuantizer(layer.weight_quantizer.scale)  # type: ignore[assignment]
    student.clock = clock  # type: ignore[assignment]


def _may_saturate(layer: QuantLayer) -> bool:
    """Return whether the sum of two products of activation and weight codes can overflow 16 bits.

    On x86 without VNNI, ONNX Runtime multiplies signed weights with vpmaddubsw, which adds pairs with saturation; it
    widens unsigned weights first (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
    """
    qmax = layer.act_quantizer.qmax
    return qmax < 256 and 2 * qmax * -layer.weight_quantizer.qmin > 32767


def _onnx(operator: str, x: Tensor, *inputs: Tensor, dtype: torch.dtype, **attributes: Any) -> Tensor:
    """Add the ONNX operator `operator` to the exported graph; its output has the shape of x."""
    return torch.onnx.ops.symbolic(operator, (x, *inputs), attributes, dtype=dtype, shape=x.shape, version=OPSET)
