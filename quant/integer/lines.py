"""Programs: lines that operate on numbered states, and the layout of the states in memory."""

from dataclasses import dataclass
from typing import Any

from quant.integer import binding
from quant.integer.binding import (
    ATTENTION,
    ENLARGE,
    FILTER_DOWN,
    FILTER_UP,
    KEEP,
    MIRROR_DOWN,
    MIRROR_UP,
    POOL,
    QUANTIZE,
)
from quant.integer.layers import IntegerLayer, Layers, pad_to_lanes

DOUBLING, HALVING = (ENLARGE, FILTER_UP, MIRROR_UP), (POOL, FILTER_DOWN, MIRROR_DOWN)


@dataclass
class Line:
    """`LineStruct` with numbers of states instead of offsets; a layer, norm, skip or residual of -1 means none."""

    kind: int
    layer: int
    norm: int
    source: int
    skip: int
    residual: int
    target: int
    factor: int
    heads: int
    resampling: int = KEEP
    centre: float = 0.0
    divisor: float = 1.0


class Program:
    """Lines that operate on numbered states, the first of which are inputs.

    Attributes:
        lines: in execution order.
        shapes: channels, height and width of each state.
        offsets: offset of each state in the `memory` floats of a thread; states in use at the same time do not overlap.
        structure: structure that the core reads.
    """

    def __init__(self, layers: Layers, *shapes: tuple[int, int, int]):
        self.lines: list[Line] = []
        self.shapes = list(shapes)
        self._layers, self._given = layers, len(shapes)

    def emit(
        self, layer: Any, source: int, kind: int = QUANTIZE, norm: Any = None, skip: int = -1, residual: int = -1,
        factor: int = 1, heads: int = 0,
    ) -> int:  # fmt: skip
        """Append a line, or one for each digit of 16-bit codes, and return the number of the last target state."""
        integer = self._layers[layer]
        if integer.high is not None:
            residual = self._append(integer.high, source, kind, norm, skip, residual, factor, heads)
        return self._append(integer, source, kind, norm, skip, residual, factor, heads)

    def _append(
        self, integer: IntegerLayer, source: int, kind: int, norm: Any, skip: int, residual: int, factor: int,
        heads: int,
    ) -> int:  # fmt: skip
        target = len(self.shapes)
        channels, height, width = self.shapes[source]
        channels = channels // (3 if kind == ATTENTION else 1) + (self.shapes[skip][0] if skip >= 0 else 0)
        if channels != integer.in_channels:
            raise ValueError(f"{integer.name}: {channels} channels meet a layer of {integer.in_channels}")
        if skip >= 0 and self.shapes[skip][1:] != (height, width):
            raise ValueError(f"{integer.name}: a skip of {self.shapes[skip][1:]} pixels meets {(height, width)}")
        shape = (integer.out_channels, *integer.output_size(height * factor, width * factor))
        if min(shape) < 1 or (residual >= 0 and self.shapes[residual] != shape):
            raise ValueError(f"{integer.name}: images of {self.shapes[0]} are too small or do not divide")
        number = self._number(norm)
        self.lines.append(Line(kind, integer.number, number, source, skip, residual, target, factor, heads))
        self.shapes.append(shape)
        return target

    def change(
        self, source: int, kind: int = QUANTIZE, norm: Any = None, resampling: int = KEEP, centre: float = 0.0,
        divisor: float = 1.0,
    ) -> int:  # fmt: skip
        """Append a line without a layer, target = (resampled(source) - centre) / divisor, and return its target."""
        channels, height, width = self.shapes[source]
        if resampling in (MIRROR_DOWN, MIRROR_UP) and min(height, width) < 2:
            raise ValueError(f"images of {self.shapes[0]} are too small for a border in a mirror")
        if resampling in HALVING:
            height, width = height // 2, width // 2
        if resampling in DOUBLING:
            height, width = 2 * height, 2 * width
        if min(height, width) < 1:
            raise ValueError(f"images of {self.shapes[0]} are too small")
        target, number = len(self.shapes), self._number(norm)
        self.lines.append(Line(kind, -1, number, source, -1, -1, target, 1, 0, resampling, centre, divisor))
        self.shapes.append((channels, height, width))
        return target

    def _number(self, norm: Any) -> int:
        return -1 if norm is None else self._layers.norms[norm]

    def place(self, results: list[int]) -> "Program":
        """Allocate memory for every state and return the program; `results` are kept until the end."""
        last_use = dict.fromkeys(results, len(self.lines))
        for at, line in reversed(list(enumerate(self.lines))):
            for state in (line.source, line.skip, line.residual):
                last_use.setdefault(state, at)
        sizes = [pad_to_lanes(channels) * height * width for channels, height, width in self.shapes]
        self.offsets, live, self.memory = {-1: -1}, set(range(self._given)), 0
        for state in live:
            self.offsets[state] = self.memory
            self.memory += sizes[state]
        for at, line in enumerate(self.lines):
            start = 0
            for other in sorted(live, key=self.offsets.__getitem__):
                if start + sizes[line.target] <= self.offsets[other]:
                    break
                start = max(start, self.offsets[other] + sizes[other])
            self.offsets[line.target] = start
            self.memory = max(self.memory, start + sizes[line.target])
            live = {state for state in live | {line.target} if last_use.get(state, at) > at}
        placed = (binding.LineStruct * len(self.lines))(*map(self._placed, self.lines))
        first, last = self.shapes[0], self.shapes[results[-1]]
        ends = (0, first[0], first[1] * first[2], self.offsets[results[-1]], last[0], last[1] * last[2])
        self.structure = binding.ProgramStruct(*ends, len(placed), placed, self._layers.table, self.memory)
        return self

    def _placed(self, line: Line) -> binding.LineStruct:
        channels, height, width = self.shapes[line.source]
        skip_channels = 0 if line.skip < 0 else self.shapes[line.skip][0]
        source, skip, residual, target = (
            self.offsets[state] for state in (line.source, line.skip, line.residual, line.target)
        )
        return binding.LineStruct(
            line.kind, line.layer, line.norm, source, channels, skip, skip_channels, residual, target,
            height, width, line.factor, line.heads, line.resampling, line.centre, line.divisor,
        )  # fmt: skip
