"""Build the parser of a command's options and its help, and check option values."""

import argparse
import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, get_args, get_origin

import jsonargparse

from ddpm_mnist.lab import flat

# Folder of the YAML configs: inside this package in a wheel, beside it in the repository.
CONFIGS = Path(__file__).parents[1] / "configs"


if not CONFIGS.is_dir():
    CONFIGS = Path(__file__).parents[2] / "configs"


def check_numbers(values: dict[str, Any]) -> None:
    """Raise ValueError if a number in `values` is NaN, infinite, or an integer of more than 64 bits."""
    for name, value in flat(values).items():
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name} must be a number, not {number}")
            if isinstance(number, int) and abs(number) >= 1 << 63:
                raise ValueError(f"{name} must lie within ±2^63, not {number}")


def check_value(name: str, value: Any) -> Any:
    """Return an option's value with `~` expanded; raise ValueError for a string that `check_text` rejects."""
    if isinstance(value, list):
        return [check_value(name, part) for part in value]
    if isinstance(value, str | Path):
        check_text(name, str(value))
        return type(value)(os.path.expanduser(value))
    return value


def check_text(place: str, text: str) -> None:
    """Raise ValueError if `text` is empty or cannot be encoded in the locale's encoding, which file names use.

    Args:
        place: where the text comes from, for the message.
    """
    if not text or text.endswith("="):
        raise ValueError(f"{place}: a value is missing, where {text!r} stands")
    try:
        os.fsencode(text)
        text.encode()  # raises for lone surrogates, which stand for command-line bytes that could not be decoded
    except UnicodeError as error:
        encoding = sys.getfilesystemencoding()
        utf8 = "" if encoding == "utf-8" else "set PYTHONUTF8=1, or "
        raise ValueError(
            f"{place}: {text!r} is not in the locale's encoding, {encoding}: {utf8}take another name"
        ) from error


def explain(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """Rewrite a parser's error: name the option, the type that it takes and the value that it got."""
    if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
        return f"--{missing[1]} is missing"
    wrong = re.match(r'Parser key "([\w.]+)":', message)
    action = next((action for action in parser._actions if wrong and action.dest == wrong[1]), None)
    if not wrong or action is None:
        return message
    hint = getattr(action, "_typehint", action.type)
    if hint is None:
        return f"--{action.dest} is a section: its options are --{action.dest}.NAME"
    value = re.search(r"(?:Got value|Given value): (.*)", message)
    return f"--{action.dest} must be {describe_type(hint)}" + (f", not {value[1]}" if value else "")


def describe_type(hint: Any) -> str:
    """Describe the values of a type for the user, e.g. `int | None` → "a whole number or null"."""
    if get_origin(hint) is tuple:
        return "a list such as [1,2]" if int in get_args(hint) else "a list such as [a,b]"
    if several := get_args(hint):
        return " or ".join(describe_type(one) for one in several)
    words = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null", Path: "a path"}
    return words.get(hint, "a text")


def config_names() -> str:
    """Return the names of the configs in `CONFIGS`, separated by commas."""
    return ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))


def make_parser(
    prog: str, function: Callable[[Any], Any], config_class: type, default: str | None
) -> jsonargparse.ArgumentParser:
    """Return a parser with one option per field of `config_class`; arguments as for `run_command`."""
    # The help of an option is the docstring under its field; the title of a group is the docstring of its class.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--OPTION VALUE …]",
        description=re.split(r"\n\n(?:Args|Raises):", inspect.getdoc(function) or "")[0],
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    usual = f" Default: {default}." if default else ""
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML file, or one of {config_names()}; options that follow override what it says.{usual}",
    )
    lists = {field.name for field in dataclasses.fields(config_class) if field.type == list[str]}
    parser.add_class_arguments(config_class, as_group=False, skip=lists)
    for field in dataclasses.fields(config_class):
        if field.name in lists:
            names = field.default_factory()  # type: ignore[operator]
            parser.add_argument(
                f"--{field.name}", nargs="+", type=str, default=names or None, required=not names, **field.metadata
            )
    groups = {action.dest.rpartition(".")[0] for action in parser._actions}
    for action in parser._actions:
        if action.dest == "help":
            action.help = "Show this help, and exit."
        elif action.dest == "print_config":
            action.help = "Print the configuration as YAML, and exit."
        elif action.dest in groups:  # jsonargparse would read a config file per group; --config is enough
            action.help = argparse.SUPPRESS
    return parser


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Help formatter that shows each option with the kind of its value, and below it its meaning and its default."""

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
        text = (action.help or "").replace("None:", "null:")  # as the user types it
        if action.required:
            return f"{text} Required."
        if action.dest in ("help", "config", "print_config"):
            return text
        default = list(action.default) if isinstance(action.default, tuple) else action.default
        return f"{text} Default: {default if isinstance(default, str | Path) else json.dumps(default)}."

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def unknown_option(name: str, options: Collection[str]) -> str:
    """Return the error message for the unknown option `name`, with the most similar of `options`."""
    near = [option for option in sorted(options) if option.endswith(f".{name}")]
    near = near or difflib.get_close_matches(name, options, n=1)
    return f"no option --{name}; " + (f"did you mean --{near[0]}?" if near else "--help lists them")


def underscored(word: str) -> str:
    """Replace dashes in an option's name by underscores: "--num-steps=5" → "--num_steps=5"."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
