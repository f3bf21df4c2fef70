"""Distributed execution on the processes that accelerate or torchrun starts.

All processes run the same program. Independent jobs are distributed whole, and their results do not depend on the rank
that runs them. A training batch is split into equal parts, whose gradients are averaged. Only the main process (rank 0)
writes files and prints. With one process, every function here runs locally without communication.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast, parse_flag_from_env, reduce
from torch import Tensor, nn

from ddpm_mnist.lab import InputError

T = TypeVar("T")
Job = TypeVar("Job")
Config = TypeVar("Config")

# Timeout of collectives in training. The end of a process is noticed at once; the timeout is for a machine that stops
# responding.
TIMEOUT = timedelta(minutes=10)
# Timeout of collectives after distributed jobs, which may take hours longer on one process than on another.
JOB_TIMEOUT = timedelta(days=7)

_alone = False


class ProcessLost(Exception):
    """Another process ended early or stopped responding. Commands print its message as one line, with exit code 1."""


def state() -> PartialState:
    """Return accelerate's `PartialState`: ranks and this process's device. The first call joins the process group.

    Raises:
        InputError: the environment variables (WORLD_SIZE, RANK, …) are inconsistent or left over from another launch.
    """
    global _alone
    try:
        return _joined()
    except Exception as error:  # from int, accelerate, torch's store or a backend
        _alone = True  # so that this process reports the error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the environment's WORLD_SIZE, RANK and the like do not fit each other ({reason}): "
            "unset them, or start with accelerate launch"
        ) from error


def _joined() -> PartialState:
    # A Mac's GPU cannot be shared among processes.
    number, of = (int(os.environ.get(name, usual)) for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if of > 1 and not 0 <= number < of:
        raise ValueError(f"process {number} of {of}")
    several = of > 1
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    no_gpu = accelerator is None or (several and accelerator.type == "mps")
    return PartialState(parse_flag_from_env("ACCELERATE_USE_CPU") or no_gpu, timeout=TIMEOUT)


@contextmanager
def alone() -> Iterator[None]:
    """Context manager in which this process acts as the only one: rank 0 of 1, without communication."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def count() -> int:
    """Return the number of processes (the world size)."""
    return 1 if _alone else state().num_processes


def rank() -> int:
    """Return the rank of this process, from 0."""
    return 0 if _alone else state().process_index


def is_main() -> bool:
    """Return whether this is the main process (rank 0), which writes and prints."""
    return rank() == 0


def share_out(
    function: Callable[[Job], T], jobs: Sequence[Job], progress: Callable[[int], None] = lambda done: None
) -> list[T]:
    """Distribute `jobs` over the processes; return their results, in order, in every process.

    Of p processes, rank k mod p runs job k inside `alone()`, so nested calls of this function are not distributed.

    Args:
        function: runs one job. Its result must be picklable and on the CPU.
        progress: called after each job of this process with an estimate of all finished jobs, which assumes that the
            other processes are equally far.
    """
    results: dict[int, T] = {}
    for number in range(rank(), len(jobs), count()):
        with alone():
            results[number] = function(jobs[number])
        progress(min(number - rank() + count(), len(jobs)))
    if count() > 1:
        parts: list[Any] = [None] * count()
        with _exchange():
            dist.all_gather_object(parts, results, group=_patient())
        results = {number: result for part in parts for number, result in part.items()}
    return [results[number] for number in range(len(jobs))]


def from_main(function: Callable[[], T]) -> T:
    """Call `function` in the main process; return its result, or raise its InputError, in every process."""
    if count() == 1:
        return function()
    outcome: list[Any] = [None]
    if is_main():
        try:
            with alone():
                outcome = [function()]
        except InputError as error:
            outcome = [error]
    with _exchange():
        dist.broadcast_object_list(outcome, src=0, group=_patient())
    if isinstance(outcome[0], InputError):
        raise outcome[0]
    return outcome[0]


def by_main(command: Callable[[Config], T]) -> Callable[[Config], T]:
    """Decorate a command to run in the main process only, while the others wait for its result."""

    @wraps(command)
    def run(config: Config) -> T:
        return from_main(lambda: command(config))

    return run


def own_part(batch: Tensor) -> Tensor:
    """Return this process's part (b, …) of a batch (p · b, …), p the number of processes."""
    return batch.chunk(count())[rank()]


def average(tensor: Tensor) -> Tensor:
    """Return the mean of `tensor` over the processes."""
    if count() == 1:
        return tensor
    with _exchange():
        return reduce(tensor, "mean")


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in place.

    This is the gradient of the whole batch if each process's loss is the mean over its part.
    """
    if count() == 1:
        return
    # The network, not the batch, determines which parameters have a gradient: they are the same in every process.
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    means = average(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, mean in zip(gradients, means.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def copy_from_main(module: nn.Module) -> None:
    """Broadcast the main process's parameters and buffers of `module`: other machines may have rounded differently."""
    if count() > 1:
        with _exchange():
            broadcast(list(module.state_dict().values()))


def leave() -> None:
    """Leave the process group. Call it once, after all communication."""
    if count() > 1:
        state().destroy_process_group()


@cache
def _patient() -> Any:
    return dist.new_group(timeout=JOB_TIMEOUT, backend="gloo")


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the backends have no narrower exception for a lost process
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ProcessLost(f"another process has ended or does not answer ({reason})") from error
