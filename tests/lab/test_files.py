"""Whatever stands in a file that is read back: it is read, or refused in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddpm_mnist.lab import InputError, one_line
from ddpm_mnist.lab.read import parse_json, read_json, read_state

MUTANTS = Path(__file__).parent / "mutants.py"


@pytest.mark.slow
def test_mutants_are_read_or_refused_in_one_line():
    words = [sys.executable, str(MUTANTS), "--child", "--count", "150", "--seed", "7"]
    answer = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert answer.returncode == 0, answer.stderr
    rows = [json.loads(line) for line in answer.stdout.splitlines()]
    assert len(rows) == 150
    assert [row for row in rows if row[3] not in ("read", "refused")] == []
    assert {row[0] for row in rows if row[3] == "refused"} >= {"student", "teacher", "state", "rung", "npy", "config"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "a key is there twice"),
        ("[" * 100_000, "recursion"),
        ("1" + "0" * 400, "too large a number"),
        ("1e999", "too large a number"),
        ('"\ud800', "is not JSON"),
    ],
)
def test_json_that_lies_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(text, "a.json")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1200


def test_json_has_a_largest_size(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("[1, 2]")
    assert read_json(tmp_path / "a.json") == [1, 2]
    with (tmp_path / "a.json").open("ab") as file:
        file.truncate(17 << 20)
    with pytest.raises(ValueError, match="more than 16,777,216 bytes"):
        read_json(tmp_path / "a.json")


def test_a_message_is_one_line_whatever_it_quotes():
    assert one_line("a\nb\x1b[2J\0c\u2028d") == "a b [2J c d"
    assert len(one_line("x" * 10_000)) < 1010
    assert str(InputError("a\nb")) == "a b"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1).expand(10**12), "larger than what is there"),
        (torch.tensor(float("nan")), "not finite"),
        (torch.zeros(2, device="meta"), "Tensor does not belong there"),
        ({1, 2}, "set does not belong there"),
        (torch.nn.Parameter(torch.zeros(1)), "Parameter does not belong there"),
    ],
)
def test_a_state_holds_plain_values(tmp_path, value, message):
    honest = {"x": torch.arange(3), "y": [1, (2.5, "a", None)]}
    torch.save(honest, tmp_path / "a.pt")
    assert str(read_state(tmp_path / "a.pt")) == str(honest)
    torch.save({**honest, "z": [value]}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        read_state(tmp_path / "a.pt")
