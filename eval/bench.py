"""Every runtime side by side: milliseconds per denoising step, memory, and bytes on disk."""

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

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_mnist import InputError
from ddpm_mnist.command import run_command
from ddpm_mnist.runs import prepare_output, progress, write_json, write_text
from eval.memory import peak_memory
from eval.models import load_model
from eval.runtimes import Runtimes, onnx_runtimes, torch_runtimes
from quant import QuantConv2d, QuantizedUNet, to_integer
from quant.integer import IntegerLayer, Quantizer
from quant.quantizers import Clock
from quant.summary import summarise


@dataclass
class BenchConfig:
    student: str = "w4a4"
    """The student: a released name or a run folder."""
    teacher: str = "teacher"
    """The full-precision model: a released name, or a folder of diffusers."""
    batch_sizes: tuple[int, ...] = (1, 16, 64, 256)
    """Images per denoising step."""
    rounds: int = 15
    """Interleaved rounds: in each, every runtime takes one step; the table shows medians."""
    threads: int = 0
    """Threads of every runtime; 0: as many as PyTorch takes."""
    num_steps: int = 20
    """Denoising steps per image, for images_per_second."""
    output: Path = Path("bench.json")
    """JSON; the table as Markdown is written beside it."""

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes must name sizes of at least 1, not {list(self.batch_sizes)}")
        if self.output.suffix != ".json":
            raise ValueError(f"output must end in .json, not {self.output}")
        if self.rounds < 1 or self.num_steps < 1 or self.threads < 0:
            raise ValueError("rounds and num_steps must be at least 1, threads at least 0")


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
    """Growth of the process's resident memory at its peak during a step; None where the system does not tell."""


def benchmark(config: BenchConfig) -> list[Row]:
    """Time one denoising step of every runtime in turn, in one process, and write the figures.

    Runtimes: the teacher in diffusers, eager and compiled (channels-last), each in float and under bfloat16; the
    student simulated and on integers; both exported to ONNX, in ONNX Runtime and OpenVINO if they are installed,
    in float, bfloat16, and static int8 (the teacher, quantized by ONNX Runtime).

    Raises:
        InputError: no such model, or the student is none.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    teacher, student = load_model(config.teacher).denoiser.cpu(), load_model(config.student).denoiser.cpu()
    if not isinstance(student, QuantizedUNet):
        raise InputError(f'"{config.student}" is no student: a run folder or a released student is needed')
    if isinstance(teacher, QuantizedUNet):
        raise InputError(f'the teacher must be of full precision, "{config.teacher}" is not')
    prepare_output(config.output)
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        runtimes = {**torch_runtimes(teacher, student), **onnx_runtimes(teacher, student, Path(folder))}
        for batch_size in config.batch_sizes:
            rows += _time(runtimes, batch_size, config)
        sizes = _bytes_on_disk(config, Path(folder))
        convolutions = _convolutions(student, max(config.batch_sizes), config.rounds)
        integer_step = _integer_step(student, max(config.batch_sizes), config.rounds)
    start = _first_image(config.student)
    machine = _machine()
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
    Console(soft_wrap=True).print(text, markup=False, highlight=False)
    return rows


def _time(runtimes: Runtimes, batch_size: int, config: BenchConfig) -> list[Row]:
    x, t = torch.randn(batch_size, 1, 28, 28), torch.tensor(499)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runtimes}
    memory = {}
    with progress(f"batch {batch_size}", config.rounds) as advance:
        for key, denoiser in runtimes.items():  # compiles and warms up
            for _ in range(2):
                denoiser(x, t)
            memory[key] = peak_memory(partial(denoiser, x, t))
        for number in range(config.rounds):
            for key, denoiser in runtimes.items():
                start = time.perf_counter()
                denoiser(x, t)
                seconds[key].append(time.perf_counter() - start)
            advance(number + 1)
    rows = []
    for key, values in seconds.items():
        median = statistics.median(values)
        rate = batch_size / (median * config.num_steps)
        rows.append(Row(*key, batch_size, round(median * 1e3, 3), round(rate, 2), memory[key]))
    return rows


def _convolutions(student: QuantizedUNet, batch_size: int, rounds: int) -> dict[str, float]:
    """The student's convolutions alone, each on its own input: float against integer operators of oneDNN."""
    totals, macs = {"float": 0.0, "integer": 0.0}, 0
    shapes: dict[QuantConv2d, torch.Size] = {}
    layers = [layer for _, layer in student.layers() if isinstance(layer, QuantConv2d)]
    hooks = [layer.register_forward_hook(lambda at, x, _: shapes.update({at: x[0].shape})) for layer in layers]
    student(torch.zeros(1, 1, 28, 28), student.clock.timesteps[0])
    for hook in hooks:
        hook.remove()
    for layer, shape in shapes.items():
        integer, quantizer = IntegerLayer(0, "", layer, 0, fused=False), Quantizer(1.0, 0, layer.act_quantizer.qmax)
        codes = torch.randint(0, quantizer.qmax + 1, (batch_size, *shape[1:]), dtype=torch.uint8)
        codes = codes.contiguous(memory_format=torch.channels_last)
        x, weight = codes.float(), layer.quantized_weight().contiguous(memory_format=torch.channels_last)
        kinds: dict[str, Callable[[], Tensor]] = {
            "float": partial(F.conv2d, x, weight, layer.bias, *layer.geometry),
            "integer": partial(integer, codes, quantizer, layer.bias),
        }
        macs += kinds["integer"]().numel() * layer.weight_shape[1:].numel()
        for kind, step in kinds.items():
            totals[kind] += _median_seconds(step, rounds)
    return {
        "batch_size": batch_size,
        "onednn_float_milliseconds": round(totals["float"] * 1e3, 2),
        "onednn_integer_milliseconds": round(totals["integer"] * 1e3, 2),
        "ratio": round(totals["float"] / totals["integer"], 2),
        "multiply_accumulates": macs,
    }


def _integer_step(student: QuantizedUNet, batch_size: int, rounds: int) -> dict[str, float]:
    """Where the integer student's time goes, and the least that its products would take at the machine's peak."""
    integer, x = to_integer(student), torch.randn(batch_size, 1, 28, 28)
    milliseconds = _median_seconds(partial(integer, x, 499), rounds) * 1e3
    outside = {}
    if integer.is_fused:
        integer.seconds = torch.zeros(2, dtype=torch.float64)
        integer(x, 499)
        share = (integer.seconds[0] / integer.seconds.sum()).item()
        outside["share_outside_integer_products"] = round(share, 3)
    macs = sum(row.macs for row in summarise(student, (1, 28, 28)) if row.kind != "attention products")
    layer = QuantConv2d(nn.Conv2d(256, 256, 3, padding=1), 4, 4, 1, Clock([0]))
    layer.freeze()
    codes = torch.randint(0, 16, (16, 256, 28, 28), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    large = partial(IntegerLayer(0, "", layer, 0, fused=False), codes, Quantizer(1.0, 0, 15), layer.bias)
    peak = codes.numel() * 256 * 9 / _median_seconds(large, rounds)
    return {
        "batch_size": batch_size,
        "milliseconds": round(milliseconds, 2),
        **outside,
        "onednn_peak_gmacs_per_second": round(peak / 1e9, 1),
        "milliseconds_at_peak": round(macs * batch_size / peak * 1e3, 2),
    }


def _median_seconds(step: Callable[[], Any], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _first_image(student: str) -> dict[str, float]:
    """Seconds beyond the imports, in new processes: to load the student, and from there to its first integer image."""
    script = (
        "import sys, time; from eval.models import load_model, runnable, Model; "
        "from eval.sample import DrawConfig, draw; start = time.perf_counter(); "
        "student = load_model(sys.argv[1], 'simulated').denoiser; loaded = time.perf_counter(); "
        "draw(Model('student', runnable(student, 'integer')), DrawConfig(num_images=1)); "
        "print(loaded - start, time.perf_counter() - loaded)"
    )
    runs = []
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCH_EXTENSIONS_DIR": cache}
        for _ in range(2):
            command = [sys.executable, "-c", script, student]
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            if run.returncode:
                raise InputError(f"{student} does not run on integers: {run.stderr.splitlines()[-1]}")
            runs.append([float(number) for number in run.stdout.split()[-2:]])
    (_, compiling), (loading, cached) = runs
    return {"load": round(loading, 2), "compiling": round(compiling, 2), "from_cache": round(cached, 2)}


def _bytes_on_disk(config: BenchConfig, onnx: Path) -> dict[str, int]:
    sizes = {}
    for name in ("teacher", "student"):
        folder = load_model(getattr(config, name)).folder or Path()
        files = (*folder.glob("*.safetensors"), *folder.glob("unet/*.safetensors"))
        sizes[name] = files[0].stat().st_size
    return {**sizes, **{path.name: path.stat().st_size for path in sorted(onnx.glob("[st]*.onnx"))}}


def _machine() -> dict[str, Any]:
    packages = ("torch", "diffusers", "onnxruntime", "openvino")
    found = torch.cpu.get_capabilities()
    return {
        "processor": found.get("cpu_name", platform.processor()),
        "instructions": [name for name in ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8") if found.get(name)],
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in packages if importlib.util.find_spec(name)},
    }


def _markdown(rows: list[Row], content: dict[str, Any]) -> str:
    """A row per runtime: milliseconds per step at each batch size, and how many times the integer student's."""
    sizes = sorted({row.batch_size for row in rows})
    by_key = {(row.runtime, row.model, row.batch_size): row for row in rows}
    machine = content["machine"]
    lines = [
        f"{machine['processor']}, {', '.join(machine['instructions'])}, {machine['threads']} threads, "
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


if __name__ == "__main__":
    run_command("python -m eval.bench", benchmark, BenchConfig, sys.argv[1:])
