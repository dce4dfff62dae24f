"""One whole DDPO step with every role on one card: how long, and how much memory.

``python -m benchmarks.one_gpu`` builds Stable Diffusion 1.5's shape (``--shape sd3``: Stable Diffusion 3 medium's,
without T5) and BLIP-base's with random weights. Twice it draws 64 images of 512 pixels in 50 steps (SD 3: 28), captions
and scores them, learns from them by LoRA with weights of ``--dtype``, and gives the sampler what was learned. It takes
neither Ray nor a network. ``--shape tiny --device cpu --dtype float32`` goes the same way in seconds.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestration.run import git_commit
from pipelines.captioner import Captioner
from pipelines.diffusion import DiffusionPolicy
from pipelines.learning import DiffusionLearner
from pipelines.settings import CaptionerSettings, ModelSettings
from pipelines.trainable import load_weights
from policies.settings import SamplingSettings, TrainingSettings
from tests import models

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def main() -> None:
    """Print seconds and peak memory of each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="sd15")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--images-per-call", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, help="denoising steps; by default the shape's")
    parser.add_argument("--timestep-fraction", type=float, default=1.0)
    chosen = parser.parse_args()
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here; to try the command itself: --shape tiny --device cpu")
    build, captioner_of, steps, eta, guidance = SHAPES[chosen.shape]
    sampling = SamplingSettings(steps=chosen.steps or steps, eta=eta, guidance_scale=guidance)
    training = TrainingSettings(
        images_per_step=chosen.images,
        images_per_prompt=4,
        updates_per_step=1,
        timestep_fraction=chosen.timestep_fraction,
        ratio_tolerance=1.0,  # what bfloat16 does to the ratio is printed, not judged
    )
    print(f"commit {git_commit()}, torch {torch.__version__}, {_device_name(chosen.device)}")
    with tempfile.TemporaryDirectory() as place:
        stage = Stages(chosen.device)
        with stage("build and save random weights"):
            path = str(build(Path(place) / "pipeline", chosen.device, getattr(torch, chosen.dtype)))
            blip = str(captioner_of(Path(place) / "captioner"))
        model = ModelSettings(path=path, dtype=chosen.dtype, lora_rank=chosen.rank, lora_targets=LORA_TARGETS)
        with stage("load sampler, captioner, learner"):
            sampler = DiffusionPolicy(model, sampling, chosen.device)
            captioner = Captioner(CaptionerSettings(path=blip, max_new_tokens=8), chosen.device)
            learner = DiffusionLearner(model, sampling, training, seed=0, device=chosen.device)
        print(f"micro-batch {learner.micro_batch} transitions, {chosen.images} images × {sampling.steps} steps")
        prompts = [models.PROMPTS[index // 4 % len(models.PROMPTS)] for index in range(chosen.images)]
        for round_name in ("first", "second"):  # the first finds kernels and memory
            parts = []
            with stage(f"{round_name} sampling", chosen.images):
                for start in range(0, chosen.images, chosen.images_per_call):
                    some = slice(start, start + chosen.images_per_call)
                    seeds = list(range(chosen.images))[some]
                    parts.append(sampler.rollout(prompts[some], seeds, learner.weights_version))
            images = np.concatenate([each for each, _ in parts])
            with stage(f"{round_name} captioning", chosen.images):
                captions = captioner.caption(images)
            scores = images.mean(axis=(1, 2, 3)) + np.array([len(caption) for caption in captions])
            advantage = (scores - scores.mean()) / (scores.std() + 1e-6)
            trajectory = type(parts[0][1]).concatenate([each for _, each in parts])
            with stage(f"{round_name} learning", chosen.images):
                statistics, changed = learner.learn(trajectory, advantage, seed=0)
            with stage(f"{round_name} sending weights"):
                load_weights(sampler.network, learner.weights())
            worst = max(statistics.first_update_error.values())
            print(f"  changed {changed} tensors; worst |Δ log p| of the first update {worst:.2e} nats")


class Stages:
    """Seconds and peak memory of blocks, printed as they end."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    @contextmanager
    def __call__(self, name: str, images: int = 0) -> Iterator[None]:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        yield
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:6.1f} GB at most" if self.cuda else ""
        rate = f"{images / seconds:7.2f} images/s" if images else ""
        print(f"{name:<36}{seconds:9.2f} s {rate:<18}{memory}", flush=True)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"


def _text_encoder(kind: Any, tokenizer: Any, width: int, layers: int, heads: int) -> Any:
    from transformers import CLIPTextConfig

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    size = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    depth = {"num_hidden_layers": layers, "num_attention_heads": heads}
    return kind(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **size, **depth, **special))


def _autoencoder(**own: Any) -> Any:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512, **blocks, **own)


def build_sd15(directory: Path, device: str, dtype: torch.dtype) -> Path:
    """Stable Diffusion 1.5's shape; the tokenizer knows the tests' words only."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    tokenizer = models._clip_tokenizer()
    tokenizer.model_max_length = 77
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        encoder, vae = _text_encoder(CLIPTextModel, tokenizer, 768, 12, 12), _autoencoder()
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1
    )
    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, **none).to(dtype).save_pretrained(directory)
    return directory


def build_sd3(directory: Path, device: str, dtype: torch.dtype) -> Path:
    """Stable Diffusion 3 medium's shape at 512 pixels, with both CLIP encoders and without T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    tokenizer = models._clip_tokenizer()
    tokenizer.model_max_length = 77
    with torch.device(device):
        transformer = SD3Transformer2DModel(
            sample_size=64,
            num_layers=24,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=768 + 1280,
            pos_embed_max_size=192,
        )
        first = _text_encoder(CLIPTextModelWithProjection, tokenizer, 768, 12, 12)
        second = _text_encoder(CLIPTextModelWithProjection, tokenizer, 1280, 32, 20)
        vae = _autoencoder(latent_channels=16, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    parts = {"transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": vae}
    parts |= {"text_encoder": first, "tokenizer": tokenizer, "text_encoder_2": second, "tokenizer_2": tokenizer}
    StableDiffusion3Pipeline(**parts, text_encoder_3=None, tokenizer_3=None).to(dtype).save_pretrained(directory)
    return directory


def build_blip(directory: Path) -> Path:
    """BLIP-base's shape; the tokenizer knows the tests' words only."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig

    models.build_tiny_captioner(directory, image_size=384)  # for its processor
    text = BlipTextConfig(encoder_hidden_size=768, bos_token_id=2, eos_token_id=3, sep_token_id=3, pad_token_id=0)
    vision = BlipVisionConfig(image_size=384)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    words = len(models.WORDS) + 7
    with torch.no_grad():  # of its 30,524 words only those that the tokenizer knows, and none of its seven marks
        bias = model.text_decoder.get_output_embeddings().bias
        bias[:7] = bias[words:] = -1e4
    model.save_pretrained(directory)
    return directory


def build_tiny(directory: Path, device: str, dtype: torch.dtype) -> Path:
    """The tests' model, the same way."""
    return models.build_tiny_pipeline(directory)


SHAPES: dict[str, tuple[Callable[..., Path], Callable[[Path], Path], int, float, float]] = {
    "sd15": (build_sd15, build_blip, 50, 1.0, 5.0),
    "sd3": (build_sd3, build_blip, 28, 0.7, 4.5),
    "tiny": (build_tiny, models.build_tiny_captioner, 6, 1.0, 5.0),
}

if __name__ == "__main__":
    main()
