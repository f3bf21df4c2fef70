"""Command line, files, locks, processes and trackers: what every job needs, and nothing of diffusion."""

from typing import Any

MAX_MESSAGE = 1000


def one_line(message: str) -> str:
    """`message` in one line of at most `MAX_MESSAGE` characters, whatever it quotes."""
    line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    return line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]} …"


class InputError(ValueError):
    """Something that the user gave is wrong. Its message is the one line that the user sees (exit code 2)."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def flat(nested: dict[str, Any]) -> dict[str, Any]:
    """`nested` with the keys of its parts joined by dots, as they are typed."""
    joined: dict[str, Any] = {}
    for key, value in nested.items():
        parts = flat(value) if isinstance(value, dict) else {"": value}
        joined |= {f"{key}.{name}" if name else key: part for name, part in parts.items()}
    return joined
