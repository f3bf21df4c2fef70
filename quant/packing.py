"""Integer codes of 2 to 8 bits ↔ dense bytes.

Codes follow each other without gaps, least significant bit first; a code may cross the border of a byte, and only
the last byte is padded, with zeros. Three-bit codes a, b, c, …, each stored as code − qmin:

    byte 0                    byte 1                    byte 2
    bit 7 6 5 4 3 2 1 0       7 6 5 4 3 2 1 0           7 6 5 4 3 2 1 0
        c c b b b a a a       f e e e d d d c           h h h g g g f f
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quant.functional import code_range


def packed_size(bits: int, count: int) -> int:
    """Bytes that `count` codes take."""
    return math.ceil(count * bits / 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes, int8 of any shape, to bytes, uint8 (packed_size(bits, codes.numel()),).

    Raises:
        ValueError: a code does not fit into `bits`.
    """
    qmin, qmax = code_range(bits, signed=True)
    flat = codes.flatten().cpu().numpy()
    if flat.size and not qmin <= flat.min() <= flat.max() <= qmax:
        raise ValueError(f"codes of {bits} bits lie in {qmin}…{qmax}, not in {flat.min()}…{flat.max()}")
    unsigned = (flat.astype(np.int16) - qmin).astype(np.uint8)
    stream = np.unpackbits(unsigned[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream, bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The codes int8 of `shape` that `pack` made into `packed`.

    Raises:
        ValueError: `packed` has not the size that the codes take.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(bits, count),):
        found = f"{packed.dtype} {tuple(packed.shape)}"
        raise ValueError(f"{count} codes of {bits} bits take uint8 ({packed_size(bits, count)},), not {found}")
    stream = np.unpackbits(packed.cpu().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    unsigned = np.packbits(stream, axis=1, bitorder="little").reshape(shape)
    return torch.from_numpy((unsigned.astype(np.int16) + code_range(bits, signed=True)[0]).astype(np.int8))
