"""docs/tutorial.ipynb: the notebook runs from top to bottom, and its seven steps are those of the ladder."""

import base64
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
STEPS = ["1 teacher", "2 min-max", "3 QALoRA", "4 scale-aware", "5 TALSQ", "6 rollouts", "7 whole"]
TINY = """
output: {output}
teacher: {teacher}
sampler: {{num_steps: 3}}
student: {{rank: 2}}
calibration_trajectories: 2
distill: {{batch_size: 2}}
"""
# Runs after the notebook's own cells, in its kernel.
COMPARE = """
from finetune.ladder import STEPS, rung_config

learned = {"step3": one_rate, "step4": rate_per_layer, "step5": rate_per_layer, "step6": fixed}
students = {"step2": naive, "step3": qalora, "step4": scale_aware, "step5": talsq, "step6": rollout, "step7": whole}
for step, student in students.items():
    rung = rung_config(recipe, STEPS[step], folder)
    assert student.quant_config == rung.student, step
    assert learned.get(step, rung.distill) == rung.distill, step
assert rung_config(recipe, STEPS["step7"], recipe.output) == recipe
"""


def outputs(notebook, kind):
    """What its cells show, of that MIME type."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output["data"][kind] for output in shown if kind in output.get("data", {})]


def scores(notebook):
    """The rows of its table: each step's name, and its scores as text."""
    (table,) = outputs(notebook, "text/markdown")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {name: cells for name, *cells in rows}


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(PAGE, 4)


def test_it_runs_from_top_to_bottom_and_its_steps_are_the_ladders(stored, write_config, tmp_path):
    notebook = nbformat.from_dict(stored)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    values = {"CONFIG": str(write_config(tmp_path, TINY)), "UPDATES": 2, "TRAJECTORIES": 4, "NUM_IMAGES": 40}
    assert all(f"{name} = " in parameters.source for name in values)
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.append(nbformat.v4.new_code_cell(COMPARE))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    patience = {"timeout": 600, "startup_timeout": 600}  # of each cell, and of the kernel: other work may be in the way
    NotebookClient(notebook, **patience, resources={"metadata": {"path": str(tmp_path)}}).execute()
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert len(outputs(notebook, "image/png")) == 7
    found = scores(notebook)
    assert list(found) == STEPS
    for fid, same_digit, mse, fid_to_teacher in found.values():
        for score in (fid, same_digit, mse, fid_to_teacher):
            value, half = map(float, score.split(" ± "))
            assert value >= 0 <= half
    _, *to_teacher = found["1 teacher"]
    assert [float(score.split()[0]) for score in to_teacher] == [1, 0, 0]
    assert all(float(mse.split()[0]) > 0 for name, (_, _, mse, _) in found.items() if name != "1 teacher")


def test_the_docs_have_its_pictures_and_its_table(stored):
    pictures = [base64.b64decode(picture) for picture in outputs(stored, "image/png")]
    assert len(pictures) == 7
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert sum(map(len, pictures)) < 600_000
    assert list(scores(stored)) == STEPS
