import numpy as np
import onnxruntime
import pytest
import torch

from ddpm_mnist.sampler import SamplerConfig, sample
from quant import QuantConfig, calibrate, freeze, quantize
from quant.export import export_onnx


class Session:
    """An ONNX file as a denoiser."""

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def __call__(self, x, t):
        t = t.flatten()[0].numpy()
        self.sample = torch.from_numpy(self.session.run(None, {"sample": x.numpy(), "timestep": t})[0])
        return self


@pytest.fixture
def frozen(unet, solver, buffer):
    student = quantize(unet, QuantConfig(3, 6, rank=2), solver.timesteps.tolist())
    calibrate(student, {t: buffer.x[:, step] for step, t in enumerate(solver.timesteps.tolist())})
    return freeze(student)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_onnx_runtime_computes_what_the_model_computes(kind, unet, frozen, tmp_path):
    model = unet if kind == "teacher" else frozen
    export_onnx(model, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx")
    medians = []
    for count in (1, 5):
        x = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(count))
        for t in (999, 431, 0):
            with torch.no_grad():
                expected = model(x, t).sample
            error = (session(x, torch.tensor([t])).sample - expected).abs()
            assert error.mean() < 0.1 * expected.abs().mean()
            medians.append(error.median().item())
    # A student's float on the border of a code may go the other way, and everything behind it differs a little.
    assert sum(median < 1e-6 for median in medians) >= (6 if kind == "teacher" else 4)
    config = SamplerConfig(num_steps=6)
    ours, theirs = (sample(denoiser, config, 8, batch_size=8).float() for denoiser in (session, model))
    assert np.percentile((ours - theirs).abs(), 90) <= 1


def test_a_students_graph_holds_codes_and_tables(frozen, tmp_path):
    import onnx

    export_onnx(frozen, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    # Equal inputs with equal step sizes are quantized once: with random weights, those of the time projections.
    projections = [name for name, _ in frozen.layers() if "time_emb_proj" in name]
    layers = len(list(frozen.layers()))
    assert kinds.count("QuantizeLinear") == layers - len(projections) + 1
    assert kinds.count("DequantizeLinear") >= layers
    assert [(value.name, len(value.type.tensor_type.shape.dim)) for value in graph.input] == [
        ("sample", 4),
        ("timestep", 0),
    ]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_only_a_frozen_student_is_exported(student, tmp_path):
    with pytest.raises(ValueError, match=r"call quant\.freeze first"):
        export_onnx(student, tmp_path / "model.onnx")
