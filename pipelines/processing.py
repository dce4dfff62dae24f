"""What an image processor of transformers makes of images, by arithmetic that torch can differentiate."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def preprocessed(processor: Any, images: Tensor) -> Tensor:
    """What the models of ``processor`` (CLIP's, BLIP's) are given of ``images`` (batch, 3, height, width) in [0, 1]:
    (batch, 3, its height, its width), resized, cropped in the middle and normalised as it says.

    It agrees with the processor up to its rounding to 8 bits when it resizes. Raises ValueError for a size or a filter
    that it does not know.
    """
    if getattr(processor, "do_resize", True):
        size = dict(processor.size)
        if edge := size.get("shortest_edge"):
            shorter = min(images.shape[-2:])
            into = tuple(edge * side // shorter for side in images.shape[-2:])
        elif {"height", "width"} <= size.keys():
            into = size["height"], size["width"]
        else:
            raise ValueError(f"image processor: its size, {size}, is neither a shortest_edge nor a height and a width")
        if into != tuple(images.shape[-2:]):
            filters = {2: "bilinear", 3: "bicubic"}  # as PIL numbers them
            if (kind := filters.get(int(processor.resample))) is None:
                raise ValueError(f"image processor: its filter, {processor.resample}, is neither bilinear nor bicubic")
            images = functional.interpolate(images, into, mode=kind, antialias=True, align_corners=False).clamp(0, 1)
    if getattr(processor, "do_center_crop", False):
        height, width = processor.crop_size["height"], processor.crop_size["width"]
        top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
        images = images[..., top : top + height, left : left + width]
    if getattr(processor, "do_rescale", True):  # from whole numbers of 0 to 255
        images = images * (255 * processor.rescale_factor)
    if getattr(processor, "do_normalize", True):
        mean, std = (
            torch.tensor(each).view(-1, 1, 1).to(images) for each in (processor.image_mean, processor.image_std)
        )
        images = (images - mean) / std
    return images
