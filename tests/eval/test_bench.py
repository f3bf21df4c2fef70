import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import UNet2DModel

from ddpm_mnist.lab.command import run_command
from ddpm_mnist.unet import PRETRAINED, save_teacher
from eval.bench import benchmark as bench
from eval.export import ExportConfig, export
from eval.models import load_model
from eval.plots import speed_chart
from quant import QuantizedUNet
from quant.integer.binding import VARIABLE, available, choose


@pytest.fixture
def run_benchmark(teacher_folder, student_folder, tmp_path, monkeypatch, capsys):
    """Runs it with these arguments: what it writes, JSON and Markdown.

    But for what takes minutes to compile, and for the process whose first image is timed.
    """
    every_runtime = bench.torch_runtimes

    def quick_runtimes(*arguments):
        return {key: run for key, run in every_runtime(*arguments).items() if "compiled" not in key[0]}

    monkeypatch.setattr(bench, "torch_runtimes", quick_runtimes)
    monkeypatch.setattr(bench, "onnx_runtimes", lambda teacher, student, solver, folder: {})
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout="0.5 0.25"))

    def run(*arguments):
        output = tmp_path / "bench.json"
        models = ("--student", student_folder, "--teacher", teacher_folder)
        options = [*models, "--rounds", "2", "--output", str(output), *arguments]
        run_command("prog", bench.benchmark, bench.BenchConfig, options)
        table = output.with_suffix(".md").read_text()
        assert table in capsys.readouterr().out
        return json.loads(output.read_text()), table

    return run


def test_the_benchmark_writes_a_row_per_runtime_and_batch_size(run_benchmark, saved, tmp_path):
    content, table = run_benchmark("--batch_sizes", "[1,3]")
    rows = content["rows"]
    runtimes = [("eager", "teacher"), ("eager-bfloat16", "teacher"), ("simulated", "student"), ("integer", "student")]
    assert [(row["runtime"], row["model"], row["batch_size"]) for row in rows] == [
        (*runtime, batch_size) for batch_size in (1, 3) for runtime in runtimes
    ]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(
            row["batch_size"] / (row["milliseconds_per_step"] * 20e-3), rel=0.05
        )
    assert content["bytes_on_disk"]["student"] == (saved / "student" / "model.safetensors").stat().st_size
    assert content["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert content["machine"]["isa"] == choose().isa
    assert content["seconds_to_first_image"] == {"load": 0.5, "first_image": 0.25}
    assert 0 < content["integer_step"]["share_outside_integer_products"] < 1
    assert "| integer | student |" in table
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_chart_has_a_bar_for_every_runtime_at_the_largest_batch_size():
    content = json.loads((Path(__file__).parents[2] / "docs" / "bench.json").read_text())
    (axis,) = speed_chart(content).axes
    names = [label.get_text() for label in axis.get_yticklabels()]
    drawn = {name: bar.get_width() for name, bar in zip(names, axis.patches, strict=True)}
    largest = max(row["batch_size"] for row in content["rows"])
    rows = [row for row in content["rows"] if row["batch_size"] == largest]
    assert drawn == {f"{row['model']}, {row['runtime']}": row["images_per_second"] for row in rows}
    assert list(drawn.values()) == sorted(drawn.values())
    assert f"{largest} at a time" in axis.get_xlabel()


def test_the_benchmark_sets_every_instruction_set_of_the_processor_side_by_side(run_benchmark):
    content, table = run_benchmark("--batch_sizes", "[2]", "--isa", "all")
    best, *rest = available()
    on_integers = [row["runtime"] for row in content["rows"] if row["runtime"].startswith("integer")]
    assert on_integers == ["integer", *(f"integer-{isa}" for isa in rest)]
    assert content["machine"]["isa"] == best
    assert f"integers on {best}" in table
    assert all(f"| integer-{isa} | student |" in table for isa in rest)


def test_the_benchmark_takes_the_instruction_set_that_is_named(run_benchmark, monkeypatch):
    content, table = run_benchmark("--batch_sizes", "[1]", "--isa", "portable")
    assert content["machine"]["isa"] == "portable"
    assert "| integer | student |" in table
    monkeypatch.setenv(VARIABLE, "portable")
    assert bench.BenchConfig().isas() == ["portable"]


@pytest.mark.slow
def test_a_student_draws_its_first_image_in_a_new_process(run_benchmark, monkeypatch):
    monkeypatch.setattr(bench.subprocess, "run", subprocess.run)
    content, _ = run_benchmark("--batch_sizes", "[1]")
    assert min(content["seconds_to_first_image"].values()) > 0


def test_the_released_w4a4_student_takes_a_seventh_of_its_teachers_bytes():
    teacher = PRETRAINED / "unet" / "diffusion_pytorch_model.safetensors"
    assert 7 * (load_model("w4a4").folder / "model.safetensors").stat().st_size <= teacher.stat().st_size


def test_a_student_is_exported_in_its_real_bits(student_folder, tmp_path):
    packed = export(ExportConfig(student_folder, "packed", tmp_path / "packed"))
    x = torch.randn(2, 1, 28, 28)
    expected = load_model(student_folder).denoiser(x, 500).sample
    assert torch.equal(QuantizedUNet.from_pretrained(packed.parent)(x, 500).sample, expected)


def test_a_teacher_is_exported_as_onnx_with_its_scheduler(tmp_path):
    unet = UNet2DModel(
        8, 1, 1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), mid_block_type=None,
    ).eval()  # fmt: skip
    save_teacher(unet, tmp_path / "teacher")
    graph = export(ExportConfig(str(tmp_path / "teacher"), "onnx", tmp_path / "onnx"))
    x, session = torch.randn(2, 1, 8, 8), onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    eps = session.run(None, {"sample": x.numpy(), "timestep": np.array(500)})[0]
    with torch.no_grad():
        np.testing.assert_allclose(eps, unet(x, 500).sample, atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["model.onnx", "scheduler"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("export", ["--format", "pickle"], 'format must be "onnx" or "packed", not "pickle"'),
        ("export", ["--model", "{teacher}", "--format", "packed"], "only a student has codes to pack"),
        ("export", ["--model", "{student}", "--format", "packed", "--output", "{student}"], "holds a model: choose"),
        ("bench", ["--student", "{teacher}"], "is not a student: a run folder or a released student is needed"),
        ("bench", ["--batch_sizes", "[0]"], "batch_sizes must name sizes of at least 1, not [0]"),
        ("bench", ["--teacher", "{student}", "--student", "{student}"], "the teacher must be of full precision"),
        ("bench", ["--output", "bench.md"], "output must end in .json, not bench.md"),
        ("bench", ["--rounds", "0"], "rounds and num_steps must be at least 1"),
        ("bench", ["--isa", "mmx"], 'this processor has no "mmx", only '),
    ],
)
def test_wrong_input_gets_one_line(command, arguments, message, teacher_folder, student_folder, refuse):
    function, config = {"export": (export, ExportConfig), "bench": (bench.benchmark, bench.BenchConfig)}[command]
    folders = {"teacher": teacher_folder, "student": student_folder}
    assert message in refuse(function, config, [argument.format(**folders) for argument in arguments])
