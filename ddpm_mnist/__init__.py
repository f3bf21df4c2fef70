"""The full-precision teacher: MNIST, the UNet, its training, and one seeded sampler for every denoiser."""

MAX_MESSAGE = 1000


def one_line(message: str) -> str:
    """`message` in one line of at most `MAX_MESSAGE` characters, whatever it quotes."""
    line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    return line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]} …"


class InputError(ValueError):
    """Something that the user gave is wrong. Its message is the one line that the user sees (exit code 2)."""

    def __init__(self, message: str):
        super().__init__(one_line(message))
