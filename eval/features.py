"""The feature network that all scores are computed on, and the reference statistics of MNIST."""

import hashlib
from functools import cache
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

PRETRAINED = Path(__file__).parent / "pretrained"
KID_REFERENCE_IMAGES = 10_000


class FeatureNetwork(nn.Module):
    """A classifier of digits: images uint8 (N, 28, 28) → features (N, 128) and logits (N, 10).

    The features are the inputs of its last layer, as FID takes them from Inception. FID grows with the square of
    their scale, which training leaves to chance, so it is set: over MNIST's training images their variance is 1
    in the mean over the 128 dimensions.
    """

    num_features = 128

    def __init__(self) -> None:
        super().__init__()

        def block(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(c_out), nn.ReLU()]

        self.trunk = nn.Sequential(
            *block(1, 32, 1), *block(32, 32, 2), *block(32, 64, 1), *block(64, 64, 2), nn.Flatten(),
            nn.Linear(64 * 7 * 7, self.num_features), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Linear(self.num_features, 10)

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


@torch.no_grad()
def extract(network: FeatureNetwork, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Features float32 (N, 128) and logits float32 (N, 10) of images uint8 (N, 28, 28)."""
    pairs = [network(batch) for batch in images.split(batch_size)]
    features, logits = zip(*pairs, strict=True)
    return torch.cat(features), torch.cat(logits)


@cache
def load_features() -> FeatureNetwork:
    """The released feature network, in evaluation mode."""
    network = FeatureNetwork()
    network.load_state_dict(load_file(PRETRAINED / "features.safetensors"))
    return network.eval().requires_grad_(False)


@cache
def load_reference() -> dict[str, Tensor]:
    """What the scores need of MNIST's 60,000 training images.

    Keys: `sum` float64 (128,) and `outer_sum` float64 (128, 128), the sums of the features and of their outer
    products; `count` long (); `kid_features` float16 (10,000, 128), the features of the first 10,000 images.
    """
    return load_file(PRETRAINED / "reference.safetensors")


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
