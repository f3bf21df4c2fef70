import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant.functional import code_range
from quant.packing import pack, packed_size, unpack

WIDTHS = pytest.mark.parametrize("weight_bits", [1, 1.58, *range(2, 9)])


def codes_of(bits):
    return torch.tensor(code_range(bits, signed=True), dtype=torch.int8)


@WIDTHS
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=st.integers(0, 1 << 30))
def test_codes_come_back_from_dense_bytes(weight_bits, shape, seed):
    generator, known = torch.Generator().manual_seed(seed), codes_of(weight_bits)
    codes = known[torch.randint(len(known), shape, generator=generator)]
    packed = pack(codes, weight_bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size(weight_bits, codes.numel()),)
    assert packed.numel() == math.ceil(codes.numel() * (1.6 if weight_bits == 1.58 else weight_bits) / 8)
    assert torch.equal(unpack(packed, weight_bits, shape), codes)


def test_the_layouts_are_those_in_the_docstring():
    a, b, c, d = 0b101, 0b011, 0b110, 0b001
    codes = torch.tensor([a, b, c, d], dtype=torch.int8) - 4
    assert pack(codes, 3).tolist() == [(c & 0b11) << 6 | b << 3 | a, d << 1 | c >> 2]
    codes = torch.tensor([1, -1, 0, 1, 0, 1, 0], dtype=torch.int8)
    assert pack(codes, 1.58).tolist() == [2 + 9 * 1 + 27 * 2 + 81 * 1, 2 + 3 * 1]
    codes = torch.tensor([1, -1, 1, 1, -1, -1, -1, -1, 1], dtype=torch.int8)
    assert pack(codes, 1).tolist() == [0b00001101, 1]


@WIDTHS
def test_the_ends_of_the_range_survive(weight_bits):
    ends = codes_of(weight_bits)[[0, -1]]
    assert torch.equal(unpack(pack(ends, weight_bits), weight_bits, (2,)), ends)


@pytest.mark.parametrize(
    ("weight_bits", "code", "message"),
    [
        (4, 8, "codes of 4 bits lie in -8…7, not at 8"),
        (1.58, -2, r"codes of 1\.58 bits lie in -1…1, not at -2"),
        (1, 0, "codes of 1 bits are odd and lie in -1…1, not at 0"),
        (2, 2, "codes of 2 bits are odd and lie in -3…3, not at 2"),
        (2, 5, "codes of 2 bits are odd and lie in -3…3, not at 5"),
    ],
)
def test_a_code_that_there_is_not_is_refused(weight_bits, code, message):
    with pytest.raises(ValueError, match=message):
        pack(torch.tensor([1, code], dtype=torch.int8), weight_bits)


def test_bytes_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"5 codes of 3 bits take uint8 \(2,\), not torch.uint8 \(3,\)"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, (5,))
    with pytest.raises(ValueError, match=r"6 codes of 1\.58 bits take uint8 \(2,\), not torch.uint8 \(1,\)"):
        unpack(torch.zeros(1, dtype=torch.uint8), 1.58, (6,))


def test_bytes_that_no_ternary_codes_make_are_refused():
    assert unpack(torch.tensor([242], dtype=torch.uint8), 1.58, (5,)).tolist() == [1] * 5
    with pytest.raises(ValueError, match=r"bytes of codes of 1\.58 bits are at most 242, not 243"):
        unpack(torch.tensor([243], dtype=torch.uint8), 1.58, (5,))
