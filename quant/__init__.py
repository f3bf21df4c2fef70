"""Convert a float diffusers UNet to low bits: `quantize` → `calibrate` → (distil) → `freeze` → `to_integer`."""

from quant.calibrate import calibrate
from quant.convert import QuantConfig, QuantizedUNet, freeze, quantize
from quant.integer import IntegerUNet, to_integer
from quant.layers import QuantConv2d, QuantLayer, QuantLinear

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
