"""Several processes, as accelerate or torchrun start them: who does what, and how the parts come together.

All of them run the same program. Work is shared out in whole jobs, whose results do not depend on who does them; a
batch of a training is cut into equal parts, whose gradients are averaged. The main process alone writes and prints.
With one process every function here is the plain thing.
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

# How long the processes of a training wait for each other. One that ends is noticed at once; this is for a machine that
# falls silent.
TIMEOUT = timedelta(minutes=10)
# Jobs that are shared out may take hours, and one process many more than another.
PATIENCE = timedelta(days=7)

_alone = False


class ProcessLost(Exception):
    """Another process has ended before its time. Its message is the one line that the user sees (exit code 1)."""


def state() -> PartialState:
    """accelerate's view of the processes and of this one's device; the first call joins them.

    Raises:
        InputError: the environment speaks of processes that are not there, as one that a launcher left behind does.
    """
    global _alone
    try:
        return _joined()
    except Exception as error:  # of int, of accelerate, of torch's store, or of a backend
        _alone = True  # to say so
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
    """Inside, this process does everything itself and waits for no other."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def count() -> int:
    """The processes that work together here."""
    return 1 if _alone else state().num_processes


def rank() -> int:
    """The number of this process among them."""
    return 0 if _alone else state().process_index


def is_main() -> bool:
    """Whether this process writes."""
    return rank() == 0


def share_out(
    function: Callable[[Job], T], jobs: Sequence[Job], progress: Callable[[int], None] = lambda done: None
) -> list[T]:
    """What `function` returns for each of `jobs`, in their order, in every process.

    Job k is done by process k mod p, alone: what it would share out itself, it does itself.

    Args:
        function: its results can be pickled, and lie on the CPU.
        progress: called after each job of this process with the number that are done if the others are as far.
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
    """What `function` returns in the main process, in every process; an InputError is raised in every one too."""
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
    """Decorator of a command that several processes do no faster: the main one does it, the others wait."""

    @wraps(command)
    def run(config: Config) -> T:
        return from_main(lambda: command(config))

    return run


def own_part(batch: Tensor) -> Tensor:
    """This process's part of a batch (p · b, …): (b, …)."""
    return batch.chunk(count())[rank()]


def average(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over the processes."""
    if count() == 1:
        return tensor
    with _exchange():
        return reduce(tensor, "mean")


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes: that of a loss which is a mean over the whole batch."""
    if count() == 1:
        return
    # Which parameters have a gradient is decided by the network, not by the batch: it is the same in every process.
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    means = average(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, mean in zip(gradients, means.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def copy_from_main(module: nn.Module) -> None:
    """Give every process the main one's parameters and buffers: machines may round differently."""
    if count() > 1:
        with _exchange():
            broadcast(list(module.state_dict().values()))


def leave() -> None:
    """The last thing that a process does with the others."""
    if count() > 1:
        state().destroy_process_group()


@cache
def _patient() -> Any:
    return dist.new_group(timeout=PATIENCE, backend="gloo")


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the libraries below have no narrower one for all that can happen
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ProcessLost(f"another process has ended or does not answer ({reason})") from error
