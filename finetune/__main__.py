"""`python -m finetune` is `efficientdm run`."""

import sys

from ddpm_mnist.command import run_command
from finetune.pipeline import RunConfig, run

run_command("python -m finetune", run, RunConfig, sys.argv[1:])
