"""`python -m quant.integer`: which instruction sets were built, and which of them runs here."""

from quant.integer.core import ISAS, available, built

if built():
    here = available()
    print(f"Integer core: built for {', '.join(built())}; this processor runs {next(iter(here))}.")
else:
    print(
        "Integer core: not built, for lack of a C++ compiler. Students run simulated in float (--runtime simulated),\n"
        f"several times slower. Install g++ or clang++ and the package again for {', '.join(ISAS)}."
    )
