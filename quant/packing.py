"""Pack integer codes of weights into dense bytes.

Codes are numbered from 0, the smallest code. The numbers are stored without gaps, least significant bit first. A number
may cross a byte boundary, and only the last byte is padded, with zeros. Three-bit codes a, b, c, …:

    byte 0                    byte 1                    byte 2
    bit 7 6 5 4 3 2 1 0       7 6 5 4 3 2 1 0           7 6 5 4 3 2 1 0
        c c b b b a a a       f e e e d d d c           h h h g g g f f

Ternary codes would leave a quarter of the values of two bits unused. Five of them, a to e, share a byte with 3⁵ = 243
values instead, 1.6 bits each:

    byte 0                              byte 1
    a + 3·b + 9·c + 27·d + 81·e         f + 3·g + 9·h + 27·i + 81·j
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quant.functional import TERNARY, code_range

PLACES = np.array([1, 3, 9, 27, 81], np.uint8)  # place values of the ternary codes in a byte


def packed_size(bits: float, count: int) -> int:
    """Return the number of bytes of `count` packed codes."""
    return math.ceil(count / len(PLACES)) if bits == TERNARY else math.ceil(count * bits / 8)


def pack(codes: Tensor, bits: float) -> Tensor:
    """Pack signed codes, int8 of any shape, into bytes, uint8 (packed_size(bits, codes.numel()),).

    Raises:
        ValueError: a value is not a code of `bits` bits.
    """
    known, flat = code_range(bits, signed=True), codes.flatten().cpu().numpy()
    for code in set(np.unique(flat).tolist()) - set(known):
        kind = "are odd and lie" if known.step == 2 else "lie"
        raise ValueError(f"codes of {bits} bits {kind} in {known[0]}…{known[-1]}, not at {code}")
    numbers = ((flat.astype(np.int16) - known[0]) // known.step).astype(np.uint8)
    if bits == TERNARY:
        digits = np.zeros((packed_size(bits, len(numbers)), len(PLACES)), np.uint8)
        digits.flat[: len(numbers)] = numbers
        return torch.from_numpy(digits @ PLACES)
    stream = np.unpackbits(numbers[:, None], axis=1, count=int(bits), bitorder="little")
    return torch.from_numpy(np.packbits(stream, bitorder="little"))


def unpack(packed: Tensor, bits: float, shape: Sequence[int]) -> Tensor:
    """Unpack bytes that `pack` returned into codes, int8 of `shape`.

    Raises:
        ValueError: `packed` does not have the size of these codes, or has a byte that represents no codes.
    """
    known, count = code_range(bits, signed=True), math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(bits, count),):
        found = f"{packed.dtype} {tuple(packed.shape)}"
        raise ValueError(f"{count} codes of {bits} bits take uint8 ({packed_size(bits, count)},), not {found}")
    data = packed.cpu().numpy()
    if bits == TERNARY:
        if (data >= 3 ** len(PLACES)).any():
            raise ValueError(f"bytes of codes of {bits} bits are at most {3 ** len(PLACES) - 1}, not {data.max()}")
        numbers = (data[:, None] // PLACES % 3).flatten()[:count]
    else:
        stream = np.unpackbits(data, count=count * int(bits), bitorder="little").reshape(count, int(bits))
        numbers = np.packbits(stream, axis=1, bitorder="little")
    signed = numbers.reshape(shape).astype(np.int16) * known.step + known[0]
    return torch.from_numpy(signed.astype(np.int8))
