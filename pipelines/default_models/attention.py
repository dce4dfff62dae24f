"""Trains the second default pipeline, whose attention sees 64 places where the first one's sees four.

Keypoints, pose and time need to know where in an image a word is looked for. It is trained on true captions to the end,
as nothing is to be learned by reinforcement here, and on two canvases: 16 x 16, and 16 x 32 for digits that move.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from pipelines.data.digits import IMAGE_SIZE, all_prompts
from pipelines.default_models import configuration, models
from pipelines.measures.evaluator import Evaluator
from pipelines.measures.places import columns, squares

RECIPE, WIDE = "attention", 2 * IMAGE_SIZE


def build_autoencoder(directory: Path, built: Path, seed: int, tell: models.Tell) -> models.Measurements:
    """The ``AutoencoderKL`` between 16 x 16 x 3 images and 8 x 8 x 4 latents."""
    return models.build_autoencoder(directory, built, seed, tell, RECIPE)


def build_pipeline(directory: Path, built: Path, seed: int, tell: models.Tell) -> models.Measurements:
    """Trains to the end, and measures both canvases; on the wider one the judge looks at the square around the ink."""
    how, judge = configuration(RECIPE)["training"]["pipeline"], models.judge_of(built)
    curve: list[dict[str, Any]] = []
    for step, pipeline, loss in models.train_pipeline(
        models.untrained(built, seed, RECIPE), seed, how, **how["supervised"]
    ):
        found = measure(pipeline, judge, seed, models.CURVE_IMAGES, 1, IMAGE_SIZE)
        curve.append({"step": step, **found})
        tell(f"diffusion: loss {loss:.4f}, unguided accuracy {curve[-1]}")
    chosen = keep(pipeline, directory, judge, seed)
    parts = {name: models.parameters(getattr(pipeline, name)) for name in ("unet", "text_encoder")}
    images = {"curve_images": models.CURVE_IMAGES, "fine_images": models.FINE_IMAGES}
    counted = {name: number * len(all_prompts()) for name, number in images.items()}
    return {"parameters": parts, "curve": curve, "chosen": chosen, **counted, "torch": torch.__version__}


def keep(
    pipeline: StableDiffusionPipeline, directory: Path, judge: Evaluator, seed: int
) -> dict[str, dict[str, float]]:
    """Save a trained ``pipeline``, its UNet in half precision, as it is to be small, and measure what was saved."""
    pipeline.unet.half()
    pipeline.save_pretrained(directory)
    kept = StableDiffusionPipeline.from_pretrained(directory, torch_dtype=torch.float32)
    return {
        f"{name}_guidance_{scale}": measure(kept, judge, seed, models.FINE_IMAGES, scale, width)
        for name, width in (("square", IMAGE_SIZE), ("wide", WIDE))
        for scale in (1, 2)
    }


def measure(
    pipeline: StableDiffusionPipeline, judge: Evaluator, seed: int, images: int, scale: float, width: int
) -> dict[str, float]:
    """How often ``images`` of every caption show it, on a canvas of this ``width``."""
    prompts = models.asked(images)
    drawn = models.draw_images(pipeline, prompts, seed, scale, width)
    return models.accuracy(judge.judge(squares(drawn, columns(drawn)), prompts))
