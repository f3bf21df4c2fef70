"""The integer core alone, as the program `driver.cpp`: on another processor, and under sanitizers."""

import ast
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from ddpm_mnist.sampling.sampler import denoise
from ddpm_mnist.sampling.solver import SamplerConfig, Solver
from eval.models import load_model
from quant import QuantConfig, QuantizedUNet, calibrate, freeze, quantize, to_integer
from quant.integer.binding import LineStruct, available

DRIVER = Path(__file__).with_name("driver.cpp")
ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "quant" / "integer" / "core"


def setup_table(name):
    """A table of setup.py, which cannot be imported without an installation."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise ValueError(f"setup.py has no {name}")


COMMON, FLAGS = setup_table("COMMON"), {"portable": [], **setup_table("X86"), **setup_table("ARM")}
# Lines without variables are enough for a report, and compile faster.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O1"]
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def needs(program, package):
    reason = f"this machine has no {program} (Debian: {package})"
    return pytest.mark.skipif(shutil.which(program) is None, reason=reason)


def needs_here(isa):
    return pytest.mark.skipif(isa not in available(), reason=f"this processor has no {isa}")


needs_compiler = needs("g++", "g++")

# UNets that meet what a line may be: options of the UNet, of its first convolution and of its bits, height and width.
SMALL = {
    # 49 tokens, one more than fours; 3 heads of 5; 6 and 15 channels, which fill up no four and no sixteen.
    "7 × 7 tokens": (
        {"block_out_channels": (6, 15), "norm_num_groups": 3, "attention_head_dim": 5},
        {"kernel_size": 3, "padding": 1},
        {"weight_bits": 2, "act_bits": 4},
        (14, 14),
    ),
    # Codes of 8 bits throughout; a stride and a dilation of one side only; a border below and to the right only.
    "strides and borders": (
        {"block_out_channels": (20, 36), "norm_num_groups": 4, "attention_head_dim": 9, "downsample_padding": 0},
        {"kernel_size": (3, 5), "stride": (2, 1), "dilation": (1, 2), "padding": (0, 3)},
        {"weight_bits": 8, "act_bits": 8, "split_skips": False},
        (9, 14),
    ),
    # Sums of 16 bits, emptied after 8 additions; 3 and 5 blocks of 16 channels; kernels larger than their image.
    "one token": (
        {"block_out_channels": (48, 80), "norm_num_groups": 8, "attention_head_dim": 40},
        {"kernel_size": 7, "stride": 2, "padding": 3},
        {"weight_bits": 6, "act_bits": 6},
        (4, 4),
    ),
    # Ternary weights. Lines without a layer: pools and enlarged shortcuts, centring, division; normalisations of the
    # timestep.
    "resampling in residual blocks": (
        {
            "block_out_channels": (8, 20),
            "norm_num_groups": 4,
            "attention_head_dim": 5,
            "act_fn": "gelu",
            "resnet_time_scale_shift": "scale_shift",
            "center_input_sample": True,
            "mid_block_scale_factor": 1.4,
            "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
            "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        },
        {},
        {"weight_bits": 1.58, "act_bits": 2},
        (6, 10),
    ),
    # Filters over the image and the states; images of 3 channels beside those of 32.
    "skips of the image": (
        {
            "block_out_channels": (32, 32),
            "norm_num_groups": 4,
            "act_fn": "mish",
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        },
        {},
        {"weight_bits": 4, "act_bits": 8},
        (6, 4),
    ),
    # Binary weights. Filters with a mirror behind the border, the smallest images that have one.
    "k": (
        {
            "block_out_channels": (32, 32),
            "norm_num_groups": 4,
            "act_fn": "relu",
            "down_block_types": ("KDownBlock2D",) * 2,
            "up_block_types": ("KUpBlock2D",) * 2,
        },
        {},
        {"weight_bits": 1, "act_bits": 2},
        (4, 4),
    ),
}


@cache
def small(name):
    """A frozen UNet on integers, and its images: see `write_input`."""
    options, first, bits, size = SMALL[name]
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(in_channels=3, out_channels=3, layers_per_block=1, **blocks | options).eval()
    x, t = torch.randn(4, 3, *size), 700
    student = quantize(unet, QuantConfig(**bits), [t])
    if first:  # changed by hand, which `quantize` refuses
        unet.conv_in = nn.Conv2d(3, options["block_out_channels"][0], **first)
        student = QuantizedUNet(unet, QuantConfig(**bits), [t])
        for _, layer in student.layers():
            layer.weight_quantizer.initialise(layer.weight)
    calibrate(student, {t: x})
    network = to_integer(freeze(student))
    return network, [(x[:1], t, network(x[:1], t).sample)]


@cache
def released(name):
    """A released student on integers, and an image on its way through the 20 steps: see `write_input`."""
    network, solver = to_integer(load_model(name).denoiser), Solver(SamplerConfig())
    steps = zip(solver.timesteps.tolist(), denoise(network, solver, range(1)), strict=True)
    return network, [(step.x, t, step.output) for t, step in steps]


def write_input(path, network, images):
    """What the driver reads: arrays, each behind the number of its bytes. Addresses in structures mean nothing.

    The options of the sinusoids, and how many images there are; the layers and normalisations, and their weights; the
    sums of weights and the biases of all output channels; the program of the time embedding and the network's, each
    with its lines; what of the former is added to which channels, and which normalisations it scales and shifts. Then
    of each image its timestep, the quantizers and slopes of that, and x_t.

    Args:
        images: x_t (1, channels, height, width), t and ε of each, as `network` gave it.
    """
    layers, proj = network.layers, network.student.unet.time_proj
    sums, biases = np.zeros(layers.channels, np.int32), np.zeros(layers.channels, np.float32)
    for layer in layers.numbered:
        sums[layer.channels], biases[layer.channels] = layer.weight_sum, layer.bias
    options = [proj.num_channels // 2, proj.downscale_freq_shift, proj.flip_sin_to_cos, len(images)]
    time = network.time.program
    added = [
        (time.offsets[state], layers[conv].first_channel, layers[conv].out_channels)
        for conv, state in network.time.added.items()
    ]
    modulated = [
        (time.offsets[state], layers.norms[norm], time.shapes[state][0] // 2)
        for norm, state in network.time.modulated.items()
    ]
    arrays = [np.array(options, np.int64), layers.table, layers.norm_table]
    arrays += [layer.weight for layer in layers.numbered]
    arrays += [numbers for norm in layers.norm_numbers for numbers in norm]
    arrays += [sums, biases]
    for program in (time.structure, *(program.structure for program in network.programs.values())):
        arrays += [program, (LineStruct * program.num_lines)(*program.lines[: program.num_lines])]
    arrays += [np.array(added, np.int64), np.array(modulated, np.int64)]
    for x, t, _ in images:
        moment = network.moments[t, None]
        arrays += [np.array([t], np.float32), moment.quantizers, moment.slopes, x.numpy()]
    with path.open("wb") as file:
        for array in arrays:
            data = memoryview(array).tobytes()
            file.write(len(data).to_bytes(8, "little") + data)


def build(path, isa, flags, sources=SOURCES, compiler="g++"):
    """The driver for an instruction set."""
    options = [*COMMON, *flags, f"-DISA_{isa.upper()}", f"-I{sources}"]
    subprocess.run([compiler, *options, str(DRIVER), "-o", str(path)], check=True)
    return path


def run(command, network, images, folder):
    """Run the driver: what it says, and the SHA-256 of each image's biases and ε."""
    paths = [folder / "input", folder / "output"]
    write_input(paths[0], network, images)
    # Lost memory is not looked for: that needs ptrace, which a container may forbid.
    variables = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([*map(str, [*command, *paths])], env=variables, capture_output=True, text=True)
    size = 4 * (network.layers.channels + images[0][2].numel())
    data = paths[1].read_bytes()
    return done, [hashlib.sha256(data[at : at + size]).hexdigest() for at in range(0, len(data), size)]


def expected(network, images):
    """The SHA-256 of what this processor's core makes of each image: the biases with the time embedding, and ε."""
    arrays = ((network.moments[t, None].offsets.tobytes(), eps.numpy().tobytes()) for _, t, eps in images)
    return [hashlib.sha256(b"".join(pair)).hexdigest() for pair in arrays]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The driver under sanitizers, for each instruction set of this processor."""
    folder = tmp_path_factory.mktemp("sanitized")
    with ThreadPoolExecutor(2) as pool:
        builds = {isa: pool.submit(build, folder / isa, isa, [*FLAGS[isa], *SANITIZERS]) for isa in available()}
    return {isa: built.result() for isa, built in builds.items()}


@pytest.mark.slow
@needs(CROSS_COMPILER, "g++-aarch64-linux-gnu")
@needs(EMULATOR, "qemu-user")
def test_an_emulated_arm_processor_makes_the_same_bytes(tmp_path):
    """Step by step, each from the state of this processor: by induction, then, the same images."""
    driver = build(tmp_path / "driver", "neon", [*FLAGS["neon"], "-static"], compiler=CROSS_COMPILER)
    for name in ("w4a4", "w2a4"):
        network, images = released(name)
        done, digests = run([EMULATOR, "-cpu", "max", driver], network, images, tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(digests) == 20
        assert digests == expected(network, images)
    for network, images in map(small, SMALL):
        done, digests = run([EMULATOR, "-cpu", "max", driver], network, images, tmp_path)
        assert done.returncode == 0, done.stderr
        assert digests == expected(network, images)


@pytest.mark.slow
@needs_compiler
@needs_here("avx512vnni")
def test_the_kernel_of_avx_vnni_makes_the_same_bytes(tmp_path):
    """Few processors have AVX-VNNI, but AVX-512 has the same instructions on 256 bits, encoded otherwise."""
    driver = build(tmp_path / "driver", "avxvnni", ["-mavx2", "-mavx512vl", "-mavx512vnni"])
    for network, images in (released("w4a4"), *map(small, SMALL)):
        done, digests = run([driver], network, images, tmp_path)
        assert done.returncode == 0, done.stderr
        assert digests == expected(network, images)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("isa", [pytest.param(isa, marks=needs_here(isa)) for isa in FLAGS])
@pytest.mark.parametrize("name", SMALL)
def test_sanitizers_find_nothing(name, isa, sanitized, tmp_path):
    network, images = small(name)
    done, digests = run([sanitized[isa]], network, images, tmp_path)
    assert done.returncode == 0, done.stderr
    assert digests == expected(network, images)


@pytest.mark.slow
@needs_compiler
def test_sanitizers_find_rows_that_attention_writes_past_the_tokens(tmp_path):
    """Bytes do not show them: the core makes its codes in a block that is wide enough for any layer."""
    sources = shutil.copytree(SOURCES, tmp_path / "core")
    right, wrong = "for (int64_t r = 0; r < rows; ++r)", "for (int64_t r = 0; r < kRows; ++r)"
    text = (sources / "codes.h").read_text()
    assert text.count(right) == 1
    (sources / "codes.h").write_text(text.replace(right, wrong))
    driver = build(tmp_path / "driver", "portable", SANITIZERS, sources)
    done, _ = run([driver], *small("7 × 7 tokens"), tmp_path)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
