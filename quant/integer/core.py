"""The C++ core as Python sees it: one library per instruction set, plain arrays in and out.

The libraries lie beside this file, built when the package was installed (setup.py). Their code is one: `core/core.cpp`,
compiled once for each instruction set, all with the same bytes as result.
"""

import ctypes
import hashlib
import os
import sys
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np

# The best first.
ISAS = ("avx512vnni", "avxvnni", "neon", "avx2", "portable")
# Overrides the choice.
VARIABLE = "EFFICIENTDM_ISA"

# What a line does with its numbers first: `Kind` in core/program.h.
QUANTIZE, SILU, ATTENTION, GELU, RELU, MISH = range(6)
# How a line without a layer resamples: `Resampling` in core/program.h.
KEEP, POOL, ENLARGE, FILTER_DOWN, FILTER_UP, MIRROR_DOWN, MIRROR_UP = range(7)

LANES = 16  # states and outputs are filled up to a multiple of it


class Line(ctypes.Structure):
    """Codes of a state, through a layer: target = layer(codes(source, skip)) + residual.

    States are offsets into a memory of floats; -1 is nothing as skip or residual, and no normalisation as norm. Codes
    are enlarged by `factor`, by nearest neighbour; height and width are those of the source. With -1 as layer floats
    stay floats: target = (resampled(source) - centre) / divisor.
    """

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "kind", "layer", "norm", "source", "source_channels", "skip", "skip_channels", "residual", "target",
                "height", "width", "factor", "heads", "resampling",
            )
        ),
        ("centre", ctypes.c_double),
        ("divisor", ctypes.c_double),
    )  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "in_channels", "out_channels", "kernel_height", "kernel_width", "stride_y", "stride_x", "dilation_y",
                "dilation_x", "top", "left", "bottom", "right", "largest_product", "first_channel",
            )
        ),
        ("weight", ctypes.c_void_p),
    )  # fmt: skip


class Norm(ctypes.Structure):
    _fields_ = (
        ("groups", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class Moment(ctypes.Structure):
    """What the lines need to know of a timestep: `core/program.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("quantizers", "shifts", "slopes", "offsets")),
        ("norms", ctypes.POINTER(Norm)),
    )


class Program(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("sample", "in_channels", "in_pixels", "result", "out_channels", "out_pixels", "num_lines")
        ),
        ("lines", ctypes.POINTER(Line)),
        ("layers", ctypes.POINTER(Layer)),
        ("memory", ctypes.c_int64),
    )


# A quantizer of `core/program.h`.
QUANTIZER = np.dtype([("inverse", "f4"), ("low", "f4"), ("high", "f4"), ("zero_point", "i4"), ("shift", "i4")])


class Core:
    """The functions of one library.

    Attributes:
        isa: its instruction set.
        code_offset: what a code is less than its integer in the products.
    """

    def __init__(self, isa: str, path: Path):
        library = ctypes.CDLL(str(path))
        if not hasattr(library, "sources"):
            raise OSError("it was built of other sources")
        library.sources.restype = ctypes.c_char_p
        if library.sources() != _sources().encode():
            raise OSError("it was built of other sources")
        self.isa = isa
        self.runs_here = bool(library.runs_here())
        self.code_offset: int = library.code_offset()
        pointer, line, norm, program = ctypes.c_void_p, *map(ctypes.POINTER, (Line, Norm, Program))
        integer, real = ctypes.c_int64, ctypes.c_float
        self.encode = _declared(library.encode, line, norm, pointer, pointer, pointer)
        self.change = _declared(library.change, line, norm, pointer)
        self.execute = _checked(library.execute, program, ctypes.POINTER(Moment), pointer)
        self.denoise = _checked(
            library.denoise, program, pointer, pointer, pointer, integer, pointer, ctypes.c_uint, pointer
        )
        self.sinusoids = _declared(library.sinusoids, real, integer, real, integer, pointer)
        self.fourier = _declared(library.fourier, real, integer, pointer, integer, pointer)


def _declared(function: Any, *arguments: Any) -> Any:
    function.argtypes, function.restype = arguments, None
    return function


def _checked(function: Any, *arguments: Any) -> Any:
    """The function, with a MemoryError where it answers that memory was short."""

    def check(answer: int, *_: Any) -> None:
        if not answer:
            raise MemoryError("there is not enough memory for the states of these images")

    function.argtypes, function.restype, function.errcheck = arguments, ctypes.c_int32, check
    return function


def _sources() -> str:
    """SHA-256 of the core's sources, as setup.py works it out: a library of others may read a structure wrongly."""
    files = sorted((Path(__file__).parent / "core").iterdir())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def built() -> dict[str, Path]:
    """The libraries that the installation has, by instruction set, the best first."""
    folder = Path(__file__).parent
    paths = {isa: [folder / f"_core_{isa}{suffix}" for suffix in EXTENSION_SUFFIXES] for isa in ISAS}
    return {isa: found for isa, places in paths.items() for found in places if found.is_file()}


@cache
def available() -> dict[str, Core]:
    """What this processor runs, the best first."""
    cores = {}
    for isa, path in built().items():
        try:
            core = Core(isa, path)
        except OSError as error:
            print(f"{path.name} is of no use, install the package again: {error}", file=sys.stderr)
            continue
        if core.runs_here:
            cores[isa] = core
    return cores


def choose(isa: str | None = None) -> Core:
    """The core of that instruction set; None: of `EFFICIENTDM_ISA`, or the best that this processor has.

    Raises:
        ValueError: the installation has no core, or the processor lacks that instruction set.
    """
    cores = available()
    if not cores and built():
        raise ValueError("of the integer cores that were built none is of use here: install the package again")
    if not cores:
        raise ValueError(
            "the integer core was not built, for lack of a C++ compiler at installation: "
            'install one and the package again, or take the runtime "simulated", several times slower'
        )
    asked = isa or os.environ.get(VARIABLE)
    if not asked:
        return next(iter(cores.values()))
    if asked not in cores:
        place, here = "" if isa else f"{VARIABLE}: ", ", ".join(cores)
        if asked in ISAS and asked not in built():
            raise ValueError(f'{place}"{asked}" was not built at installation, only {", ".join(built())}')
        raise ValueError(f'{place}this processor has no "{asked}", only {here}')
    return cores[asked]


@cache
def openmp() -> int | None:
    """The address of the function that starts PyTorch's own OpenMP threads, or None where it has none of GCC's kind."""
    try:
        function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    except TypeError:  # Windows has no library of the whole process
        return None
    return ctypes.cast(function, ctypes.c_void_p).value if function else None
