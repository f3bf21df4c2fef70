import pytest

from quant import functional


@pytest.fixture
def weight_bits(request, monkeypatch):
    """A width of weights, to be parametrized indirectly. "2 mid-rise" is two bits if they were mid-rise."""
    if request.param != "2 mid-rise":
        return request.param
    monkeypatch.setattr(functional, "MID_RISE", {1, 2})
    return 2
