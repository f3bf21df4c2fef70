"""The training of a ruler's feature network: a classifier of digits, or of what another set shows."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision.transforms import v2

from ddpm_mnist import InputError
from ddpm_mnist.command import save_config
from ddpm_mnist.data import LABELLED, load_labelled
from ddpm_mnist.runs import prepare_output, write_json
from eval.features import FeatureNetwork, extract, features_digest, reference_statistics
from eval.metrics import fid_to_reference, kid


@dataclass
class FeaturesConfig:
    data: str = "mnist"
    """The images, with labels: "mnist", "fashion-mnist", "kmnist" or "emnist-letters"."""
    output: Path = Path("runs/features")
    """Folder for features.safetensors, reference.safetensors, features.json and config.yaml."""
    epochs: int = 8
    """Passes over the training images."""
    batch_size: int = 128
    """Images per update."""
    learning_rate: float = 3e-3
    """Peak of the one-cycle schedule."""
    seed: int = 0
    """Seeds the initial weights, the order of the images and their augmentation."""

    def __post_init__(self) -> None:
        if self.data not in LABELLED:
            raise ValueError(f'data must have labels, as {", ".join(LABELLED)} have, not "{self.data}"')
        for name in ("epochs", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


def train_features(config: FeaturesConfig) -> Path:
    """Train the network on the training images of `data`; the test images only measure it, once, at the end.

    Raises:
        InputError: the data cannot be had, or are fewer than a batch.
    """
    prepare_output(config.output / "features.json")
    images, labels = load_labelled(config.data, "train")
    if len(images) < config.batch_size:
        raise InputError(f"batch_size must be at most the {len(images)} training images, not {config.batch_size}")
    start = time.monotonic()
    torch.manual_seed(config.seed)
    network = FeatureNetwork(int(labels.max()) + 1)
    augment = v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0.01)
    total = config.epochs * (len(images) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=total)
    order = torch.cat([torch.randperm(len(images)) for _ in range(config.epochs)])
    for step in track(range(total), "feature network"):
        index = order[step * config.batch_size : (step + 1) * config.batch_size]
        # One shift, turn and size for groups of 16: an affine map a batch is too few, one an image too slow.
        batch = torch.cat([augment(part) for part in images[index].split(16)])
        loss = F.cross_entropy(network(batch)[1], labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    network.eval()
    network.standardise(extract(network, images)[0])
    reference = reference_statistics(extract(network, images)[0])
    save_file(network.state_dict(), config.output / "features.safetensors")
    digest = features_digest(config.output)
    save_file(reference, config.output / "reference.safetensors", metadata={"features": digest, "data": config.data})
    save_config(config, config.output / "config.yaml")
    record = {**describe(network, reference, config.data), "seconds": round(time.monotonic() - start)}
    write_json(config.output / "features.json", record)
    print(record)
    return config.output


def describe(network: FeatureNetwork, reference: dict[str, torch.Tensor], data: str) -> dict[str, float]:
    """Accuracy on the test images of `data`, and their FID and KID: the floor that no model can be expected below."""
    images, labels = load_labelled(data, "test")
    features, logits = extract(network, images)
    return {
        "test_accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "fid_of_test_images": fid_to_reference(features, reference),
        "kid_of_test_images": kid(features, reference["kid_features"]),
        "num_test_images": len(images),
    }
