"""Compute scores of images (features → statistics → metric, in float64) with confidence intervals."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from ddpm_mnist.lab import InputError
from ddpm_mnist.lab.processes import share_out
from eval.features import Ruler, load_ruler
from quant.context import plain_torch

# torchmetrics warns that these metrics keep all features, here only some 10,000 × 128 numbers.
warnings.filterwarnings("ignore", message="Metric .* will save all extracted features in buffer")

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
# Each score is computed in one process from all features: torchmetrics must not gather those of other processes.
LOCAL: dict[str, Any] = {"sync_on_compute": False}
# The k of precision and recall, as in their paper.
NEIGHBOURS = 3
# Maximum number of entries of a distance or kernel matrix in memory at once: 80 MB.
CELLS = 10_000_000
# Number of groups of consecutive images for the jackknife, if there are at least two images per group.
NUM_GROUPS = 20
# 97.5% quantile of Student's t with 19 degrees of freedom, for 95% intervals.
QUANTILE = 2.093
# With more features, FID gets no interval, which would take minutes.
MAX_FEATURES = 512


def _halvings() -> list[tuple[list[int], list[int]]]:
    """Return 19 balanced splits of the 20 groups into halves of ten: any two groups are in the same half in 9 of them.

    They are the rows of Paley's Hadamard matrix, from the squares modulo 19 (McCarthy 1969, Pseudo-replication: half
    samples). For a mean they give exactly the jackknife's error.
    """
    prime = NUM_GROUPS - 1
    squares = {i * i % prime for i in range(1, prime)}
    halves = [[*(i for i in range(prime) if (i + shift) % prime in squares), prime] for shift in range(prime)]
    return [(half, [i for i in range(NUM_GROUPS) if i not in half]) for half in halves]


HALVINGS = _halvings()


class Estimate(NamedTuple):
    """A score and its standard error over seeds; the error is None if there are too few images."""

    value: float
    error: float | None

    @property
    def interval(self) -> list[float] | None:
        """The 95% confidence interval [low, high] for a normally distributed score, not clipped to [0, 1]."""
        return None if self.error is None else [self.value + sign * QUANTILE * self.error for sign in (-1, 1)]


def split(values: Tensor) -> tuple[Tensor, ...]:
    """Split `values` (N, …) into `NUM_GROUPS` consecutive groups, or a single one if there are too few."""
    return values.tensor_split(NUM_GROUPS) if len(values) >= 2 * NUM_GROUPS else (values,)


def jackknife(num_groups: int, without: Callable[[int], float]) -> float | None:
    """Return the jackknife standard error of a statistic over k = `num_groups` disjoint groups of images:
    √((k - 1) / k · Σ(θ_i - θ̄)²) (Tukey 1958; Efron and Tibshirani, An Introduction to the Bootstrap, eq. 11.5).

    The bias of FID, and the meaning of precision and recall, depend on the number of images, so the spread over small
    subsets would belong to another score. Bootstrap samples contain duplicates, which lower the variance in FID, raise
    the similarity in KID, and are neighbours at distance 0 in recall. The jackknife's subsets have equal sizes and no
    duplicates, and their common bias cancels.

    Args:
        without: returns θ_i, the statistic without group i.

    Returns:
        The standard error, or None for a single group.
    """
    if num_groups < 2:
        return None
    values = torch.tensor([without(group) for group in range(num_groups)], dtype=torch.float64)
    return math.sqrt((num_groups - 1) / num_groups * (values - values.mean()).square().sum().item())


def mean(values: Tensor) -> Estimate:
    """Estimate the mean of one number per image, (N,)."""
    sums = torch.stack([part.double().sum() for part in split(values)])
    counts = [len(part) for part in split(values)]
    total = sums.sum()
    error = jackknife(len(counts), lambda i: ((total - sums[i]) / (len(values) - counts[i])).item())
    return Estimate((total / len(values)).item(), error)


def _blocks(rows: Tensor, width: int) -> tuple[Tensor, ...]:
    """Split `rows` into blocks whose matrices with `width` other rows have at most `CELLS` entries."""
    return rows.split(max(1, CELLS // width))


class _Identity(nn.Module):
    """Passes precomputed features to torchmetrics, so that they are computed once for all metrics."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@dataclass(frozen=True)
class Sums:
    """The statistics of features (N, D) for FID, in float64."""

    sum: Tensor
    """Sum of the features, (D,)."""
    outer_sum: Tensor
    """Sum of their outer products, (D, D)."""
    count: Tensor
    """N, long ()."""

    @classmethod
    def of(cls, features: Tensor) -> "Sums":
        """Compute the sums of `features` (N, D)."""
        features = features.double()
        return cls(features.sum(0), features.T @ features, torch.tensor(len(features)))

    @classmethod
    def kept(cls, reference: dict[str, Tensor]) -> "Sums":
        """Return the sums in the result of `load_reference`."""
        return cls(reference["sum"], reference["outer_sum"], reference["count"])

    def without(self, part: "Sums") -> "Sums":
        """Return the sums without the images in `part`."""
        return Sums(self.sum - part.sum, self.outer_sum - part.outer_sum, self.count - part.count)


def fid_of_sums(ours: Sums, theirs: Sums) -> float:
    """Return the FID (arXiv 1706.08500, eq. 6) between two sets of at least two features each."""
    metric = FrechetInceptionDistance(_Identity(len(ours.sum)), **LOCAL)
    metric.update(ours.sum.unsqueeze(0), real=False)  # sets the dtype; the sums are replaced below
    metric.fake_features_sum, metric.fake_features_cov_sum = ours.sum, ours.outer_sum
    metric.real_features_sum, metric.real_features_cov_sum = theirs.sum, theirs.outer_sum
    metric.fake_features_num_samples, metric.real_features_num_samples = ours.count, theirs.count
    return max(metric.compute().item(), 0.0)  # rounding can make it slightly negative


def fid_to_reference(features: Tensor, reference: dict[str, Tensor]) -> Estimate:
    """Estimate the FID of features (N, D), N ≥ 2, to the sums of `load_reference`, which are taken as fixed."""
    ours, theirs, parts = Sums.of(features), Sums.kept(reference), split(features)
    if features.shape[1] > MAX_FEATURES:
        return Estimate(fid_of_sums(ours, theirs), None)
    error = jackknife(len(parts), lambda i: fid_of_sums(ours.without(Sums.of(parts[i])), theirs))
    return Estimate(fid_of_sums(ours, theirs), error)


def fid_between(features: Tensor, others: Tensor) -> Estimate:
    """Estimate the FID between features (N, D) and others (N, D) from the same noise, N ≥ 2; the jackknife leaves out
    the same groups of both."""
    ours, theirs, parts, other_parts = Sums.of(features), Sums.of(others), split(features), split(others)
    if features.shape[1] > MAX_FEATURES:
        return Estimate(fid_of_sums(ours, theirs), None)

    def without(i: int) -> float:
        return fid_of_sums(ours.without(Sums.of(parts[i])), theirs.without(Sums.of(other_parts[i])))

    return Estimate(fid_of_sums(ours, theirs), jackknife(len(parts), without))


def kid(features: Tensor, others: Tensor) -> Estimate:
    """Estimate the KID (arXiv 1801.01401): unbiased squared MMD with the cubic kernel, mean over 100 random subsets.

    The error combines that of the MMD of all images and that of the mean over random subsets.
    """
    size = min(KID_SUBSET_SIZE, len(features), len(others))
    identity = _Identity(features.shape[1])
    metric = KernelInceptionDistance(identity, subsets=KID_SUBSETS, subset_size=size, **LOCAL)
    metric.update(others.double(), real=True)
    metric.update(features.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        value, spread = metric.compute()
    error = _mmd_error(features.double(), others.double())
    if error is not None:
        error = math.hypot(error, spread.item() / math.sqrt(KID_SUBSETS))
    return Estimate(value.item(), error)


def _mmd_error(features: Tensor, others: Tensor) -> float | None:
    """Return the jackknife error of the unbiased squared MMD between features (N, D) and fixed others (M, D).

    The kernel sums of all subsets follow from the sums over pairs of groups, which are computed once. The term that
    depends on the others only is omitted, because it is the same for every subset.
    """
    parts = split(features)
    kernel_sums = features.new_zeros(len(parts), len(parts))
    diagonal, towards_others = features.new_zeros(len(parts)), features.new_zeros(len(parts))
    for i, part in enumerate(parts):
        diagonal[i] = (part.square().sum(1) / part.shape[1] + 1).pow(3).sum()
        for block in _blocks(part, len(features)):
            kernel_sums[i] += torch.stack([columns.sum() for columns in split(_cubic(block, features).sum(0))])
        for block in _blocks(part, len(others)):
            towards_others[i] += _cubic(block, others).sum()

    def without(i: int) -> float:
        count = len(features) - len(parts[i])
        pairs = kernel_sums.sum() - 2 * kernel_sums[i].sum() + kernel_sums[i, i] - (diagonal.sum() - diagonal[i])
        cross = towards_others.sum() - towards_others[i]
        return (pairs / (count * (count - 1)) - 2 * cross / (count * len(others))).item()

    return jackknife(len(parts), without)


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    """Return (x · y / D + 1)³ for each pair of rows of x and y."""
    kernel = (x @ y.T).div_(x.shape[1]).add_(1)
    return (kernel * kernel).mul_(kernel)


def inception_score(logits: Tensor) -> Estimate:
    """Estimate the Inception score (arXiv 1606.03498), 1 … K, of a classifier's logits (N, K): the mean of 10 splits.

    The error is that of the score of all images without splits.
    """
    metric = InceptionScore(_Identity(logits.shape[1]), splits=min(10, len(logits)), **LOCAL)
    metric.update(logits.double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        value, _ = metric.compute()
    p, log_p = logits.double().softmax(1), logits.double().log_softmax(1)
    # The score is a function of the means of each image's negative entropy and probabilities.
    images = torch.cat([(p * log_p).sum(1, keepdim=True), p], dim=1)
    sums, counts = torch.stack([part.sum(0) for part in split(images)]), [len(part) for part in split(images)]

    def without(i: int) -> float:
        means = (sums.sum(0) - sums[i]) / (len(images) - counts[i])
        return (means[0] - torch.xlogy(means[1:], means[1:]).sum()).exp().item()

    return Estimate(value.item(), jackknife(len(counts), without))


def precision_recall(features: Tensor, others: Tensor, radii: Tensor | None = None) -> tuple[Estimate, Estimate]:
    """Estimate precision and recall (arXiv 1904.06991, eq. 1 and 2, k = 3) of features (N, D) against others (M, D).

    Precision is the share of the features that lie in a ball around one of the others, whose radius is the distance to
    its third neighbour. Recall is the share of the others that lie in such a ball around one of the features. Both
    depend on N and M, which must be above 3.

    As the others and their balls are fixed, precision is a mean over the features. Recall is not, because the effect of
    an image depends on its neighbours: the jackknife overestimates its error by a factor of 1.5 to 2.4 (for Gaussians
    and MNIST's training images). So recall is computed for both halves of the images, which are disjoint, and its error
    is half their difference, as the root mean square over `HALVINGS`.

    Args:
        radii: `neighbour_radii` of the others, (1, M); None: computed here.
    """
    features, others = features.double(), others.double()
    radii = neighbour_radii(others) if radii is None else radii
    precision = mean(_covered(features, others, radii)[0])
    groups = split(features)
    halves = [half for halving in HALVINGS for half in halving] if len(groups) > 1 else []
    shares = _covered(others, features, neighbour_radii(features, groups, halves)).double().mean(1)
    differences = shares[1::2] - shares[2::2]
    error = differences.square().mean().sqrt().item() / 2 if halves else None
    return precision, Estimate(shares[0].item(), error)


def neighbour_radii(
    features: Tensor, groups: Sequence[Tensor] | None = None, subsets: Sequence[Sequence[int]] = ()
) -> Tensor:
    """Return the distance of each feature (N, D) to its third neighbour: (1 + number of subsets, N).

    Row 0 is for neighbours among all features. Each further row is for one subset of groups; features outside the
    subset have radius -1 there, so that their balls are empty.

    Args:
        groups: the features, split into consecutive groups; None: one group.
        subsets: indices into `groups`.
    """
    groups, width = groups or (features,), NEIGHBOURS + 1
    sizes = torch.tensor([len(group) for group in groups])
    blocks = []
    for block in _blocks(features, len(features)):
        # Per group, keep the four nearest: the feature itself, at distance 0, and three neighbours.
        parts = torch.cdist(block, features).split(sizes.tolist(), dim=1)
        blocks.append(torch.stack([_smallest(part) for part in parts], dim=1))
    nearest, group = torch.cat(blocks), torch.arange(len(groups)).repeat_interleave(sizes)
    rows = [nearest.flatten(1).kthvalue(width).values]
    for subset in subsets:
        row = nearest[:, subset].flatten(1).kthvalue(width).values
        rows.append(row.where(torch.isin(group, torch.tensor(subset)), -1))
    return torch.stack(rows)


def _smallest(distances: Tensor) -> Tensor:
    """Return the four smallest values of each row (B, n), padded with infinity if n < 4."""
    width = NEIGHBOURS + 1
    kept = distances.topk(min(width, distances.shape[1]), largest=False).values
    return nn.functional.pad(kept, (0, width - kept.shape[1]), value=math.inf)


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Return, for each row of radii (R, M), which of points (N, D) lie in a ball around one of centres (M, D): bool
    (R, N)."""
    blocks = []
    for block in _blocks(points, len(centres)):
        distances = torch.cdist(block, centres)
        blocks.append(torch.stack([(distances <= row).any(1) for row in radii]))
    return torch.cat(blocks, dim=1)


@lru_cache(maxsize=2)
def _reference_radii(ruler: Ruler) -> Tensor:
    assert ruler.reference is not None
    features = ruler.reference["kid_features"].double()
    return neighbour_radii(features)


@dataclass
class Score:
    """The scores of one model; all fields are written to JSON.

    `<name>_interval` is the 95% confidence interval [low, high] of the mean score over seeds, for the same model and
    number of images, with the ruler and its images fixed (see `jackknife` and `precision_recall`). It is None for fewer
    than 40 images, and for FID with more than 512 features. Shares of exactly 0 or 1 have an interval of width 0.
    """

    model: str
    weight_bits: float
    """32 for a model in full precision; 1.58 is log₂ 3, for three levels."""
    act_bits: int
    runtime: str
    """"float" for a model in full precision; "integer" or "simulated" for a student."""
    fid: float | None
    """FID to the ruler's reference images, by default MNIST's 60,000 training images. Its bias depends on `num_images`:
    compare equal numbers only. Here and below, None means that the ruler cannot compute it (see `measure`)."""
    fid_interval: list[float] | None
    fid_second: float | None
    """FID of the ruler's second network. An improvement counts only if both networks show it."""
    fid_second_interval: list[float] | None
    kid: float | None
    """KID to the first 10,000 reference images; unbiased."""
    kid_interval: list[float] | None
    precision: float | None
    """Share of the images that lie near those 10,000 in feature space: a measure of quality (`precision_recall`)."""
    precision_interval: list[float] | None
    recall: float | None
    """Share of those 10,000 that lie near the images: a measure of diversity. Compare equal `num_images` only."""
    recall_interval: list[float] | None
    inception_score: float | None
    """Inception score with the ruler's classifier."""
    inception_score_interval: list[float] | None
    same_digit: float | None
    """Share of images that the ruler's classifier assigns to the same class as the teacher's image from the same
    noise."""
    same_digit_interval: list[float] | None
    mse_to_teacher: float
    """Mean squared difference from the teacher's image from the same noise, with pixels in [-1, 1]."""
    mse_to_teacher_interval: list[float] | None
    fid_to_teacher: float | None
    """FID to the teacher's images from the same noise."""
    fid_to_teacher_interval: list[float] | None
    num_images: int
    num_steps: int
    solver: str
    eps_scale: float
    """Factor on ε in sampling."""
    eta: float
    labels: list[int]
    """The classes, used in turn; empty: all classes, or a model without classes."""
    guidance_scale: float
    seed: int
    """Image i starts from the noise of `seed` + i."""
    seconds: float
    """Time to sample the images."""
    features: str
    """Digest of the ruler's network; "inception" for Inception, "none" if the ruler does not support the shape."""
    features_second: str
    """Digest of the ruler's second network; "none" if it has none."""
    classifier_accuracy: float | None = None
    """Accuracy on real test images of a classifier that was trained on the images only, with labels from the ruler's
    classifier. None: not computed."""
    classifier_accuracy_of_real: float | None = None
    """Accuracy of the same classifier, trained on as many real images with their true labels."""


def check_score(score: dict[str, Any]) -> None:
    """Raise ValueError unless `score`, read from a file, has the fields of `Score` with their types."""
    for field in fields(Score):
        value: Any = score.get(field.name, field.default)
        if value is MISSING:
            raise ValueError(f"it has no {field.name}")
        many, kinds = field.name.endswith("_interval") or field.name == "labels", str(field.type)
        words = "str" in kinds
        for part in (value or []) if many and isinstance(value, list | None) else (value,):
            number = isinstance(part, int | float) and not isinstance(part, bool) and math.isfinite(part)
            absent = part is None and "None" in kinds and not many
            if not (absent or (isinstance(part, str) if words else number)):
                raise ValueError(f"its {field.name} is {value!r}")
        if field.name.endswith("_interval") and value is not None and len(value) != 2:
            raise ValueError(f"its {field.name} is {value!r}")


# Scores that need no teacher, and scores that compare with the teacher's images.
OF_IMAGES = ("fid", "fid_second", "kid", "precision", "recall", "inception_score")
TO_TEACHER = ("same_digit", "mse_to_teacher", "fid_to_teacher")


@plain_torch()
def measure(images: Tensor, teacher_images: Tensor, ruler: Ruler | None = None) -> dict[str, Any]:
    """Compute the fields of `Score` from `fid` to `fid_to_teacher_interval`, and the digests.

    Scores that cannot be computed are None: all but `mse_to_teacher` if the ruler does not support the images' shape;
    those that need reference images if it has none; precision and recall for fewer than four images. The batches for
    the features, and then the scores, are distributed over the processes.

    Args:
        images: uint8 (N, H, W) or (N, H, W, C), N ≥ 2.
        teacher_images: the teacher's images from the same noise, same shape.
        ruler: None: the released one, for 28×28 pixels with one channel.

    Raises:
        InputError: the images and the teacher's differ in shape.
    """
    if images.shape != teacher_images.shape:
        ours, theirs = (tuple(pictures.shape) for pictures in (images, teacher_images))
        raise InputError(f"images of shape {ours} cannot be compared with the teacher's of shape {theirs}")
    ruler = ruler or load_ruler()
    difference = (images.float() - teacher_images.float()) / 127.5
    estimates: dict[str, Estimate] = {"mse_to_teacher": mean(difference.square().flatten(1).mean(1))}
    digests = {"features": "none", "features_second": "none"}
    if ruler.fits(images.shape[1:]):
        features, logits = ruler.extract(images)
        teacher_features, teacher_logits = ruler.extract(teacher_images)
        parts = _of_features(images, features, logits, ruler)
        parts.append(lambda: {"same_digit": mean(logits.argmax(1) == teacher_logits.argmax(1))})
        parts.append(lambda: {"fid_to_teacher": fid_between(features, teacher_features)})
        estimates |= _together(parts)
        digests = {"features": ruler.digest, "features_second": ruler.second.digest if ruler.second else "none"}
    scores: dict[str, Any] = {}
    for name in (*OF_IMAGES, *TO_TEACHER):
        estimate = estimates.get(name)
        scores |= {name: estimate and estimate.value, f"{name}_interval": estimate and estimate.interval}
    return scores | digests


def measure_alone(images: Tensor, ruler: Ruler) -> dict[str, float]:
    """Compute the scores `OF_IMAGES` that the ruler supports, of images uint8 (N, H, W) or (N, H, W, C) of its
    shape."""
    features, logits = ruler.extract(images)
    return {name: x.value for name, x in _together(_of_features(images, features, logits, ruler)).items()}


# Computes some of the scores, by name.
Part = Callable[[], dict[str, Estimate]]


def _together(parts: Sequence[Part]) -> dict[str, Estimate]:
    return {name: x for part in share_out(lambda part: part(), parts) for name, x in part.items()}


def _of_features(images: Tensor, features: Tensor, logits: Tensor, ruler: Ruler) -> list[Part]:
    """Return the computations of the scores that need no teacher, the longest first."""
    parts: list[Part] = []
    if (reference := ruler.reference) is not None:
        others = reference["kid_features"]
        if min(len(features), len(others)) > NEIGHBOURS:
            names = "precision", "recall"
            parts.append(
                lambda: dict(zip(names, precision_recall(features, others, _reference_radii(ruler)), strict=True))
            )
        parts.append(lambda: {"kid": kid(features, others)})
        parts.append(lambda: {"fid": fid_to_reference(features, reference)})
    if ruler.second is not None and (second := ruler.second.reference) is not None:
        second_features, _ = ruler.second.extract(images)
        parts.append(lambda: {"fid_second": fid_to_reference(second_features, second)})
    parts.append(lambda: {"inception_score": inception_score(logits)})
    return parts
