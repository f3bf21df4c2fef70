"""The package, installed from a copy of its sources: with a C++ compiler, and without."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quant.integer.core import available

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "ddpm_mnist", "quant", "eval", "finetune")


@pytest.fixture
def install(tmp_path):
    """Install into a folder, with that C++ compiler or the usual one; a function that runs Python there."""

    def run_install(compiler=None):
        sources, target = tmp_path / "sources", tmp_path / "target"
        for name in SOURCES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            (sources / name).parent.mkdir(exist_ok=True)
            copy(ROOT / name, sources / name)
        for library in (sources / "quant" / "integer").glob("_core_*"):
            library.unlink()
        environment = {**os.environ, "PYTHONPATH": str(target)}
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(target)]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, str(sources)],
            env={**environment, **({"CXX": compiler, "CC": compiler} if compiler else {})}, check=True,
        )  # fmt: skip

        def run_python(*arguments):
            command = [sys.executable, *arguments]
            return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

        return run_python

    return run_install


def test_without_a_compiler_the_install_goes_through_and_says_what_is_missing(install, tmp_path):
    python = install("/bin/false")
    told = python("-m", "quant.integer").stdout
    assert "not built, for lack of a C++ compiler. Students run simulated in float" in told
    options = ("--model", "w4a4", "--num_images", "1", "--num_steps", "2", "--output", "one.npy")
    sample = ("target/bin/efficientdm", "sample", *options)
    refused = python(*sample)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "the integer core was not built, for lack of a C++ compiler at installation" in refused.stderr
    assert not (tmp_path / "one.npy").exists()
    assert python(*sample, "--runtime", "simulated").returncode == 0
    assert np.load(tmp_path / "one.npy").shape == (1, 28, 28)


def test_an_installed_package_draws_without_its_sources(install, tmp_path):
    python = install()
    assert f"this processor runs {next(iter(available()))}" in python("-m", "quant.integer").stdout
    where = python("-c", "import quant.integer as package; print(package.__file__)").stdout
    assert where.startswith(str(tmp_path / "target"))
    drawn = python("target/bin/efficientdm", "sample", "--model", "w2a4", "--num_images", "2", "--output", "two.npy")
    assert drawn.returncode == 0, drawn.stderr
    assert np.load(tmp_path / "two.npy").any()
