"""Each network of `structures.py` through the whole path; docs/structures.md is the table that comes out.

`EFFICIENTDM_WRITE_DOCS=1 pytest tests/quant/test_structures.py` exports all of them and writes the table anew; without
that, ONNX, whose export takes most of the time, is tried for those of `EXPORTED`.
"""

import os
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from structures import STRUCTURES, conditions_of, make, size_of

from finetune.distill import DistillConfig, parameter_groups
from quant import QuantConfig, QuantizedUNet, calibrate, freeze, quantize, to_integer
from quant.export import export_onnx

DOCS = Path(__file__).parents[2] / "docs" / "structures.md"
EXPORTED = (
    "openai/diffusers-cd_imagenet64 (consistency model)",
    "google/ncsnpp-celebahq-256 (Skip blocks, Fourier times)",
    "tiny Stable Diffusion (UNet2DConditionModel)",
)
WRITES = bool(os.environ.get("EFFICIENTDM_WRITE_DOCS"))
COUNT = 3  # states at each timestep


@cache
def calibrated(name):
    """A student of W5A8, what its network answers to the states, and what `quantize` warned of."""
    unet = make(name)
    timesteps = [20.5, 0.7] if unet.config.time_embedding_type == "fourier" else [600, 30]
    states = {t: torch.randn(COUNT, unet.config.in_channels, *size_of(unet)) for t in timesteps}
    conditions = conditions_of(unet, COUNT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        student = quantize(unet, QuantConfig(5, 8, rank=2, search="min-max"), timesteps)
    calibrate(student, states, **conditions)
    x, t = torch.cat(list(states.values())), torch.tensor(timesteps).repeat_interleave(COUNT)
    inputs = {"sample": x, "timestep": t, **{name: torch.cat([rows, rows]) for name, rows in conditions.items()}}
    with torch.no_grad():
        target = unet(**inputs).sample
    warned = [str(warning.message) for warning in caught if "but:" in str(warning.message)]
    return SimpleNamespace(student=student, inputs=inputs, target=target, warned=warned)


def rms(x):
    return x.square().mean().sqrt().item()


def table():
    """The rows of docs/structures.md that stand there."""
    lines = DOCS.read_text().splitlines() if DOCS.exists() else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture(scope="module")
def told():
    """A function that is told what stands in a cell: with `WRITES` it becomes the table, else it must be there."""
    rows = {name: {} for name in STRUCTURES}

    def tell(name, column, cell):
        rows[name][column] = cell
        assert WRITES or table()[name][column] == cell

    yield tell
    if WRITES:
        head, *_ = DOCS.read_text().partition("| structure |")
        lines = ["| structure | simulated | integers | ONNX |", "|---|---|---|---|"]
        lines += [f"| {name} | yes | {cells[1]} | {cells[2]} |" for name, cells in rows.items()]
        DOCS.write_text(head + "\n".join(lines) + "\n")


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_learns_is_saved_and_runs_as_the_table_says(name, tmp_path, told):
    case = calibrated(name)
    student, inputs, target = case.student, case.inputs, case.target
    groups = parameter_groups(student, DistillConfig())
    learned = {parameter for group in groups for parameter in group["params"]}
    norms = [module for module in student.modules() if type(module).__name__.endswith("Norm")]
    assert learned.issuperset(parameter for norm in norms for parameter in norm.parameters(recurse=False))
    optimizer = torch.optim.Adam([{**group, "lr": group["peak_lr"]} for group in groups])
    before = student.unet.conv_in.lora_b.clone()
    (student(**inputs).sample - target).square().mean().backward()
    optimizer.step()
    assert not torch.equal(student.unet.conv_in.lora_b, before)

    frozen = freeze(student)
    frozen.save_pretrained(tmp_path)
    loaded = QuantizedUNet.from_pretrained(tmp_path)
    with torch.no_grad():
        simulated = frozen(**inputs).sample
        assert torch.equal(loaded(**inputs).sample, simulated)
    error = rms(simulated - target)
    assert 0 < error < 0.3 * rms(target)
    told(name, 0, "yes")

    try:
        integer = to_integer(loaded)
    except ValueError as refusal:
        assert case.warned == [f"this student can be simulated and exported, but: {refusal}"]
        told(name, 1, str(refusal))
    else:
        assert not case.warned
        assert rms(integer(**inputs).sample - simulated) < 0.5 * error
        told(name, 1, "yes")


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURES if WRITES else EXPORTED)
def test_a_structure_is_exported_as_the_table_says(name, tmp_path, told):
    case, path = calibrated(name), tmp_path / "model.onnx"
    frozen = freeze(case.student)
    try:
        export_onnx(frozen, path)
    except ValueError as refusal:
        told(name, 2, str(refusal))
        return
    levels = onnxruntime.GraphOptimizationLevel
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.intra_op_num_threads = level, 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        kinds = {entry.name: types[entry.type] for entry in session.get_inputs()}
        for rows in (slice(COUNT), slice(COUNT, None)):
            inputs = {name: values[rows] for name, values in case.inputs.items()}
            with torch.no_grad():
                simulated = frozen(**inputs).sample
            feed = {**inputs, "timestep": inputs["timestep"][0]}
            (ours,) = session.run(None, {name: np.asarray(feed[name], kind) for name, kind in kinds.items()})
            assert rms(torch.from_numpy(ours) - simulated) < 0.5 * rms(simulated - case.target[rows])
    told(name, 2, "yes")


def test_the_table_has_no_other_rows():
    assert table().keys() == {"structure", *STRUCTURES}
