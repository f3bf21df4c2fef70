"""From the words of a command line to a typed config, or to one line that says what is wrong."""

import dataclasses
import inspect
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from ddpm_mnist import InputError, processes
from ddpm_mnist.runs import write_text

# What is wrong for every process the main one says, and its end ends the others before so many seconds are over.
SECONDS_TO_SPEAK = 5


def run_command(prog: str, function: Callable[[Any], Any], config_class: type, arguments: list[str]) -> Any:
    """Call `function` with the `config_class` that `arguments` describe.

    Options are the fields of the dataclass, nested ones with dots; `--config` reads them from YAML. Dashes and
    underscores in their names are the same; a field of type list takes its values one after the other.

    Wrong input, on the command line or found later as InputError, prints one line and exits with code 2. Of several
    processes (`ddpm_mnist.processes`) the main one alone prints.
    """
    if not processes.is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lasts)
    # The help of an option is the docstring under its field.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=prog, description=inspect.getdoc(function), exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; options that follow override what it says")
    lists = {field.name for field in dataclasses.fields(config_class) if field.type == list[str]}
    parser.add_class_arguments(config_class, as_group=False, skip=lists)
    for field in dataclasses.fields(config_class):
        if field.name in lists:
            parser.add_argument(f"--{field.name}", nargs="+", type=str, required=True, help=field.metadata["help"])
    words = [_underscored(word) for word in arguments]
    try:
        for option, value in zip(words, [*words, ""][1:], strict=True):
            if option.startswith("--config"):
                _check_yaml(Path(option.partition("=")[2] or value))
        parsed = parser.instantiate(parser.parse_args(words))
        del parsed["config"]
        config = config_class(**vars(parsed))
    except (jsonargparse.ArgumentError, ValueError, TypeError, OSError) as error:
        _fail(prog, str(error), 2)
    try:
        result = function(config)
        processes.leave()
        return result
    except (InputError, OSError) as error:
        _fail(prog, str(error), 2)
    except processes.ProcessLost as error:
        _fail(prog, str(error), 1)
    except KeyboardInterrupt:
        _fail(prog, "interrupted", 130)


def _check_yaml(path: Path) -> None:
    """ValueError that names the file, where it is there and no YAML or no options: the parser's own does not."""
    if not path.is_file():
        return
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be parsed: {error}") from error
    if not isinstance(content, dict | None):
        raise ValueError(f"{path} must hold options with their values, not a {type(content).__name__}")


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _fail(prog: str, message: str, code: int) -> NoReturn:
    if not processes.is_main():
        time.sleep(SECONDS_TO_SPEAK)
        prog = f"{prog}, process {processes.rank()}"
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def save_config(config: Any, path: Path) -> None:
    """Write the dataclass `config` as the YAML that `--config` reads back."""
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(type(config), as_group=False)
    values = jsonargparse.dict_to_namespace(dataclasses.asdict(config))
    write_text(path, parser.dump(values, skip_validation=True))
