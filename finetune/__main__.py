"""`python -m finetune` is `efficientdm run`."""

import sys

from finetune.cli import main

sys.argv.insert(1, "run")
main()
