"""The jobs of test_processes.py, each by one process and by two, all forked from one that has imported everything.

`python jobs.py FOLDER` makes FOLDER/<job>/<number of processes>/, and FOLDER/codes.json of exit codes.
"""

import dataclasses
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import numpy as np
import torch

import finetune.ladder
from ddpm_mnist.lab import InputError, command, processes
from ddpm_mnist.lab.command import run_command
from ddpm_mnist.lab.run_state import RunState
from ddpm_mnist.sampling.sampler import sample
from ddpm_mnist.sampling.solver import SamplerConfig
from ddpm_mnist.train import TeacherConfig, train_teacher
from ddpm_mnist.unet import UNetConfig, make_unet, save_teacher
from eval.features import load_ruler
from eval.metrics import measure
from eval.models import load_model, runnable
from finetune.config import RunConfig
from finetune.make import calibration_states, distill_student
from finetune.trajectories import make_trajectories
from quant import QuantConfig, calibrate, freeze, quantize

ROOT = Path(sys.argv[1])
TEACHER = str(ROOT / "teacher")
TINY = UNetConfig(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8)
BATCH = 4  # of all processes together
LIMIT = 300  # seconds after which a process that hangs is ended
STUDENT = [
    "--teacher", TEACHER, "--sampler.num_steps", "3", "--student.rank", "2", "--student.search", "min-max",
    "--num_trajectories", "7", "--calibration_trajectories", "4", "--distill.num_updates", "4",
    "--distill.warmup_updates", "1", "--distill.log_every", "1", "--distill.save_every", "2",
]  # fmt: skip


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def share(folder: Path) -> None:
    """What is shared out by batches and by scores."""
    teacher = load_model(TEACHER)
    solver = teacher.solver(SamplerConfig(num_steps=3))
    buffer = make_trajectories(teacher.denoiser, solver, 7, seed=0, batch_size=3)
    student = quantize(teacher.denoiser, QuantConfig(rank=2), solver.timesteps.tolist())
    calibrate(student, calibration_states(buffer, solver, 7))
    images = sample(teacher.denoiser, solver, 50, batch_size=8)
    drawn = sample(runnable(freeze(student), "integer"), solver, 50, batch_size=8)
    ruler = load_ruler()
    few = {**ruler.reference, "kid_features": ruler.reference["kid_features"][:500]}
    found = {
        "trajectories": buffer.x, "answers": buffer.outputs, "images": images, "student's images": drawn,
        "scores": measure(drawn, images, dataclasses.replace(ruler, reference=few)),
    }  # fmt: skip
    torch.save(found, folder / f"{rank()}.pt")


def teach(folder: Path) -> None:
    words = ["--batch_size", str(BATCH // processes.count()), "--output", str(folder / "run"), "--total_updates", "4"]
    words += ["--data", str(ROOT / "images.npy"), "--warmup_updates", "1", "--log_every", "1"]
    words += [f"--unet.{name}={list(x) if isinstance(x, tuple) else x}" for name, x in vars(TINY).items()]
    run_command("prog", train_teacher, TeacherConfig, words)


def distill(folder: Path, *words: str) -> None:
    words = *STUDENT, "--distill.batch_size", str(BATCH // processes.count()), "--output", str(folder / "run"), *words
    run_command("prog", distill_student, RunConfig, list(words))


def denoise(folder: Path) -> None:
    distill(folder, "--distill.objective", "denoising", "--data", str(ROOT / "images.npy"))


def die(folder: Path) -> None:
    """The distillation, whose last process is killed at the third update."""
    log = RunState.log

    def log_or_die(self, **row):
        log(self, **row)
        if row["update"] == 3 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    RunState.log = log_or_die
    distill(folder)


def go_on(folder: Path) -> None:
    distill(ROOT / "die")


def climb(folder: Path) -> None:
    finetune.ladder._write_pictures = lambda *_: None
    base = [word.replace("--", "--base.") for word in STUDENT]
    words = ["--rungs", '["ptq", "full", "full-10-steps"]', "--seeds", "1", "--teacher_steps", "[]", *base]
    words += ["--base.num_images", "3", "--base.grid_columns", "2", "--base.tracker", "tensorboard"]
    words += ["--output", str(folder / "run")]
    run_command("prog", finetune.ladder.climb, finetune.ladder.LadderConfig, words)


def refuse(folder: Path) -> None:
    def refused() -> None:
        raise InputError("no such thing")

    run_command("prog", lambda config: processes.from_main(refused), TeacherConfig, [])


def interrupt(folder: Path) -> None:
    def interrupted(config) -> None:
        raise KeyboardInterrupt

    run_command("prog", interrupted, TeacherConfig, [])


def fork(number: int, job, folder: Path) -> list[int]:
    """The exit codes of `number` processes that do `job`; what they say is in <rank>.out and <rank>.err."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for index in range(number):
        children.append(os.fork())
        if not children[-1]:
            signal.alarm(LIMIT)
            if number > 1:  # as torchrun has it
                launched = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
                os.environ |= {name: str(value) for name, value in launched.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / f"{index}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            code = 0
            try:
                job(folder)
            except SystemExit as ended:
                code = ended.code
            except BaseException:
                traceback.print_exc()
                code = 70
            sys.stdout.flush()
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    command.REPORT_DELAY = 0
    torch.manual_seed(0)
    with processes.alone():  # joining the processes is left to the children
        save_teacher(make_unet(TINY), Path(TEACHER))
    np.save(ROOT / "images.npy", np.random.default_rng(0).integers(0, 256, (9, 28, 28), np.uint8))
    codes = {}
    for job in (share, teach, distill, denoise, climb):
        for number in (1, 2):
            codes[f"{job.__name__} {number}"] = fork(number, job, ROOT / job.__name__ / str(number))
    for job in (die, go_on, refuse, interrupt):
        codes[job.__name__] = fork(2, job, ROOT / job.__name__)
    (ROOT / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
