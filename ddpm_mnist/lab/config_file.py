"""Read and write configs as YAML."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

import jsonargparse
import yaml

from ddpm_mnist.lab.options import CONFIGS, config_names, describe_type, unknown_option
from ddpm_mnist.lab.read import read_limited
from ddpm_mnist.lab.write import write_text

# Configs have only a few levels of sections; deeper nesting is refused.
MAX_CONFIG_BYTES, MAX_CONFIG_DEPTH = 1 << 20, 10


def read_config_files(words: list[str], config_class: type, options: Collection[str]) -> list[str]:
    """Return `words`, the arguments, with each --config value replaced by the checked text of that file.

    jsonargparse would read the files itself, but it follows aliases, imports any `class_path`, and does not name the
    file in its errors.

    Raises:
        ValueError: a file does not exist, is no valid YAML, or holds an unknown option.
    """
    for at, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == "--config" and (equals or at + 1 < len(words)):
            value = value if equals else words[at + 1]
            places = Path(value), CONFIGS / f"{value}.yaml"
            path = next((path for path in places if path.exists() and not path.is_dir()), None)  # a pipe, too
            if path is None:
                raise ValueError(f'no configuration "{value}": neither a file nor one of {config_names()}')
            source = read_limited(path, MAX_CONFIG_BYTES)
            content = parse_yaml(source, path)
            _check_content(path, config_class, content, options)
            # Emitted as ASCII, because the parser decodes text in the locale's encoding. It rejects an empty config.
            text = [f"--config={yaml.emit(yaml.parse(source, yaml.SafeLoader))}"] if content else []
            rest = read_config_files(words[at + (1 if equals else 2) :], config_class, options)
            return [*words[:at], *text, *rest]
    return words


def parse_yaml(text: str, path: Path) -> dict[str, Any]:
    """Parse the YAML `text` of the file `path` into a dict of options: sections and plain values, no Python objects.

    Raises:
        ValueError: the text is no mapping, repeats a key, uses anchors or Python tags, or is nested too deeply.
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
    """A YAML loader that raises ValueError for duplicate keys, of which YAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            raise ValueError("an option is there twice")
        return mapping


def _check_content(
    path: Path, config_class: type, content: dict[str, Any], options: Collection[str], section: str = ""
) -> None:
    """Raise ValueError for keys that are no fields of `config_class`, and for strings that would be parsed as YAML
    again."""
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(config_class)}
    for key, value in content.items():
        name = f"{section}{key}"
        if key not in fields:
            raise ValueError(f"{path}: {unknown_option(name, options)}")
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {name} must hold options with their values")
            _check_content(path, fields[key], value, options, f"{name}.")
        elif value is None and type(None) not in get_args(fields[key]):
            raise ValueError(f"{path}: {name} must be {describe_type(fields[key])}, not null")
        elif isinstance(value, str) and fields[key] not in (str, str | None, Path) and set("&*!{") & set(value):
            raise ValueError(f"{path}: {name} must be {fields[key]}, not {value!r}")


def save_config(config: Any, path: Path) -> None:
    """Write the dataclass `config` to `path` as YAML that `--config` reads."""
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(type(config), as_group=False)
    values = jsonargparse.dict_to_namespace(dataclasses.asdict(config))
    write_text(path, parser.dump(values, skip_validation=True))
