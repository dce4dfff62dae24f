"""The frozen eye of the image experiments: a small network trained once on real images, or a vision model.

Every image distance of a run is taken between its features (what MAD, 2307.01850, does with a LeNet on MNIST). Where
images have labels, they are a classifier's last hidden layer; where they have none, the network learns which two views
show the same image (SimCLR: Chen et al., 2002.05709). 32 dimensions keep the covariance of a few hundred samples well
conditioned. The weights are a function of images, labels and seed; their hash belongs beside every figure, since
distances in two spaces cannot be compared.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.measures.evaluator import to_network_input
from pipelines.storage.atomic import Files, content_digest
from pipelines.storage.locations import find
from pipelines.storage.model_files import load_whole, quieten, read_json, reading, weight_files
from pipelines.training import train

DIMENSIONS = 32
UPDATES, BATCH_SIZE, LEARNING_RATE = 250, 64, 4e-3
_TEMPERATURE = 0.2  # of SimCLR's softmax over cosines
_SPREAD, _CONTRAST, _GRAIN = 0.15, 0.2, 0.1  # of its views: scale, shift in sides; contrast, light; noise
_CONFIGS = ("config.json", "preprocessor_config.json", "model.safetensors.index.json")


class Extractor:
    """A frozen network; make one with :func:`train_extractor` or :func:`load_extractor`.

    ``shape`` is the (height, width, channels) of the images it was trained on, ``sha256`` the hash of its weights in
    hexadecimal.
    """

    def __init__(self, network: nn.Sequential, shape: tuple[int, ...]) -> None:
        self.network = network.eval().requires_grad_(False)
        self.shape = shape
        self.device = next(network.parameters()).device
        self.sha256 = hashlib.sha256(self._weights()).hexdigest()

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
        config = {"shape": self.shape, "classes": getattr(self.network[-1], "out_features", 0)}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _weights(self) -> bytes:
        from safetensors.torch import save

        return save({name: tensor.cpu() for name, tensor in self.network.state_dict().items()})


class VisionModel(Extractor):
    """A vision model of transformers. Its features are the mean over the places of its last hidden state."""

    def __init__(self, directory: Path, device: str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        quieten()
        whole = load_whole(AutoModel, directory, device, "pooler", dtype=torch.float32, trust_remote_code=False)
        self.network: Any = getattr(whole, "vision_model", whole).requires_grad_(False)
        self.processor = AutoImageProcessor.from_pretrained(directory, backend="pil", trust_remote_code=False)
        self.device = whole.device
        self.sha256 = content_digest({path.name: path.read_bytes() for path in weight_files(directory)})

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width, channels) → float64 (n, its width)."""
        found = []
        for start in range(0, len(images), 32):
            coloured = [*np.broadcast_to(batch := images[start : start + 32], (*batch.shape[:3], 3))]
            pixels = self.processor(coloured, return_tensors="pt")["pixel_values"].to(self.device)
            hidden = self.network(pixel_values=pixels).last_hidden_state
            found.append(hidden.mean(dim=(2, 3) if hidden.ndim == 4 else 1))
        return torch.cat(found).double().numpy(force=True)


def train_extractor(
    images: np.ndarray, labels: np.ndarray | None, classes: int, seed: int, device: str = "cpu"
) -> Extractor:
    """Train on real ``images`` (n, height, width, channels) uint8 and their ``labels`` (n,) in [0, classes), or with 0
    ``classes`` without them.

    The number of updates is fixed, so the cost does not grow with n.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(images.shape[3], classes or DIMENSIONS).to(device)
    generator = torch.Generator().manual_seed(seed)
    inputs = to_network_input(images)
    targets = torch.zeros(len(images)) if labels is None else torch.from_numpy(labels).long()

    def draw() -> tuple[Tensor, ...]:
        chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        shown = inputs[chosen].to(device)
        if classes:
            return shown, targets[chosen].to(device)
        return _view(shown, generator), _view(shown, generator)

    def loss(network: nn.Module, shown: Tensor, other: Tensor) -> Tensor:
        if classes:
            return functional.cross_entropy(network(shown), other)
        return contrastive_loss(network(torch.cat([shown, other])))

    train(network, draw, loss, UPDATES, LEARNING_RATE, divisible=bool(classes), weight_decay=0.05)
    if not classes:
        network[-1] = nn.Identity()  # SimCLR's projection is for training alone
    return Extractor(network, images.shape[1:])


def contrastive_loss(views: Tensor) -> Tensor:
    """SimCLR's NT-Xent: how surely each of ``views`` (2n, D) finds its other one, n places on, among all 2n − 1."""
    unit = functional.normalize(views, dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-torch.inf) / _TEMPERATURE
    return functional.cross_entropy(cosines, torch.arange(len(views), device=views.device).roll(len(views) // 2))


def _view(images: Tensor, random: torch.Generator) -> Tensor:
    """Images (n, channels, height, width) as they might have been taken otherwise: moved, in another light, noisier."""

    def draw(spread: float, *shape: int) -> Tensor:
        return (torch.rand(len(images), *shape, generator=random) * 2 - 1) * spread

    moved = torch.cat([(1 + draw(_SPREAD, 1, 1)) * torch.eye(2), draw(2 * _SPREAD, 2, 1)], dim=2)  # a side is 2 long
    grid = functional.affine_grid(moved, list(images.shape), align_corners=False)
    found = functional.grid_sample(images, grid.to(images.device), padding_mode="border", align_corners=False)
    contrast, light = (draw(_CONTRAST, 1, 1, 1).to(images.device) for _ in range(2))
    grain = _GRAIN * torch.randn(images.shape, generator=random)
    return found * (1 + contrast) + light + grain.to(images.device)


def load_extractor(directory: Path, device: str = "cpu") -> Extractor:
    """The extractor that :meth:`Extractor.save` wrote, or the vision model of transformers in ``directory``."""
    from safetensors.torch import load_file

    config = read_json(directory / "config.json")
    if "model_type" in config:
        return VisionModel(directory, device)
    network = _network(config["shape"][2], config["classes"])
    network.load_state_dict(load_file(directory / "model.safetensors"))
    return Extractor(network.to(device), tuple(config["shape"]))


def given_extractor(path: str, images: np.ndarray) -> Files:
    """The files of the extractor in a directory, once it has looked at ``images`` (n, height, width, channels) uint8.

    Raises ValueError if there is none, or it cannot look at such images.
    """
    directory = find(path)
    if directory is None or not (directory / "config.json").is_file():
        raise ValueError(f"data.extractor: {path!r} is not classifier, self_supervised or a directory with config.json")
    with reading(f"data.extractor: {directory}"):
        extractor = load_extractor(directory)
        if not isinstance(extractor, VisionModel) and extractor.shape != images.shape[1:]:
            raise ValueError(f"it looks at images (height, width, channels) {extractor.shape}, not {images.shape[1:]}")
        extractor.features(images)
        files = [directory / name for name in _CONFIGS if (directory / name).is_file()] + weight_files(directory)
    return {file.name: file.read_bytes() for file in files}


def _network(channels: int, outputs: int) -> nn.Sequential:
    """Images (n, channels, height, width) in [-1, 1], 8x8 or larger → (n, outputs), by LeNet's plan; 0: features."""
    first = nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    # LeNet's own tanh: with unbounded features an image that shows its class too clearly would count as imprecise.
    last = nn.Linear(DIMENSIONS, outputs) if outputs else nn.Identity()
    return nn.Sequential(*first, *second, nn.Linear(32 * 4 * 4, DIMENSIONS), nn.Tanh(), last)
