import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.packing import pack, packed_size, unpack


@pytest.mark.parametrize("bits", range(2, 9))
@settings(max_examples=200, deadline=None)
@given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=st.integers(0, 1 << 30))
def test_codes_come_back_from_dense_bytes(bits, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, shape, generator=generator, dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size(bits, codes.numel()),)
    assert packed.numel() == math.ceil(codes.numel() * bits / 8)
    assert torch.equal(unpack(packed, bits, shape), codes)


def test_the_layout_is_the_one_in_the_docstring():
    a, b, c, d = 0b101, 0b011, 0b110, 0b001
    codes = torch.tensor([a, b, c, d], dtype=torch.int8) - 4
    assert pack(codes, 3).tolist() == [(c & 0b11) << 6 | b << 3 | a, d << 1 | c >> 2]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_ends_of_the_range_survive(bits):
    ends = torch.tensor([-(1 << bits - 1), (1 << bits - 1) - 1], dtype=torch.int8)
    assert torch.equal(unpack(pack(ends, bits), bits, (2,)), ends)


def test_a_code_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"codes of 4 bits lie in -8…7, not in -3…8"):
        pack(torch.tensor([-3, 8], dtype=torch.int8), 4)


def test_bytes_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"5 codes of 3 bits take uint8 \(2,\), not torch.uint8 \(3,\)"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, (5,))
