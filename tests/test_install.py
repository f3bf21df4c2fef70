"""The package, built as a wheel from a copy of its sources and installed: with a C++ compiler, and without."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ddpm_mnist.lab.command import EXTRAS
from eval.models import STUDENTS
from quant.integer.binding import available

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "configs", "ddpm_mnist", "quant", "eval", "finetune")
PACKAGES = ("ddpm_mnist", "ddpm_mnist/lab", "ddpm_mnist/sampling", "quant", "quant/integer", "eval", "finetune")

# Runs each list of words as a command, in one process; prints its exit code.
COMMANDS = """
import json, sys
from finetune.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        main()
        print("exit 0")
    except SystemExit as error:
        print("exit", error.code)
"""
# A student that is made in seconds; what else there is comes from the packaged configuration.
TINY = {
    "num_trajectories": 4, "calibration_trajectories": 2, "distill.num_updates": 1, "distill.batch_size": 2,
    "num_images": 12, "sampler.num_steps": 2, "student.rank": 1, "output": "run",
}  # fmt: skip


@pytest.fixture
def install(tmp_path):
    """Install into a folder, with that C++ compiler or the usual one; a function that runs Python there."""

    def run_install(compiler=None):
        sources, target = tmp_path / "sources", tmp_path / "target"
        for name in SOURCES:
            (sources / name).parent.mkdir(exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, sources / name)
        for library in (sources / "quant" / "integer").glob("_core_*"):
            library.unlink()
        environment = {**os.environ, "PYTHONPATH": str(target)}
        options = ["--quiet", "--no-deps", "--no-build-isolation"]
        builder = {**environment, **({"CXX": compiler, "CC": compiler} if compiler else {})}
        pip = [sys.executable, "-m", "pip"]
        subprocess.run([*pip, "wheel", *options, "--wheel-dir", str(tmp_path), str(sources)], env=builder, check=True)
        (wheel,) = tmp_path.glob("*.whl")
        subprocess.run([*pip, "install", *options, "--target", str(target), str(wheel)], env=environment, check=True)
        shutil.rmtree(sources)

        def run_python(*arguments):
            command, empty = [sys.executable, *arguments], tmp_path / "empty"
            empty.mkdir(exist_ok=True)
            return subprocess.run(command, env=environment, cwd=empty, capture_output=True, text=True)

        return run_python

    return run_install


def test_without_a_compiler_the_install_goes_through_and_says_what_is_missing(install, tmp_path):
    python = install("/bin/false")
    told = python("-m", "quant.integer").stdout
    assert "not built, for lack of a C++ compiler. Students run simulated in float" in told
    options = ("--model", "w4a4", "--num_images", "1", "--num_steps", "2", "--output", "one.npy")
    sample = (str(tmp_path / "target/bin/efficientdm"), "sample", *options)
    refused = python(*sample)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "the integer core was not built, for lack of a C++ compiler at installation" in refused.stderr
    assert not (tmp_path / "empty" / "one.npy").exists()
    assert python(*sample, "--runtime", "simulated").returncode == 0
    assert np.load(tmp_path / "empty" / "one.npy").shape == (1, 28, 28)


def test_a_wheel_has_all_that_the_commands_need_in_an_empty_folder(install, tmp_path):
    python = install()
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"ddpm_mnist/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert len(configs) >= 4
    assert names >= configs | {f"{package}/py.typed" for package in PACKAGES}
    assert names >= {"eval/report.html.j2", "quant/integer/core/core.cpp"}
    assert names >= {f"ddpm_mnist/pretrained/{name}/model.safetensors" for name in STUDENTS}
    assert not any(name.startswith(("tests/", "configs/", "runs/")) for name in names)

    assert f"this processor runs {next(iter(available()))}" in python("-m", "quant.integer").stdout
    where = python("-c", "import quant.integer as package; print(package.__file__)").stdout
    assert where.startswith(str(tmp_path / "target"))
    commands = [
        ["run", *(word for name, value in TINY.items() for word in (f"--{name}", str(value)))],
        ["sample", "--model", "run", "--num-images", "2", "--output", "two.npy"],
        ["grid", "--models", "teacher", "run", "--columns", "2", "--num-steps", "2"],
        ["fid", "--model", "run", "--num-images", "12", "--num-steps", "2"],
        ["export", "--model", "run", "--format", "packed", "--output", "packed"],
        ["export", "--model", "run", "--output", "onnx"],
        ["teacher", "--config", "fashion", "--data", "nothing"],
    ]
    answer = python("-c", COMMANDS, json.dumps(commands))
    exits = [line for line in answer.stdout.splitlines() if line.startswith("exit ")]
    assert exits == [*["exit 0"] * 6, "exit 2"], answer.stderr + answer.stdout
    assert 'data "nothing" does not exist' in answer.stderr
    made = tmp_path / "empty"
    assert np.load(made / "two.npy").any()
    for name in ("run/report.html", "grid.png", "fid.json", "packed/model.safetensors", "onnx/model.onnx"):
        assert (made / name).stat().st_size > 0, name


def test_what_the_lab_alone_needs_is_not_needed_to_draw(tmp_path):
    """Modules that cannot be imported stand for an installation without the extra."""
    without = f"import sys; sys.modules |= dict.fromkeys({[*EXTRAS, 'scipy']})\n{COMMANDS}"
    commands = [
        ["sample", "--model", "w4a4", "--num-images", "1", "--num-steps", "2", "--output", str(tmp_path / "a.png")],
        ["fid", "--model", "w4a4"],
        ["export", "--model", "w4a4", "--output", str(tmp_path / "onnx")],
    ]
    answer = subprocess.run([sys.executable, "-c", without, json.dumps(commands)], capture_output=True, text=True)
    exits = [line for line in answer.stdout.splitlines() if line.startswith("exit")]
    assert exits == ["exit 0", "exit 2", "exit 2"], answer.stderr
    fid, export = answer.stderr.splitlines()
    assert fid.startswith("efficientdm fid: this needs torch")  # torchvision or torchmetrics
    assert fid.endswith("which is not installed: pip install 'efficientdm[lab]'")
    assert export.startswith("efficientdm export: this needs onnx")
    assert export.endswith("which is not installed: pip install 'efficientdm[export]'")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.png"]
