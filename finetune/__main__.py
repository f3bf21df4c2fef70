"""`python -m finetune` is `efficientdm run`."""

import sys

from finetune.cli import start

start("run", "python -m finetune", sys.argv[1:])
