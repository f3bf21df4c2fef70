"""The console script `efficientdm`: one subcommand per job, each a function with a typed config."""

import importlib
import signal
import sys
from typing import NamedTuple


class Command(NamedTuple):
    """Where a subcommand lives; nothing of it is imported before it is asked for."""

    module: str
    function: str
    config: str
    help: str


COMMANDS = {
    "run": Command(
        "finetune.pipeline", "run", "RunConfig",
        "The main job: trajectories from noise, calibration, distillation, scores, grid, report",
    ),
    "distill": Command(
        "finetune.pipeline", "distill_student", "RunConfig", "Make a student, without scores, grid and report"
    ),
    "ladder": Command("finetune.ladder", "climb", "LadderConfig", "What each technique gives, and what each bit costs"),
    "sample": Command("eval.sample", "write_samples", "SampleConfig", "Draw images with a model"),
    "fid": Command("eval.fid", "print_fid", "FidConfig", "Score a model: FID, KID, Inception score and more"),
    "grid": Command("eval.grid", "draw_models", "GridConfig", "Draw a row of images per model, from the same noise"),
    "export": Command("eval.export", "export", "ExportConfig", "Write a student in its real bits, or a model as ONNX"),
    "demo": Command("eval.demo", "serve", "DemoConfig", "A page to play with: digits of every bit-width, step by step"),
    "bench": Command("eval.bench", "benchmark", "BenchConfig", "Time every runtime side by side"),
    "teacher": Command("ddpm_mnist.train", "train_teacher", "TeacherConfig", "Train a teacher on images"),
    "features": Command(
        "eval.train_features", "train_features", "FeaturesConfig", "Train a ruler: the feature network of the scores"
    ),
}  # fmt: skip


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    return (
        "usage: efficientdm COMMAND [--config FILE.yaml] [--OPTION VALUE …]\n\n"
        "A laboratory for low-bit diffusion: a full-precision teacher draws digits, a 2- to 8-bit student learns\n"
        f"from it without data, and both are measured.\n\ncommands:\n{rows}\n\n"
        "`efficientdm COMMAND --help` explains its options, `--print_config` prints them as YAML.\n"
        "Start here: efficientdm run --config configs/quick.yaml"
    )


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        if hasattr(signal, "SIGPIPE"):  # a reader that leaves, as `head` does, is no error
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        print(usage())
        sys.exit(0 if arguments else 2)
    name = arguments[0]
    if name not in COMMANDS:
        print(f'efficientdm: no command "{name}"; there are {", ".join(COMMANDS)}', file=sys.stderr)
        sys.exit(2)
    command = COMMANDS[name]
    # Only now: torch and diffusers take seconds to import.
    from ddpm_mnist.command import run_command

    module = importlib.import_module(command.module)
    config_class = getattr(module, command.config)
    run_command(f"efficientdm {name}", getattr(module, command.function), config_class, arguments[1:])
