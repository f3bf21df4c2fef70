"""From images to scores: features → statistics → metric, in float64, and how far each score is to be trusted."""

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

# torchmetrics warns that these metrics keep every feature: some ten thousand times 128 numbers.
warnings.filterwarnings("ignore", message="Metric .* will save all extracted features in buffer")

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
# A score is worked out in one process, from all features: torchmetrics must not add up those of other processes.
LOCAL: dict[str, Any] = {"sync_on_compute": False}
# The k of precision and recall, as in their paper.
NEIGHBOURS = 3
# Of a matrix of distances or kernels, as much is held at once: 80 MB.
CELLS = 10_000_000
# Groups of consecutive images that are left out in turn, where there are at least two images for each.
NUM_GROUPS = 20
# Of Student's t with 19 degrees of freedom, for 95% between minus this and this.
QUANTILE = 2.093
# Beyond as many features an interval of FID takes minutes: there is none.
MAX_FEATURES = 512


def _halvings() -> list[tuple[list[int], list[int]]]:
    """The 20 groups in two halves of ten, in 19 ways that are balanced: any two groups stay together in 9 of them.

    They are the rows of Paley's Hadamard matrix, from the squares modulo 19 (McCarthy 1969, Pseudo-replication: half
    samples). Of a mean they give the very error that the jackknife gives.
    """
    prime = NUM_GROUPS - 1
    squares = {i * i % prime for i in range(1, prime)}
    halves = [[*(i for i in range(prime) if (i + shift) % prime in squares), prime] for shift in range(prime)]
    return [(half, [i for i in range(NUM_GROUPS) if i not in half]) for half in halves]


HALVINGS = _halvings()


class Estimate(NamedTuple):
    """A score with its standard error over other seeds; None: too few images to tell."""

    value: float
    error: float | None

    @property
    def interval(self) -> list[float] | None:
        """[low, high], 95% under a normal distribution; not cut off at 0 or 1."""
        return None if self.error is None else [self.value + sign * QUANTILE * self.error for sign in (-1, 1)]


def split(values: Tensor) -> tuple[Tensor, ...]:
    """`values` (N, …) in `NUM_GROUPS` consecutive groups; in one where they are too few."""
    return values.tensor_split(NUM_GROUPS) if len(values) >= 2 * NUM_GROUPS else (values,)


def jackknife(num_groups: int, without: Callable[[int], float]) -> float | None:
    """The standard error of a statistic, from its values `without` each of `num_groups` disjoint groups of images:
    √((k - 1) / k · Σ(θ_i - θ̄)²) (Tukey 1958; Efron and Tibshirani, An Introduction to the Bootstrap, eq. 11.5).

    FID's bias changes with the number of images, and precision's and recall's meaning with it. So the spread over
    small sets would be that of another score; and a bootstrap's sets hold images twice, which FID takes for less
    variance, KID for closeness and recall for a neighbour at distance 0. Here all sets are of one size, each image is
    in a set once, and what is left of the bias is the same for all and cancels.

    None: one group alone, which says nothing of a spread.
    """
    if num_groups < 2:
        return None
    values = torch.tensor([without(group) for group in range(num_groups)], dtype=torch.float64)
    return math.sqrt((num_groups - 1) / num_groups * (values - values.mean()).square().sum().item())


def mean(values: Tensor) -> Estimate:
    """The mean of one number per image, (N,)."""
    sums = torch.stack([part.double().sum() for part in split(values)])
    counts = [len(part) for part in split(values)]
    total = sums.sum()
    error = jackknife(len(counts), lambda i: ((total - sums[i]) / (len(values) - counts[i])).item())
    return Estimate((total / len(values)).item(), error)


def _blocks(rows: Tensor, width: int) -> tuple[Tensor, ...]:
    """`rows` in parts that may each meet `width` others at once."""
    return rows.split(max(1, CELLS // width))


class _Identity(nn.Module):
    """Hands torchmetrics features that are computed already, so that one pass serves every metric."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@dataclass(frozen=True)
class Sums:
    """What FID needs of N features (N, D), in float64."""

    sum: Tensor
    """Of the features, (D,)."""
    outer_sum: Tensor
    """Of their outer products, (D, D)."""
    count: Tensor
    """N, long ()."""

    @classmethod
    def of(cls, features: Tensor) -> "Sums":
        """Those of `features` (N, D)."""
        features = features.double()
        return cls(features.sum(0), features.T @ features, torch.tensor(len(features)))

    @classmethod
    def kept(cls, reference: dict[str, Tensor]) -> "Sums":
        """Those in what `load_reference` returns."""
        return cls(reference["sum"], reference["outer_sum"], reference["count"])

    def without(self, part: "Sums") -> "Sums":
        """Those of the images that are not in `part`."""
        return Sums(self.sum - part.sum, self.outer_sum - part.outer_sum, self.count - part.count)


def fid_of_sums(ours: Sums, theirs: Sums) -> float:
    """FID (arXiv 1706.08500, eq. 6) of two sets of at least two features each."""
    metric = FrechetInceptionDistance(_Identity(len(ours.sum)), **LOCAL)
    metric.update(ours.sum.unsqueeze(0), real=False)  # tells it the type; the sums are replaced
    metric.fake_features_sum, metric.fake_features_cov_sum = ours.sum, ours.outer_sum
    metric.real_features_sum, metric.real_features_cov_sum = theirs.sum, theirs.outer_sum
    metric.fake_features_num_samples, metric.real_features_num_samples = ours.count, theirs.count
    return max(metric.compute().item(), 0.0)  # rounding may leave a zero below itself


def fid_to_reference(features: Tensor, reference: dict[str, Tensor]) -> Estimate:
    """FID of features (N, D), N ≥ 2, against the sums of `load_reference`, which stay as they are."""
    ours, theirs, parts = Sums.of(features), Sums.kept(reference), split(features)
    if features.shape[1] > MAX_FEATURES:
        return Estimate(fid_of_sums(ours, theirs), None)
    error = jackknife(len(parts), lambda i: fid_of_sums(ours.without(Sums.of(parts[i])), theirs))
    return Estimate(fid_of_sums(ours, theirs), error)


def fid_between(features: Tensor, others: Tensor) -> Estimate:
    """FID of features (N, D) against others (N, D) of the same noise, N ≥ 2: what is left out is left out of both."""
    ours, theirs, parts, other_parts = Sums.of(features), Sums.of(others), split(features), split(others)
    if features.shape[1] > MAX_FEATURES:
        return Estimate(fid_of_sums(ours, theirs), None)

    def without(i: int) -> float:
        return fid_of_sums(ours.without(Sums.of(parts[i])), theirs.without(Sums.of(other_parts[i])))

    return Estimate(fid_of_sums(ours, theirs), jackknife(len(parts), without))


def kid(features: Tensor, others: Tensor) -> Estimate:
    """KID (arXiv 1801.01401): the unbiased squared MMD with the cubic kernel, mean over 100 random subsets.

    Its error has two parts: that of the MMD of all images, and what a mean over random subsets is off from it.
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
    """The jackknife's error of the unbiased squared MMD of features (N, D) to fixed others (M, D).

    Its sets' kernels are sums over pairs of groups, which are added up once. The term of the others alone is left
    away: it is the same in every set.
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
    """(x · y / D + 1)³ for each pair of rows."""
    kernel = (x @ y.T).div_(x.shape[1]).add_(1)
    return (kernel * kernel).mul_(kernel)


def inception_score(logits: Tensor) -> Estimate:
    """Inception score (arXiv 1606.03498) of a classifier's logits (N, K): 1 … K, mean of 10 splits.

    Its error is that of the score of all images at once.
    """
    metric = InceptionScore(_Identity(logits.shape[1]), splits=min(10, len(logits)), **LOCAL)
    metric.update(logits.double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        value, _ = metric.compute()
    p, log_p = logits.double().softmax(1), logits.double().log_softmax(1)
    # Of each image its negative entropy and its probabilities: the score is a function of their means.
    images = torch.cat([(p * log_p).sum(1, keepdim=True), p], dim=1)
    sums, counts = torch.stack([part.sum(0) for part in split(images)]), [len(part) for part in split(images)]

    def without(i: int) -> float:
        means = (sums.sum(0) - sums[i]) / (len(images) - counts[i])
        return (means[0] - torch.xlogy(means[1:], means[1:]).sum()).exp().item()

    return Estimate(value.item(), jackknife(len(counts), without))


def precision_recall(features: Tensor, others: Tensor, radii: Tensor | None = None) -> tuple[Estimate, Estimate]:
    """Precision and recall (arXiv 1904.06991, eq. 1 and 2, k = 3) of features (N, D) against others (M, D); N, M > 3.

    Precision: the share of the features that lie in a ball around one of the others, as far as its third neighbour.
    Recall: the share of the others that lie in such a ball around one of the features. Both depend on the numbers.

    The others are fixed and so are their balls: precision is a mean over the features. Recall is far from one, for what
    an image adds depends on its neighbours: the jackknife takes its error for 1.5 to 2.4 times what it is (of Gaussians
    and of MNIST's training images). So recall is taken of both halves of the images, which lie apart, and half their
    difference is its error, in the mean square over `HALVINGS`.

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
    """The distance of each feature (N, D) to its third neighbour: (1 + number of subsets, N).

    Row 0 is among all features, which `groups` are in their order (None: one group). The rows that follow are among the
    groups of each subset alone; the other features have radius -1 there, that of a ball that holds nothing.
    """
    groups, width = groups or (features,), NEIGHBOURS + 1
    sizes = torch.tensor([len(group) for group in groups])
    blocks = []
    for block in _blocks(features, len(features)):
        # Of each group as many as could be among the nearest: the feature itself, at distance 0, and its neighbours.
        parts = torch.cdist(block, features).split(sizes.tolist(), dim=1)
        blocks.append(torch.stack([_smallest(part) for part in parts], dim=1))
    nearest, group = torch.cat(blocks), torch.arange(len(groups)).repeat_interleave(sizes)
    rows = [nearest.flatten(1).kthvalue(width).values]
    for subset in subsets:
        row = nearest[:, subset].flatten(1).kthvalue(width).values
        rows.append(row.where(torch.isin(group, torch.tensor(subset)), -1))
    return torch.stack(rows)


def _smallest(distances: Tensor) -> Tensor:
    """The four smallest of each row (B, n), filled up with infinity where it has fewer."""
    width = NEIGHBOURS + 1
    kept = distances.topk(min(width, distances.shape[1]), largest=False).values
    return nn.functional.pad(kept, (0, width - kept.shape[1]), value=math.inf)


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Which of points (N, D) lie in a ball around one of centres (M, D), for each row of radii (R, M): bool (R, N)."""
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
    """One model's scores; every field travels into the JSON.

    `<name>_interval`: [low, high], which holds the mean score over all seeds at 95%, of as many images of the same
    model: see `jackknife` and `precision_recall`. The ruler and its images are fixed. None for fewer than 40 images,
    and of FID for more than 512 features. A share of 1 or 0 has one of no width: what never happened has no spread.
    """

    model: str
    weight_bits: float
    """32 for a model in full precision; 1.58 is the logarithm of three levels."""
    act_bits: int
    runtime: str
    """"float" for a model in full precision; a student runs "integer" or "simulated"."""
    fid: float | None
    """FID against the ruler's images, by default MNIST's 60,000 training images. Its bias depends on `num_images`:
    compare equal counts only. None, here and below: the ruler does not tell, see `measure`."""
    fid_interval: list[float] | None
    fid_second: float | None
    """The same by the ruler's second network: what one network takes for better and the other does not is no better."""
    fid_second_interval: list[float] | None
    kid: float | None
    """KID against the first 10,000 of them; unbiased."""
    kid_interval: list[float] | None
    precision: float | None
    """Share of the images that lie where those 10,000 do, in the ruler's features: are they good?"""
    precision_interval: list[float] | None
    recall: float | None
    """Share of those 10,000 that lie where the images do: are all there? Compare equal counts only."""
    recall_interval: list[float] | None
    inception_score: float | None
    """Inception score of the ruler's classifier."""
    inception_score_interval: list[float] | None
    same_digit: float | None
    """Share of images in which the ruler's classifier sees what it sees in the teacher's image of the same noise."""
    same_digit_interval: list[float] | None
    mse_to_teacher: float
    """Mean over images and pixels of the squared difference from the teacher's image of the same noise, in [-1, 1]."""
    mse_to_teacher_interval: list[float] | None
    fid_to_teacher: float | None
    """FID against the teacher's images of the same noise instead."""
    fid_to_teacher_interval: list[float] | None
    num_images: int
    num_steps: int
    solver: str
    eps_scale: float
    """What ε was multiplied with in sampling."""
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
    features_second: str
    """Digest of its second network; "none" where there is none."""
    classifier_accuracy: float | None = None
    """What the images are worth as data: the accuracy on real test images of a classifier that learned from them alone,
    labelled by the ruler's. None: not asked for."""
    classifier_accuracy_of_real: float | None = None
    """That of the same classifier after as many real images with their own labels."""


def check_score(score: dict[str, Any]) -> None:
    """ValueError or KeyError unless `score`, which was read from a file, has the fields of `Score` and their types."""
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


# What images score by themselves, and what they score beside the teacher's.
OF_IMAGES = ("fid", "fid_second", "kid", "precision", "recall", "inception_score")
TO_TEACHER = ("same_digit", "mse_to_teacher", "fid_to_teacher")


@plain_torch()
def measure(images: Tensor, teacher_images: Tensor, ruler: Ruler | None = None) -> dict[str, Any]:
    """All that images say: the fields of `Score` from `fid` to `fid_to_teacher_interval`, and the digests.

    A ruler for images of another shape measures nothing: then `mse_to_teacher` is all there is. One without reference
    images gives what needs none, and precision and recall need four images. Several processes share out the batches
    for the features, then the scores.

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
    """What images uint8 (N, H, W) or (N, H, W, C) that the ruler fits score by themselves: some of `OF_IMAGES`."""
    features, logits = ruler.extract(images)
    return {name: x.value for name, x in _together(_of_features(images, features, logits, ruler)).items()}


# Some of the scores, by their names.
Part = Callable[[], dict[str, Estimate]]


def _together(parts: Sequence[Part]) -> dict[str, Estimate]:
    return {name: x for part in share_out(lambda part: part(), parts) for name, x in part.items()}


def _of_features(images: Tensor, features: Tensor, logits: Tensor, ruler: Ruler) -> list[Part]:
    """What images score by themselves, the longest work first."""
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
