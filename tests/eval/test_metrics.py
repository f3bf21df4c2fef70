import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors import safe_open

from eval.features import (
    KID_REFERENCE_IMAGES,
    PRETRAINED,
    extract,
    features_digest,
    load_features,
    load_reference,
    reference_statistics,
)
from eval.metrics import fid_between, fid_to_reference, inception_score, kid, measure


def features(count, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(9)) / 12**0.5
    return torch.randn(count, 12, generator=generator) @ mixing + shift


def scipy_fid(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)


def test_fid_equals_scipys():
    a, b = features(500), features(700, shift=0.3, seed=1)
    assert fid_between(a, b) == pytest.approx(scipy_fid(a, b), rel=1e-8)


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


def test_scores_do_not_depend_on_the_callers_random_state():
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


def test_a_score_has_every_field_of_the_contract():
    from eval.metrics import Score

    contract = "model weight_bits act_bits fid kid inception_score mse_to_teacher fid_to_teacher"
    contract += " num_images num_steps seed seconds features"
    assert set(contract.split()) <= {field.name for field in dataclasses.fields(Score)}
