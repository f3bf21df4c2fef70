"""The console script `efficientdm`: one subcommand per job, each a function with a config dataclass."""

import difflib
import importlib
import io
import os
import signal
import sys
from importlib.metadata import version
from typing import Any, NamedTuple


class Command(NamedTuple):
    """The module, function and config class of a subcommand, imported only when it runs."""

    module: str
    function: str
    config: str
    help: str
    default: str | None = None
    """Name of the YAML file in configs/ that is read without --config."""


COMMANDS = {
    "run": Command(
        "finetune.run", "run", "RunConfig",
        "The main job: trajectories from noise, calibration, distillation, scores, grid, report",
        default="quick",
    ),
    "distill": Command(
        "finetune.make", "distill_student", "RunConfig", "Make a student, without scores, grid and report",
        default="quick",
    ),
    "ladder": Command("finetune.ladder", "climb", "LadderConfig", "What each technique gives, and what each bit costs"),
    "sample": Command("eval.sample", "write_samples", "SampleConfig", "Draw images with a model"),
    "fid": Command("eval.fid", "print_fid", "FidConfig", "Score a model: FID, KID, Inception score and more"),
    "grid": Command("eval.grid", "draw_models", "GridConfig", "Draw a row of images per model, from the same noise"),
    "export": Command("eval.export", "export", "ExportConfig", "Write a student in its real bits, or a model as ONNX"),
    "demo": Command("eval.demo", "serve", "DemoConfig", "A page to play with: digits of every bit-width, step by step"),
    "bench": Command("eval.bench.benchmark", "benchmark", "BenchConfig", "Time every runtime side by side"),
    "teacher": Command("ddpm_mnist.train", "train_teacher", "TeacherConfig", "Train a teacher on images"),
    "features": Command(
        "eval.train_features", "train_features", "FeaturesConfig", "Train a ruler: the feature network of the scores"
    ),
}  # fmt: skip


def usage() -> str:
    """Return the help text of the script."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    return (
        "usage: efficientdm COMMAND [--config FILE.yaml] [--OPTION VALUE …]\n\n"
        "A laboratory for low-bit diffusion: a full-precision teacher draws digits, a 1- to 8-bit student learns\n"
        f"from it without data, and both are measured.\n\ncommands:\n{rows}\n\n"
        "`efficientdm COMMAND --help` explains its options, `--print_config` prints them as YAML;\n"
        "`efficientdm --version` tells the version.\n"
        "Start here: efficientdm run"
    )


def main() -> None:
    """Run the subcommand that the command line names."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (closed by the caller)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # the encoding of pipes on Windows lacks ε and ↓
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        if hasattr(signal, "SIGPIPE"):  # a reader that closes the pipe early, e.g. `head`, is no error
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        print(usage())
        sys.exit(0 if arguments else 2)
    name = arguments[0]
    if name == "--version":
        print(f"efficientdm {version('efficientdm')}")
        sys.exit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        proposal = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(COMMANDS)}"
        print(f'efficientdm: no command "{name}"; {proposal}', file=sys.stderr)
        sys.exit(2)
    start(name, f"efficientdm {name}", arguments[1:])


def start(name: str, prog: str, arguments: list[str]) -> None:
    """Run the command `name` with the command-line `arguments`; its messages begin with `prog`."""

    def leave(*_: Any) -> None:
        os.write(2, f"{prog}: interrupted\n".encode())
        os._exit(130)

    # Importing torch and diffusers takes seconds, so it happens only here. Ctrl-C exits directly meanwhile, because
    # their import code may catch a KeyboardInterrupt and report another error.
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    command = COMMANDS[name]
    from ddpm_mnist.lab.command import one_line_errors, run_command

    with one_line_errors(prog):
        module = importlib.import_module(command.module)
    signal.signal(signal.SIGINT, handler)
    function, config_class = getattr(module, command.function), getattr(module, command.config)
    run_command(prog, function, config_class, arguments, command.default)


if __name__ == "__main__":
    main()
