"""The independent judge of the digit world: which digit, ink and ground does an image show?

It is a small convolutional network trained on handwritten digits that neither the diffusion model nor the captioner has
seen, so a policy that learns to fool the captioner does not fool the judge by the same trick. Weights are safetensors
beside a ``config.json`` that names the classes; nothing else is read.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.data.digits import SLOTS, parse
from pipelines.measures.places import columns, squares
from pipelines.storage.model_files import reading
from pipelines.videos import frames_of

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


class EvaluatorNetwork(nn.Module):
    """Images (n, 3, size, size) in [-1, 1] -> for each slot the logits (n, classes)."""

    def __init__(self, classes: dict[str, list[str]], channels: int, image_size: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(3, channels),
            *_convolution(channels, channels),
            nn.MaxPool2d(2),
            *_convolution(channels, 2 * channels),
            *_convolution(2 * channels, 2 * channels),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(2 * channels * (image_size // 4) ** 2, 4 * channels),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({slot: nn.Linear(4 * channels, len(names)) for slot, names in classes.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.features(images)
        return {slot: head(features) for slot, head in self.heads.items()}


def _convolution(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()


class Evaluator:
    """A loaded judge; make one with :func:`load_evaluator`."""

    def __init__(self, network: EvaluatorNetwork, classes: dict[str, list[str]], image_size: int) -> None:
        self.network = network.eval()
        self.classes = classes
        self.image_size = image_size

    @torch.inference_mode()
    def slots(self, images: np.ndarray) -> dict[str, list[str]]:
        """For uint8 ``images`` (n, height, width, 3), the n most likely words of each slot. Of those on a wider canvas
        it looks at the square around the ink.

        Raises ValueError if the images are not uint8, or neither of the size that the judge was trained on nor wider.
        """
        if images.ndim == 4 and images.dtype == np.uint8 and images.shape[2] > images.shape[1] == self.image_size:
            images = squares(images, columns(images))
        expected = (self.image_size, self.image_size, 3)
        if images.ndim != 4 or images.shape[1:] != expected or images.dtype != np.uint8:
            raise ValueError(
                f"the evaluator takes uint8 images of shape (n, {', '.join(map(str, expected))}), "
                f"but was given {images.dtype} of shape {images.shape}"
            )
        device = next(self.network.parameters()).device
        words: dict[str, list[str]] = {slot: [] for slot in self.classes}
        for batch in to_network_input(images).split(512):
            logits = self.network(batch.to(device))
            for slot, names in self.classes.items():
                words[slot].extend(names[index] for index in logits[slot].argmax(dim=1).tolist())
        return words

    def judge(self, images: np.ndarray, prompts: Sequence[str], frames: int = 1) -> dict[str, np.ndarray]:
        """Does each image show what its prompt says? Boolean arrays (n,) for digit, ink, ground and full (all three).

        A slot the prompt leaves open is met by any image. A video of so many ``frames``, which stand below each other,
        shows what all of them show.
        """
        if frames > 1:
            each = self.judge(frames_of(images, frames), [prompt for prompt in prompts for _ in range(frames)])
            return {slot: np.asarray(met.reshape(-1, frames).all(axis=1)) for slot, met in each.items()}
        wanted = [parse(prompt) for prompt in prompts]
        seen = self.slots(images)
        pairs = {slot: zip(wanted, seen[slot], strict=True) for slot in SLOTS}
        met = {slot: np.array([want[slot] in (None, word) for want, word in each]) for slot, each in pairs.items()}
        return met | {"full": np.logical_and.reduce(list(met.values()))}


def to_network_input(images: np.ndarray) -> Tensor:
    """uint8 (n, height, width, 3) -> float32 (n, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def load_evaluator(directory: str | Path, device: str = "cpu") -> Evaluator:
    """Loads the judge from ``directory``. Raises ModelFilesError."""
    from safetensors.torch import load_file

    directory = Path(directory)
    with reading(directory):
        config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
        network = EvaluatorNetwork(config["classes"], config["channels"], config["image_size"])
        network.load_state_dict(load_file(directory / WEIGHTS_NAME))
    return Evaluator(network.to(device), config["classes"], config["image_size"])


def save_evaluator(evaluator: Evaluator, directory: Path, channels: int) -> None:
    """Writes what :func:`load_evaluator` reads."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file(evaluator.network.state_dict(), directory / WEIGHTS_NAME)
    config = {"classes": evaluator.classes, "channels": channels, "image_size": evaluator.image_size}
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
