import dataclasses
import hashlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors import safe_open
from torch import nn

from ddpm_mnist import InputError
from eval import features as features_module
from eval import train_features as training
from eval.features import (
    KID_REFERENCE_IMAGES,
    PRETRAINED,
    extract,
    features_digest,
    load_features,
    load_reference,
    load_ruler,
    reference_statistics,
)
from eval.metrics import fid_between, fid_to_reference, inception_score, kid, measure
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


def test_fid_equals_scipys():
    a, b = features(500), features(700, shift=0.3, seed=1)
    assert fid_between(a, b) == pytest.approx(scipy_fid(a, b), rel=1e-8)
    assert eigenvalue_fid(a, b) == pytest.approx(scipy_fid(a, b), rel=1e-8)


def test_fid_from_sums_equals_fid_from_features():
    a, b = features(500), features(700, shift=0.3, seed=1)
    assert fid_to_reference(a, reference_statistics(b)) == pytest.approx(scipy_fid(a, b), rel=1e-8)


def test_fid_of_equal_sets_is_zero():
    a = features(500)
    assert 0 <= fid_between(a, a) < 1e-8


def test_kid_equals_the_unbiased_estimator():
    a, b = features(300), features(300, shift=0.5, seed=1)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    x, y = a.double().numpy(), b.double().numpy()
    n = len(x)
    within = [(kernel(z, z).sum() - np.trace(kernel(z, z))) / (n * (n - 1)) for z in (x, y)]
    expected = sum(within) - 2 * kernel(x, y).mean()
    assert kid(a, b) == pytest.approx(expected, rel=1e-8)
    assert abs(kid(a, features(300, seed=2))) < 0.1 * expected


def test_the_inception_score_runs_from_1_to_10():
    certain = 50 * torch.eye(10).repeat(100, 1)
    assert inception_score(certain) == pytest.approx(10, abs=0.6)
    assert inception_score(torch.zeros(1000, 10)) == pytest.approx(1)


def test_scores_do_not_depend_on_the_callers_random_state(monkeypatch):
    monkeypatch.setattr("eval.metrics.KID_SUBSETS", 10)
    a, b, logits = features(1500), features(1500, seed=1), torch.randn(1500, 10)
    first = kid(a, b), inception_score(logits)
    torch.manual_seed(123)
    assert (kid(a, b), inception_score(logits)) == first


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
    assert score["mse_to_teacher"] == 0
    assert 0 <= score["fid_to_teacher"] < 1e-6
    assert score["fid"] > 100, "noise is no digit"
    shifted = measure(images, (images.int() // 2).byte())
    assert shifted["mse_to_teacher"] > 0.01
    assert shifted["fid_to_teacher"] > 0.1


def test_the_released_ruler_is_the_default():
    ruler = load_ruler()
    assert (ruler.digest, ruler.data, ruler.shape) == (features_digest(), "mnist", (28, 28))
    images, others = (torch.randint(0, 256, (40, 28, 28), dtype=torch.uint8) for _ in range(2))
    assert measure(images, others, ruler) == measure(images, others)
    assert measure(images, others)["features"] == features_digest()
    assert load_ruler(PRETRAINED).digest == ruler.digest


@pytest.mark.parametrize("shape", [(28, 28, 3), (8, 12), (8, 12, 3)])
def test_images_that_the_ruler_is_not_for(shape):
    images, others = (torch.randint(0, 256, (20, *shape), dtype=torch.uint8) for _ in range(2))
    score = measure(images, others)
    expected = np.square((images.numpy().astype(float) - others.numpy()) / 127.5).mean()
    assert score.pop("mse_to_teacher") == pytest.approx(expected)
    assert score.pop("features") == "none"
    assert score == dict.fromkeys(("fid", "kid", "inception_score", "fid_to_teacher"))


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
    assert (record["num_test_images"], record["test_accuracy"]) == (48, 1.0)
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
    assert not ruler.fits(torch.zeros(2, 8, 12, 4, dtype=torch.uint8))


def test_inception_with_reference_images(inception, tmp_path):
    images, others = (torch.randint(0, high, (80, 8, 12, 3), dtype=torch.uint8) for high in (256, 200))
    np.save(tmp_path / "reference.npy", others.numpy())
    ruler = load_ruler("inception", str(tmp_path / "reference.npy"))
    score = measure(images, others, ruler)
    assert score["fid"] == pytest.approx(score["fid_to_teacher"], rel=1e-6)
    assert score["kid"] == pytest.approx(kid(ruler.extract(images)[0], ruler.extract(others)[0]), abs=1e-3)
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
    from eval.metrics import Score

    contract = "model weight_bits act_bits fid kid inception_score mse_to_teacher fid_to_teacher"
    contract += " num_images num_steps seed seconds features"
    assert set(contract.split()) <= {field.name for field in dataclasses.fields(Score)}
