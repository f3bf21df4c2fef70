"""Rulers: feature networks to compute scores with, and the statistics of their reference images."""

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
# Subfolder of a ruler's second network.
SECOND_FOLDER = "second"
KID_REFERENCE_IMAGES = 10_000
# SHA-256 of the Inception weights of torch-fidelity. Others are refused, because it unpickles the file.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class FeatureNetwork(nn.Module):
    """A classifier for MNIST and similar data sets: images uint8 (N, 28, 28) → features (N, 128) and logits
    (N, `num_classes`).

    As in FID with Inception, the features are the inputs of the last layer. FID is proportional to the square of their
    scale, which training does not determine. So `standardise` sets it: over the training images the variance is 1 in
    the mean over the 128 dimensions.
    """

    num_features = 128
    shape = (28, 28)

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.trunk = self.make_trunk()
        self.classifier = nn.Linear(self.num_features, num_classes)

    def make_trunk(self) -> nn.Sequential:
        """Return the layers from images (N, 1, 28, 28) to features; the last are linear and ReLU, for
        `standardise`."""

        def block(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(c_out), nn.ReLU()]

        return nn.Sequential(
            *block(1, 32, 1), *block(32, 32, 2), *block(32, 64, 1), *block(64, 64, 2), nn.Flatten(),
            nn.Linear(64 * 7 * 7, self.num_features), nn.ReLU(),
        )  # fmt: skip

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Rescale the last layers so that the mean variance of `features` (M, 128) becomes 1; logits do not change."""
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
    """A classifier with a different architecture, as a check of the first: 5×5 convolutions, max-pooling instead of
    strides, GELU instead of ReLU, and no normalisation. Artefacts that one network misses may be visible to the
    other."""

    def make_trunk(self) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2), nn.MaxPool2d(2), nn.GELU(),
            nn.Conv2d(16, 32, 5, padding=2), nn.MaxPool2d(2), nn.GELU(), nn.Flatten(),
            nn.Linear(32 * 7 * 7, self.num_features), nn.ReLU(),
        )  # fmt: skip


class InceptionNetwork(nn.Module):
    """The standard Inception network of FID, from torch-fidelity: images uint8 (N, H, W) or (N, H, W, 3), resized to
    299×299 → features (N, 2048) and logits (N, 1008).

    Raises:
        InputError: torch-fidelity is not installed, or its weights cannot be downloaded.
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
            raise InputError(
                f"Inception's weights are not available; put {url} into {path.parent} ({reason})"
            ) from error
        self.extractor = inception.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        colour = images if images.dim() == 4 else images.unsqueeze(-1).expand(-1, -1, -1, 3)
        colour = colour.to(self.extractor.fc.weight.device)
        features, logits = self.extractor(rearrange(colour, "n h w c -> n c h w"))
        return features.cpu(), logits.cpu()


@torch.no_grad()
def extract(network: nn.Module, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Compute features float32 (N, D) and logits float32 (N, K) of images uint8 (N, H, W) or (N, H, W, 3).

    The batches are distributed over the processes; each gets all features.
    """
    pairs = processes.share_out(network, images.split(batch_size))
    features, logits = zip(*pairs, strict=True)
    return torch.cat(features), torch.cat(logits)


@cache
def load_features(folder: Path = PRETRAINED, second: bool = False) -> FeatureNetwork:
    """Load the feature network in `folder`, by default the released one, in evaluation mode.

    Args:
        second: whether it is a `SecondNetwork`.
    """
    weights = load_file(folder / "features.safetensors")
    kind, bias = SecondNetwork if second else FeatureNetwork, weights["classifier.bias"]
    with torch.device("meta"):  # checks the shapes before memory for the file's number of classes is allocated
        kind(bias.numel()).load_state_dict(weights, assign=True)
    _refuse_infinite(weights)
    network = kind(bias.numel())
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def _refuse_infinite(tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise ValueError(f"{name} contains a value that is not finite")


@cache
def load_reference(folder: Path = PRETRAINED) -> dict[str, Tensor]:
    """Load the statistics of the reference images: the training images of the network in `folder`.

    Keys: `sum` float64 (128,) and `outer_sum` float64 (128, 128), the sums of the features and of their outer
    products; `count` long (); `kid_features` float16 (10,000, 128), the features of the first 10,000 images, for KID,
    precision and recall. The second network is used for FID only and has no `kid_features`.
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
    """Return the first 12 hex digits of the SHA-256 of the feature network's file. Scores are comparable only if these
    are equal."""
    return hashlib.sha256((folder / "features.safetensors").read_bytes()).hexdigest()[:12]


def reference_statistics(features: Tensor) -> dict[str, Tensor]:
    """Compute the statistics of `load_reference` from the features (M, D) of the reference images."""
    doubles = features.double()
    return {
        "sum": doubles.sum(0),
        "outer_sum": doubles.T @ doubles,
        "count": torch.tensor(len(features)),
        "kid_features": features[:KID_REFERENCE_IMAGES].half().contiguous(),
    }


@dataclass(frozen=True, eq=False)
class Ruler:
    """A feature network with the statistics of its reference images."""

    network: nn.Module
    """Images uint8 (N, H, W) or (N, H, W, 3) → features (N, D) and logits (N, number of classes)."""
    reference: dict[str, Tensor] | None
    """The statistics of `load_reference`; None: images can only be compared with the teacher's."""
    digest: str
    """`features_digest`, or "inception". Scores are comparable only if it is equal."""
    data: str | None
    """The reference data: the training data of the network, or the argument `reference` for "inception"."""
    shape: tuple[int, ...] | None
    """Shape (H, W) of the images that it supports; None: any size, with one or three channels."""
    batch_size: int = 500
    """Images per batch of the network."""
    second: "Ruler | None" = None
    """Another network, trained independently on the same data, for a second FID; None: there is none."""
    floor: dict[str, Any] | None = None
    """Scores of real images that were not used in training: `num_images` and the fields of `Score` that need no
    teacher. No model is expected to have a lower FID at that number of images. None: unknown."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether it supports images of this shape, (H, W) or (H, W, C)."""
        if self.shape is None:
            return len(shape) == 2 or shape[2] == 3
        return tuple(shape) == self.shape

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits of images of a supported shape (see the function `extract`)."""
        return extract(self.network, images, self.batch_size)


@cache
@plain_torch()
def load_ruler(features: Path | str | None = None, reference: str | None = None) -> Ruler:
    """Load a ruler from a folder of `efficientdm features`, or torch-fidelity's Inception network.

    Args:
        features: the folder, or "inception". None: the released ruler, for MNIST.
        reference: reference images for "inception", as for `load_images`, of any size. Folders have their own.

    Raises:
        InputError: the folder contains no ruler, or files of different ones; or the Inception network or the reference
            images cannot be loaded.
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
        raise InputError(f"{folder / 'features.json'} is not the record of a ruler: {error}") from error
    return replace(ruler, second=second, floor=floor)


def _load_folder(folder: Path, second: bool = False) -> Ruler:
    """Load the network in `folder` with its statistics; raise InputError if they belong to different networks."""
    try:
        network, statistics, digest = load_features(folder, second), load_reference(folder), features_digest(folder)
        if not second and "kid_features" not in statistics:
            raise ValueError("its statistics have no kid_features")
        with safe_open(folder / "reference.safetensors", "pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:  # safetensors and torch raise many types of exceptions for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise InputError(f'{folder} holds no ruler; "efficientdm features" makes one ({reason})') from error
    if metadata.get("features") != digest:
        theirs = metadata.get("features")
        raise InputError(f"{folder}: the statistics are of the network {theirs}, not of {digest}")
    return Ruler(network, statistics, digest, metadata.get("data", "mnist"), network.shape)
