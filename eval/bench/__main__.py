"""Run the benchmark: `python -m eval.bench`."""

import sys

from ddpm_mnist.lab.command import run_command
from eval.bench.benchmark import BenchConfig, benchmark

run_command("python -m eval.bench", benchmark, BenchConfig, sys.argv[1:])
