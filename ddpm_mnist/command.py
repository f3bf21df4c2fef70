"""From the words of a command line to a typed config, or to one line that says what is wrong."""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from ddpm_mnist import InputError
from ddpm_mnist.files import one_line, read_limited
from ddpm_mnist.runs import write_text

# The YAML files of configs/: in a wheel they are inside this package, in the repository beside it.
CONFIGS = Path(__file__).parent / "configs"
if not CONFIGS.is_dir():
    CONFIGS = Path(__file__).parents[1] / "configs"

# What of the installation only some commands need: the extra of pyproject.toml that brings each module.
EXTRAS = {
    **dict.fromkeys(("torchvision", "torchmetrics", "matplotlib", "jinja2", "onnxruntime"), "lab"),
    **dict.fromkeys(("onnx", "onnxscript"), "export"),
}

# Sections lie but a few deep in each other.
MAX_CONFIG_BYTES, MAX_CONFIG_DEPTH = 1 << 20, 10


def run_command(
    prog: str, function: Callable[[Any], Any], config_class: type, arguments: list[str], default: str | None = None
) -> Any:
    """Call `function` with the `config_class` that `arguments` describe.

    Options are the fields of the dataclass, nested ones with dots; `--config` reads them from YAML, from a file or by
    the name of one in `CONFIGS`. Dashes and underscores in their names are the same; a field of type list takes its
    values one after the other.

    Wrong input, on the command line or found later as InputError, prints one line and exits with code 2.

    Args:
        default: what `--config` is where the arguments have none.
    """
    # The help of an option is the docstring under its field.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=prog, description=inspect.getdoc(function), exit_on_error=False)
    usual = f" (default: {default})" if default else ""
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML file, or one of {_config_names()}{usual}; options that follow override what it says",
    )
    lists = {field.name for field in dataclasses.fields(config_class) if field.type == list[str]}
    parser.add_class_arguments(config_class, as_group=False, skip=lists)
    for field in dataclasses.fields(config_class):
        if field.name in lists:
            parser.add_argument(f"--{field.name}", nargs="+", type=str, required=True, help=field.metadata["help"])
    words = [_underscored(word) for word in arguments]
    if default and not any(word.partition("=")[0] == "--config" for word in words):
        words = ["--config", default, *words]
    try:
        parsed = parser.instantiate(parser.parse_args(_with_config_files(words, config_class)))
        del parsed["config"]
        config = config_class(**vars(parsed))
    except (jsonargparse.ArgumentError, ValueError, TypeError, OSError, OverflowError) as error:
        _fail(prog, str(error), 2)
    with one_line_errors(prog):
        return function(config)


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Inside, what the user can do something about ends the program with one line: exit code 2, after Ctrl-C 130."""
    try:
        yield
    except (InputError, OSError) as error:
        _fail(prog, str(error), 2)
    except MemoryError as error:
        _fail(prog, f"there is not enough memory ({str(error) or 'MemoryError'})", 2)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        _fail(prog, f"this needs {missing}, which is not installed: pip install 'efficientdm[{EXTRAS[missing]}]'", 2)
    except KeyboardInterrupt:
        _fail(prog, "interrupted", 130)


def _config_names() -> str:
    return ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))


def _with_config_files(words: list[str], config_class: type) -> list[str]:
    """`words` with the file of each --config in the place of its name, checked: the parser's own reader follows
    aliases, imports what a `class_path` names, and does not say which file it speaks of."""
    words = list(words)
    for at, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == "--config" and (equals or at + 1 < len(words)):
            value = value if equals else words[at + 1]
            path = next((path for path in (Path(value), CONFIGS / f"{value}.yaml") if path.is_file()), None)
            if path is None:
                raise ValueError(f'no configuration "{value}": neither a file nor one of {_config_names()}')
            _check_options(path, config_class, read_yaml(path))
            words[at if equals else at + 1] = f"--config={path}" if equals else str(path)
    return words


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in `path`: sections and plain values, each once; nothing in it names an object of Python.

    Raises:
        ValueError: it is something else; in one line.
    """
    text, depth = read_limited(path, MAX_CONFIG_BYTES), 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if getattr(event, "anchor", None) is not None:
                raise ValueError("anchors and aliases are not read")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_CONFIG_DEPTH:
                raise ValueError(f"it is nested more than {MAX_CONFIG_DEPTH} deep")
        content = yaml.load(text, _OnceLoader)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(one_line(f"{path} cannot be parsed: {error}")) from error
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


def _check_options(path: Path, config_class: type, content: dict[str, Any], section: str = "") -> None:
    """ValueError for what `config_class` has no field for, and for values that would be parsed as YAML again."""
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(config_class)}
    for key, value in content.items():
        name = f"{section}{key}"
        if key not in fields:
            raise ValueError(one_line(f"{path} has no option for {name!r} here, only {', '.join(fields)}"))
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {name} must hold options with their values")
            _check_options(path, fields[key], value, f"{name}.")
        elif isinstance(value, str) and fields[key] not in (str, str | None, Path) and set("&*!{") & set(value):
            raise ValueError(one_line(f"{path}: {name} must be {fields[key]}, not {value!r}"))


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _fail(prog: str, message: str, code: int) -> NoReturn:
    print(f"{prog}: {one_line(message)}", file=sys.stderr)
    sys.exit(code)


def save_config(config: Any, path: Path) -> None:
    """Write the dataclass `config` as the YAML that `--config` reads back."""
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(type(config), as_group=False)
    values = jsonargparse.dict_to_namespace(dataclasses.asdict(config))
    write_text(path, parser.dump(values, skip_validation=True))
