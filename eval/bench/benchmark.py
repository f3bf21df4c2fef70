"""Benchmark all runtimes: milliseconds per denoising step, memory, and bytes on disk."""

import dataclasses
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from ddpm_mnist.lab import InputError
from ddpm_mnist.lab.processes import by_main
from ddpm_mnist.lab.terminal import progress
from ddpm_mnist.lab.write import prepare_output, write_bytes, write_json, write_text
from ddpm_mnist.sampling.sampler import choose_conditions, image_shape
from ddpm_mnist.sampling.solver import SamplerConfig, Solver
from eval.bench.memory import peak_memory
from eval.bench.runtimes import Runtimes, onnx_runtimes, torch_runtimes
from eval.models import load_model
from eval.plots import speed_chart, to_png
from quant import QuantConv2d, QuantizedUNet, to_integer
from quant.context import plain_torch
from quant.integer.binding import VARIABLE, available, choose
from quant.summary import summarise


@dataclass
class BenchConfig:
    student: str = "w4a4"
    """The student: the name of a released model, or a run folder."""
    teacher: str = "teacher"
    """The full-precision model: the name of a released model, or a diffusers folder."""
    batch_sizes: tuple[int, ...] = (1, 16, 64, 256)
    """Images per denoising step, each at least 1."""
    rounds: int = 15
    """Rounds, at least 1: each times one step of every runtime. The table shows medians."""
    isa: str = "best"
    """Instruction sets of the integer student: "best" (from EFFICIENTDM_ISA, or else the processor's best), "all" that
    the processor supports, or a name."""
    threads: int = 0
    """Threads of every runtime, at least 0. 0: PyTorch's default."""
    num_steps: int = 20
    """Denoising steps per image, at least 1, to compute images per second."""
    output: Path = Path("bench.json")
    """JSON file of the results. A table (.md) and a chart (.png) with the same name are written as well."""

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes must name sizes of at least 1, not {list(self.batch_sizes)}")
        if self.output.suffix != ".json":
            raise ValueError(f"output must end in .json, not {self.output}")
        self.isas()
        if self.rounds < 1 or self.num_steps < 1 or self.threads < 0:
            raise ValueError("rounds and num_steps must be at least 1, threads at least 0")

    def isas(self) -> list[str]:
        """Return the names of the instruction sets, the best first."""
        if self.isa == "all":
            return list(available()) or [choose().isa]
        return [choose(None if self.isa == "best" else self.isa).isa]


@dataclass
class Row:
    """One runtime at one batch size."""

    runtime: str
    model: str
    batch_size: int
    milliseconds_per_step: float
    """Median over the rounds."""
    images_per_second: float
    peak_memory_mib: float | None
    """Peak growth of the process's resident memory during a step; None if the system does not report it."""


@plain_torch()
@by_main
def benchmark(config: BenchConfig) -> list[Row]:
    """Time one denoising step of every runtime, alternating in one process, and write the results.

    Runtimes: the teacher in diffusers, eager and compiled (channels-last), each in float and with bfloat16 autocast;
    the student simulated and with integers on each instruction set of `isa`; both exported to ONNX, in ONNX Runtime and
    (if installed) OpenVINO, in float, bfloat16, and static int8 (the teacher, quantized by ONNX Runtime).

    Raises:
        InputError: a model does not exist, or `student` is not a student.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    models = load_model(config.teacher), load_model(config.student)
    teacher, student = (model.denoiser.cpu() for model in models)
    if not isinstance(student, QuantizedUNet):
        raise InputError(f'"{config.student}" is not a student: a run folder or a released student is needed')
    if isinstance(teacher, QuantizedUNet):
        raise InputError(f'the teacher must be of full precision, "{config.teacher}" is not')
    if models[0].shape != models[1].shape:
        raise InputError(
            f'"{config.teacher}" draws images of {models[0].shape}, "{config.student}" of {models[1].shape}'
        )
    load_model(config.student, "integer")  # raises if the integer runtime does not support the student
    solver = models[1].solver(SamplerConfig(num_steps=config.num_steps))
    prepare_output(config.output)
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        # A new cache: PyTorch's does not distinguish code that was compiled for other instruction sets.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        runtimes = {
            **torch_runtimes(teacher, student, config.isas()),
            **onnx_runtimes(teacher, student, solver, Path(folder)),
        }
        for batch_size in config.batch_sizes:
            rows += _time(runtimes, _inputs(student, solver, batch_size), config)
        sizes = _bytes_on_disk(config, Path(folder))
        inputs = _inputs(student, solver, max(config.batch_sizes))
        integer_step = _integer_step(student, inputs, config)
        convolutions = _convolutions(student, inputs, integer_step, config)
    start = _first_image(config)
    machine = {**_machine(), "isa": config.isas()[0]}
    content = {
        "machine": machine,
        "student": load_model(config.student).bits,
        "rows": [dataclasses.asdict(row) for row in rows],
        "bytes_on_disk": sizes,
        "convolutions": convolutions,
        "integer_step": integer_step,
        "seconds_to_first_image": start,
    }
    write_json(config.output, content)
    text = _markdown(rows, content)
    write_text(config.output.with_suffix(".md"), text)
    write_bytes(config.output.with_suffix(".png"), to_png(speed_chart(content)))
    Console(soft_wrap=True).print(text, markup=False, highlight=False)
    return rows


def _inputs(student: QuantizedUNet, solver: Solver, batch_size: int) -> tuple[Tensor, ...]:
    """Return a batch at the middle timestep: x float (N, C, H, W), t (), and class labels (N,) if the model has
    classes."""
    conditions = choose_conditions(student, solver.config, range(batch_size))
    x, t = torch.randn(batch_size, *image_shape(student)), solver.timesteps[len(solver.timesteps) // 2]
    return x, t, *conditions.values()


def _time(runtimes: Runtimes, inputs: tuple[Tensor, ...], config: BenchConfig) -> list[Row]:
    batch_size = len(inputs[0])
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runtimes}
    memory = {}
    with progress(f"batch {batch_size}", config.rounds) as advance:
        for key, denoiser in runtimes.items():  # compiles and warms up
            for _ in range(2):
                denoiser(*inputs)
            memory[key] = peak_memory(partial(denoiser, *inputs))
        for number in range(config.rounds):
            for key, denoiser in runtimes.items():
                start = time.perf_counter()
                denoiser(*inputs)
                seconds[key].append(time.perf_counter() - start)
            advance(number + 1)
    rows = []
    for key, values in seconds.items():
        median = statistics.median(values)
        rate = batch_size / (median * config.num_steps)
        rows.append(Row(*key, batch_size, round(median * 1e3, 3), round(rate, 2), memory[key]))
    return rows


def _integer_step(student: QuantizedUNet, inputs: tuple[Tensor, ...], config: BenchConfig) -> dict[str, float]:
    """Time a step of the integer student, and the share of its integer products, measured by the threads' clocks."""
    integer, batch_size = to_integer(student, config.isas()[0]), len(inputs[0])
    integer(*inputs)
    milliseconds = _median_seconds(partial(integer, *inputs), config.rounds) * 1e3
    integer.seconds = np.zeros(2)
    integer(*inputs)
    products = integer.seconds[1] / integer.seconds.sum()
    conditions = dict(zip(("class_labels",), _one(inputs)[2:], strict=False))
    layers = summarise(student, image_shape(student), **conditions)
    macs = sum(row.macs for row in layers if row.kind != "attention products")
    return {
        "batch_size": batch_size,
        "milliseconds": round(milliseconds, 2),
        "share_outside_integer_products": round(1 - products, 3),
        "products_milliseconds": round(products * milliseconds, 2),
        "products_gmacs_per_second": round(macs * batch_size / (products * milliseconds) / 1e6, 1),
    }


def _one(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the first sample of a batch."""
    return tuple(part[:1] if part.dim() else part for part in inputs)


def _convolutions(
    student: QuantizedUNet, inputs: tuple[Tensor, ...], integer_step: dict[str, float], config: BenchConfig
) -> dict[str, float]:
    """Time the student's convolutions in PyTorch float, each on its own input, relative to all integer products."""
    batch_size, total, macs = len(inputs[0]), 0.0, 0
    shapes: dict[QuantConv2d, torch.Size] = {}
    layers = [layer for _, layer in student.layers() if isinstance(layer, QuantConv2d)]
    hooks = [layer.register_forward_hook(lambda at, x, _: shapes.update({at: x[0].shape})) for layer in layers]
    student(*_one(inputs))
    for hook in hooks:
        hook.remove()
    for layer, shape in shapes.items():
        x = torch.randn(batch_size, *shape[1:]).contiguous(memory_format=torch.channels_last)
        weight = layer.quantized_weight().contiguous(memory_format=torch.channels_last)
        step = partial(F.conv2d, x, weight, layer.bias, *layer.geometry)
        macs += step().numel() * layer.weight_shape[1:].numel()
        total += _median_seconds(step, config.rounds)
    return {
        "batch_size": batch_size,
        "float_milliseconds": round(total * 1e3, 2),
        "ratio": round(total * 1e3 / integer_step["products_milliseconds"], 2),
        "multiply_accumulates": macs,
    }


def _median_seconds(step: Callable[[], Any], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _first_image(config: BenchConfig) -> dict[str, float]:
    """Measure the seconds to load the student in a new process, without imports, and from there to its first image."""
    script = (
        "import sys, time; from eval.models import load_model, runnable; "
        "from eval.sample import DrawConfig, draw; start = time.perf_counter(); "
        "student = load_model(sys.argv[1], 'simulated'); loaded = time.perf_counter(); "
        "student.denoiser = runnable(student.denoiser, 'integer'); draw(student, DrawConfig(num_images=1)); "
        "print(loaded - start, time.perf_counter() - loaded)"
    )
    environment = {**os.environ, VARIABLE: config.isas()[0]}
    command = [sys.executable, "-c", script, config.student]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        said = run.stderr.strip() or f"exit code {run.returncode}"
        raise InputError(f"{config.student} does not run on integers: {said.splitlines()[-1]}")
    loading, drawing = (float(number) for number in run.stdout.split()[-2:])
    return {"load": round(loading, 2), "first_image": round(drawing, 2)}


def _bytes_on_disk(config: BenchConfig, onnx: Path) -> dict[str, int]:
    sizes = {}
    for name in ("teacher", "student"):
        folder = load_model(getattr(config, name)).folder or Path()
        files = (*folder.glob("*.safetensors"), *folder.glob("unet/*.safetensors"))
        sizes[name] = files[0].stat().st_size
    return {**sizes, **{path.name: path.stat().st_size for path in sorted(onnx.glob("[st]*.onnx"))}}


def _machine() -> dict[str, Any]:
    packages = ("torch", "diffusers", "onnxruntime", "openvino")
    found, told = torch.cpu.get_capabilities(), ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8")
    return {
        "processor": found.get("cpu_name", platform.processor()),
        "instructions": [name for name in told if found.get(name)],
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in packages if importlib.util.find_spec(name)},
    }


def _markdown(rows: list[Row], content: dict[str, Any]) -> str:
    """Return a Markdown table, a row per runtime: milliseconds per step, also relative to the integer student's."""
    sizes = sorted({row.batch_size for row in rows})
    by_key = {(row.runtime, row.model, row.batch_size): row for row in rows}
    machine = content["machine"]
    lines = [
        f"{machine['processor']}, {', '.join(machine['instructions'])}, integers on {machine['isa']}, "
        f"{machine['threads']} threads, "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items()),
        "",
        "| runtime | model | "
        + " | ".join(f"ms, batch {size} | to integers" for size in sizes)
        + f" | images/s, batch {sizes[-1]} | MiB |",
        "|---|---|" + "---:|" * (2 * len(sizes) + 2),
    ]
    for runtime, model in dict.fromkeys((row.runtime, row.model) for row in rows):
        cells = []
        for size in sizes:
            row, integer = by_key[runtime, model, size], by_key["integer", "student", size]
            ratio = row.milliseconds_per_step / integer.milliseconds_per_step
            cells += [f"{row.milliseconds_per_step:.2f}", f"{ratio:.2f}"]
        memory = "" if row.peak_memory_mib is None else f"{row.peak_memory_mib:.0f}"
        lines.append(f"| {runtime} | {model} | {' | '.join(cells)} | {row.images_per_second:.1f} | {memory} |")
    for heading in ("bytes_on_disk", "convolutions", "integer_step", "seconds_to_first_image"):
        facts = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in content[heading].items())
        lines += ["", f"{heading.replace('_', ' ').capitalize()}: {facts}."]
    return "\n".join(lines) + "\n"
