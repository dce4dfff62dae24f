"""Diffusers directories that this project and older releases of diffusers and transformers read alike.

What transformers 5 writes, its fourth edition does not understand: a tokenizer in one file, and text encoders whose
weights lack the prefix ``text_model``. Both editions read the older form.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DIGITS = Path("models/digits/pipeline")
SIZES = {"0.8M": (32, 56), "6M": (96, 152)}  # channels of a UNet's two levels


def portable_copy(pipeline: Path, directory: Path) -> Path:
    """Write ``pipeline`` into ``directory`` in the older form."""
    if pipeline != directory:
        shutil.copytree(pipeline, directory, dirs_exist_ok=True)
    model = json.loads((directory / "tokenizer" / "tokenizer.json").read_text())["model"]
    (directory / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (directory / "tokenizer" / "merges.txt").write_text("\n".join(merges) + "\n")
    weights = directory / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    named = {name if name.startswith("text_model.") else f"text_model.{name}": each for name, each in tensors.items()}
    save_file(named, weights, metadata={"format": "pt"})
    return directory


def random_pipeline(channels: tuple[int, int], directory: Path) -> Path:
    """A Stable Diffusion of random weights on latents 4×8×8, images 16×16, with SD 1.5's own noise schedule; tokenizer
    and text encoder are those of the digits."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    stock = StableDiffusionPipeline.from_pretrained(DIGITS, safety_checker=None, requires_safety_checker=False)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=stock.text_encoder.config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=False,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = {"unet": unet, "vae": vae, "scheduler": scheduler}
    pipeline = StableDiffusionPipeline(
        **{**stock.components, **parts, "safety_checker": None}, requires_safety_checker=False
    )
    pipeline.save_pretrained(directory, safe_serialization=True)
    return portable_copy(directory, directory)
