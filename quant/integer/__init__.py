"""A frozen student on integers: `program` follows its UNet, `model` is the denoiser, `core` multiplies."""

from quant.integer.model import IntegerUNet, to_integer

__all__ = ["IntegerUNet", "to_integer"]
