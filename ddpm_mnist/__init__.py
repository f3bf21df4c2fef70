"""The full-precision teacher: MNIST, the UNet, its training, and one seeded sampler for every denoiser."""


class InputError(ValueError):
    """Something that the user gave is wrong. Its message is the one line that the user sees (exit code 2)."""
