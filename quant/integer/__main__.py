"""`python -m quant.integer`: print which instruction sets were built, and which one this processor uses."""

import sys

from quant.integer.binding import ISAS, built, choose

if built():
    try:
        print(f"Integer core: built for {', '.join(built())}; this processor runs {choose().isa}.")
    except ValueError as error:
        sys.exit(f"Integer core: {error}")
else:
    print(
        "Integer core: not built, for lack of a C++ compiler. Students run simulated in float (--runtime simulated),\n"
        f"several times slower. Install g++ or clang++ and the package again for {', '.join(ISAS)}."
    )
