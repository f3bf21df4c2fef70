"""From a float diffusers UNet to a low-bit one: `quantize` → `calibrate` → (distil)."""

from quant.calibrate import calibrate
from quant.convert import QuantConfig, QuantizedUNet, quantize
from quant.layers import QuantConv2d, QuantLayer, QuantLinear

__all__ = [
    "QuantConfig",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "QuantizedUNet",
    "calibrate",
    "quantize",
]
