"""The frozen eye of the image experiments: a small classifier of real images, whose last hidden layer is the space.

Every image distance of a run is taken between its features (what MAD, 2307.01850, does with a LeNet on MNIST); 32
dimensions keep the covariance of a few hundred samples well conditioned. The weights are a function of images, labels
and seed; their hash belongs beside every figure, since distances in two spaces cannot be compared.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pipelines.measures.evaluator import to_network_input
from pipelines.training import train

DIMENSIONS = 32
UPDATES, BATCH_SIZE, LEARNING_RATE = 250, 64, 4e-3


class Extractor:
    """A frozen network; make one with :func:`train_extractor` or :func:`load_extractor`.

    ``shape`` is the (height, width, channels) of the images it was trained on.
    """

    def __init__(self, network: nn.Sequential, shape: tuple[int, ...]) -> None:
        self.network = network.eval().requires_grad_(False)
        self.shape = shape
        self.device = next(network.parameters()).device

    @property
    def sha256(self) -> str:
        """The hash of the weights, in hexadecimal."""
        return hashlib.sha256(self._weights()).hexdigest()

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width, channels) → float64 (n, 32)."""
        hidden = [self.network[:-1](batch.to(self.device)) for batch in to_network_input(images).split(512)]
        return torch.cat(hidden).double().numpy(force=True)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width, channels) → float64 (n, classes); rows sum to 1."""
        return self.classify(self.features(images))

    @torch.inference_mode()
    def classify(self, features: np.ndarray) -> np.ndarray:
        """The :meth:`probabilities` of images whose features (n, 32) are known."""
        inputs = torch.from_numpy(features).float().to(self.device)
        return self.network[-1](inputs).double().softmax(dim=1).numpy(force=True)

    def save(self, directory: Path) -> None:
        """Write what :func:`load_extractor` reads. Equal extractors write equal bytes."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "model.safetensors").write_bytes(self._weights())
        config = {"shape": self.shape, "classes": self.network[-1].out_features}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _weights(self) -> bytes:
        from safetensors.torch import save

        return save({name: tensor.cpu() for name, tensor in self.network.state_dict().items()})


def train_extractor(images: np.ndarray, labels: np.ndarray, classes: int, seed: int, device: str = "cpu") -> Extractor:
    """Train on real ``images`` (n, height, width, channels) uint8 and their ``labels`` (n,) in [0, classes).

    The number of updates is fixed, so the cost does not grow with n.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(images.shape[3], classes).to(device)
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = to_network_input(images), torch.from_numpy(labels).long()

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        return functional.cross_entropy(network(inputs[chosen].to(device)), targets[chosen].to(device))

    train(network, loss, UPDATES, LEARNING_RATE, weight_decay=0.05)
    return Extractor(network, images.shape[1:])


def load_extractor(directory: Path, device: str = "cpu") -> Extractor:
    """The extractor that :meth:`Extractor.save` wrote."""
    from safetensors.torch import load_file

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    network = _network(config["shape"][2], config["classes"])
    network.load_state_dict(load_file(directory / "model.safetensors"))
    return Extractor(network.to(device), tuple(config["shape"]))


def _network(channels: int, classes: int) -> nn.Sequential:
    """Images (n, channels, height, width) in [-1, 1], 8x8 or larger → logits (n, classes), by LeNet's plan."""
    first = nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    # LeNet's own tanh: with unbounded features an image that shows its class too clearly would count as imprecise.
    return nn.Sequential(*first, *second, nn.Linear(32 * 4 * 4, DIMENSIONS), nn.Tanh(), nn.Linear(DIMENSIONS, classes))
