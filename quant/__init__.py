"""Convert a float diffusers UNet to low bits: `quantize` → `calibrate` → (distil) → `freeze` → `to_integer`."""

from quant.calibrate import calibrate
from quant.convert import freeze, quantize
from quant.integer import IntegerUNet, to_integer
from quant.layers import QuantConv2d, QuantLayer, QuantLinear
from quant.replace import QuantConfig
from quant.student import QuantizedUNet

__all__ = [
    "IntegerUNet",
    "QuantConfig",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "QuantizedUNet",
    "calibrate",
    "freeze",
    "quantize",
    "to_integer",
]
