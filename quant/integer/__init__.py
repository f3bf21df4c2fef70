"""Integer inference: `program` translates a frozen student's UNet, `core/` runs it in C++, `model` is the denoiser."""

from quant.integer.model import IntegerUNet, to_integer

__all__ = ["IntegerUNet", "to_integer"]
