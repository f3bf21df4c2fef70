"""Train the two feature networks of a ruler: classifiers for MNIST or a similar data set."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from ddpm_mnist.datasets import LABELLED, load_labelled
from ddpm_mnist.lab import InputError
from ddpm_mnist.lab.config_file import save_config
from ddpm_mnist.lab.locks import locked_folder
from ddpm_mnist.lab.processes import by_main
from ddpm_mnist.lab.terminal import progress
from ddpm_mnist.lab.write import prepare_output, write_bytes, write_json
from eval.features import (
    SECOND_FOLDER,
    FeatureNetwork,
    Ruler,
    SecondNetwork,
    extract,
    features_digest,
    load_features,
    load_reference,
    load_ruler,
    reference_statistics,
)
from eval.metrics import measure_alone
from quant.context import plain_torch


@dataclass
class FeaturesConfig:
    data: str = "mnist"
    """Labelled data set: "mnist", "fashion-mnist", "kmnist" or "emnist-letters"."""
    output: Path = Path("runs/features")
    """Folder for features.safetensors, reference.safetensors, features.json and config.yaml. The second network's files
    are in its subfolder "second"."""
    epochs: int = 8
    """Passes over the training images, at least 1."""
    batch_size: int = 128
    """Images per update, at least 1."""
    learning_rate: float = 3e-3
    """Peak learning rate of the one-cycle schedule, above 0. The second network uses a third of it."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and their augmentation, 0 to 2^32 - 1. The second network
    uses seed + 1."""

    def __post_init__(self) -> None:
        if self.data not in LABELLED:
            raise ValueError(f'data must have labels, as {", ".join(LABELLED)} have, not "{self.data}"')
        for name in ("epochs", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed must lie in 0…2^32 - 1, not {self.seed}")


class Recipe(NamedTuple):
    """The training settings that differ between the two networks."""

    network: type[FeatureNetwork]
    augment: nn.Module
    """Augmentation: applies one random transform to all images uint8 (N, 28, 28)."""
    learning_rate: float
    """Factor on the config's learning rate."""
    seed: int
    """Added to the config's seed."""


FIRST = Recipe(FeatureNetwork, v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1)), 1, 0)
# Without batch normalisation it needs a lower learning rate.
SECOND = Recipe(SecondNetwork, v2.RandomPerspective(0.3, p=0.5), 1 / 3, 1)


def fit(
    recipe: Recipe, images: Tensor, labels: Tensor, num_classes: int, epochs: int, config: FeaturesConfig
) -> FeatureNetwork:
    """Train a classifier on `images` uint8 (N, 28, 28) with `labels` int64 (N,) < `num_classes`, N at least the batch
    size; return it in evaluation mode."""
    torch.manual_seed(config.seed + recipe.seed)
    network = recipe.network(num_classes)
    learning_rate = config.learning_rate * recipe.learning_rate
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01)
    total = epochs * (len(images) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total)
    order = torch.cat([torch.randperm(len(images)) for _ in range(epochs)])
    with progress("feature network", total) as advance:
        for step in range(total):
            index = order[step * config.batch_size : (step + 1) * config.batch_size]
            # One transform per 16 images: one per batch is too little augmentation, one per image too slow.
            batch = torch.cat([recipe.augment(part) for part in images[index].split(16)])
            loss = F.cross_entropy(network(batch)[1], labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(step + 1)
    return network.eval()


@plain_torch()
@torch.enable_grad()
@by_main
def train_features(config: FeaturesConfig) -> Path:
    """Train both feature networks on the training images of `data`; the test images are only used to evaluate them.

    Raises:
        InputError: the data cannot be loaded, or there are fewer images than a batch.
    """
    prepare_output(config.output / SECOND_FOLDER / "features.safetensors")
    prepare_output(config.output / "features.json")
    with locked_folder(config.output):
        return _train_both(config)


def _train_both(config: FeaturesConfig) -> Path:
    images, labels = load_labelled(config.data, "train")
    if len(images) < config.batch_size:
        raise InputError(f"batch_size must be at most the {len(images)} training images, not {config.batch_size}")
    start = time.monotonic()
    first = train_network(FIRST, config, config.output, images, labels)
    second = train_network(SECOND, config, config.output / SECOND_FOLDER, images, labels)
    save_config(config, config.output / "config.yaml")
    record = {**describe(replace(first, second=second)), "seconds": round(time.monotonic() - start)}
    write_json(config.output / "features.json", record)
    print(record)
    return config.output


def train_network(recipe: Recipe, config: FeaturesConfig, folder: Path, images: Tensor, labels: Tensor) -> Ruler:
    """Train one network on `images` and write it, with their statistics, into `folder`."""
    network = fit(recipe, images, labels, int(labels.max()) + 1, config.epochs, config)
    network.standardise(extract(network, images)[0])
    reference = reference_statistics(extract(network, images)[0])
    if recipe is SECOND:
        del reference["kid_features"]
    write_bytes(folder / "features.safetensors", save(network.state_dict()))
    for cached in (features_digest, load_features, load_reference, load_ruler):
        cached.cache_clear()
    digest = features_digest(folder)
    content = save(reference, metadata={"features": digest, "data": config.data})
    write_bytes(folder / "reference.safetensors", content)
    return Ruler(network, reference, digest, config.data, network.shape)


def describe(ruler: Ruler) -> dict[str, Any]:
    """Return the accuracy of both networks on the test images of the ruler's data, and the floor: their scores.

    The floor has no intervals, because the test images are not in random order and so their groups differ.
    """
    assert ruler.data is not None and ruler.second is not None
    images, labels = load_labelled(ruler.data, "test")
    return {
        "test_accuracy": accuracy(ruler.network, images, labels),
        "test_accuracy_second": accuracy(ruler.second.network, images, labels),
        "floor": {**measure_alone(images, ruler), "num_images": len(images)},
    }


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy of the network on images uint8 (N, 28, 28) with labels (N,)."""
    return (extract(network, images)[1].argmax(1) == labels).double().mean().item()


def load_sets(ruler: Ruler, num_images: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Load the "train" and "test" images and labels with which `num_images` generated images are compared as training
    data (see `classifier_accuracy`).

    Raises:
        InputError: the ruler has no labelled training data, the data cannot be loaded, or `num_images` is below the
            batch size or above the number of training images.
    """
    if ruler.shape is None or ruler.data not in LABELLED:
        raise InputError(f"classifier needs a ruler that learned from labels, not {ruler.digest}")
    sets = {split: load_labelled(ruler.data, split) for split in ("train", "test")}
    least, most = FeaturesConfig.batch_size, len(sets["train"][0])
    if not least <= num_images <= most:
        raise InputError(f"classifier needs num_images from {least} to {most}, not {num_images}")
    return sets


# Number of training samples for `classifier_accuracy`, repeated if there are fewer images: one pass over MNIST.
IMAGES_SEEN = 60_000


def classifier_accuracy(images: Tensor, labels: Tensor, num_classes: int, test: tuple[Tensor, Tensor]) -> float:
    """Train a new `FeatureNetwork` on `images` with `labels`; return its accuracy on `test`."""
    epochs = math.ceil(IMAGES_SEEN / len(images))
    network = fit(FIRST, images, labels, num_classes, epochs, FeaturesConfig())
    return accuracy(network, *test)
