"""How small an image is as JPEG."""

import io

import numpy as np

from pipelines.rewards import Reward, RewardFunction

JPEG_QUALITY = 95  # Black et al. 2023, appendix on compressibility


class JpegOptions(Reward):
    """Size as JPEG."""

    names = ("jpeg_compressibility", "jpeg_incompressibility")

    def load(self, name: str, device: str) -> RewardFunction:
        """More is better, or less."""
        sign = 1 if name == "jpeg_incompressibility" else -1
        return lambda images, prompts, captions: sign * jpeg_kilobytes(images)


def jpeg_kilobytes(images: np.ndarray) -> np.ndarray:
    """Size of each image as JPEG in kB (1,000 bytes)."""
    from PIL import Image

    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
        sizes.append(buffer.tell() / 1000)
    return np.array(sizes)
