"""`kill -9` at random moments of a job, then the same command: the same bytes as an uninterrupted one?

`python tests/lab/kills.py --kills 30 teacher run ladder` kills each as often as you like, three times of five at a
random moment and twice in the midst of a write, and prints what became of it; exit code 1 if any folder differs.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: threads do not survive a fork

import numpy as np
import torch

from ddpm_mnist.lab.command import run_command
from ddpm_mnist.train import TeacherConfig, train_teacher
from ddpm_mnist.unet import UNetConfig, make_unet, save_teacher
from eval.features import load_ruler
from finetune.config import RunConfig
from finetune.ladder import LadderConfig, climb
from finetune.run import run

JOBS: dict[str, tuple[Callable[[Any], Any], type]] = {
    "teacher": (train_teacher, TeacherConfig),
    "run": (run, RunConfig),
    "ladder": (climb, LadderConfig),
}

TEACHER = """
data: {root}/images.npy
unet: {{block_out_channels: [8, 16], norm_num_groups: 4, attention_head_dim: 8}}
total_updates: 10
restart_updates: 2
average_at: [6, 12]
batch_size: 2
warmup_updates: 2
log_every: 3
save_every: 2
grid_every: 6
"""
RUN = """
teacher: {root}/teacher
sampler: {{num_steps: 3}}
student: {{weight_bits: 3, act_bits: 5, rank: 2, search: min-max}}
num_trajectories: 6
calibration_trajectories: 4
num_images: 8
grid_columns: 4
distill: {{num_updates: 7, batch_size: 4, rollout_steps: 2, log_every: 2, save_every: 3}}
"""
LADDER = """
rungs: [ptq-min-max, full, full-10-steps]
seeds: 1
teacher_steps: [2]
base:
"""


def write_inputs(root: Path) -> None:
    """The jobs' configurations, images to learn from, and a teacher of random weights."""
    np.save(root / "images.npy", np.random.default_rng(0).integers(0, 256, (12, 12, 12), np.uint8))
    torch.manual_seed(0)
    unet = make_unet(UNetConfig(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8))
    save_teacher(unet.eval().requires_grad_(False), root / "teacher")
    indented = "".join(f"  {line}\n" for line in RUN.strip().splitlines())
    for name, text in {"teacher": TEACHER, "run": RUN, "ladder": LADDER + indented}.items():
        (root / f"{name}.yaml").write_text(text.format(root=root))


def start(name: str, root: Path, kill_at_write: int | None = None) -> int:
    """The job's process, which writes into `root/out`, and kills itself in the midst of the write of that number."""
    if pid := os.fork():
        return pid
    log = os.open(root / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Seconds are written into files: clocks that stand still and go evenly.
    ticks = itertools.count()
    time.monotonic, time.perf_counter = lambda: 100.0, lambda: float(next(ticks))  # type: ignore[assignment]
    whole, writes = Path.write_bytes, itertools.count()

    def write_bytes(path: Path, content: Any) -> int:
        if next(writes) == kill_at_write:
            whole(path, bytes(content)[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(path, content)

    Path.write_bytes = write_bytes  # type: ignore[method-assign, assignment]
    code = 99
    try:
        function, config = JOBS[name]
        run_command(name, function, config, ["--config", str(root / f"{name}.yaml"), "--output", str(root / "out")])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        whole(root / "writes", str(next(writes)).encode())
        sys.stdout.flush()
        os._exit(code)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait(pid: int, root: Path, kill_at: float = float("inf")) -> tuple[float, bool]:
    """Until the process has ended, killed after `kill_at` seconds of processor time at the latest: how many seconds it
    took, and whether it was killed.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    used = 0.0
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        used = cpu_seconds(pid)
        if used >= kill_at:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.003)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"exit code {code}: {(root / 'log').read_text()[-2000:]}")
    return used, code != 0


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def trials(name: str, root: Path, kills: int, seed: int) -> Iterator[tuple[str, bool, list[str]]]:
    """For each trial of the job what it was, whether it was killed, and the files that differ after the second call."""
    out = root / "out"
    seconds, _ = wait(start(name, root), root)
    whole, writes = content(out), int((root / "writes").read_bytes())
    shutil.rmtree(out)
    generator = random.Random(seed)
    for number in range(kills):
        if number % 5 < 3:
            moment = generator.uniform(0.02, 0.95 * seconds)
            what = f"after {moment:.2f} s of {seconds:.2f}"
            _, killed = wait(start(name, root), root, moment)
        else:
            write = generator.randrange(writes)
            what = f"in write {write} of {writes}"
            _, killed = wait(start(name, root, write), root)
        wait(start(name, root), root)
        again = content(out)
        yield what, killed, sorted(path for path in whole.keys() | again.keys() if whole.get(path) != again.get(path))
        shutil.rmtree(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", choices=JOBS)
    parser.add_argument("--kills", type=int, default=30, help="of each job")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    load_ruler()  # before the forks
    total, bad = 0, 0
    for name in options.jobs:
        with tempfile.TemporaryDirectory(prefix="kills-") as folder:
            write_inputs(Path(folder))
            for what, killed, files in trials(name, Path(folder), options.kills, options.seed):
                total += killed
                bad += bool(files)
                became = f"differs: {', '.join(files)}" if files else "same"
                print(
                    f"{name}: {'killed' if killed else 'ended before it could be killed'} {what}: {became}", flush=True
                )
    print(f"{total} killed, {bad} differ")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
