import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from ddpm_mnist.lab import InputError
from ddpm_mnist.lab import terminal as terminal_module
from ddpm_mnist.lab.locks import lock_file, lock_folder, unlock_folder
from ddpm_mnist.lab.run_state import RunState
from ddpm_mnist.lab.terminal import progress, span
from ddpm_mnist.lab.write import prepare_output, write_bytes, write_text
from ddpm_mnist.unet import save_teacher


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what is added to clock[0]."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_without_a_terminal_progress_is_a_line_for_every_tenth(clock, capsys):
    with progress("distilling", 300) as advance:
        for done in range(1, 301):
            clock[0] += 0.5
            if done % 3 == 0:
                advance(done, f"loss {1 / done:.2f}")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "distilling 0/300"
    assert lines[1] == "distilling 30/300, 2 min 15 s left, loss 0.03"
    assert lines[9] == "distilling 270/300, 15 s left, loss 0.00"
    assert lines[10:] == ["distilling done in 2 min 30 s, loss 0.00"]


def test_a_job_that_goes_on_counts_its_own_time(clock, capsys):
    with progress("distilling", 300, completed=150) as advance:
        clock[0] += 100
        advance(200)
    assert capsys.readouterr().out.splitlines()[:2] == ["distilling 150/300", "distilling 200/300, 3 min 20 s left"]


def test_a_job_of_seconds_has_a_first_and_a_last_line(clock, capsys):
    with progress("sampling", 10) as advance:
        for done in range(1, 11):
            clock[0] += 0.4
            advance(done)
    with progress("distilling", 300, completed=300):
        pass
    assert capsys.readouterr().out.splitlines() == ["sampling 0/10", "sampling done in 4 s"]


def test_a_job_that_fails_has_no_last_line(capsys):
    with pytest.raises(KeyError), progress("sampling", 10):
        raise KeyError
    assert capsys.readouterr().out == "sampling 0/10\n"


def test_in_a_terminal_progress_is_a_bar(monkeypatch, capsys):
    terminal = partial(Console, force_terminal=True, width=120)
    monkeypatch.setattr(terminal_module, "Console", terminal)
    monkeypatch.setattr("rich.progress.get_console", lambda: terminal())
    with progress("distilling", 10) as advance:
        advance(10, "loss 0.5")
    out = capsys.readouterr().out
    assert "━" in out
    assert "10/10" in out
    assert "loss 0.5" in out
    assert "done in" not in out


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (80, "1 min 20 s"), (7500, "2 h 5 min")]
)
def test_a_span_of_time_in_words(seconds, text):
    assert span(seconds) == text


def hold(folder, pipe):
    try:
        lock_folder(folder)
        pipe.send("in")
    except InputError as error:
        pipe.send(str(error))
    pipe.recv()


def test_a_folder_has_one_process_at_a_time(tmp_path):
    fork, processes = multiprocessing.get_context("fork"), []

    def enter():
        ours, theirs = fork.Pipe()
        processes.append(fork.Process(target=hold, args=(tmp_path, theirs), daemon=True))
        processes[-1].start()
        return ours.recv()

    assert enter() == "in"
    refusal = f"process {processes[0].pid} is writing into {tmp_path}: wait for it, or choose another folder"
    assert enter() == refusal
    with pytest.raises(InputError, match=refusal):
        RunState(tmp_path, {})
    assert not (tmp_path / "log.jsonl").exists()
    processes[0].kill()
    processes[0].join()
    assert processes[0].exitcode == -signal.SIGKILL
    assert enter() == "in"
    for process in processes[1:]:
        process.kill()
        process.join()
    lock_folder(tmp_path)
    lock_folder(tmp_path)  # its own is no other's


def test_a_run_that_is_finished_leaves_its_folder_to_others(tmp_path):
    run = RunState(tmp_path, {})
    with (tmp_path / ".lock").open() as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        run.finish()
        assert not (tmp_path / ".lock").exists()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_a_killed_process_had_half_written_is_taken_away(tmp_path):
    other = RunState(tmp_path / "others" / "run", {})
    left = [
        tmp_path / name for name in ("state/.latest.pt.123.half", ".metrics.json.7.half", "rung/0/.images.pt.8.half")
    ]
    kept = [tmp_path / name for name in (".bashrc.20240101", "x.half", "samples/1.20", "others/run/.log.jsonl.3.half")]
    for path in (*left, *kept):
        write_bytes(path, b"half a st")
    (tmp_path / ".abcdefgh.half" / "unet").mkdir(parents=True)  # a teacher's
    assert RunState(tmp_path, {}).state is None
    assert not [path for path in left if path.exists()]
    assert not (tmp_path / ".abcdefgh.half").exists()
    assert all(path.exists() for path in kept)
    other.finish()


def test_the_names_of_half_written_files_are_those_that_are_taken_away(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(path, target):
        shutil.copy(path, tmp_path / "copy" / path.name)
        raise Killed

    (tmp_path / "copy").mkdir()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", die)
        write_bytes(tmp_path / "x.json", b"{}")
    assert len(list((tmp_path / "copy").iterdir())) == 1
    RunState(tmp_path / "copy", {}).finish()
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["log.jsonl"]


def test_a_folder_that_was_taken_away_is_refused_once_and_may_then_be_made_anew(tmp_path):
    run = RunState(tmp_path / "run", {})
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"cannot write .*run was deleted"):
        run.save({})
    assert not (tmp_path / "run").exists()
    RunState(tmp_path / "run", {}).finish()
    run = RunState(tmp_path / "run", {})
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()  # by someone else
    with pytest.raises(InputError, match="was deleted"):
        write_bytes(tmp_path / "run" / "sub" / "x", b"")
    assert not list((tmp_path / "run").iterdir())


def test_a_job_may_begin_where_an_earlier_one_of_this_process_had_its_folder_taken_away(tmp_path):
    RunState(tmp_path / "ladder" / "run", {})  # never finished, as after an error
    shutil.rmtree(tmp_path / "ladder")
    RunState(tmp_path / "ladder" / "run", {}).finish()
    lock_folder(tmp_path / "ladder")
    (tmp_path / "ladder").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="ladder was deleted"):  # between two rungs
        RunState(tmp_path / "ladder" / "next", {})
    assert not (tmp_path / "ladder").exists()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_harms_nothing(small_disk):
    run = RunState(small_disk / "run", {"seed": 0})
    run.log(update=1, loss=0.5)
    run.save({"update": 1})
    write_bytes(small_disk / "x.json", b"old")
    before = {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file()}
    with pytest.raises(OSError, match="No space left"), (small_disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    for write, name in (
        (lambda: write_bytes(small_disk / "x.json", bytes(9000)), "x.json"),
        (lambda: run.save({"update": 2, "more": bytes(9000).decode()}), "latest.pt"),
        (lambda: [run.log(update=2, text="x" * 5000)], "log.jsonl"),
    ):
        with pytest.raises(InputError, match=rf"cannot write .*{name}: No space left on device"):
            write()
    (small_disk / "filler").unlink()
    run.log_path.write_bytes(before[run.log_path])  # what of a line was written is cut off when the run goes on
    assert before == {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file()}
    assert RunState(small_disk / "run", {"seed": 0}).state == {"update": 1}


def test_a_teacher_that_finds_no_room_leaves_nothing(small_disk, unet):
    with pytest.raises(InputError, match=r"cannot write .*teacher: .*No space left on device"):
        save_teacher(unet, small_disk / "teacher")
    assert not list((small_disk / "teacher").iterdir())


def test_a_disk_that_is_read_only_is_refused(small_disk):
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match=r"cannot write .*run/log.jsonl: Read-only file system"):
        RunState(small_disk / "run", {})
    with pytest.raises(InputError, match=r"cannot write .*new/log.jsonl: Read-only file system"):
        RunState(small_disk / "new", {})


def test_no_room_leaves_no_file_beside(tmp_path, monkeypatch):
    def refuse(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    write_bytes(tmp_path / "x.json", b"old")
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(InputError, match=r"cannot write .*x\.json: No space left on device"):
        write_bytes(tmp_path / "x.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_bytes() == b"old"


@pytest.mark.parametrize("write", [lambda run: run.log(update=1), lambda run: run.save({})])
def test_a_folder_that_is_taken_away_is_not_made_again(write, tmp_path):
    run = RunState(tmp_path / "run", {})
    (tmp_path / "run").rename(tmp_path / "away")
    with pytest.raises(InputError, match=r"cannot write .*: .*run was deleted, or its \.lock"):
        write(run)
    assert not (tmp_path / "run").exists()


def test_an_output_is_a_file_and_a_link_stays_one(tmp_path):
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    write_text(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"
    with pytest.raises(InputError, match="it is a folder"):
        prepare_output(tmp_path)
    with pytest.raises(InputError, match="it is not a regular file"):
        prepare_output(Path("/dev/null"))
    with pytest.raises(InputError, match="File name too long"):  # with what it is called as it is being written
        prepare_output(tmp_path / f"{'x' * 245}.json")
    prepare_output(tmp_path / "new.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "real.json"]


def test_a_folder_that_may_not_be_written_into_is_refused_at_once(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)  # an administrator may write anywhere
    with pytest.raises(InputError, match=r"cannot write .*x\.json: Permission denied"):
        prepare_output(tmp_path / "x.json")


def test_links_in_a_circle_are_no_place(tmp_path):
    (tmp_path / "x.json").symlink_to(tmp_path / "x.json")
    with pytest.raises(InputError, match=r"cannot write .*x\.json"):
        prepare_output(tmp_path / "x.json")


@pytest.mark.parametrize("part", ["scheduler", "model.safetensors", "model.onnx", "unet"])
def test_what_a_model_is_made_of_is_not_written_over(part, tmp_path):
    (tmp_path / part).touch()
    with pytest.raises(InputError, match="holds a model but no state to go on from"):
        RunState(tmp_path, {})


def test_a_file_is_locked_once(tmp_path):
    with (tmp_path / "a").open("ab") as one, (tmp_path / "a").open("ab") as two:
        assert lock_file(one)
        with pytest.raises(BlockingIOError):
            lock_file(two)


def test_a_forked_child_has_none_of_its_parents_locks(tmp_path):
    lock_folder(tmp_path)
    if (child := os.fork()) == 0:
        try:
            lock_folder(tmp_path)
        except InputError:
            unlock_folder(tmp_path)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / ".lock").exists(), "only the parent unlocks it"
    unlock_folder(tmp_path)
