import dataclasses
import hashlib
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.stats
import torch
from safetensors import safe_open
from torch import nn
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from ddpm_mnist.lab import InputError
from eval import features as features_module
from eval import metrics
from eval import train_features as training
from eval.features import (
    KID_REFERENCE_IMAGES,
    PRETRAINED,
    Ruler,
    SecondNetwork,
    extract,
    features_digest,
    load_features,
    load_reference,
    load_ruler,
    reference_statistics,
)
from eval.metrics import (
    Score,
    fid_between,
    fid_to_reference,
    inception_score,
    kid,
    mean,
    measure,
    neighbour_radii,
    precision_recall,
)
from eval.train_features import FeaturesConfig, train_features


def features(count, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(9)) / 12**0.5
    return torch.randn(count, 12, generator=generator) @ mixing + shift


def scipy_fid(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)


def eigenvalue_fid(a, b):
    """The same from symmetric matrices alone, which may be singular: of few images, or features that are never on."""
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = scipy.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(scipy.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b) - 2 * trace


def kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd(x, y):
    """The unbiased squared MMD of sets of any two sizes."""
    x, y = x.double().numpy(), y.double().numpy()
    within = [(kernel(z, z).sum() - np.trace(kernel(z, z))) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return sum(within) - 2 * kernel(x, y).mean()


def scipy_precision_recall(a, b):
    """From all distances at once, in units of the features."""
    a, b = a.double().numpy(), b.double().numpy()
    radius_a, radius_b = (np.sort(scipy.spatial.distance.cdist(x, x), axis=1)[:, 3] for x in (a, b))
    distances = scipy.spatial.distance.cdist(a, b)
    return (distances <= radius_b).any(1).mean(), (distances <= radius_a[:, None]).any(0).mean()


def left_out(statistic, *sets):
    """The jackknife's standard error: `statistic` of the sets without each twentieth of them, made anew."""
    folds = np.array_split(np.arange(len(sets[0])), 20)
    values = [statistic(*(torch.from_numpy(np.delete(x.numpy(), fold, 0)) for x in sets)) for fold in folds]
    return np.sqrt(19 / 20 * np.square(np.array(values) - np.mean(values)).sum())


def test_fid_equals_scipys():
    a, b = features(500), features(700, shift=0.3, seed=1)
    assert fid_to_reference(a, reference_statistics(b)).value == pytest.approx(scipy_fid(a, b), rel=1e-8)
    assert fid_between(a, b[:500]).value == pytest.approx(scipy_fid(a, b[:500]), rel=1e-8)
    assert eigenvalue_fid(a, b) == pytest.approx(scipy_fid(a, b), rel=1e-8)


def test_fid_of_equal_sets_is_zero():
    a = features(500)
    assert fid_between(a, a) == (pytest.approx(0, abs=1e-8), pytest.approx(0, abs=1e-8))


def test_the_errors_of_fid_are_those_of_scipys_fid_without_each_twentieth():
    a, b = features(205), features(205, shift=0.3, seed=1)
    error = left_out(lambda rest: scipy_fid(rest, b), a)
    assert fid_to_reference(a, reference_statistics(b)).error == pytest.approx(error, rel=1e-7)
    paired = left_out(scipy_fid, a, b)
    assert fid_between(a, b).error == pytest.approx(paired, rel=1e-7)
    assert abs(error / paired - 1) > 0.05, "left out of both is another thing"


def test_kid_equals_the_unbiased_estimator():
    a, b = features(300), features(300, shift=0.5, seed=1)
    assert kid(a, b).value == pytest.approx(mmd(a, b), rel=1e-8)
    assert abs(kid(a, features(300, seed=2)).value) < 0.1 * mmd(a, b)


def test_the_error_of_kid_is_that_of_the_estimator_and_of_its_subsets(monkeypatch):
    a, b = features(205), features(300, shift=0.5, seed=1)
    monkeypatch.setattr(metrics, "CELLS", 900)
    error = left_out(lambda rest: mmd(rest, b), a)
    assert metrics._mmd_error(a.double(), b.double()) == pytest.approx(error, rel=1e-9)
    monkeypatch.setattr(metrics, "KID_SUBSETS", 30)
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 100)
    metric = KernelInceptionDistance(metrics._Identity(12), subsets=30, subset_size=100)
    metric.update(b.double(), real=True)
    metric.update(a.double(), real=False)
    torch.manual_seed(0)
    _, spread = metric.compute()
    assert spread > 0
    assert kid(a, b).error == pytest.approx(np.sqrt(error**2 + spread.item() ** 2 / 30), rel=1e-9)


def test_the_inception_score_runs_from_1_to_10():
    certain = 50 * torch.eye(10).repeat(100, 1)
    assert inception_score(certain).value == pytest.approx(10, abs=0.6)
    assert inception_score(torch.zeros(1000, 10)) == (pytest.approx(1), pytest.approx(0, abs=1e-12))


@pytest.mark.filterwarnings("ignore:std")
def test_the_error_of_the_inception_score_is_that_of_torchmetrics_of_one_split():
    logits = 3 * torch.randn(205, 10, generator=torch.Generator().manual_seed(0))

    def whole(rest):
        metric = InceptionScore(metrics._Identity(10), splits=1)  # whose spread is no number
        metric.update(rest.double())
        return metric.compute()[0].item()

    assert inception_score(logits).error == pytest.approx(left_out(whole, logits), rel=1e-9)


def test_the_error_of_a_mean_is_that_of_the_means_of_its_groups():
    values = torch.rand(400, generator=torch.Generator().manual_seed(0))
    estimate = mean(values)
    assert estimate.value == pytest.approx(values.double().mean().item(), rel=1e-12)
    assert estimate.error == pytest.approx(scipy.stats.sem(values.double().view(20, 20).mean(1).numpy()), rel=1e-9)
    low, high = estimate.interval
    assert (low + high) / 2 == pytest.approx(estimate.value)
    assert high - low == pytest.approx(2 * scipy.stats.t.ppf(0.975, 19) * estimate.error, rel=1e-3)
    assert mean(values[:39]).interval is None, "too few to tell"
    assert mean(values[:40]).interval is not None


@pytest.mark.parametrize(("count", "others", "shift"), [(205, 150, 0.3), (4, 9, 0.0), (60, 300, 2.0), (300, 60, 0.1)])
def test_precision_and_recall_equal_scipys_and_torch_fidelitys(count, others, shift, monkeypatch):
    a, b = features(count), features(others, shift=shift, seed=1)
    whole = precision_recall(a, b)
    values = whole[0].value, whole[1].value
    assert values == pytest.approx(scipy_precision_recall(a, b), abs=1e-12)
    monkeypatch.setattr(metrics, "CELLS", 7 * max(count, others))
    assert precision_recall(a, b, neighbour_radii(b.double())) == whole, "in blocks"
    theirs = prc_features_to_metric(
        a.double(), b.double(), prc_neighborhood=3, prc_batch_size=50, save_cpu_ram=True, verbose=False
    )
    assert values == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_the_error_of_precision_is_that_without_each_twentieth():
    a, b = features(205), features(150, shift=0.3, seed=1)
    error = left_out(lambda rest: scipy_precision_recall(rest, b)[0], a)
    assert precision_recall(a, b)[0].error == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("count", [41, 205])  # a group of two has no third neighbour inside
def test_the_error_of_recall_is_half_the_difference_between_halves(count):
    a, b = features(count), features(150, shift=0.3, seed=1)
    groups, differences = np.array_split(np.arange(count), 20), []
    for halving in metrics.HALVINGS:
        one, other = (scipy_precision_recall(a[np.concatenate([groups[i] for i in half])], b)[1] for half in halving)
        differences.append(one - other)
    expected = np.sqrt(np.mean(np.square(differences))) / 2
    assert precision_recall(a, b)[1].error == pytest.approx(expected, rel=1e-9)
    assert expected > 0


def test_halvings_are_balanced():
    signs = np.full((20, 19), -1)
    for row, (half, other) in enumerate(metrics.HALVINGS):
        assert sorted(half + other) == list(range(20))
        signs[half, row] = 1
    np.testing.assert_array_equal(signs.T @ signs, 20 * np.eye(19))
    assert (signs.sum(0) == 0).all()
    means = np.random.default_rng(0).normal(size=20)
    assert np.sqrt(np.square(means @ signs / 10).mean()) / 2 == pytest.approx(scipy.stats.sem(means))


def precision(a, b):
    return precision_recall(a, b)[0]


def recall(a, b):
    return precision_recall(a, b)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("score", "count", "sets"),
    [
        (lambda a, b: fid_to_reference(a, reference_statistics(b)), 1000, 200),
        (lambda a, b: fid_between(a, a + 0.3 * torch.randn(a.shape, generator=NOISE)), 1000, 200),
        (kid, 400, 100),
        (precision, 200, 100),
        (recall, 300, 100),
        (lambda a, b: inception_score(3 * a), 1000, 200),
    ],
    ids=["fid", "fid_to_teacher", "kid", "precision", "recall", "inception_score"],
)
def test_intervals_cover_what_other_seeds_give(score, count, sets, monkeypatch):
    """Of many independent sets 95% of the intervals should hold the score's mean over all of them."""
    monkeypatch.setattr(metrics, "KID_SUBSETS", 20)
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", count // 4)
    NOISE.manual_seed(10**7)
    others = features(1000, shift=0.2, seed=10**6)
    estimates = [score(features(count, seed=seed), others) for seed in range(sets)]
    values, errors = torch.tensor(estimates, dtype=torch.float64).T
    assert 0.85 < errors.mean() / values.std() < 1.25
    covered = sum(low <= values.mean() <= high for low, high in (estimate.interval for estimate in estimates))
    assert 0.88 <= covered / sets <= 0.99


NOISE = torch.Generator()


def test_scores_do_not_depend_on_the_callers_random_state(monkeypatch):
    monkeypatch.setattr("eval.metrics.KID_SUBSETS", 10)
    a, b, logits = features(1500), features(1500, seed=1), torch.randn(1500, 10)
    first = kid(a, b), inception_score(logits)
    torch.manual_seed(123)
    assert (kid(a, b), inception_score(logits)) == first


def test_the_shipped_networks_are_those_of_all_recorded_scores():
    assert features_digest() == "c8a9d1441665"
    assert load_ruler().second.digest == features_digest(PRETRAINED / "second") != features_digest()


def test_the_shipped_second_network_has_its_own_statistics():
    second = load_ruler().second
    assert isinstance(second.network, SecondNetwork)
    assert second.reference.keys() == {"sum", "outer_sum", "count"}
    average = second.reference["sum"] / 60_000
    variance = second.reference["outer_sum"].diag() / 60_000 - average**2
    assert variance.mean().item() == pytest.approx(1, abs=1e-3)
    images = torch.randint(0, 256, (60, 28, 28), dtype=torch.uint8)
    features, others = second.extract(images)[0], load_ruler().extract(images)[0]
    assert features.shape == others.shape
    assert measure(images, images)["fid_second"] == fid_to_reference(features, second.reference).value


def test_the_shipped_floor_is_of_ten_thousand_images():
    floor = dict(load_ruler().floor)
    assert floor.pop("num_images") == 10_000
    assert floor.keys() == set(metrics.OF_IMAGES)
    assert 0 < floor["fid"] < 0.5
    assert 0 < floor["fid_second"] < 0.5
    assert abs(floor["kid"]) < 0.005
    assert min(floor["precision"], floor["recall"]) > 0.7


def test_the_shipped_reference_belongs_to_the_shipped_network():
    with safe_open(PRETRAINED / "reference.safetensors", "pt") as file:
        assert file.metadata() == {"features": features_digest()}
    reference = load_reference()
    assert reference["count"] == 60_000
    mean = reference["sum"] / reference["count"]
    variance = reference["outer_sum"].diag() / reference["count"] - mean**2
    assert variance.mean().item() == pytest.approx(1, abs=1e-3)
    assert reference["kid_features"].shape == (KID_REFERENCE_IMAGES, 128)
    assert (reference["kid_features"].float().mean(0) - mean).abs().max() < 0.1


def test_features_do_not_depend_on_the_batch():
    images = torch.randint(0, 256, (9, 28, 28), dtype=torch.uint8)
    whole, _ = extract(load_features(), images)
    parts, _ = extract(load_features(), images, batch_size=2)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_measure_of_the_teachers_own_images():
    images = torch.randint(0, 256, (50, 28, 28), dtype=torch.uint8)
    score = measure(images, images)
    assert (score["same_digit"], score["same_digit_interval"]) == (1, [1, 1])
    assert (score["mse_to_teacher"], score["mse_to_teacher_interval"]) == (0, [0, 0])
    assert 0 <= score["fid_to_teacher"] < 1e-6
    assert min(score["fid"], score["fid_second"]) > 100, "noise is no digit"
    shifted = measure(images, (images.int() // 2).byte())
    assert shifted["mse_to_teacher"] > 0.01
    assert shifted["fid_to_teacher"] > 0.1


def test_every_score_has_an_interval_around_it():
    images, others = (torch.randint(0, high, (200, 28, 28), dtype=torch.uint8) for high in (256, 200))
    score = measure(images, others)
    for name in (*metrics.OF_IMAGES, *metrics.TO_TEACHER):
        low, high = score[f"{name}_interval"]
        assert (low + high) / 2 == pytest.approx(score[name], abs=1e-9)
        if name not in ("precision", "recall", "same_digit", "inception_score"):  # may be 0 or 1 for all images
            assert 0 < high - low < max(abs(score[name]), 1)
    few = measure(images[:39], others[:39])
    assert all(few[f"{name}_interval"] is None for name in (*metrics.OF_IMAGES, *metrics.TO_TEACHER))
    assert few["recall"] is not None
    fewest = measure(images[:2], others[:2])
    assert (fewest["precision"], fewest["recall"]) == (None, None)
    assert fewest["fid"] > 0


class Brightest(nn.Module):
    """Sees as many classes as an image has rows: that of the brightest one."""

    def forward(self, images):
        rows = images.float().mean(2)
        return rows[:, :2], rows


def test_same_digit_is_the_share_in_which_the_classifier_sees_what_it_sees_in_the_teachers():
    images, others = torch.zeros(2, 40, 28, 28, dtype=torch.uint8)
    images[torch.arange(40), torch.arange(40) % 7] = 200
    others[torch.arange(40), torch.arange(40) % 7] = 100
    others[:10, 20] = 101
    score = measure(images, others, Ruler(Brightest(), None, "rows", None, (28, 28)))
    assert score["same_digit"] == 0.75
    assert (score["fid"], score["fid_second"], score["features_second"]) == (None, None, "none")


def test_the_released_ruler_is_the_default():
    ruler = load_ruler()
    assert (ruler.digest, ruler.data, ruler.shape) == (features_digest(), "mnist", (28, 28))
    images, others = (torch.randint(0, 256, (40, 28, 28), dtype=torch.uint8) for _ in range(2))
    score = measure(images, others)
    assert measure(images, others, ruler) == score
    assert (score["features"], score["features_second"]) == (features_digest(), features_digest(PRETRAINED / "second"))
    assert load_ruler(PRETRAINED).digest == ruler.digest


@pytest.mark.parametrize("shape", [(28, 28, 3), (8, 12), (8, 12, 3)])
def test_images_that_the_ruler_is_not_for(shape):
    images, others = (torch.randint(0, 256, (20, *shape), dtype=torch.uint8) for _ in range(2))
    score = measure(images, others)
    expected = np.square((images.numpy().astype(float) - others.numpy()) / 127.5).mean()
    assert score.pop("mse_to_teacher") == pytest.approx(expected)
    assert (score.pop("features"), score.pop("features_second")) == ("none", "none")
    assert set(score.values()) == {None}
    names = {"fid", "fid_second", "kid", "inception_score", "precision", "recall", "same_digit", "fid_to_teacher"}
    assert names <= score.keys()


def test_images_of_two_shapes_are_not_compared():
    images = torch.zeros(4, 28, 28, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"shape \(4, 28, 28\) cannot be compared .* shape \(1, 28, 28\)"):
        measure(images, images[:1])


def bright_and_dark(count, seed):
    """Images and labels of three classes: grey levels, under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 56, (count, 28, 28), generator=generator)
    return (labels.view(-1, 1, 1) * 100 + noise).byte(), labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a ruler that was trained on `bright_and_dark`."""
    folder = tmp_path_factory.mktemp("ruler")
    sets = {"train": bright_and_dark(96, 0), "test": bright_and_dark(48, 1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "load_labelled", lambda data, split: {"kmnist": sets}[data][split])
        train_features(FeaturesConfig(data="kmnist", output=folder, epochs=6, batch_size=16))
    return folder


def test_a_ruler_of_another_set(trained):
    ruler = load_ruler(trained)
    assert (ruler.digest, ruler.data) == (features_digest(trained), "kmnist")
    record = json.loads((trained / "features.json").read_text())
    assert (record["test_accuracy"], record["test_accuracy_second"]) == (1.0, 1.0)
    images, _ = bright_and_dark(96, 0)
    features, logits = ruler.extract(images)
    assert logits.shape == (96, 3)
    assert features.var(0).mean().item() == pytest.approx(1, abs=1e-4)
    score = measure(images, images.flip(0), ruler)
    assert score["fid"] == pytest.approx(0, abs=1e-5), "these are the reference images"
    assert score["fid_to_teacher"] == pytest.approx(0, abs=1e-5)
    assert 2 < score["inception_score"] <= 3.01
    assert score["features"] == ruler.digest != features_digest()
    others, _ = bright_and_dark(60, 2)
    expected = eigenvalue_fid(ruler.extract(others // 2)[0], features)
    assert measure(others // 2, others, ruler)["fid"] == pytest.approx(expected, rel=1e-4)
    second = eigenvalue_fid(ruler.second.extract(others // 2)[0], ruler.second.extract(images)[0])
    assert measure(others // 2, others, ruler)["fid_second"] == pytest.approx(second, rel=1e-4)
    assert ruler.second.extract(images)[0].var(0).mean().item() == pytest.approx(1, abs=1e-4)


def test_the_floor_is_what_the_test_images_score(trained):
    floor = load_ruler(trained).floor
    assert floor == json.loads((trained / "features.json").read_text())["floor"]
    images, _ = bright_and_dark(48, 1)
    assert floor.pop("num_images") == 48
    assert floor == pytest.approx({name: measure(images, images, load_ruler(trained))[name] for name in floor})
    assert floor.keys() == set(metrics.OF_IMAGES)


def test_a_network_is_the_same_whatever_was_trained_before_it(tmp_path):
    images, labels = bright_and_dark(96, 0)
    config = FeaturesConfig(batch_size=16)
    first = training.fit(training.FIRST, images, labels, 3, 1, config)
    torch.manual_seed(99)
    second = training.fit(training.SECOND, images, labels, 3, 1, config)
    for recipe, network in ((training.FIRST, first), (training.SECOND, second)):
        again = training.fit(recipe, images, labels, 3, 1, config).state_dict()
        assert all(torch.equal(again[name], weights) for name, weights in network.state_dict().items())
    assert type(first) is not type(second)


def test_a_ruler_without_a_second_network_measures_without_it(trained, tmp_path):
    for name in ("features.safetensors", "reference.safetensors"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    ruler = load_ruler(tmp_path)
    assert (ruler.second, ruler.floor) == (None, None)
    images, _ = bright_and_dark(60, 2)
    score = measure(images, images, ruler)
    assert (score["fid_second"], score["fid_second_interval"], score["features_second"]) == (None, None, "none")
    assert score["recall"] is not None


def test_what_is_no_ruler_is_refused(trained, tmp_path):
    with pytest.raises(InputError, match=r'holds no ruler; "efficientdm features" makes one'):
        load_ruler(tmp_path)
    for name in ("features", "reference"):
        source = PRETRAINED if name == "features" else trained
        (tmp_path / f"{name}.safetensors").write_bytes((source / f"{name}.safetensors").read_bytes())
    mixed = f"the statistics are of the network {features_digest(trained)}, not of {features_digest()}"
    with pytest.raises(InputError, match=mixed):
        load_ruler(str(tmp_path))
    with pytest.raises(InputError, match="the released ruler has its own"):
        load_ruler(reference="mnist")
    shutil.copytree(PRETRAINED, tmp_path / "whole")
    shutil.copytree(trained / "second", tmp_path / "whole" / "second", dirs_exist_ok=True)
    with pytest.raises(InputError, match="the second network is of kmnist, the first of mnist"):
        load_ruler(tmp_path / "whole")
    shutil.copytree(PRETRAINED, tmp_path / "half")
    (tmp_path / "half" / "second" / "features.safetensors").unlink()
    with pytest.raises(InputError, match="second holds no ruler"):
        load_ruler(tmp_path / "half")
    shutil.copytree(trained, tmp_path / "other")
    (tmp_path / "other" / "features.json").write_text("[1]")
    with pytest.raises(InputError, match=r"other/features\.json is not the record of a ruler"):
        load_ruler(tmp_path / "other")


def test_features_need_labels_and_a_batch(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r'data must have labels, as mnist, .* have, not "pictures"'):
        FeaturesConfig(data="pictures")
    monkeypatch.setattr(training, "load_labelled", lambda data, split: bright_and_dark(9, 0))
    with pytest.raises(InputError, match="at most the 9 training images, not 128"):
        train_features(FeaturesConfig(output=tmp_path))


class Extractor(nn.Module):
    """In the place of torch-fidelity's: the means of the channels and of the upper half, as features and as logits."""

    def __init__(self, name, features_list, path):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.fc = nn.Linear(1, 1)

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        means = images.float().mean((2, 3)) / 255, images[:, :, : images.shape[2] // 2].float().mean((2, 3)) / 255
        features = torch.cat(means, dim=1)
        return features, features


@pytest.fixture
def inception(monkeypatch, tmp_path):
    """torch-fidelity and its weights, or something in their places. The folder where the weights lie."""
    weights = tmp_path / "checkpoints" / "weights.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    module = SimpleNamespace(FeatureExtractorInceptionV3=Extractor, URL_INCEPTION_V3="https://example.org/weights.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(feature_extractor_inceptionv3=module))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest())
    load_ruler.cache_clear()
    yield weights.parent
    load_ruler.cache_clear()


@pytest.mark.parametrize("channels", [(), (3,)])
def test_inception_measures_any_size(channels, inception):
    generator = torch.Generator().manual_seed(0)
    images, others = (
        torch.randint(0, high, (80, 8, 12, *channels), dtype=torch.uint8, generator=generator) for high in (256, 200)
    )
    ruler = load_ruler("inception")
    score = measure(images, others, ruler)
    assert (score["fid"], score["kid"], score["features"]) == (None, None, "inception")

    def means(pictures):
        colour = pictures if channels else pictures.unsqueeze(-1).expand(-1, -1, -1, 3)
        return torch.cat([colour.double().mean((1, 2)), colour[:, :4].double().mean((1, 2))], dim=1) / 255

    assert score["fid_to_teacher"] == pytest.approx(eigenvalue_fid(means(images), means(others)), rel=1e-3)
    torch.testing.assert_close(ruler.extract(images)[0].double(), means(images), rtol=0, atol=1e-6)
    assert not ruler.fits((8, 12, 4))


def test_inception_with_reference_images(inception, tmp_path):
    images, others = (torch.randint(0, high, (80, 8, 12, 3), dtype=torch.uint8) for high in (256, 200))
    np.save(tmp_path / "reference.npy", others.numpy())
    ruler = load_ruler("inception", str(tmp_path / "reference.npy"))
    score = measure(images, others, ruler)
    assert score["fid"] == pytest.approx(score["fid_to_teacher"], rel=1e-6)
    assert score["kid"] == pytest.approx(kid(ruler.extract(images)[0], ruler.extract(others)[0]).value, abs=1e-3)
    np.save(tmp_path / "one.npy", others[:1].numpy())
    with pytest.raises(InputError, match=r"one\.npy holds one image: a covariance needs two"):
        load_ruler("inception", str(tmp_path / "one.npy"))


def test_inception_that_cannot_be_had_is_one_line(inception, monkeypatch):
    def refuse(*_):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    (inception / "weights.pth").write_bytes(b"others")
    with pytest.raises(InputError, match=r"put https://example.org/weights.pth into .*weights.pth has SHA-256 "):
        load_ruler("inception")
    (inception / "weights.pth").unlink()
    with pytest.raises(InputError, match=r"put https://example.org/weights.pth into .*checkpoints \(no network\)"):
        load_ruler("inception")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match=r"needs torch-fidelity: pip install 'efficientdm\[inception\]'"):
        load_ruler("inception")


def test_a_score_has_every_field_of_the_contract():
    contract = "model weight_bits act_bits fid kid inception_score mse_to_teacher fid_to_teacher"
    contract += " num_images num_steps seed seconds features same_digit precision recall fid_second"
    names = {field.name for field in dataclasses.fields(Score)}
    assert set(contract.split()) <= names
    assert {f"{name}_interval" for name in (*metrics.OF_IMAGES, *metrics.TO_TEACHER)} <= names
