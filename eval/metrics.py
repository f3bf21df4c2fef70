"""From images to scores: features → statistics → metric, through torchmetrics, in float64."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from eval.features import extract, features_digest, load_features, load_reference

# torchmetrics warns that these metrics keep every feature: some ten thousand times 128 numbers.
warnings.filterwarnings("ignore", message="Metric .* will save all extracted features in buffer")

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000


class _Identity(nn.Module):
    """Hands torchmetrics features that are computed already, so that one pass serves every metric."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid_to_reference(features: Tensor, reference: dict[str, Tensor]) -> float:
    """FID (arXiv 1706.08500, eq. 6) of features (N, D), N ≥ 2, against the sums of `load_reference`."""
    metric = FrechetInceptionDistance(_Identity(features.shape[1]), reset_real_features=False)
    metric.real_features_sum = reference["sum"]
    metric.real_features_cov_sum = reference["outer_sum"]
    metric.real_features_num_samples = reference["count"]
    metric.update(features.double(), real=False)
    return metric.compute().item()


def fid_between(features: Tensor, others: Tensor) -> float:
    """FID of features (N, D) against features (M, D); N, M ≥ 2."""
    metric = FrechetInceptionDistance(_Identity(features.shape[1]))
    metric.update(others.double(), real=True)
    metric.update(features.double(), real=False)
    return max(metric.compute().item(), 0.0)  # rounding may leave a zero below itself


def kid(features: Tensor, others: Tensor) -> float:
    """KID (arXiv 1801.01401): the unbiased squared MMD with the cubic kernel, mean over 100 random subsets."""
    size = min(KID_SUBSET_SIZE, len(features), len(others))
    metric = KernelInceptionDistance(_Identity(features.shape[1]), subsets=KID_SUBSETS, subset_size=size)
    metric.update(others.double(), real=True)
    metric.update(features.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, _ = metric.compute()
    return mean.item()


def inception_score(logits: Tensor) -> float:
    """Inception score (arXiv 1606.03498) of logits (N, 10) of the digit classifier: 1 … 10, mean of 10 splits."""
    metric = InceptionScore(_Identity(logits.shape[1]), splits=min(10, len(logits)))
    metric.update(logits.double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, _ = metric.compute()
    return mean.item()


@dataclass
class Score:
    """One model's scores; every field travels into the JSON."""

    model: str
    weight_bits: int
    """32 for a model in full precision."""
    act_bits: int
    runtime: str
    """"float" for a model in full precision; a student runs "integer" or "simulated"."""
    fid: float
    """FID against MNIST's 60,000 training images. Its bias depends on `num_images`: compare equal counts only."""
    kid: float
    """KID against the first 10,000 training images; unbiased."""
    inception_score: float
    """Inception score of the digit classifier."""
    mse_to_teacher: float
    """Mean over images and pixels of the squared difference from the teacher's image of the same noise, in [-1, 1]."""
    fid_to_teacher: float
    """FID against the teacher's images of the same noise instead of MNIST's."""
    num_images: int
    num_steps: int
    solver: str
    eta: float
    seed: int
    """Image i starts from the noise of `seed` + i."""
    seconds: float
    """Time to draw the images."""
    features: str
    """Digest of the feature network."""


def measure(images: Tensor, teacher_images: Tensor) -> dict[str, float | str]:
    """All that images say: the fields of `Score` from `fid` to `fid_to_teacher`, and the digest.

    Args:
        images: uint8 (N, 28, 28), N ≥ 2.
        teacher_images: the teacher's images from the same noise, same shape.
    """
    network = load_features()
    features, logits = extract(network, images)
    teacher_features, _ = extract(network, teacher_images)
    reference = load_reference()
    difference = (images.float() - teacher_images.float()) / 127.5
    return {
        "fid": fid_to_reference(features, reference),
        "kid": kid(features, reference["kid_features"]),
        "inception_score": inception_score(logits),
        "mse_to_teacher": difference.square().mean().item(),
        "fid_to_teacher": fid_between(features, teacher_features),
        "features": features_digest(),
    }
