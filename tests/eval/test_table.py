import dataclasses
import math

import pytest

from eval import plots
from eval.fid import print_scores
from eval.grid import fid_label
from eval.metrics import OF_IMAGES, TO_TEACHER, Score
from eval.report import write_report
from eval.table import Row, bits_label, markdown, number, score_table, summarise_scores

FLOOR = {"fid": 0.21, "kid": 0.0005, "precision": 0.9, "num_images": 10_000}


def make_score(model="student", weight_bits=4.0, act_bits=4, num_images=10_000, **values):
    """A score in which everything is 0.5 ± 0.04, but for `values`."""
    fields = dict.fromkeys((*OF_IMAGES, *TO_TEACHER), 0.5)
    fields |= {f"{name}_interval": [0.46, 0.54] for name in (*OF_IMAGES, *TO_TEACHER)}
    rest = {
        "num_steps": 20,
        "solver": "dpm++",
        "eps_scale": 1.0,
        "eta": 0.0,
        "labels": [],
        "guidance_scale": 1.0,
        "seed": 0,
    }
    rest |= {"seconds": 8.0, "features": "abc", "features_second": "def", "runtime": "integer"}
    return Score(model, weight_bits, act_bits, num_images=num_images, **{**fields, **rest, **values})


def cells(scores, floor=None):
    headings, rows = score_table(scores, floor)
    assert all(len(row) == len(headings) for row in rows)
    return headings, {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(
    ("weight_bits", "act_bits", "label"),
    [(32, 32, "32"), (32.0, 32, "32"), (4, 4, "W4A4"), (2.0, 8, "W2A8"), (1.58, 4, "W1.58A4"), (1, 8, "W1A8")],
)
def test_bits_have_one_label(weight_bits, act_bits, label):
    assert bits_label(weight_bits, act_bits) == label


def test_a_number_with_half_its_interval():
    assert number(2.553, 2, [2.513, 2.593]) == "2.55 ± 0.04"
    assert number(2.553, 2) == "2.55"
    assert number(None, 2) == number(math.nan, 2) == "–"


def test_a_column_per_model_and_a_row_per_score():
    scores = [make_score("teacher", 32, 32, fid=2.5, fid_interval=None), make_score(weight_bits=1.58, fid_second=None)]
    headings, rows = cells(scores)
    assert headings == ["", "teacher", "student"]
    assert rows["bits"] == ["32", "W1.58A4"]
    assert rows["FID ↓"] == ["2.50", "0.50 ± 0.04"]
    assert rows["FID, second network ↓"] == ["0.50 ± 0.04", "–"]
    assert rows["same digit ↑"][1] == "0.500 ± 0.040"
    assert "classifier's accuracy ↑" not in rows
    worth = make_score(classifier_accuracy=0.97, classifier_accuracy_of_real=0.98)
    assert cells([worth])[1]["classifier's accuracy ↑"] == ["0.9700"]
    assert cells([worth])[1]["from real ones"] == ["0.9800"]


def test_the_floor_is_a_column_at_its_own_number_of_images_alone(capsys):
    headings, rows = cells([make_score()], FLOOR)
    assert headings[-1] == "real test images"
    assert (rows["FID ↓"][-1], rows["precision ↑"][-1]) == ("0.21", "0.900")
    assert (rows["recall ↑"][-1], rows["bits"][-1]) == ("–", "")
    print_scores([make_score()], FLOOR)
    out = capsys.readouterr().out
    assert "0.50 ± 0.04" in out
    assert "0.21" in out
    assert "a floor for as many images" not in out
    few = [make_score(num_images=2000)]
    assert cells(few, FLOOR)[0] == ["", "student"]
    print_scores(few, FLOOR)
    note = "The 10,000 real test images score FID 0.21; KID 0.0005; precision 0.900: a floor for as many images"
    assert note in " ".join(capsys.readouterr().out.split())


def test_the_report_shows_scores_with_their_intervals_and_the_floor(tmp_path):
    picture = plots.loss_curve([1, 2], [2.0, 1.0])
    for floor, needle in ((FLOOR, '<th scope="row">real test images'), (None, '<th scope="row">student')):
        write_report(
            tmp_path / "report.html", title="t", facts=[], scores=[make_score()], floor=floor,
            grid=picture, loss=picture, step_sizes=picture, layers=[], config="",
        )  # fmt: skip
        text = (tmp_path / "report.html").read_text()
        assert needle in text
        assert ("real test images" in text) == (floor is not None)
        for needle in ("<td>0.50 ± 0.04", "<td>0.500 ± 0.040", "<td>W4A4", "<dt>Same digit", "<dt>Precision, recall"):
            assert needle in text


def test_the_ladder_has_spreads_where_there_are_several_distillations():
    scores = [dataclasses.asdict(make_score("teacher", 32, 32, fid=0.25))]
    scores += [
        dataclasses.asdict(make_score("w1", 1.0, fid=fid, fid_second=fid + 1, same_digit=fid / 10, recall=fid / 8))
        for fid in (3.0, 4.0, 5.0)
    ]
    scores += [dataclasses.asdict(make_score("other", fid_second=None, precision=None))]
    teacher, row, other = summarise_scores(scores)
    assert (row.bits, row.fid, row.spread, row.ratio) == ("W1A4", 4.0, 1.0, 16.0)
    assert (row.fid_second, row.fid_second_spread, row.recall) == (5.0, 1.0, 0.5)
    assert (row.same_digit, row.same_digit_spread) == (pytest.approx(0.4), pytest.approx(0.1))
    assert math.isnan(other.fid_second)
    assert math.isnan(teacher.same_digit_spread)
    lines = markdown([teacher, row, other], 10_000, 0, "dpm++").splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    start = "| w1 | W1A4 | 20 | 3 | 4.00 ± 1.00 | 16.00 | 5.00 ± 1.00 | 0.400 ± 0.100 | 0.500 | 0.500 |"
    assert any(line.startswith(start) for line in lines)
    assert any(line.startswith("| other | W4A4 | 20 | 1 | 0.50 | 2.00 | – | 0.500 | – |") for line in lines)


def test_bits_stand_in_the_order_of_their_product():
    bits = {"w2a4": "W2A4", "w1a8": "W1A8", "w1.58a4": "W1.58A4", "full": "W4A4", "w1a4": "W1A4"}
    values = dict.fromkeys((field.name for field in dataclasses.fields(Row)), 1.0)
    rows = [Row(**{**values, "name": name, "bits": label}) for name, label in [("teacher", "32"), *bits.items()]]
    labels = [label.get_text() for label in plots.bits_chart(rows, []).axes[0].get_xticklabels()]
    assert labels == ["W1A4", "W1.58A4", "W1A8", "W2A4", "W4A4"]


def test_a_label_of_a_row_of_images():
    assert fid_label(2.5, 10_000) == "FID 2.50 (10,000)"
    assert fid_label(2.5, 10_000, 0.956) == "FID 2.50 (10,000)\nsame digit 96%"
