"""Whatever a config of diffusers' `UNet2DModel` can ask for: integers against the simulation, and among themselves."""

from functools import cache

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from eval import exactness
from quant import QuantConfig, calibrate, freeze, quantize, to_integer
from quant.integer import binding, program
from quant.integer.binding import available

PLAIN = ["DownBlock2D", "AttnDownBlock2D"], ["AttnUpBlock2D", "UpBlock2D"]
ATTENTION = ["AttnDownBlock2D"] * 2, ["AttnUpBlock2D"] * 2
RESNET = ["ResnetDownsampleBlock2D"] * 2, ["ResnetUpsampleBlock2D"] * 2
# Blocks of NCSN++ choose their groups by themselves, and want 32 channels.
SKIP = ["SkipDownBlock2D", "AttnSkipDownBlock2D"], ["AttnSkipUpBlock2D", "SkipUpBlock2D"]
THREE = (
    ["SkipDownBlock2D", "AttnSkipDownBlock2D", "DownBlock2D"],
    ["SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"],
)
K = ["KDownBlock2D"] * 2, ["KUpBlock2D"] * 2

STRUCTURES = {
    "scale and shift": (PLAIN, {"resnet_time_scale_shift": "scale_shift"}),
    "scale and shift, attention normalised": (
        PLAIN, {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    ),
    "resampling in residual blocks": (RESNET, {"layers_per_block": 2}),
    "resampling in residual blocks with attention": (
        ATTENTION, {"downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift"},
    ),
    "gelu": (PLAIN, {"act_fn": "gelu"}),
    "relu": (PLAIN, {"act_fn": "relu"}),
    "mish, resampled": (RESNET, {"act_fn": "mish"}),
    "classes": (PLAIN, {"num_class_embeds": 3}),
    "classes as timesteps": (PLAIN, {"class_embed_type": "timestep", "act_fn": "gelu"}),
    "centred, divided": (PLAIN, {"center_input_sample": True, "mid_block_scale_factor": 1.4}),
    "no attention in the middle": (PLAIN, {"add_attention": False, "dropout": 0.5}),
    "no middle": (PLAIN, {"mid_block_type": None, "norm_eps": 0.1}),
    "heads that leave channels out": (PLAIN, {"attention_head_dim": 5, "downsample_padding": 0}),
    "one head": (PLAIN, {"attention_head_dim": None, "attn_norm_num_groups": 8}),
    "fourier": (PLAIN, {"time_embedding_type": "fourier", "flip_sin_to_cos": False}),
    "fourier, classes as timesteps": (PLAIN, {"time_embedding_type": "fourier", "class_embed_type": "timestep"}),
    "learned, classes as timesteps": (
        PLAIN, {"time_embedding_type": "learned", "num_train_timesteps": 1000, "class_embed_type": "timestep"},
    ),
    "time of another width": (PLAIN, {"time_embedding_dim": 21, "num_class_embeds": 4}),
    "skips of the image": (SKIP, {"block_out_channels": (32, 32), "center_input_sample": True}),
    "some skips of the image": (
        THREE, {"block_out_channels": (32, 32, 32), "resnet_time_scale_shift": "scale_shift", "layers_per_block": 2},
    ),
    "skips of the image up": ((["DownBlock2D"] * 2, SKIP[1]), {"block_out_channels": (32, 32)}),
    "k": (K, {"block_out_channels": (32, 64), "layers_per_block": 2, "act_fn": "gelu"}),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", STRUCTURES)
SIZE = (8, 12)


def make_unet(kinds, **options):
    torch.manual_seed(0)
    defaults = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    blocks = {"down_block_types": kinds[0], "up_block_types": kinds[1]}
    return UNet2DModel(SIZE, 3, 3, **blocks, **defaults | options).eval()


def make_frozen(unet, edge_act_bits=16):
    """Calibrated at timestep 700; of 4 bits, so that few floats lie on a border of codes, but for the edges' inputs."""
    for name, parameter in unet.named_parameters():
        if "norm" in name and parameter.dim() == 1:  # a new network's do nothing
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
    student = quantize(unet, QuantConfig(8, 4, edge_bits=4, edge_act_bits=edge_act_bits), [700])
    x = torch.randn(8, 3, *SIZE)
    calibrate(student, {700: x}, **labels(student.unet, len(x)))
    return freeze(student)


def labels(unet, count):
    """Arguments that say the class of each image, 1 or 2, if the network has classes."""
    return {} if unet.class_embedding is None else {"class_labels": torch.arange(count) % 2 + 1}


@cache
def frozen_of(name, edge_act_bits=16):
    kinds, options = STRUCTURES[name]
    return make_frozen(make_unet(kinds, **options), edge_act_bits)


def timesteps_of(student):
    """Between those of the tables, and not integers where the network takes such."""
    return torch.tensor([250, 700, 3] if student.config.time_embedding_type == "learned" else [250.6, 700, 3.25])


@EVERY
def test_an_image_is_the_simulations(name):
    """But for what a code on the other side of a border changes, which is not in every image: of 4 bits it is not."""
    frozen = frozen_of(name, edge_act_bits=4)
    x, t = torch.randn(12, 3, *SIZE), timesteps_of(frozen).repeat(4)
    conditions = labels(frozen.unet, len(x))
    with torch.no_grad():
        expected = frozen(x, t, **conditions).sample
    actual = to_integer(frozen)(x, t, **conditions).sample
    errors = (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert errors.median() < 1e-5
    assert errors.max() < 0.5


@EVERY
def test_every_line_makes_the_simulations_codes(name):
    frozen = frozen_of(name)
    x, t = torch.randn(4, 3, *SIZE), timesteps_of(frozen)[0]
    shares = exactness.flipped_shares(frozen, x, t, None if frozen.unet.class_embedding is None else 2)
    assert shares.keys() == dict(frozen.layers()).keys()
    assert max(shares.values()) < 2e-3
    assert sum(shares.values()) < 1e-4 * len(shares)


@EVERY
def test_the_bytes_depend_neither_on_the_instruction_set_nor_on_the_batch(name):
    frozen = frozen_of(name)
    x, t = torch.randn(3, 3, *SIZE), timesteps_of(frozen)
    conditions = labels(frozen.unet, 3)
    expected = to_integer(frozen, "portable")(x, t, **conditions).sample
    assert len(expected.unique(dim=0)) == 3
    for isa in available():
        model = to_integer(frozen, isa)
        assert torch.equal(model(x, t, **conditions).sample, expected)
        for i in range(3):
            alone = {key: value[i : i + 1] for key, value in conditions.items()}
            assert torch.equal(model(x[i : i + 1], t[i], **alone).sample, expected[i : i + 1])


@pytest.mark.parametrize(
    ("structure", "t", "given", "message"),
    [
        ("classes", 700, None, r"this network has classes: class_labels must say which, \(N,\)"),
        ("classes", 700, [0, 3], "the class label must be an integer from 0 to 2, not 3"),
        ("classes", 700, [-1, 0], "the class label must be an integer from 0 to 2, not -1"),
        ("classes", 700, [0.5, 0], "the class label must be an integer from 0 to 2, not 0.5"),
        ("classes", 700, [0, 1, 2], "the class label must be a number, or one for each of 2 samples"),
        ("classes as timesteps", 700, [0, float("nan")], "the class label must be a finite number"),
        ("fourier", 0, None, "the timestep must be positive, for its logarithm is taken, not 0"),
        ("fourier", [3.5, -1], None, "the timestep must be positive, for its logarithm is taken, not -1.0"),
        ("fourier, classes as timesteps", 700, [0, 1], "the class label must be positive, for its logarithm is taken"),
        ("learned, classes as timesteps", 250.6, [0, 1], "the timestep must be an integer from 0 to 999, not 250.6"),
        ("learned, classes as timesteps", 1000, [0, 1], "the timestep must be an integer from 0 to 999, not 1000"),
        ("learned, classes as timesteps", 999, [0, 1000], "the class label must be an integer from 0 to 999, not 1000"),
    ],
)
def test_timesteps_and_classes_that_a_network_does_not_know_get_one_line(structure, t, given, message):
    model, x = to_integer(frozen_of(structure)), torch.randn(2, 3, *SIZE)
    with pytest.raises(ValueError, match=message) as caught:
        model(x, t, given)
    assert "\n" not in str(caught.value)


def test_classes_are_kept_apart():
    model, x = to_integer(frozen_of("classes")), torch.randn(1, 3, *SIZE).expand(4, -1, -1, -1)
    eps = model(x, 700, torch.tensor([0, 1, 2, 0])).sample
    assert len(eps.unique(dim=0)) == 3
    assert torch.equal(eps[0], eps[3])
    assert model.moments.keys() == {(700, 0), (700, 1), (700, 2)}
    assert torch.equal(model(x, 700, 1).sample, eps[1].expand_as(eps)), "one label for all"
    assert model(x[:0], 700, torch.zeros(0, dtype=torch.long)).sample.shape == (0, 3, *SIZE)


def test_what_is_not_finite_makes_its_image_none_and_no_other():
    model, x = to_integer(frozen_of("some skips of the image")), torch.randn(3, 3, *SIZE)
    expected = model(x, 700).sample
    x[1, 2, 0, 0] = torch.inf
    actual = model(x, 700).sample
    assert actual[1].isnan().all()
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])
    assert expected.isfinite().all()


@pytest.mark.parametrize(
    ("structure", "wrong"),
    [
        ("some skips of the image", {binding.FILTER_DOWN: binding.MIRROR_DOWN}),
        ("some skips of the image", {binding.FILTER_UP: binding.ENLARGE}),
        ("k", {binding.MIRROR_UP: binding.FILTER_UP}),
        ("resampling in residual blocks with attention", {binding.POOL: binding.FILTER_DOWN}),
    ],
)
def test_a_wrong_resampling_is_seen(structure, wrong, monkeypatch):
    """In the images, and in the codes of a line unless a concatenation comes between them."""
    right = program.resampling_of
    monkeypatch.setattr(program, "resampling_of", lambda *given: wrong.get(right(*given), right(*given)))
    if structure != "k":
        with pytest.raises(AssertionError):
            test_every_line_makes_the_simulations_codes(structure)
    with pytest.raises(AssertionError):
        test_an_image_is_the_simulations(structure)
