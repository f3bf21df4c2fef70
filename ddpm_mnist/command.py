"""From the words of a command line to a typed config, or to one line that says what is wrong."""

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
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import jsonargparse
import yaml

from ddpm_mnist import InputError, one_line, processes
from ddpm_mnist.files import read_limited
from ddpm_mnist.runs import flat, write_text

# The YAML files of configs/: in a wheel they are inside this package, in the repository beside it.
CONFIGS = Path(__file__).parent / "configs"
if not CONFIGS.is_dir():
    CONFIGS = Path(__file__).parents[1] / "configs"

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

# Sections lie but a few deep in each other.
MAX_CONFIG_BYTES, MAX_CONFIG_DEPTH = 1 << 20, 10


def run_command(
    prog: str, function: Callable[[Any], Any], config_class: type, arguments: list[str], default: str | None = None
) -> Any:
    """Call `function` with the `config_class` that `arguments` describe.

    Options are the fields of the dataclass, nested ones with dots; `--config` reads them from YAML, from a file or by
    the name of one in `CONFIGS`. Dashes and underscores in their names are the same; a field of type list takes its
    values one after the other.

    Wrong input, on the command line or found later as InputError, prints one line and exits with code 2. Of several
    processes (`ddpm_mnist.processes`) the main one alone prints.

    Args:
        default: what `--config` is where the arguments have none.
    """
    with one_line_errors(prog):
        if not processes.is_main():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lasts)
    parser = _make_parser(prog, function, config_class, default)
    options = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    words = [_underscored(word) for word in arguments]
    if default and not any(word.partition("=")[0] == "--config" for word in words):
        words = ["--config", default, *words]
        path = CONFIGS / f"{default}.yaml"
        parser.set_defaults(flat(parse_yaml(read_limited(path), path)))  # for the help to tell
    try:
        os.getcwd()  # it may have been taken away
        for word in words:
            _check_text("the command line", word)
            option, _, _ = word.partition("=")
            if option.startswith("--") and option[2:] not in options:
                raise ValueError(_no_option(option[2:], options))
        parsed = parser.parse_args(_with_config_files(words, config_class, options))
        del parsed["config"]
        for name, value in parsed.items():
            parsed[name] = _checked(f"--{name}", value)
        config = config_class(**vars(parser.instantiate(parsed)))
        _check_numbers(dataclasses.asdict(config))
    except (jsonargparse.ArgumentError, ValueError, TypeError, OSError, OverflowError) as error:
        _fail(prog, _in_our_words(str(error), parser), 2)
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


def _check_numbers(values: dict[str, Any]) -> None:
    """ValueError where a number is NaN or infinite, or an integer of more than 64 bits: no option has a use for one."""
    for name, value in flat(values).items():
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name} must be a number, not {number}")
            if isinstance(number, int) and abs(number) >= 1 << 63:
                raise ValueError(f"{name} must lie within ±2^63, not {number}")


def _checked(name: str, value: Any) -> Any:
    """The option's value, with the home folder in the place of `~`; ValueError for a text of no use."""
    if isinstance(value, list):
        return [_checked(name, part) for part in value]
    if isinstance(value, str | Path):
        _check_text(name, str(value))
        return type(value)(os.path.expanduser(value))
    return value


def _check_text(place: str, text: str) -> None:
    """ValueError for a text that is empty, or has letters that the locale's encoding lacks, which names of files have
    on disk."""
    if not text or text.endswith("="):
        raise ValueError(f"{place}: a value is missing, where {text!r} stands")
    try:
        os.fsencode(text)
        text.encode()  # bytes of the command line that are none of that encoding stand as halves of a letter
    except UnicodeError as error:
        encoding = sys.getfilesystemencoding()
        utf8 = "" if encoding == "utf-8" else "set PYTHONUTF8=1, or "
        raise ValueError(
            f"{place}: {text!r} is not in the locale's encoding, {encoding}: {utf8}take another name"
        ) from error


def _in_our_words(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """What the parser says of a value of the wrong type, with the option's name and what it takes."""
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
    return f"--{action.dest} must be {_kind(hint)}" + (f", not {value[1]}" if value else "")


def _kind(hint: Any) -> str:
    """What an option of that type takes, in words."""
    if get_origin(hint) is tuple:
        return "a list such as [1,2]" if int in get_args(hint) else "a list such as [a,b]"
    if several := get_args(hint):
        return " or ".join(_kind(one) for one in several)
    words = {int: "a whole number", float: "a number", bool: "true or false", type(None): "null", Path: "a path"}
    return words.get(hint, "a text")


def _make_parser(
    prog: str, function: Callable[[Any], Any], config_class: type, default: str | None
) -> jsonargparse.ArgumentParser:
    # The help of an option is the docstring under its field, the title of a group that of its class.
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
        help=f"YAML file, or one of {_config_names()}; options that follow override what it says.{usual}",
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


def _no_option(name: str, options: Collection[str]) -> str:
    """That `name` is none of `options`, and the nearest that is."""
    near = [option for option in sorted(options) if option.endswith(f".{name}")]
    near = near or difflib.get_close_matches(name, options, n=1)
    return f"no option --{name}; " + (f"did you mean --{near[0]}?" if near else "--help lists them")


def _config_names() -> str:
    return ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))


def _with_config_files(words: list[str], config_class: type, options: Collection[str]) -> list[str]:
    """`words` with the text of each --config file in the place of its name, checked: the parser's own reader follows
    aliases, imports what a `class_path` names, and does not say which file it speaks of."""
    for at, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == "--config" and (equals or at + 1 < len(words)):
            value = value if equals else words[at + 1]
            places = Path(value), CONFIGS / f"{value}.yaml"
            path = next((path for path in places if path.exists() and not path.is_dir()), None)  # a pipe, too
            if path is None:
                raise ValueError(f'no configuration "{value}": neither a file nor one of {_config_names()}')
            source = read_limited(path, MAX_CONFIG_BYTES)
            content = parse_yaml(source, path)
            _check_content(path, config_class, content, options)
            # Its text in ASCII: the parser would read the file in the locale's encoding. It wants at least an option.
            text = [f"--config={yaml.emit(yaml.parse(source, yaml.SafeLoader))}"] if content else []
            rest = _with_config_files(words[at + (1 if equals else 2) :], config_class, options)
            return [*words[:at], *text, *rest]
    return words


def parse_yaml(text: str, path: Path) -> dict[str, Any]:
    """The options in `text`, read from `path`: sections and plain values, each once; nothing in it names an object of
    Python.

    Raises:
        ValueError: it is something else.
    """
    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if getattr(event, "anchor", None) is not None:
                raise ValueError("anchors and aliases are not read")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_CONFIG_DEPTH:
                raise ValueError(f"it is nested more than {MAX_CONFIG_DEPTH} deep")
        content = yaml.load(text, _OnceLoader)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} cannot be parsed: {error}") from error
    if not isinstance(content, dict | None):
        raise ValueError(f"{path} must hold options with their values, not a {type(content).__name__}")
    return content or {}


class _OnceLoader(yaml.SafeLoader):
    """Refuses what YAML would read as the last of several."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            raise ValueError("an option is there twice")
        return mapping


def _check_content(
    path: Path, config_class: type, content: dict[str, Any], options: Collection[str], section: str = ""
) -> None:
    """ValueError for what `config_class` has no field for, and for values that would be parsed as YAML again."""
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(config_class)}
    for key, value in content.items():
        name = f"{section}{key}"
        if key not in fields:
            raise ValueError(f"{path}: {_no_option(name, options)}")
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {name} must hold options with their values")
            _check_content(path, fields[key], value, options, f"{name}.")
        elif value is None and type(None) not in get_args(fields[key]):
            raise ValueError(f"{path}: {name} must be {_kind(fields[key])}, not null")
        elif isinstance(value, str) and fields[key] not in (str, str | None, Path) and set("&*!{") & set(value):
            raise ValueError(f"{path}: {name} must be {fields[key]}, not {value!r}")


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _fail(prog: str, message: str, code: int) -> NoReturn:
    if not processes.is_main():
        time.sleep(SECONDS_TO_SPEAK)
        prog = f"{prog}, process {processes.rank()}"
    print(f"{prog}: {one_line(message)}", file=sys.stderr)
    sys.exit(code)


def save_config(config: Any, path: Path) -> None:
    """Write the dataclass `config` as the YAML that `--config` reads back."""
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(type(config), as_group=False)
    values = jsonargparse.dict_to_namespace(dataclasses.asdict(config))
    write_text(path, parser.dump(values, skip_validation=True))
