"""The rulers: the feature networks that scores are computed on, with the statistics of the images they compare with."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_mnist.data import load_images
from ddpm_mnist.lab import InputError, processes
from ddpm_mnist.lab.read import read_json
from quant.context import plain_torch

PRETRAINED = Path(__file__).parent / "pretrained"
# Of the ruler's second network, in the folder of the first.
SECOND_FOLDER = "second"
KID_REFERENCE_IMAGES = 10_000
# Of the Inception weights that torch-fidelity names, and of no others: it unpickles them.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class FeatureNetwork(nn.Module):
    """A classifier of digits, or of what else MNIST-shaped sets show: images uint8 (N, 28, 28) → features (N, 128) and
    logits (N, `num_classes`).

    The features are the inputs of its last layer, as FID takes them from Inception. FID grows with the square of
    their scale, which training leaves to chance, so it is set: over the set's training images their variance is 1
    in the mean over the 128 dimensions.
    """

    num_features = 128
    shape = (28, 28)

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.trunk = self.make_trunk()
        self.classifier = nn.Linear(self.num_features, num_classes)

    def make_trunk(self) -> nn.Sequential:
        """From images (N, 1, 28, 28) to features; it ends in a linear layer and ReLU, so that it can be scaled."""

        def block(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(c_out), nn.ReLU()]

        return nn.Sequential(
            *block(1, 32, 1), *block(32, 32, 2), *block(32, 64, 1), *block(64, 64, 2), nn.Flatten(),
            nn.Linear(64 * 7 * 7, self.num_features), nn.ReLU(),
        )  # fmt: skip

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Bring the mean variance of `features` (M, 128) to 1, and leave the logits as they are."""
        factor = features.var(0).mean().rsqrt()
        last = self.trunk[-2]
        assert isinstance(last, nn.Linear)
        last.weight.mul_(factor)
        last.bias.mul_(factor)
        self.classifier.weight.div_(factor)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(rearrange(images, "n h w -> n 1 h w").float() / 255)
        return features, self.classifier(F.dropout(features, 0.5, self.training))


class SecondNetwork(FeatureNetwork):
    """A second opinion, as unlike the first as a classifier of the same images can be: two convolutions of 5×5, max-
    pooling in the place of strides, GELU in that of ReLU, no normalisation. What fools one need not fool the other."""

    def make_trunk(self) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2), nn.MaxPool2d(2), nn.GELU(),
            nn.Conv2d(16, 32, 5, padding=2), nn.MaxPool2d(2), nn.GELU(), nn.Flatten(),
            nn.Linear(32 * 7 * 7, self.num_features), nn.ReLU(),
        )  # fmt: skip


class InceptionNetwork(nn.Module):
    """The Inception network of the papers' FID, torch-fidelity's copy of it: images uint8 (N, H, W) or (N, H, W, 3),
    which it scales to 299×299 → features (N, 2048) and logits (N, 1008).

    Raises:
        InputError: torch-fidelity is not installed, or its weights are not to be had.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as inception
        except ImportError as error:
            raise InputError("Inception needs torch-fidelity: pip install 'efficientdm[inception]'") from error
        url = inception.URL_INCEPTION_V3
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        try:
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(path), INCEPTION_SHA256)
            if (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != INCEPTION_SHA256:
                raise ValueError(f"{path} has SHA-256 {digest}, not {INCEPTION_SHA256}")
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"Inception's weights cannot be had; put {url} into {path.parent} ({reason})") from error
        self.extractor = inception.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        colour = images if images.dim() == 4 else images.unsqueeze(-1).expand(-1, -1, -1, 3)
        colour = colour.to(self.extractor.fc.weight.device)
        features, logits = self.extractor(rearrange(colour, "n h w c -> n c h w"))
        return features.cpu(), logits.cpu()


@torch.no_grad()
def extract(network: nn.Module, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Features float32 (N, D) and logits float32 (N, number of classes) of images uint8 (N, H, W) or (N, H, W, 3).

    Several processes share out the batches; each gets all features.
    """
    pairs = processes.share_out(network, images.split(batch_size))
    features, logits = zip(*pairs, strict=True)
    return torch.cat(features), torch.cat(logits)


@cache
def load_features(folder: Path = PRETRAINED, second: bool = False) -> FeatureNetwork:
    """The feature network in `folder` (by default the released one), a `SecondNetwork` if so; in evaluation mode."""
    weights = load_file(folder / "features.safetensors")
    kind, bias = SecondNetwork if second else FeatureNetwork, weights["classifier.bias"]
    with torch.device("meta"):  # takes no memory: only then is the number of classes known to be that of the weights
        kind(bias.numel()).load_state_dict(weights, assign=True)
    _refuse_infinite(weights)
    network = kind(bias.numel())
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def _refuse_infinite(tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise ValueError(f"{name} holds what is no finite number")


@cache
def load_reference(folder: Path = PRETRAINED) -> dict[str, Tensor]:
    """What the scores need of the training images, MNIST's 60,000 or those that the network in `folder` learned from.

    Keys: `sum` float64 (128,) and `outer_sum` float64 (128, 128), the sums of the features and of their outer
    products; `count` long (); `kid_features` float16 (10,000, 128), the features of the first 10,000 images, which KID,
    precision and recall compare with. The second network is for FID alone, and has none.
    """
    reference = load_file(folder / "reference.safetensors")
    _refuse_infinite(reference)
    width = FeatureNetwork.num_features
    shapes = {"sum": (width,), "outer_sum": (width, width), "count": ()}
    for name, shape in shapes.items():
        if reference[name].shape != shape or reference[name].dtype not in (torch.float64, torch.int64):
            raise ValueError(f"{name} of its statistics is {reference[name].dtype} {tuple(reference[name].shape)}")
    if not 2 <= reference["count"].item() <= 1 << 40:
        raise ValueError(f"its statistics are of {reference['count'].item()} images")
    if (kid := reference.get("kid_features")) is not None and (kid.dim() != 2 or kid.shape[1] != width or len(kid) < 2):
        raise ValueError(f"kid_features of its statistics is {tuple(kid.shape)}")
    return reference


@cache
def features_digest(folder: Path = PRETRAINED) -> str:
    """The first 12 digits of the SHA-256 of the feature network's file: scores compare only where it is equal."""
    return hashlib.sha256((folder / "features.safetensors").read_bytes()).hexdigest()[:12]


def reference_statistics(features: Tensor) -> dict[str, Tensor]:
    """The statistics that `load_reference` describes, from the features (M, 128) of the training images."""
    doubles = features.double()
    return {
        "sum": doubles.sum(0),
        "outer_sum": doubles.T @ doubles,
        "count": torch.tensor(len(features)),
        "kid_features": features[:KID_REFERENCE_IMAGES].half().contiguous(),
    }


@dataclass(frozen=True, eq=False)
class Ruler:
    """What scores are taken with: a network, and the images that it compares with."""

    network: nn.Module
    """Images uint8 (N, H, W) or (N, H, W, 3) → features (N, D) and logits (N, number of classes)."""
    reference: dict[str, Tensor] | None
    """The statistics of `load_reference`; None: the teacher's images are all that it compares with."""
    digest: str
    """Scores compare only where it is equal: `features_digest`, or "inception"."""
    data: str | None
    """Whose statistics: the data that the network learned from, or for "inception" the reference that was given."""
    shape: tuple[int, ...] | None
    """Of the images that it measures, (H, W); None: of any size, in one channel or three."""
    batch_size: int = 500
    """Images that the network sees at once."""
    second: "Ruler | None" = None
    """Another network that learned from the same data by itself, for a second FID; None: there is none."""
    floor: dict[str, Any] | None = None
    """What real images that no network learned from score: fields of `Score`, without those that need a teacher, with
    `num_images`. No model can be expected below their FID at that number of images. None: not known."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it measures images of this shape, (H, W) or (H, W, C)."""
        if self.shape is None:
            return len(shape) == 2 or shape[2] == 3
        return tuple(shape) == self.shape

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of images that it measures, as `extract` gives them."""
        return extract(self.network, images, self.batch_size)


@cache
@plain_torch()
def load_ruler(features: Path | str | None = None, reference: str | None = None) -> Ruler:
    """The ruler in a folder of `efficientdm features`, or the Inception network of torch-fidelity.

    Args:
        features: the folder, or "inception". None: the released ruler, MNIST's.
        reference: for "inception": images to compare with, as for `load_images`, of any size. A folder has its own.

    Raises:
        InputError: the folder holds no ruler or one whose parts do not belong together; the Inception network or the
            reference images are not to be had.
    """
    if str(features) == "inception":
        inception = InceptionNetwork().to(processes.state().device)
        ruler = Ruler(inception, None, "inception", reference, None, batch_size=50)
        if reference is None:
            return ruler
        images = load_images(reference)
        if len(images) < 2:
            raise InputError(f"{reference} holds one image: a covariance needs two")
        return replace(ruler, reference=reference_statistics(ruler.extract(images)[0]))
    if reference is not None:
        raise InputError(f'reference is for features "inception": {features or "the released ruler"} has its own')
    folder = PRETRAINED if features is None else Path(features)
    ruler, second = _load_folder(folder), None
    if (folder / SECOND_FOLDER).is_dir():
        second = _load_folder(folder / SECOND_FOLDER, second=True)
        if second.data != ruler.data:
            raise InputError(f"{folder}: the second network is of {second.data}, the first of {ruler.data}")
    try:
        floor = read_json(folder / "features.json").get("floor")
        if floor is not None and type(floor.get("num_images")) is not int:
            raise ValueError("its floor is of no number of images")
        for name, value in (floor or {}).items():
            if not isinstance(value, int | float | None) or not math.isfinite(value or 0):
                raise ValueError(f"its floor has no number as {name}")
    except FileNotFoundError:
        floor = None
    except (ValueError, AttributeError) as error:
        raise InputError(f"{folder / 'features.json'} is no record of a ruler: {error}") from error
    return replace(ruler, second=second, floor=floor)


def _load_folder(folder: Path, second: bool = False) -> Ruler:
    """The network in `folder` with its statistics; InputError where they do not belong together."""
    try:
        network, statistics, digest = load_features(folder, second), load_reference(folder), features_digest(folder)
        if not second and "kid_features" not in statistics:
            raise ValueError("its statistics have no kid_features")
        with safe_open(folder / "reference.safetensors", "pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # whatever safetensors and torch have to say of a broken file
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise InputError(f'{folder} holds no ruler; "efficientdm features" makes one ({reason})') from error
    if metadata.get("features") != digest:
        theirs = metadata.get("features")
        raise InputError(f"{folder}: the statistics are of the network {theirs}, not of {digest}")
    return Ruler(network, statistics, digest, metadata.get("data", "mnist"), network.shape)
