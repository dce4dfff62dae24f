"""How small an image is as JPEG."""

import io

import numpy as np

JPEG_QUALITY = 95  # Black et al. 2023, appendix on compressibility


def jpeg_kilobytes(images: np.ndarray) -> np.ndarray:
    """Size of each image as JPEG in kB (1,000 bytes)."""
    from PIL import Image

    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
        sizes.append(buffer.tell() / 1000)
    return np.array(sizes)
