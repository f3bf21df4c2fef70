import copy

import pytest
import torch
from torch import nn

from quant import freeze
from quant.integer.binding import available


@pytest.fixture(scope="session", params=available())
def isa(request):
    """Each instruction set of this processor in turn."""
    return request.param


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """PyTorch's own work is too small here for two, which wait for each other where the processor has more to do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def buffer(made_once):
    return made_once.buffer


@pytest.fixture(scope="session")
def frozen(made_once):
    """A frozen student whose adapters learned something; no test changes it."""
    torch.manual_seed(0)
    student = copy.deepcopy(made_once.student)
    for _, layer in student.layers():
        nn.init.normal_(layer.lora_b, std=0.01)
    return freeze(student)
