"""Create the runtimes of teacher and student that the benchmark compares."""

import copy
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor

from ddpm_mnist.sampling.sampler import choose_conditions, denoise
from ddpm_mnist.sampling.solver import Solver
from quant import QuantizedUNet, to_integer
from quant.export import export_onnx

# (runtime, model) → a denoiser, called with x float (N, C, H, W), the timestep t () and, if the model has classes, the
# class labels (N,).
Runtimes = dict[tuple[str, str], Callable[..., Any]]
# Names of these inputs in the ONNX graphs, in the same order.
NAMES = ("sample", "timestep", "class_labels")


def torch_runtimes(teacher: UNet2DModel, student: QuantizedUNet, isas: list[str]) -> Runtimes:
    """Return the PyTorch and integer runtimes; "integer" uses the first of `isas`, "integer-ISA" the others."""
    channels_last = copy.deepcopy(teacher).to(memory_format=torch.channels_last)

    def under_bfloat16(denoiser: Any) -> Any:
        def run(*inputs: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return denoiser(*inputs)

        return run

    return {
        ("eager", "teacher"): teacher,
        ("compiled", "teacher"): torch.compile(channels_last, dynamic=False),
        ("eager-bfloat16", "teacher"): under_bfloat16(teacher),
        ("compiled-bfloat16", "teacher"): torch.compile(under_bfloat16(channels_last), dynamic=False),
        ("simulated", "student"): student,
        **{
            (f"integer-{isa}" if number else "integer", "student"): to_integer(student, isa)
            for number, isa in enumerate(isas)
        },
    }


def onnx_runtimes(teacher: UNet2DModel, student: QuantizedUNet, solver: Solver, folder: Path) -> Runtimes:
    """Export both models as ONNX files into `folder`; return them in every installed runtime for ONNX."""
    paths = {name: folder / f"{name}.onnx" for name in ("teacher", "teacher-int8", "student")}
    export_onnx(teacher, paths["teacher"])
    export_onnx(student, paths["student"])
    _quantize_statically(teacher, solver, paths["teacher"], paths["teacher-int8"])
    found: Runtimes = {}
    for runtime, model, path in (
        ("onnxruntime-float", "teacher", "teacher"),
        ("onnxruntime-int8", "teacher", "teacher-int8"),
        ("onnxruntime-qdq", "student", "student"),
    ):
        found[runtime, model] = _onnxruntime(paths[path])
    if importlib.util.find_spec("openvino"):
        for runtime, path, precision in (
            ("openvino-float", "teacher", "f32"),
            ("openvino-bfloat16", "teacher", "bf16"),
            ("openvino-int8", "teacher-int8", "f32"),
            ("openvino-int8-bfloat16", "teacher-int8", "bf16"),
        ):
            found[runtime, "teacher"] = _openvino(paths[path], precision)
    return found


def _onnxruntime(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads that spin would slow down the runtime that is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda *inputs: session.run(None, _arrays(*inputs))


def _openvino(path: Path, precision: str) -> Any:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = openvino.Core().compile_model(path, "CPU", options)
    return lambda *inputs: model(_arrays(*inputs))


def _arrays(*inputs: Tensor) -> dict[str, np.ndarray]:
    return {name: x.numpy() for name, x in zip(NAMES, inputs, strict=False)}


def _quantize_statically(teacher: UNet2DModel, solver: Solver, source: Path, target: Path) -> None:
    """Quantize to 8 bits with ONNX Runtime's static quantization, calibrated on 16 trajectories of the teacher."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            given = choose_conditions(teacher, solver.config, range(16)).values()
            self.states = iter(
                _arrays(step.x, solver.timesteps[step.number], *given) for step in denoise(teacher, solver, range(16))
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.states, None)

    prepared = source.with_name("prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    logging.disable(logging.WARNING)
    try:
        quantize_static(prepared, target, Reader(), per_channel=True)
    finally:
        logging.disable(logging.NOTSET)
