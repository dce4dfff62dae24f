"""Two updates of ESD-x on a pipeline of Stable Diffusion 1.5's true shape, with random weights.

``python -m benchmarks.erase_sd15 DIRECTORY [--device cuda]`` builds the pipeline there (4 GB) unless it is there,
erases "red" from it, and prints losses, seconds and memory.
"""

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import torch

from orchestration.runs.manifest import git_commit
from pipelines.studies.erase import Eraser, Prompts
from policies.erasing import ErasingSettings

UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}


def build(directory: Path) -> None:
    """Write it, with the tokenizer of the default model."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained("models/digits/pipeline/tokenizer")
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **TEXT, **ends)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**UNET),
        scheduler=DDIMScheduler(
            1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if not (arguments.directory / "model_index.json").exists():
        build(arguments.directory)
    start = time.perf_counter()
    settings = ErasingSettings(images=1, batch=1, updates=2, steps=2, eta=1.0, learning_rate=5e-5)
    losses = Eraser(str(arguments.directory), arguments.device).erase(Prompts.of("red", []), "esd-x", settings, seed=0)
    seconds, memory = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"commit {git_commit()}: losses {losses}, {seconds:.0f} s with loading, {memory:.1f} GiB at most")


if __name__ == "__main__":
    main()
