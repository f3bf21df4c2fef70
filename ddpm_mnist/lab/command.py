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

# What is wrong for every process the main one says, and its end ends the others before so many seconds are over.
SECONDS_TO_SPEAK = 5


# What of the installation only some commands need: the extra of pyproject.toml that brings each module.
EXTRAS = {
    **dict.fromkeys(("torchvision", "torchmetrics", "matplotlib", "jinja2", "onnxruntime"), "lab"),
    **dict.fromkeys(("onnx", "onnxscript"), "export"),
    "gradio": "demo",
}


# What torch, which knows no MemoryError, says where memory is short: its CPU allocator, one of an accelerator, and of a
# size that no memory has.
NO_MEMORY = (
    r"(?<=DefaultCPUAllocator: ).*?(?=\. |$)|\w+ (?:backend )?out of memory(?:.* Tried to allocate [\d.]+ \w+)?"
    r"|Storage size calculation overflowed"
)


def run_command(
    prog: str, function: Callable[[Any], Any], config_class: type, arguments: list[str], default: str | None = None
) -> Any:
    """Call `function` with the `config_class` that `arguments` describe.

    Options are the fields of the dataclass, nested ones with dots; `--config` reads them from YAML, from a file or by
    the name of one in `CONFIGS`. Dashes and underscores in their names are the same; a field of type list takes its
    values one after the other.

    Wrong input, on the command line or found later as InputError, prints one line and exits with code 2. Of several
    processes (`ddpm_mnist.lab.processes`) the main one alone prints.

    Args:
        default: what `--config` is where the arguments have none.
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
        parser.set_defaults(flat(parse_yaml(read_limited(path), path)))  # for the help to tell
    try:
        os.getcwd()  # it may have been taken away
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
    """Inside, what the user can do something about ends the program with one line: exit code 2, after Ctrl-C 130.

    Args:
        output: what a system's error speaks of that names no file.
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
            sys.exit(130)  # all are interrupted: the main one says so
        _fail(prog, "interrupted", 130)


def _stdout_is_full() -> bool:
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _fail(prog: str, message: str, code: int) -> NoReturn:
    if not processes.is_main():
        time.sleep(SECONDS_TO_SPEAK)
        prog = f"{prog}, process {processes.rank()}"
    print(f"{prog}: {one_line(message)}", file=sys.stderr)
    sys.exit(code)
