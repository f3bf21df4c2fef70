"""Every network of `structures.py` that runs on integers: against the simulation, and among instruction sets."""

from functools import cache

import pytest
import torch
from structures import COMBINATIONS, STRUCTURES, conditions_of, make, size_of

from eval.exactness import flipped_shares
from quant import QuantConfig, calibrate, freeze, quantize, to_integer
from quant.integer import binding, program
from quant.integer.binding import available

# Rows that integers refuse, and rows whose program has no line that the others' have not.
REFUSED = (
    "classes as embeddings (class_embed_type identity)",
    "tiny Stable Diffusion (UNet2DConditionModel)",
    "the same with linear projections",
)
SAME = ("this project's teacher", "google/ddpm-celebahq-256", "dropout", "not square, three channels", "no sample_size")
NAMES = [name for name in STRUCTURES | COMBINATIONS if name not in REFUSED + SAME]
EVERY = pytest.mark.parametrize("name", NAMES)


@cache
def frozen_of(name, edge_act_bits=16):
    """Calibrated at timestep 700; of 4 bits, so that few floats lie on a border of codes, but for the edges' inputs."""
    unet = make(name)
    config = QuantConfig(8, 4, edge_bits=4, edge_act_bits=edge_act_bits, search="min-max")
    student = quantize(unet, config, [700])
    calibrate(student, {700: states_of(student, 8)}, **conditions_of(unet, 8))
    return freeze(student)


def states_of(student, count):
    return torch.randn(count, student.config.in_channels, *size_of(student))


def timesteps_of(student):
    """Between those of the tables, and not integers where the network takes such."""
    return torch.tensor([250, 700, 3] if student.config.time_embedding_type == "learned" else [250.6, 700, 3.25])


@EVERY
def test_an_image_is_the_simulations(name):
    """But for what a code on the other side of a border changes, which is not in every image: of 4 bits it is not."""
    frozen = frozen_of(name, edge_act_bits=4)
    x, t, conditions = states_of(frozen, 12), timesteps_of(frozen).repeat(4), conditions_of(frozen.unet, 12)
    with torch.no_grad():
        expected = frozen(x, t, **conditions).sample
    actual = to_integer(frozen)(x, t, **conditions).sample
    errors = (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert errors.median() < 1e-5
    assert errors.max() < 0.5


@EVERY
def test_every_line_makes_the_simulations_codes(name):
    frozen = frozen_of(name)
    label = None if frozen.unet.class_embedding is None else 2
    shares = flipped_shares(frozen, states_of(frozen, 4), timesteps_of(frozen)[0], label)
    assert shares.keys() == dict(frozen.layers()).keys()
    assert max(shares.values()) < 2e-3
    assert sum(shares.values()) < 1e-4 * len(shares)


@EVERY
def test_the_bytes_depend_neither_on_the_instruction_set_nor_on_the_batch(name):
    frozen = frozen_of(name)
    x, t, conditions = states_of(frozen, 3), timesteps_of(frozen), conditions_of(frozen.unet, 3)
    expected = to_integer(frozen, "portable")(x, t, **conditions).sample
    assert len(expected.unique(dim=0)) == 3
    for isa in available():
        model = to_integer(frozen, isa)
        assert torch.equal(model(x, t, **conditions).sample, expected)
        for i in range(3):
            alone = {key: value[i : i + 1] for key, value in conditions.items()}
            assert torch.equal(model(x[i : i + 1], t[i], **alone).sample, expected[i : i + 1])


CLASSES, TIMES = "classes (num_class_embeds)", "classes as times (class_embed_type timestep)"
RESAMPLING = "resampling in the residual blocks (downsample_type, upsample_type)"
FOURIER, LEARNED = "Fourier times, classes as times", "learned times, classes as times"


@pytest.mark.parametrize(
    ("structure", "t", "given", "message"),
    [
        (CLASSES, 700, None, r"this network has classes: class_labels must say which, \(N,\)"),
        (CLASSES, 700, [0, 5], "the class label must be an integer from 0 to 4, not 5"),
        (CLASSES, 700, [-1, 0], "the class label must be an integer from 0 to 4, not -1"),
        (CLASSES, 700, [0.5, 0], "the class label must be an integer from 0 to 4, not 0.5"),
        (CLASSES, 700, [0, 1, 2], "the class label must be a number, or one for each of 2 samples"),
        (TIMES, 700, [0, float("nan")], "the class label must be a finite number"),
        ("Fourier times", 0, None, "the timestep must be positive, for its logarithm is taken, not 0"),
        ("Fourier times", [3.5, -1], None, "the timestep must be positive, for its logarithm is taken, not -1.0"),
        (FOURIER, 700, [0, 1], "the class label must be positive, for its logarithm is taken"),
        (LEARNED, 250.6, [0, 1], "the timestep must be an integer from 0 to 999, not 250.6"),
        (LEARNED, 1000, [0, 1], "the timestep must be an integer from 0 to 999, not 1000"),
        (LEARNED, 999, [0, 1000], "the class label must be an integer from 0 to 999, not 1000"),
    ],
)
def test_timesteps_and_classes_that_a_network_does_not_know_get_one_line(structure, t, given, message):
    frozen = frozen_of(structure)
    with pytest.raises(ValueError, match=message) as caught:
        to_integer(frozen)(states_of(frozen, 2), t, given)
    assert "\n" not in str(caught.value)


def test_classes_are_kept_apart():
    frozen = frozen_of(CLASSES)
    model, x = to_integer(frozen), states_of(frozen, 1).expand(4, -1, -1, -1)
    eps = model(x, 700, torch.tensor([0, 1, 2, 0])).sample
    assert len(eps.unique(dim=0)) == 3
    assert torch.equal(eps[0], eps[3])
    assert model.moments.keys() == {(700, 0), (700, 1), (700, 2)}
    assert torch.equal(model(x, 700, 1).sample, eps[1].expand_as(eps)), "one label for all"
    assert model(x[:0], 700, torch.zeros(0, dtype=torch.long)).sample.shape == (0, *x.shape[1:])


def test_what_is_not_finite_makes_its_image_none_and_no_other():
    frozen = frozen_of("some Skip blocks")
    model, x = to_integer(frozen), states_of(frozen, 3)
    expected = model(x, 700).sample
    x[1, 2, 0, 0] = torch.inf
    actual = model(x, 700).sample
    assert actual[1].isnan().all()
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])
    assert expected.isfinite().all()


@pytest.mark.parametrize(
    ("structure", "wrong"),
    [
        ("some Skip blocks", {binding.FILTER_DOWN: binding.MIRROR_DOWN}),
        ("some Skip blocks", {binding.FILTER_UP: binding.ENLARGE}),
        ("K blocks", {binding.MIRROR_UP: binding.FILTER_UP}),
        (RESAMPLING, {binding.POOL: binding.FILTER_DOWN}),
    ],
)
def test_a_wrong_resampling_is_seen(structure, wrong, monkeypatch):
    """In the images, and in the codes of a line unless a concatenation comes between them."""
    right = program.resampling_of
    monkeypatch.setattr(program, "resampling_of", lambda *given: wrong.get(right(*given), right(*given)))
    if structure != "K blocks":
        with pytest.raises(AssertionError):
            test_every_line_makes_the_simulations_codes(structure)
    with pytest.raises(AssertionError):
        test_an_image_is_the_simulations(structure)
