"""Weights (LSQ), activations (TALSQ), and the clock that tells an activation quantizer its denoising step."""

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quant.functional import FINE, code_range, fake_quantize, quantize

# Fractions of the min-max range that the searches for an initial step size try, as `torch.linspace` takes them (first,
# last, count): weights are few and get more. No tensors, which the defaults of the importing process would decide.
WEIGHT_FRACTIONS = (0.2, 1.1, 181)
# Codes that are symmetric, ternary and mid-rise, are so few that the best step size may be a twentieth of the range.
SYMMETRIC_FRACTIONS = (0.02, 1.1, 217)
RANGE_FRACTIONS = (0.2, 1.1, 37)
# Fractions of the negative part of a range that it keeps: SiLU's shallow tail is often better given up.
TAIL_FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)

# Codes of 16 bits begin with twice the range that was seen: it costs them one bit, and what lies outside is far worse.
FINE_MARGIN = 2

# No step size is smaller: half precision, in which step sizes are saved, still holds it.
SMALLEST = torch.finfo(torch.half).tiny


class Clock:
    """Where in the denoising each sample of the running batch stands.

    One clock is shared by all activation quantizers of a model; the model sets it in its forward from the
    timestep that it is given (never by counting calls). A deep copy of the model has a clock of its own. It is
    no module and no part of the state dict.

    Attributes:
        timesteps: the training timesteps of the T sampling steps, as Python's numbers.

    Args:
        timesteps: in any order, all different: numbers, tensors (), or a tensor (T,), as schedulers have them.
    """

    def __init__(self, timesteps: Sequence[float] | Tensor):
        try:
            self.timesteps = [as_number(t) for t in timesteps]
        except TypeError as error:
            raise ValueError(f"timesteps must be a sequence or a tensor (T,), not {timesteps!r}") from error
        if len(set(self.timesteps)) != len(self.timesteps) or not self.timesteps:
            raise ValueError(f"a clock needs different timesteps, not {self.timesteps}")
        self._running = threading.local()  # each thread's own batch: threads may share a model

    def set(self, t: Tensor) -> None:
        """Set the clock to the timestep of each sample, t (N,)."""
        ordered, rows = torch.tensor(self.timesteps, device=t.device, dtype=torch.float32).sort()
        t = t.float().contiguous()
        above = torch.searchsorted(ordered, t).clamp(max=len(ordered) - 1)
        below = (above - 1).clamp(min=0)
        gap = ordered[above] - ordered[below]
        # Outside the table's ends the nearest row serves.
        fraction = torch.where(gap > 0, (t - ordered[below]) / gap, 0).clamp(0, 1)
        self._running.interval = rows[below], rows[above], fraction

    def unset(self) -> None:
        self._running.interval = None

    def read(self, table: Tensor) -> Tensor:
        """The value of `table` (T,) for each sample, (N,), interpolated linearly; a table (1,) serves every timestep.

        Raises:
            RuntimeError: the clock was not set.
        """
        interval: tuple[Tensor, Tensor, Tensor] | None = getattr(self._running, "interval", None)
        if interval is None:
            raise RuntimeError("the clock is not set: call the quantized model with (x, t), not its layers")
        below, above, fraction = interval
        if len(table) == 1:
            return table.expand(len(below))
        fraction = fraction.to(table.dtype)
        # Not torch.lerp, which some processors fuse: integers promise the same bits on all.
        return table[below] * (1 - fraction) + table[above] * fraction

    def __deepcopy__(self, memo: dict) -> "Clock":
        return memo.setdefault(id(self), Clock(self.timesteps))

    def __reduce__(self) -> tuple:
        return Clock, (self.timesteps,)


def as_number(t: Any) -> int | float:
    """A timestep as Python's number: an integer where it is one."""
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
    """Signed codes around zero with one learned step size per output channel (LSQ, arXiv 1902.08153).

    Args:
        bits: 1, 1.58 or 2…8; the codes are those of `code_range`.
        channels: output channels, the size of dimension 0 of the weight.
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
        """Set each channel's step size from `weight` (c_out, …): see `QuantConfig.search`."""
        rows = weight.flatten(1)
        widest = rows.abs().amax(1).clamp(min=SMALLEST) / -self.qmin
        if search == "min-max":
            self.scale.copy_(rows.abs().amax(1).clamp(min=SMALLEST) / self.qmax)
            return
        fractions = SYMMETRIC_FRACTIONS if self.qmax == -self.qmin else WEIGHT_FRACTIONS
        self.scale.copy_(_least_error(rows, _spaced(fractions, rows)[:, None] * widest, self.codes))

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.scale, self.zero_point, self.codes)

    def quantize(self, weight: Tensor) -> Tensor:
        """The codes int8 of `weight` (c_out, …)."""
        scale, zero_point = self._rows(weight, self.scale), self._rows(weight, self.zero_point)
        return quantize(weight, scale, zero_point, self.codes).to(torch.int8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The weight that `codes` (c_out, …) stand for, bit for bit what `forward` gives."""
        return codes.float() * self._rows(codes, self.scale)

    @staticmethod
    def _rows(x: Tensor, values: Tensor) -> Tensor:
        """`values` (c_out,) shaped to act on x (c_out, …)."""
        return values.view(-1, *[1] * (x.dim() - 1))


class ActivationQuantizer(nn.Module):
    """Unsigned codes with a zero point; a step size and a zero point for every denoising step (TALSQ, eq. 9).

    Args:
        bits: 2…8 or 16.
        clock: the model's clock; its T timesteps are the rows of the tables.
        per_step: if false, one step size and zero point serve all timesteps.
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
        """Set the range of the denoising step of that row from `values` (M,): see `QuantConfig.search`."""
        low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
        if self.bits == FINE:
            low, high, search = FINE_MARGIN * low, FINE_MARGIN * high, "min-max"
        widest = ((high - low) / self.qmax).clamp(min=SMALLEST)
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
        """Step size and zero point of each sample of the running batch, each (N,), by the clock."""
        return self.clock.read(self.scale), self.clock.read(self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, *self.read(), self.codes)


def _spaced(fractions: tuple[float, float, int], like: Tensor) -> Tensor:
    """The fractions, float32, on the device of `like`; worked out on the CPU, so that they are the same on all."""
    return torch.linspace(*fractions, dtype=torch.float32, device="cpu").to(like)


def _least_error(rows: Tensor, scales: Tensor, codes: range) -> Tensor:
    """Of K candidates `scales` (K, R) those with the least squared error on `rows` (R, M), (R,)."""
    zero = torch.zeros_like(scales[0])
    errors = [(fake_quantize(rows, scale, zero, codes) - rows).square().sum(1) for scale in scales]
    return scales.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]
