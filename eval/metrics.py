"""From images to scores: features → statistics → metric, through torchmetrics, in float64."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from ddpm_mnist import InputError
from eval.features import Ruler, load_ruler

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
    return _compute_fid(metric)


def fid_between(features: Tensor, others: Tensor) -> float:
    """FID of features (N, D) against features (M, D); N, M ≥ 2."""
    metric = FrechetInceptionDistance(_Identity(features.shape[1]))
    metric.update(others.double(), real=True)
    metric.update(features.double(), real=False)
    return _compute_fid(metric)


def _compute_fid(metric: FrechetInceptionDistance) -> float:
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
    """Inception score (arXiv 1606.03498) of a classifier's logits (N, K): 1 … K, mean of 10 splits."""
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
    fid: float | None
    """FID against the ruler's images, by default MNIST's 60,000 training images. Its bias depends on `num_images`:
    compare equal counts only. None, here and below: the ruler does not tell, see `measure`."""
    kid: float | None
    """KID against the first 10,000 of them; unbiased."""
    inception_score: float | None
    """Inception score of the ruler's classifier."""
    mse_to_teacher: float
    """Mean over images and pixels of the squared difference from the teacher's image of the same noise, in [-1, 1]."""
    fid_to_teacher: float | None
    """FID against the teacher's images of the same noise instead."""
    num_images: int
    num_steps: int
    solver: str
    eta: float
    labels: list[int]
    """The classes in turn; empty: all of them, or a model without."""
    guidance_scale: float
    seed: int
    """Image i starts from the noise of `seed` + i."""
    seconds: float
    """Time to draw the images."""
    features: str
    """Digest of the ruler's network; "inception" for that one, "none" where the ruler is for another shape."""


def measure(images: Tensor, teacher_images: Tensor, ruler: Ruler | None = None) -> dict[str, float | str | None]:
    """All that images say: the fields of `Score` from `fid` to `fid_to_teacher`, and the digest.

    A ruler for images of another shape measures nothing: then `mse_to_teacher` is all there is. One without reference
    images gives no `fid` and no `kid`.

    Args:
        images: uint8 (N, H, W) or (N, H, W, C), N ≥ 2.
        teacher_images: the teacher's images from the same noise, same shape.
        ruler: None: the released one, of 28×28 in one channel.

    Raises:
        InputError: the images and the teacher's differ in shape.
    """
    if images.shape != teacher_images.shape:
        ours, theirs = (tuple(pictures.shape) for pictures in (images, teacher_images))
        raise InputError(f"images of shape {ours} cannot be compared with the teacher's of shape {theirs}")
    ruler = ruler or load_ruler()
    difference = (images.float() - teacher_images.float()) / 127.5
    scores: dict[str, float | str | None] = {
        **dict.fromkeys(("fid", "kid", "inception_score")),
        "mse_to_teacher": difference.square().mean().item(),
        "fid_to_teacher": None,
        "features": "none",
    }
    if ruler.fits(images):
        features, logits = ruler.extract(images)
        scores["inception_score"] = inception_score(logits)
        scores["fid_to_teacher"] = fid_between(features, ruler.extract(teacher_images)[0])
        scores["features"] = ruler.digest
        if ruler.reference is not None:
            scores["fid"] = fid_to_reference(features, ruler.reference)
            scores["kid"] = kid(features, ruler.reference["kid_features"])
    return scores
