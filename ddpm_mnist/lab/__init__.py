"""Command line, configs, files, locks, processes and trackers: the infrastructure of every job, without diffusion."""

from typing import Any

MAX_MESSAGE = 1000


def one_line(message: str) -> str:
    """Return `message` as one line of at most `MAX_MESSAGE` printable characters (and "…" if it was cut)."""
    line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    return line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]} …"


class InputError(ValueError):
    """Invalid user input: an option, a file or a folder. Commands print its message in one line and exit with 2."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def flat(nested: dict[str, Any]) -> dict[str, Any]:
    """Flatten a nested dict; keys are joined by dots, as in option names: {"a": {"b": 1}} → {"a.b": 1}."""
    joined: dict[str, Any] = {}
    for key, value in nested.items():
        parts = flat(value) if isinstance(value, dict) else {"": value}
        joined |= {f"{key}.{name}" if name else key: part for name, part in parts.items()}
    return joined
