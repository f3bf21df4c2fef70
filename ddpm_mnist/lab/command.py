"""Run a command: parse its options into a typed config, call it, and report errors in one line."""

import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jsonargparse

from ddpm_mnist.lab import InputError, flat, one_line, processes
from ddpm_mnist.lab.config_file import parse_yaml, read_config_files
from ddpm_mnist.lab.options import (
    CONFIGS,
    check_numbers,
    check_text,
    check_value,
    explain,
    make_parser,
    underscored,
    unknown_option,
)
from ddpm_mnist.lab.read import read_limited

# If all ranks hit the same error, rank 0 reports it, and the launcher then stops the others. They wait this many
# seconds before they report an error of their own.
REPORT_DELAY = 5


# Optional dependencies: module → the extra of pyproject.toml that installs it.
EXTRAS = {
    **dict.fromkeys(("torchvision", "torchmetrics", "matplotlib", "jinja2", "onnxruntime"), "lab"),
    **dict.fromkeys(("onnx", "onnxscript"), "export"),
    "gradio": "demo",
}


# torch raises RuntimeError, not MemoryError, if memory runs out. These are the messages of its CPU allocator, of the
# allocators of accelerators, and for a size that overflows.
NO_MEMORY = (
    r"(?<=DefaultCPUAllocator: ).*?(?=\. |$)|\w+ (?:backend )?out of memory(?:.* Tried to allocate [\d.]+ \w+)?"
    r"|Storage size calculation overflowed"
)


def run_command(
    prog: str, function: Callable[[Any], Any], config_class: type, arguments: list[str], default: str | None = None
) -> Any:
    """Parse `arguments` into a `config_class` and call `function` with it.

    The options are the fields of the dataclass; nested fields are written with dots (`--sampler.num_steps`).
    `--config` reads options from a YAML file, given by its path or by its name in `CONFIGS`. Dashes and underscores in
    option names are equivalent. A field of type list takes several values: `--models a b c`.

    Invalid input, on the command line or raised later as InputError, prints one line and exits with code 2. With
    several processes (`ddpm_mnist.lab.processes`) only the main one prints.

    Args:
        default: value of `--config` if the arguments do not contain it.
    """
    with one_line_errors(prog):
        if not processes.is_main():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lasts)
    parser = make_parser(prog, function, config_class, default)
    options = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    words = [underscored(word) for word in arguments]
    if default and not any(word.partition("=")[0] == "--config" for word in words):
        words = ["--config", default, *words]
        path = CONFIGS / f"{default}.yaml"
        parser.set_defaults(flat(parse_yaml(read_limited(path), path)))  # so that the help shows them
    try:
        os.getcwd()  # raises if the working directory was deleted
        for word in words:
            check_text("the command line", word)
            option, _, _ = word.partition("=")
            if option.startswith("--") and option[2:] not in options:
                raise ValueError(unknown_option(option[2:], options))
        parsed = parser.parse_args(read_config_files(words, config_class, options))
        del parsed["config"]
        for name, value in parsed.items():
            parsed[name] = check_value(f"--{name}", value)
        config = config_class(**vars(parser.instantiate(parsed)))
        check_numbers(dataclasses.asdict(config))
    except (jsonargparse.ArgumentError, ValueError, TypeError, OSError, OverflowError) as error:
        _fail(prog, explain(str(error), parser), 2)
    with one_line_errors(prog, str(getattr(config, "output", ""))):
        result = function(config)
        processes.leave()
        return result


@contextmanager
def one_line_errors(prog: str, output: str = "") -> Iterator[None]:
    """Report errors that the user can fix in one line and exit: code 2, after Ctrl-C 130, if a process was lost 1.

    Args:
        output: path to name in the message of an OSError that has no file name.
    """
    try:
        yield
    except InputError as error:
        _fail(prog, str(error), 2)
    except BrokenPipeError:
        _fail(prog, "whoever was reading the output has gone", 2)
    except OSError as error:
        if not error.filename and output:
            output = "standard output" if _stdout_is_full() else output
            _fail(prog, f"{output}: {error}", 2)
        _fail(prog, str(error), 2)
    except MemoryError as error:
        _fail(prog, f"there is not enough memory ({str(error) or 'MemoryError'})", 2)
    except RuntimeError as error:
        if (short := re.search(NO_MEMORY, str(error))) is None:
            raise
        _fail(prog, f"there is not enough memory ({short[0]})", 2)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        _fail(prog, f"this needs {missing}, which is not installed: pip install 'efficientdm[{EXTRAS[missing]}]'", 2)
    except processes.ProcessLost as error:
        _fail(prog, str(error), 1)
    except KeyboardInterrupt:
        if not processes.is_main():
            sys.exit(130)  # all processes are interrupted; the main one prints the message
        _fail(prog, "interrupted", 130)


def _stdout_is_full() -> bool:
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _fail(prog: str, message: str, code: int) -> NoReturn:
    if not processes.is_main():
        time.sleep(REPORT_DELAY)
        prog = f"{prog}, process {processes.rank()}"
    print(f"{prog}: {one_line(message)}", file=sys.stderr)
    sys.exit(code)
