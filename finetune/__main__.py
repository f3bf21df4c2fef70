"""Run `efficientdm run` as `python -m finetune`."""

import sys

from finetune.cli import start

start("run", "python -m finetune", sys.argv[1:])
