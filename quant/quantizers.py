"""Quantizers of weights (LSQ) and activations (TALSQ), and the clock that holds the timesteps of the running batch."""

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quant.functional import TWO_DIGIT_BITS, code_range, fake_quantize, quantize

# Candidates for the initial step size, as fractions of the min-max range: arguments of `torch.linspace` (first, last,
# count), not tensors, whose dtype and device would depend on the importing process's defaults. Weights are fewer than
# activations and get a finer grid.
WEIGHT_FRACTIONS = (0.2, 1.1, 181)
# With the few symmetric codes (ternary and mid-rise), the best step size may be a twentieth of the range.
SYMMETRIC_FRACTIONS = (0.02, 1.1, 217)
RANGE_FRACTIONS = (0.2, 1.1, 37)
# Fractions of the range's negative part to keep: clipping the shallow negative tail of SiLU often reduces the error.
TAIL_FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)

# Codes of 16 bits start with twice the range of calibration: this costs one bit, and clipping would cost far more.
FINE_MARGIN = 2

# Lower bound of step sizes: the smallest normal number of half precision, in which step sizes are saved.
MIN_SCALE = torch.finfo(torch.half).tiny


class Clock:
    """Timesteps of the samples in the running batch.

    All activation quantizers of a model share one clock. The model sets it in each forward pass from the given
    timestep (never by counting calls). A deep copy of the model has its own clock. A clock is not a module and not
    part of the state dict.

    Attributes:
        timesteps: the training timesteps of the T sampling steps, as Python numbers.

    Args:
        timesteps: distinct, in any order: a sequence of numbers or of tensors (), or a tensor (T,) such as a
            scheduler's `timesteps`.
    """

    def __init__(self, timesteps: Sequence[float] | Tensor):
        try:
            self.timesteps = [as_number(t) for t in timesteps]
        except TypeError as error:
            raise ValueError(f"timesteps must be a sequence or a tensor (T,), not {timesteps!r}") from error
        if len(set(self.timesteps)) != len(self.timesteps) or not self.timesteps:
            raise ValueError(f"a clock needs different timesteps, not {self.timesteps}")
        self._running = threading.local()  # one batch per thread, because threads may share a model

    def set(self, t: Tensor) -> None:
        """Set the clock to the timesteps t (N,) of the samples."""
        ordered, rows = torch.tensor(self.timesteps, device=t.device, dtype=torch.float32).sort()
        t = t.float().contiguous()
        above = torch.searchsorted(ordered, t).clamp(max=len(ordered) - 1)
        below = (above - 1).clamp(min=0)
        gap = ordered[above] - ordered[below]
        # Outside the range of timesteps, use the nearest row.
        fraction = torch.where(gap > 0, (t - ordered[below]) / gap, 0).clamp(0, 1)
        self._running.interval = rows[below], rows[above], fraction

    def unset(self) -> None:
        self._running.interval = None

    def read(self, table: Tensor) -> Tensor:
        """Return the linearly interpolated value of `table` (T,) for each sample, (N,).

        A table (1,) has one value for all timesteps.

        Raises:
            RuntimeError: the clock is not set.
        """
        interval: tuple[Tensor, Tensor, Tensor] | None = getattr(self._running, "interval", None)
        if interval is None:
            raise RuntimeError("the clock is not set: call the quantized model with (x, t), not its layers")
        below, above, fraction = interval
        if len(table) == 1:
            return table.expand(len(below))
        fraction = fraction.to(table.dtype)
        # Not torch.lerp, which is fused on some processors: integer inference gives the same bits on all.
        return table[below] * (1 - fraction) + table[above] * fraction

    def __deepcopy__(self, memo: dict) -> "Clock":
        return memo.setdefault(id(self), Clock(self.timesteps))

    def __reduce__(self) -> tuple:
        return Clock, (self.timesteps,)


def as_number(t: Any) -> int | float:
    """Return a timestep as a Python number: an int if its value is an integer, else a float."""
    try:
        if isinstance(t, str | bool):
            raise TypeError
        value = float(t)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"a timestep must be a number, not {t!r}") from error
    if not math.isfinite(value):
        raise ValueError(f"a timestep must be finite, not {value}")
    return int(value) if value.is_integer() else value


class WeightQuantizer(nn.Module):
    """Weight quantizer: signed codes, zero point 0, a learned step size per output channel (LSQ, arXiv 1902.08153).

    Args:
        bits: 1, 1.58 or 2…8; `code_range` has the codes.
        channels: number of output channels, the size of dimension 0 of the weight.
    """

    zero_point: Tensor

    def __init__(self, bits: float, channels: int):
        super().__init__()
        self.bits = bits
        self.codes = code_range(bits, signed=True)
        self.qmin, self.qmax = self.codes[0], self.codes[-1]
        self.scale = nn.Parameter(torch.ones(channels))
        self.register_buffer("zero_point", torch.zeros(channels), persistent=False)

    @torch.no_grad()
    def initialise(self, weight: Tensor, search: str = "error") -> None:
        """Initialise each channel's step size from `weight` (c_out, …), by the method `QuantConfig.search`."""
        rows = weight.flatten(1)
        widest = rows.abs().amax(1).clamp(min=MIN_SCALE) / -self.qmin
        if search == "min-max":
            self.scale.copy_(rows.abs().amax(1).clamp(min=MIN_SCALE) / self.qmax)
            return
        fractions = SYMMETRIC_FRACTIONS if self.qmax == -self.qmin else WEIGHT_FRACTIONS
        self.scale.copy_(_least_error(rows, _spaced(fractions, rows)[:, None] * widest, self.codes))

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.scale, self.zero_point, self.codes)

    def quantize(self, weight: Tensor) -> Tensor:
        """Return the codes, int8, of `weight` (c_out, …)."""
        scale, zero_point = self._rows(weight, self.scale), self._rows(weight, self.zero_point)
        return quantize(weight, scale, zero_point, self.codes).to(torch.int8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the weight that `codes` (c_out, …) represent, bit for bit the output of `forward`."""
        return codes.float() * self._rows(codes, self.scale)

    @staticmethod
    def _rows(x: Tensor, values: Tensor) -> Tensor:
        """Reshape `values` (c_out,) to broadcast over x (c_out, …)."""
        return values.view(-1, *[1] * (x.dim() - 1))


class ActivationQuantizer(nn.Module):
    """Activation quantizer: unsigned codes, a learned step size and zero point per denoising step (TALSQ, eq. 9).

    Args:
        bits: 2…8 or 16.
        clock: the model's clock; the tables have a row for each of its T timesteps.
        per_step: if false, all timesteps share one step size and zero point.
    """

    def __init__(self, bits: int, clock: Clock, per_step: bool = True):
        super().__init__()
        self.bits = bits
        self.clock = clock
        self.codes = code_range(bits, signed=False)
        self.qmin, self.qmax = self.codes[0], self.codes[-1]
        count = len(clock.timesteps) if per_step else 1
        self.scale = nn.Parameter(torch.ones(count))
        self.zero_point = nn.Parameter(torch.zeros(count))

    @torch.no_grad()
    def initialise(self, values: Tensor, search: str = "error", row: int = 0) -> None:
        """Initialise row `row` of the tables from activations `values` (M,), by the method `QuantConfig.search`."""
        low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
        if self.bits == TWO_DIGIT_BITS:
            low, high, search = FINE_MARGIN * low, FINE_MARGIN * high, "min-max"
        widest = ((high - low) / self.qmax).clamp(min=MIN_SCALE)
        if search == "min-max":
            self.scale[row], self.zero_point[row] = widest, (-low / widest).round()
            return
        scales = _spaced(RANGE_FRACTIONS, values) * widest
        best = values.new_tensor(math.inf)
        for tail in TAIL_FRACTIONS:
            zeros = (-low * tail / scales).round().clamp(self.qmin, self.qmax)
            rounded = fake_quantize(values.expand(len(scales), -1), scales, zeros, self.codes)
            error, at = (rounded - values).square().sum(1).min(0)
            if error < best:
                best, self.scale[row], self.zero_point[row] = error, scales[at], zeros[at]

    def read(self) -> tuple[Tensor, Tensor]:
        """Return the step size and the zero point of each sample in the running batch, each (N,)."""
        return self.clock.read(self.scale), self.clock.read(self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, *self.read(), self.codes)


def _spaced(fractions: tuple[float, float, int], like: Tensor) -> Tensor:
    """Return the fractions on the device of `like`, computed in float32 on the CPU to be the same for all devices."""
    return torch.linspace(*fractions, dtype=torch.float32, device="cpu").to(like)


def _least_error(rows: Tensor, scales: Tensor, codes: range) -> Tensor:
    """Return, for each of `rows` (R, M), the one of K candidates `scales` (K, R) with the least squared error: (R,)."""
    zero = torch.zeros_like(scales[0])
    errors = [(fake_quantize(rows, scale, zero, codes) - rows).square().sum(1) for scale in scales]
    return scales.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]
