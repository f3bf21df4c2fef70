"""The console script `efficientdm`: one subcommand per job, each a function with a typed config."""

import importlib
import sys
from typing import Any, NamedTuple

from ddpm_mnist import InputError


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
    "sample": Command("eval.sample", "write_samples", "SampleConfig", "Draw images with a model"),
    "fid": Command("eval.fid", "print_fid", "FidConfig", "Score a model: FID, KID, Inception score, distance to the teacher"),
    "grid": Command("eval.grid", "draw_models", "GridConfig", "Draw a row of images per model, from the same noise"),
    "teacher": Command("ddpm_mnist.train", "train_teacher", "TeacherConfig", "Train the teacher (needs MNIST)"),
    "features": Command(
        "eval.features", "train_features", "FeaturesConfig", "Train the feature network of the scores (needs MNIST)"
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


def run_command(name: str, arguments: list[str]) -> Any:
    """Parse `arguments` into the command's config and call it; wrong input ends the process with exit code 2."""
    command = COMMANDS[name]
    # diffusers and torch say much about themselves while they are imported that no user can act on.
    import jsonargparse

    module = importlib.import_module(command.module)
    config_class = getattr(module, command.config)
    parser = jsonargparse.ArgumentParser(prog=f"efficientdm {name}", description=command.help)
    parser.add_argument("--config", action="config", help="YAML file; options given after it override it")
    parser.add_class_arguments(config_class, as_group=False)
    parsed = parser.parse_args(arguments)
    try:
        del parsed["config"]
        config = config_class(**parser.instantiate_classes(parsed).as_dict())
        return getattr(module, command.function)(config)
    except InputError as error:
        print(f"efficientdm {name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"efficientdm {name}: interrupted", file=sys.stderr)
        sys.exit(130)


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    if arguments[0] not in COMMANDS:
        print(f'efficientdm: no command "{arguments[0]}"; there are {", ".join(COMMANDS)}', file=sys.stderr)
        sys.exit(2)
    run_command(*arguments[:1], arguments[1:])
