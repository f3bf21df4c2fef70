"""What a process sets for torch has no influence: every verb gives the same bytes in every context."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from diffusers import UNet2DModel

import quant
from quant.context import plain_torch
from quant.summary import summarise

TIMESTEPS = [400.5, 20]
SMALL = {
    "time_embedding_type": "fourier", "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,),
    "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8, "mid_block_type": None,
    "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",),
}  # fmt: skip


def digest(tensors):
    return hashlib.sha256(b"".join(f"{x.dtype}".encode() + x.numpy().tobytes() for x in tensors)).hexdigest()


def every_verb(folder, surrounding):
    """What each verb makes of the same network and the same states, as digests."""
    with plain_torch():
        torch.manual_seed(1)
        unet = UNet2DModel(**SMALL).eval()
        states = {t: torch.randn(4, 1, 8, 8) for t in TIMESTEPS}
        times = (20, 333.3, [0.7, 20.5, 700.0, 900.0], torch.tensor([20, 400, 400, 900]))
    x, given = states[20], {name: value.clone() for name, value in unet.state_dict().items()}
    made = {}
    with surrounding():
        for name, options in (("plain", {}), ("reconstructed", {"reconstruction": True, "per_step": False})):
            torch.manual_seed(2)
            student = quant.quantize(unet, quant.QuantConfig(rank=2, **options), TIMESTEPS)
            made[f"quantize {name}"] = [x.clone() for x in student.state_dict().values()]
            quant.calibrate(student, states)
            made[f"calibrate {name}"] = student.state_dict().values()
        frozen = quant.freeze(student)
        frozen.save_pretrained(folder)
        loaded = quant.QuantizedUNet.from_pretrained(folder)
        integer = quant.to_integer(loaded)
        summarise(frozen, (1, 8, 8))
        made["freeze"] = frozen.state_dict().values()
        made["from_pretrained"] = loaded.state_dict().values()
        for number, t in enumerate(times):
            made[f"frozen {number}"] = [frozen(x, t).sample.detach()]
            made[f"integer {number}"] = [integer(x, t).sample]
    assert all(torch.equal(value, given[name]) for name, value in unet.state_dict().items())
    learned = student(x, 20).sample.square().mean()
    learned.backward()  # what is made in inference mode could not be trained
    return {name: digest(tensors) for name, tensors in made.items()}


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return every_verb(tmp_path_factory.mktemp("usual"), contextlib.nullcontext)


@pytest.mark.parametrize(
    "surrounding",
    [
        lambda: default_dtype(torch.float64),
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode,
        torch.no_grad,
        lambda: reduced_precision(),
    ],
    ids=["float64", "meta", "autocast", "inference_mode", "no_grad", "medium precision"],
)
def test_every_verb_gives_the_same_bytes(surrounding, usual, tmp_path):
    assert every_verb(tmp_path, surrounding) == usual


@pytest.mark.slow
def test_the_defaults_of_the_importing_process_have_no_influence(usual, tmp_path):
    program = (
        "import contextlib, json, sys, torch\n"
        "torch.set_default_dtype(torch.bfloat16)\n"
        "torch.set_default_device('meta')\n"
        f"sys.path.insert(0, {str(__file__).rpartition('/')[0]!r})\n"
        "import test_context\n"
        f"print(json.dumps(test_context.every_verb({str(tmp_path)!r}, contextlib.nullcontext)))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout) == usual


def test_a_child_that_is_forked_inside_leaves_and_enters_as_its_parent():
    with default_dtype(torch.float64):
        with plain_torch():
            child = os.fork()
            seen = [torch.get_default_dtype()]
            with plain_torch():
                seen.append(torch.get_default_dtype())
        seen.append(torch.get_default_dtype())
        with plain_torch():
            seen.append(torch.get_default_dtype())
        if child == 0:
            os._exit(seen != [torch.float32, torch.float32, torch.float64, torch.float32])
    assert os.waitpid(child, 0)[1] == 0


def test_a_child_that_is_forked_while_another_thread_is_inside_has_the_processs_default():
    entered, left = threading.Event(), threading.Event()

    def stay():
        with plain_torch():
            entered.set()
            left.wait()

    with default_dtype(torch.float64):
        thread = threading.Thread(target=stay)
        thread.start()
        entered.wait()
        if (child := os.fork()) == 0:
            os._exit(torch.get_default_dtype() != torch.float64)
        left.set()
        thread.join()
    assert os.waitpid(child, 0)[1] == 0


@contextlib.contextmanager
def reduced_precision():
    torch.set_float32_matmul_precision("medium")
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.conv.fp32_precision = "none"


def test_the_default_dtype_comes_back_when_the_last_thread_is_out():
    with default_dtype(torch.float64):
        first, second = plain_torch(), plain_torch()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float32, "one is still inside"
        second.__exit__(None, None, None)
