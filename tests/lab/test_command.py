import dataclasses
import importlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ddpm_mnist.lab import processes
from ddpm_mnist.lab.command import run_command
from finetune.cli import COMMANDS, main
from finetune.config import RunConfig


def load(name):
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    return getattr(module, command.function), getattr(module, command.config)


def leaves(config_class, prefix=""):
    """The names of the options that the fields of a config are."""
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(field.type):
            yield from leaves(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_in_words(name, capsys):
    function, config_class = load(name)
    with pytest.raises(SystemExit) as caught:
        run_command("prog", function, config_class, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "Args:" not in text, "those of the function are no options"
    options = re.findall(r"^  --([\w.]+) (\S+).*\n((?:      .+\n)+)", text, re.MULTILINE)
    explained = {option: (kind, " ".join(words.split())) for option, kind, words in options}
    assert explained.keys() == {*leaves(config_class), "config", "print_config"}
    for option, (kind, words) in explained.items():
        if option not in ("config", "print_config"):
            assert re.search(r"\w.*[.)] (Default: .+|Required)\.$", words), (option, words)
        if kind in ("INTEGER", "NUMBER") and option.rpartition(".")[2] not in ("image_size", "null_class"):
            assert re.search(r"at least|above| to |from 1|2…8|divide", words), f"{option} says no range: {words}"
    for inside in ("<class", "Union", "(type:", "Raises", "PosixPath", "None:", "= <", "Path to a configuration"):
        assert inside not in text
    for line in text.splitlines():
        assert "(self" not in line
        assert not re.match(r"\w+Config\(", line)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("fid", ["--num_image", "3"], "no option --num_image; did you mean --num_images?"),
        ("fid", ["--num-image=3"], "no option --num_image; did you mean --num_images?"),
        ("run", ["--weight_bits", "3"], "no option --weight_bits; did you mean --student.weight_bits?"),
        ("run", ["--student.wieght_bits", "3"], "no option --student.wieght_bits; did you mean --student.weight_bits?"),
        ("run", ["--config", "{yaml}"], "wrong.yaml: no option --student.weight_bit; did you mean --student.weight"),
        ("ladder", ["--zzz", "3"], "no option --zzz; --help lists them"),
    ],
)
def test_an_unknown_option_proposes_the_nearest(name, words, message, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text("student:\n  weight_bit: 3\n")
    with pytest.raises(SystemExit) as caught:
        run_command("prog", *load(name), [word.format(yaml=tmp_path / "wrong.yaml") for word in words])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["efficientdm", "run"]
from finetune.cli import main
main()
"""


def test_an_interrupt_while_importing_is_one_line():
    result = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "efficientdm run: interrupted\n")


def test_an_unknown_command_proposes_the_nearest(monkeypatch, capsys):
    for words, code, out in (
        (["rnu"], 2, 'efficientdm: no command "rnu"; did you mean "run"?\n'),
        (["--version"], 0, "efficientdm 0.1.0\n"),
    ):
        monkeypatch.setattr("sys.argv", ["efficientdm", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == code
        captured = capsys.readouterr()
        assert captured.out + captured.err == out


def test_the_module_is_the_program():
    result = subprocess.run([sys.executable, "-m", "finetune.cli", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "efficientdm 0.1.0\n", "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--num_images", "abc"], "--num_images must be a whole number, not abc"),
        (["--sampler.eps_scale", "x"], "--sampler.eps_scale must be a number or null, not x"),
        (["--sampler.labels", "3"], "--sampler.labels must be a list such as [1,2], not 3"),
        (["--student", "4"], "--student is a section: its options are --student.NAME"),
        (["--distill.lr_adapters", "1e999"], "distill.lr_adapters must be a number, not inf"),
        (["--num_images", "100000000000"], "num_images must be at most 2^31, not 100000000000"),
        (["--lr_factor", "2"], 'lr_factor must be 1 but for the recipe "published"'),
    ],
)
def test_a_wrong_value_is_told_in_the_options_own_words(words, line, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("prog", lambda config: None, RunConfig, words)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"prog: {line}\n"


def said_in(locale, *commands):
    """What becomes of the words of each command, in a process of that locale without UTF-8 mode: exit code, error."""
    variables = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = (
        "import sys; from dataclasses import dataclass; from pathlib import Path\n"
        "from ddpm_mnist.lab.command import run_command; from ddpm_mnist.lab.write import write_text\n"
        "@dataclass\n"
        "class Config:\n"
        "    output: Path = Path('a')\n"
        "for option, value in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    try:\n"
        "        words, code = [option, value], 0\n"
        "        run_command('prog', lambda config: write_text(config.output, 'written'), Config, words)\n"
        "    except SystemExit as end:\n"
        "        code = end.code\n"
        "    print('exit', code, file=sys.stderr)\n"
    )
    words = [word for command in commands for word in command]
    process = [sys.executable, "-c", program, *words]
    ended = subprocess.run(process, env={**os.environ, **variables}, capture_output=True, text=True)
    return [(int(code), error) for error, code in re.findall(r"((?:prog.*\n)?)exit (\d)\n", ended.stderr)]


def test_an_output_is_written_or_the_encoding_that_lacks_its_letters_is_named(tmp_path):
    written = [f"{tmp_path}/ş{name}" for name in "12"]
    for name, text in (("named", f"output: {written[1]}\n"), ("comment", f"# ş\noutput: {tmp_path}/b\n")):
        (tmp_path / name).write_text(text, "utf-8")
    commands = ["--output", written[0]], ["--config", str(tmp_path / "named")], ["--config", str(tmp_path / "comment")]
    *refused, in_a_comment_alone = said_in("C", *commands)
    assert len(refused) == 2
    for code, error in refused:
        assert code == 2
        assert "is not in the locale's encoding, ascii: set PYTHONUTF8=1, or take another name" in error
    assert in_a_comment_alone == (0, "")

    *taken, (code, error) = said_in("C.UTF-8", *commands, ["--output", os.fsencode(tmp_path) + b"/\xff"])
    assert taken == [(0, "")] * 3
    assert [Path(path).read_text() for path in (*written, tmp_path / "b")] == ["written"] * 3
    assert code == 2
    assert "is not in the locale's encoding, utf-8: take another name" in error


@pytest.mark.parametrize(
    "words", [["--model", ""], ["--model="], ["--config", "EMPTY"]], ids=["word", "equals", "file"]
)
def test_an_empty_value_is_refused(words, tmp_path, refuse):
    (tmp_path / "empty.yaml").write_text('model: ""\n')
    words = [word.replace("EMPTY", str(tmp_path / "empty.yaml")) for word in words]
    assert "a value is missing, where " in refuse(*load("sample"), words)


def test_the_home_folder_is_where_its_sign_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("output: ~/b.npy\n")
    seen = []
    for words in (["--output=~/a.npy"], ["--config", str(tmp_path / "c.yaml")], ["--model", "~/m"]):
        run_command("prog", seen.append, load("sample")[1], words)
    assert [config.output for config in seen[:2]] == [tmp_path / "a.npy", tmp_path / "b.npy"]
    assert seen[2].model == str(tmp_path / "m")


def test_a_config_may_come_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    thread = threading.Thread(target=(tmp_path / "pipe").write_text, args=["num_images: 3\n"])
    thread.start()
    seen = []
    run_command("prog", seen.append, load("sample")[1], ["--config", str(tmp_path / "pipe")])
    thread.join()
    assert seen[0].num_images == 3


def test_a_file_of_comments_changes_nothing_and_null_is_no_number(tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    (tmp_path / "null.yaml").write_text("seed: null\n")
    assert (
        run_command("prog", lambda config: config, RunConfig, ["--config", str(tmp_path / "empty.yaml")]) == RunConfig()
    )
    with pytest.raises(SystemExit):
        run_command("prog", lambda config: None, RunConfig, ["--config", str(tmp_path / "null.yaml")])
    assert "seed must be a whole number, not null" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "reason"),
    [({"WORLD_SIZE": "2", "RANK": "5"}, "process 5 of 2"), ({"WORLD_SIZE": "abc"}, "invalid literal for int")],
)
def test_what_a_launcher_left_behind_is_named(variables, reason, monkeypatch, capsys):
    monkeypatch.setattr(processes, "_alone", False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        run_command("prog", lambda config: None, RunConfig, [])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"prog: the environment's WORLD_SIZE, RANK and the like do not fit each other ({reason}")
    assert said.endswith("unset them, or start with accelerate launch\n")


CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.25 GiB of which 9.25 GiB is"
MPS = "MPS backend out of memory (MPS allocated: 6.53 GB, max allowed: 9.07 GB). Tried to allocate 4.00 GB on a pool."


def accelerator(message):
    raise torch.OutOfMemoryError(message)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda config: torch.empty(1 << 50), r"can't allocate memory: you tried to allocate \d+ bytes"),
        (lambda config: torch.empty(1 << 40, 1 << 40), "Storage size calculation overflowed"),
        (lambda config: accelerator(CUDA), "CUDA out of memory. Tried to allocate 20.00 GiB"),
        (lambda config: accelerator(MPS), r"MPS backend out of memory \(.*\). Tried to allocate 4.00 GB"),
        (lambda config: accelerator("HIP out of memory"), "HIP out of memory"),
    ],
)
def test_memory_that_torch_cannot_have_is_one_line(ask, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command("prog", ask, RunConfig, [])
    assert ended.value.code == 2
    assert re.fullmatch(rf"prog: there is not enough memory \({message}\)\n", capsys.readouterr().err)


@pytest.mark.parametrize("words", [["--batch_size", str(1 << 63)], ["--sampler.labels", f"[1, {1 << 70}]"]])
def test_integers_of_more_than_64_bits_are_refused(words, refuse):
    assert re.search(
        r"prog: (batch_size|sampler.labels) must lie within ±2\^63, not \d+", refuse(print, RunConfig, words)
    )


def test_the_help_tells_the_defaults_of_the_usual_config(capsys):
    with pytest.raises(SystemExit):
        run_command("prog", lambda config: None, RunConfig, ["--help"], default="quick")
    assert "Default: runs/quick." in capsys.readouterr().out
