"""Python bindings of the C++ core: one library per instruction set, with plain arrays as inputs and outputs.

The libraries are in this folder and are built at installation (setup.py): `core/core.cpp` is compiled once per
instruction set. All of them return the same bytes.
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

# Instruction sets, fastest first.
ISAS = ("avx512vnni", "avxvnni", "neon", "avx2", "portable")
# Environment variable that overrides the choice.
VARIABLE = "EFFICIENTDM_ISA"

# First operation of a line on its source: `Kind` in core/program.h.
QUANTIZE, SILU, ATTENTION, GELU, RELU, MISH = range(6)
# Resampling by a line without a layer: `Resampling` in core/program.h.
KEEP, POOL, ENLARGE, FILTER_DOWN, FILTER_UP, MIRROR_DOWN, MIRROR_UP = range(7)

LANES = 16  # the channels of states and outputs are padded to a multiple of it


class LineStruct(ctypes.Structure):
    """Instruction of a program, which applies a layer to a state: target = layer(codes(source, skip)) + residual.

    States are offsets into an array of floats; a skip, residual or norm of -1 means none. Codes are upsampled by
    `factor` (nearest neighbour); height and width are those of the source. Without a layer (-1), values stay float:
    target = (resampled(source) - centre) / divisor.
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


class LayerStruct(ctypes.Structure):
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


class NormStruct(ctypes.Structure):
    _fields_ = (
        ("groups", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class MomentStruct(ctypes.Structure):
    """Parameters of the lines that depend on the timestep: see `core/program.h`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("quantizers", "shifts", "slopes", "offsets")),
        ("norms", ctypes.POINTER(NormStruct)),
    )


class ProgramStruct(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("sample", "in_channels", "in_pixels", "result", "out_channels", "out_pixels", "num_lines")
        ),
        ("lines", ctypes.POINTER(LineStruct)),
        ("layers", ctypes.POINTER(LayerStruct)),
        ("memory", ctypes.c_int64),
    )


# `Quantizer` in core/program.h.
QUANTIZER = np.dtype([("inverse", "f4"), ("low", "f4"), ("high", "f4"), ("zero_point", "i4"), ("shift", "i4")])


class Core:
    """Functions of one library.

    Attributes:
        isa: its instruction set.
        code_offset: offset that is subtracted from a code before multiplication.
    """

    def __init__(self, isa: str, path: Path):
        library = ctypes.CDLL(str(path))
        if not hasattr(library, "sources"):
            raise OSError("it was built from other sources")
        library.sources.restype = ctypes.c_char_p
        if library.sources() != _sources().encode():
            raise OSError("it was built from other sources")
        self.isa = isa
        self.runs_here = bool(library.runs_here())
        self.code_offset: int = library.code_offset()
        pointer, line, norm, program = ctypes.c_void_p, *map(ctypes.POINTER, (LineStruct, NormStruct, ProgramStruct))
        integer, real = ctypes.c_int64, ctypes.c_float
        self.encode = _declared(library.encode, line, norm, pointer, pointer, pointer)
        self.change = _declared(library.change, line, norm, pointer)
        self.execute = _checked(library.execute, program, ctypes.POINTER(MomentStruct), pointer)
        self.denoise = _checked(
            library.denoise, program, pointer, pointer, pointer, integer, pointer, ctypes.c_uint, pointer
        )
        self.sinusoids = _declared(library.sinusoids, real, integer, real, integer, pointer)
        self.fourier = _declared(library.fourier, real, integer, pointer, integer, pointer)


def _declared(function: Any, *arguments: Any) -> Any:
    function.argtypes, function.restype = arguments, None
    return function


def _checked(function: Any, *arguments: Any) -> Any:
    """Declare the types of `function`, which returns 0 if memory is insufficient; MemoryError is then raised."""

    def check(answer: int, *_: Any) -> None:
        if not answer:
            raise MemoryError("there is not enough memory for the states of these images")

    function.argtypes, function.restype, function.errcheck = arguments, ctypes.c_int32, check
    return function


def _sources() -> str:
    """Return the SHA-256 of the core's sources, as in setup.py: the structures of other sources may differ."""
    files = sorted((Path(__file__).parent / "core").iterdir())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def built() -> dict[str, Path]:
    """Return the installed libraries by instruction set, fastest first."""
    folder = Path(__file__).parent
    paths = {isa: [folder / f"_core_{isa}{suffix}" for suffix in EXTENSION_SUFFIXES] for isa in ISAS}
    return {isa: found for isa, places in paths.items() for found in places if found.is_file()}


@cache
def available() -> dict[str, Core]:
    """Return the cores that this processor can run by instruction set, fastest first."""
    cores = {}
    for isa, path in built().items():
        try:
            core = Core(isa, path)
        except OSError as error:
            print(f"{path.name} cannot be used, install the package again: {error}", file=sys.stderr)
            continue
        if core.runs_here:
            cores[isa] = core
    return cores


def choose(isa: str | None = None) -> Core:
    """Return the core of the instruction set `isa`; None: of `EFFICIENTDM_ISA`, or the fastest that this processor has.

    Raises:
        ValueError: the installation has no core, or the processor lacks that instruction set.
    """
    cores = available()
    if not cores and built():
        raise ValueError("none of the integer cores can be used here: install the package again")
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
    """Return the address of the function that runs PyTorch's OpenMP threads, or None without GCC's OpenMP interface."""
    try:
        function = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    except TypeError:  # Windows cannot look up symbols in the whole process
        return None
    return ctypes.cast(function, ctypes.c_void_p).value if function else None
