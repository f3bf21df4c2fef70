import copy
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import UNet1DModel, UNet2DConditionModel, UNet2DModel

from quant import QuantConfig, freeze, quantize
from quant.export import export_onnx
from quant.functional import code_range, round_zero_point
from quant.functional import quantize as to_codes

ALL = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
LEVELS = tuple(onnxruntime.GraphOptimizationLevel.__members__.values())
TIMESTEPS = [900, 500, 100]


def _float(cls=UNet2DModel, **config):
    """A tiny UNet with random weights, biases and normalisations."""
    config = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        **config,
    }
    torch.manual_seed(0)
    unet = cls(**config).eval().requires_grad_(False)
    for parameter in unet.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(-0.5, 0.5)
    return unet


def _student(unet, bits, timesteps=TIMESTEPS, **config):
    """A frozen student whose step sizes and zero points differ between layers and timesteps, and cut values off.

    Steps of 16 bits are as wide as those of 8: finer ones are so many that in most images some float lies on a border,
    where the last bit of a sum decides. `test_codes_of_16_bits_of_the_usual_steps` has the fine ones.
    """
    student = quantize(unet, QuantConfig(*bits, rank=2, **config), timesteps)
    for number, (_, layer) in enumerate(student.layers()):
        table = layer.act_quantizer
        steps = torch.linspace(0.7, 1.5, len(table.scale))
        table.scale.data = (steps + number % 5 / 10) / min(table.qmax, 255)
        table.zero_point.data = table.qmax * (0.6 - steps / 10)
    return freeze(student)


def _session(path, level=ALL, optimized=None):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _feed(session, size, t, count=8, channels=3):
    """Random values for every input of a session's graph."""
    generator = torch.Generator().manual_seed(count)
    values = {
        "sample": torch.randn(count, channels, *size, generator=generator),
        "timestep": torch.tensor(t),
        "class_labels": torch.arange(count) % 5,
        "encoder_hidden_states": torch.randn(count, count + 1, 12, generator=generator),
    }
    return {value.name: values[value.name] for value in session.get_inputs()}


def _assert_close(ours, theirs):
    """Equal to rounding in most of the images, and no worse than what a few other codes make in the rest.

    A float on the border of a code may go the other way, and then all of its image differs a little.
    """
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).reshape(len(ours), -1) / np.abs(theirs).max()
    assert (error.max(1) < 3e-6).mean() >= 0.5, error.max(1)
    assert error.mean() < 0.01


def _assert_codes_agree(student, path, t):
    """In every layer ONNX Runtime's codes are the student's of the same input; on a border one may be the next."""
    graph = onnx.load(path)
    points = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]  # in the order of the layers
    names = list(dict.fromkeys(name for node in points for name in (node.input[0], node.output[0])))
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = _session(graph.SerializeToString())
    feed = _feed(session, (8, 8), t)
    outputs = session.run(None, {name: value.numpy() for name, value in feed.items()})
    values = {name: torch.from_numpy(value.astype(np.float32)) for name, value in zip(names, outputs, strict=True)}

    ran = []
    for _, layer in student.layers():
        layer.act_quantizer.register_forward_hook(lambda quantizer, *_: ran.append(quantizer))
    student(**feed)
    student.clock.set(torch.full((8,), float(t)))
    for quantizer, node in zip(ran, points, strict=True):
        x, theirs = values[node.input[0]], values[node.output[0]]
        scale, zero_point = (value.view(-1, *[1] * (x.dim() - 1)) for value in quantizer.read())
        zero_point = round_zero_point(zero_point, quantizer.qmin, quantizer.qmax)
        apart = (to_codes(x, scale, zero_point, quantizer.codes) - theirs).abs()
        to_border = ((x.double() / scale) % 1 - 0.5).abs()
        assert (apart[to_border > 0.02] == 0).all()
        assert apart.max() <= 1


def _assert_equal(model, path, timesteps, sizes=((8, 8),), levels=LEVELS, **options):
    """ONNX Runtime gives the model's ε."""
    for level in levels:
        session = _session(path, level)
        for t in timesteps:
            for size in sizes:
                feed = _feed(session, size, t, **options)
                (ours,) = session.run(None, {name: value.numpy() for name, value in feed.items()})
                with torch.no_grad():
                    _assert_close(ours, model(**feed).sample.numpy())


# The smallest that still has skip concatenations and a shortcut over the last skip; and with attention.
FLAT = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}
ATTENTION = {**FLAT, "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}


@pytest.fixture(scope="module")
def w8a8(tmp_path_factory):
    """A student whose attention projections saturate wherever two products are added in 16 bits, and its graph."""
    student = _student(_float(**ATTENTION, num_class_embeds=5), (8, 8), edge_act_bits=8)
    for name, layer in student.layers():
        if "attentions" in name:
            layer.codes.copy_(torch.where(layer.codes < 0, -128, 127))
            layer.act_quantizer.scale.data *= 0.25
            layer.act_quantizer.zero_point.data.fill_(100)
    path = tmp_path_factory.mktemp("onnx") / "w8a8.onnx"
    export_onnx(student, path)
    return student, path


@pytest.fixture(scope="module")
def w4a4(tmp_path_factory):
    unet = _float(sample_size=None, mid_block_type=None, up_block_types=("UpBlock2D", "UpBlock2D"))
    student = _student(unet, (4, 4), [1700.5, 500, 100.25], edge_act_bits=8)
    path = tmp_path_factory.mktemp("onnx") / "w4a4.onnx"
    export_onnx(student, path)
    return student, path


def test_8_bits_and_classes_at_every_level_of_optimization(w8a8):
    _assert_equal(*w8a8, TIMESTEPS)


def test_4_bits_of_any_size_at_every_level_of_optimization(w4a4):
    _assert_equal(*w4a4, (500.0,), sizes=((8, 8), (6, 10), (16, 2)))
    _assert_equal(*w4a4, (500.0,), levels=[ALL], count=65)  # diffusers branches at 64 samples


@pytest.mark.parametrize(
    ("weight_bits", "act_bits"),
    [(1, 2), pytest.param(1.58, 3, marks=pytest.mark.slow), pytest.param(2, 8, marks=pytest.mark.slow)],
)
def test_few_bits_at_every_level_of_optimization(weight_bits, act_bits, tmp_path):
    student = _student(_float(**FLAT), (weight_bits, act_bits), edge_bits=4, edge_act_bits=4)
    path = tmp_path / "model.onnx"
    export_onnx(student, path)
    _assert_equal(student, path, TIMESTEPS[:2])
    codes = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if "codes" in t.name}
    layers = dict(student.layers())
    assert len(codes) == len(layers)
    for name, values in codes.items():
        assert values.dtype == np.int8, name
    used = {code for name, values in codes.items() if "resnets.0.conv1" in name for code in np.unique(values).tolist()}
    assert used == set(code_range(weight_bits, signed=True))


@pytest.mark.parametrize(("name", "timesteps"), [("w8a8", (5000, 901, 731, 0)), ("w4a4", (1701.0, 700.3, 100.3, -1.0))])
def test_every_timestep_is_answered_as_the_clock_does(name, timesteps, request):
    _assert_equal(*request.getfixturevalue(name), timesteps, levels=[ALL])


def test_inputs_of_16_bits_at_every_level_of_optimization(tmp_path):
    """Of wide steps and of the usual ones: see `_student`."""
    student = _student(_float(**ATTENTION), (4, 8))
    for _, layer in student.layers():
        if layer.act_quantizer.bits == 16:
            layer.act_quantizer.zero_point.data = torch.tensor([3.0, 40_000.0, 65_535.0])
            layer.act_quantizer.scale.data[1:] *= 255 / layer.act_quantizer.qmax
    export_onnx(student, tmp_path / "model.onnx")
    _assert_equal(student, tmp_path / "model.onnx", TIMESTEPS[:1])
    points = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "Cast"]
    assert any(a.i == onnx.TensorProto.UINT16 for node in points for a in node.attribute if a.name == "to")
    for t in (500, 100, 430):
        _assert_codes_agree(student, tmp_path / "model.onnx", t)


def test_weights_whose_products_could_saturate_are_unsigned(w8a8, w4a4, tmp_path):
    def kinds(path):
        """The types of the weights' codes, by the name of the tensor."""
        tensors = onnx.load(path).graph.initializer
        codes = [tensor for tensor in tensors if tensor.name.endswith("codes")]
        return {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in codes}

    student, path = w8a8
    assert len(kinds(path)) == len(list(student.layers()))
    assert set(kinds(path).values()) == {"UINT8"}
    edges = ("conv_in", "conv_out", "time_embedding", "up_blocks.1.resnets.1.conv_shortcut")
    for name, kind in kinds(w4a4[1]).items():
        assert (kind == "UINT8") == any(edge in name for edge in edges), name

    # What the processor multiplies in 8 bits: no fused layer with signed weights.
    _session(path, optimized=tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    fused = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert fused
    assert all(types[node.input[1]] == onnx.TensorProto.UINT8 for node in fused)


@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="this machine has no qemu-x86_64 (Debian: qemu-user)")
def test_nothing_saturates_on_a_processor_without_vnni(w8a8, tmp_path):
    student, path = w8a8
    feed = _feed(_session(path), (8, 8), 500)
    np.savez(tmp_path / "feed.npz", **{name: value.numpy() for name, value in feed.items()})
    program = f"""
import numpy, onnxruntime
session = onnxruntime.InferenceSession("{path}", providers=["CPUExecutionProvider"])
numpy.save("{tmp_path}/eps.npy", session.run(None, dict(numpy.load("{tmp_path}/feed.npz")))[0])
"""
    subprocess.run(["qemu-x86_64", "-cpu", "Haswell", sys.executable, "-c", program], check=True, capture_output=True)
    with torch.no_grad():
        _assert_close(np.load(tmp_path / "eps.npy"), student(**feed).sample.numpy())


def test_one_row_of_step_sizes_and_centred_images_that_are_not_square(tmp_path):
    student = _student(_float(**FLAT, sample_size=[8, 4], center_input_sample=True), (3, 5), per_step=False)
    export_onnx(student, tmp_path / "model.onnx")
    _assert_equal(student, tmp_path / "model.onnx", (500,), sizes=((8, 4),))


def test_cross_attention_and_half_precision_leave_the_model_alone(tmp_path):
    unet = _float(
        UNet2DConditionModel,
        sample_size=None,
        block_out_channels=(8,),
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        num_class_embeds=5,
    )
    unet = unet.to(torch.bfloat16).train()
    before = copy.deepcopy(unet.state_dict())
    export_onnx(unet, tmp_path / "model.onnx")
    assert unet.training
    assert unet.dtype == torch.bfloat16
    assert all(torch.equal(before[name], value) for name, value in unet.state_dict().items())
    path = tmp_path / "model.onnx"
    for count in (1, 5):
        _assert_equal(unet.float().eval(), path, (999, 0), sizes=((8, 8), (3, 5)), count=count)


def test_what_has_no_graph_is_refused_by_name(tmp_path):
    path = tmp_path / "model.onnx"
    unet = _float(**FLAT)
    with pytest.raises(ValueError, match=r"call quant\.freeze first"):
        export_onnx(quantize(unet, QuantConfig(), TIMESTEPS), path)
    with pytest.raises(ValueError, match='class_embed_type = "identity"'):
        export_onnx(_float(class_embed_type="identity"), path)
    with pytest.raises(ValueError, match="time_cond_proj_dim = 4"):
        export_onnx(_float(UNet2DConditionModel, time_cond_proj_dim=4), path)
    with pytest.raises(ValueError, match=r"cannot export this network: .* Expected 8 in dimension 2 but got 7"):
        plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        export_onnx(_float(sample_size=7, mid_block_type=None, **plain), path)
    with pytest.raises(ValueError, match="UNet1DModel"):
        export_onnx(UNet1DModel(block_out_channels=(32, 32, 64)), path)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_file_and_nothing_else(monkeypatch, tmp_path):
    class Program:
        class model:
            graph = ()

        def save(self, path):
            path.with_name(f"{path.name}.data").write_bytes(b"weights")
            path.write_bytes(b"half")
            raise OSError("no space left on device")

    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: Program())
    with pytest.raises(OSError, match="no space"):
        export_onnx(_float(), path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("model.onnx", b"old")]
