"""Builds the integer core: one library per instruction set of this kind of processor, from one source.

Each is optional. Without a C++ compiler the installation goes through without them.
"""

import hashlib
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = {
    "avx2": ["-mavx2"],
    "avxvnni": ["-mavx2", "-mavxvnni"],
    "avx512vnni": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"],
}
ARM = {"neon": ["-march=armv8.2-a+dotprod"]}
FLAGS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}

# Nothing is fused, so that every processor rounds alike, whatever CFLAGS say.
COMMON = ["-std=c++17", "-O3", "-fno-fast-math", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"]

CORE = sorted(Path(__file__).parent.glob("quant/integer/core/*"))
SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in CORE)).hexdigest()


class BuildCore(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = True  # as many compilers as processors

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # plain functions for ctypes, no module of Python


setup(
    ext_modules=[
        Extension(
            f"quant.integer._core_{isa}",
            sources=["quant/integer/core/core.cpp"],
            depends=list(map(str, CORE)),
            define_macros=[(f"ISA_{isa.upper()}", None), ("SOURCES", f'"{SOURCES}"')],
            extra_compile_args=[*COMMON, *flags],
            language="c++",
            optional=True,
        )
        for isa, flags in {"portable": [], **FLAGS.get(platform.machine().lower(), {})}.items()
    ],
    cmdclass={"build_ext": BuildCore},
)
