"""From the words of a command line to a typed config, or to one line that says what is wrong."""

import argparse
import dataclasses
import difflib
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn, get_args

import jsonargparse
import yaml

from ddpm_mnist import InputError
from ddpm_mnist.runs import flat, write_text


def run_command(prog: str, function: Callable[[Any], Any], config_class: type, arguments: list[str]) -> Any:
    """Call `function` with the `config_class` that `arguments` describe.

    Options are the fields of the dataclass, nested ones with dots; `--config` reads them from YAML. Dashes and
    underscores in their names are the same; a field of type list takes its values one after the other.

    Wrong input, on the command line or found later as InputError, prints one line and exits with code 2.
    """
    parser = _make_parser(prog, function, config_class)
    options = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    words = [_underscored(word) for word in arguments]
    try:
        for word, next_word in zip(words, [*words[1:], ""], strict=True):
            option, _, value = word.partition("=")
            if option.startswith("--"):
                _check_option(option[2:], options)
            if option == "--config":
                _check_yaml(Path(value or next_word), options)
        parsed = parser.instantiate(parser.parse_args(words))
        del parsed["config"]
        config = config_class(**vars(parsed))
    except (jsonargparse.ArgumentError, ValueError, TypeError, OSError) as error:
        _fail(prog, str(error), 2)
    try:
        return function(config)
    except InputError as error:
        _fail(prog, str(error), 2)
    except OSError as error:
        _fail(prog, str(error) if error.filename else f"{getattr(config, 'output', '')}: {error}", 2)
    except KeyboardInterrupt:
        _fail(prog, "interrupted", 130)


def _make_parser(prog: str, function: Callable[[Any], Any], config_class: type) -> jsonargparse.ArgumentParser:
    # The help of an option is the docstring under its field, the title of a group that of its class.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--OPTION VALUE …]",
        description=(inspect.getdoc(function) or "").partition("\n\nRaises:")[0],
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; options that follow override what it says.")
    lists = {field.name for field in dataclasses.fields(config_class) if field.type == list[str]}
    parser.add_class_arguments(config_class, as_group=False, skip=lists)
    for field in dataclasses.fields(config_class):
        if field.name in lists:
            parser.add_argument(f"--{field.name}", nargs="+", type=str, required=True, help=field.metadata["help"])
    groups = {action.dest.rpartition(".")[0] for action in parser._actions}
    for action in parser._actions:
        if action.dest == "help":
            action.help = "Show this help, and exit."
        elif action.dest == "print_config":
            action.help = "Print the configuration as YAML, and exit."
        elif action.dest in groups:  # a file of its own for each group: a file for all is enough
            action.help = argparse.SUPPRESS
    return parser


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """An option with the kind of its value; below it, in words, what it means, and its default."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, max_help_position=6, **options)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(fill(paragraph, width, indent) for paragraph in text.split("\n\n"))

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.dest == "config":
            return "FILE"
        hint = getattr(action, "_typehint", action.type)
        kinds = {float: "NUMBER", int: "INTEGER", Path: "PATH", str: "TEXT"}
        return next((kind for of, kind in kinds.items() if of in (hint, *get_args(hint))), "VALUE")

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").replace("None:", "null:")  # as it is typed
        if action.required:
            return f"{text} Required."
        if action.dest in ("help", "config", "print_config"):
            return text
        default = list(action.default) if isinstance(action.default, tuple) else action.default
        return f"{text} Default: {default if isinstance(default, str | Path) else json.dumps(default)}."

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def _check_option(name: str, options: Collection[str]) -> None:
    """ValueError that proposes the nearest, unless `name` is one of `options`."""
    if name not in options:
        near = [option for option in sorted(options) if option.endswith(f".{name}")]
        near = near or difflib.get_close_matches(name, options, n=1)
        raise ValueError(f"no option --{name}; " + (f"did you mean --{near[0]}?" if near else "--help lists them"))


def _check_yaml(path: Path, options: Collection[str]) -> None:
    """ValueError that names the file, where it is there and no YAML, or has what is none of `options`."""
    if not path.is_file():
        return
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be parsed: {error}") from error
    if not isinstance(content, dict | None):
        raise ValueError(f"{path} must hold options with their values, not a {type(content).__name__}")
    for name in flat(content or {}):
        try:
            _check_option(name, options)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _fail(prog: str, message: str, code: int) -> NoReturn:
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def save_config(config: Any, path: Path) -> None:
    """Write the dataclass `config` as the YAML that `--config` reads back."""
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(type(config), as_group=False)
    values = jsonargparse.dict_to_namespace(dataclasses.asdict(config))
    write_text(path, parser.dump(values, skip_validation=True))
