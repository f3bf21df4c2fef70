import json

import numpy as np
import onnxruntime
import pytest
import torch

from ddpm_mnist.command import run_command
from ddpm_mnist.unet import PRETRAINED, save_teacher
from eval import bench
from eval.export import ExportConfig, export
from eval.models import load_model
from quant import QuantizedUNet, freeze, to_integer


@pytest.fixture
def folders(unet, student, tmp_path):
    save_teacher(unet, tmp_path / "teacher")
    freeze(student).save_pretrained(tmp_path / "student")
    return {"teacher": str(tmp_path / "teacher"), "student": str(tmp_path / "student")}


def test_the_benchmark_writes_a_row_per_runtime_and_batch_size(folders, tmp_path, monkeypatch, capsys):
    """With two of the runtimes: the others take minutes to compile."""
    monkeypatch.setattr(
        bench, "torch_runtimes", lambda teacher, student: {
            ("eager", "teacher"): teacher, ("integer", "student"): to_integer(student),
        },
    )  # fmt: skip
    monkeypatch.setattr(bench, "onnx_runtimes", lambda teacher, student, folder: {})
    output = tmp_path / "bench.json"
    arguments = ["--student", folders["student"], "--teacher", folders["teacher"], "--batch_sizes", "[1,3]"]
    run_command("prog", bench.benchmark, bench.BenchConfig, [*arguments, "--rounds", "2", "--output", str(output)])
    content = json.loads(output.read_text())
    rows = content["rows"]
    assert [(row["runtime"], row["model"], row["batch_size"]) for row in rows] == [
        ("eager", "teacher", 1),
        ("integer", "student", 1),
        ("eager", "teacher", 3),
        ("integer", "student", 3),
    ]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(
            row["batch_size"] / (row["milliseconds_per_step"] * 20e-3), rel=0.05
        )
    assert content["bytes_on_disk"]["student"] == (tmp_path / "student" / "model.safetensors").stat().st_size
    assert content["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert content["seconds_to_first_image"].keys() == {"load", "compiling", "from_cache"}
    table = output.with_suffix(".md").read_text()
    assert "| integer | student |" in table
    assert table in capsys.readouterr().out


def test_the_released_w4a4_student_takes_a_seventh_of_its_teachers_bytes(tmp_path):
    sizes = bench._bytes_on_disk(bench.BenchConfig("w4a4"), tmp_path)
    assert sizes["teacher"] == (PRETRAINED / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert 7 * sizes["student"] <= sizes["teacher"]


def test_a_student_is_exported_in_its_real_bits_and_as_onnx(folders, tmp_path, capsys):
    packed = export(ExportConfig(folders["student"], "packed", tmp_path / "packed"))
    x = torch.randn(2, 1, 28, 28)
    expected = load_model(folders["student"]).denoiser(x, 500).sample
    assert torch.equal(QuantizedUNet.from_pretrained(packed.parent)(x, 500).sample, expected)
    graph = export(ExportConfig(folders["teacher"], "onnx", tmp_path / "onnx"))
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    eps = session.run(None, {"sample": x.numpy(), "timestep": np.array(500)})[0]
    np.testing.assert_allclose(eps, load_model(folders["teacher"]).denoiser(x, 500).sample, atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["model.onnx"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("export", ["--format", "pickle"], 'format must be "onnx" or "packed", not "pickle"'),
        ("export", ["--model", "{teacher}", "--format", "packed"], "only a student has codes to pack"),
        ("export", ["--model", "{student}", "--format", "packed", "--output", "{student}"], "exists: choose another"),
        ("bench", ["--student", "{teacher}"], "is no student: a run folder or a released student is needed"),
        ("bench", ["--batch_sizes", "[0]"], "batch_sizes must name sizes of at least 1, not [0]"),
        ("bench", ["--teacher", "{student}", "--student", "{student}"], "the teacher must be of full precision"),
        ("bench", ["--output", "bench.md"], "output must end in .json, not bench.md"),
        ("bench", ["--rounds", "0"], "rounds and num_steps must be at least 1"),
    ],
)
def test_wrong_input_gets_one_line(command, arguments, message, folders, tmp_path, capsys):
    function, config = {"export": (export, ExportConfig), "bench": (bench.benchmark, bench.BenchConfig)}[command]
    with pytest.raises(SystemExit) as caught:
        run_command("prog", function, config, [argument.format(**folders) for argument in arguments])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
