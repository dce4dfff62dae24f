"""Pipelines and captioners of known shapes with random weights, for benchmarks on a card: no hub is needed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import models


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


# By name: pipeline, captioner, denoising steps, η, guidance.
SHAPES: dict[str, tuple[Callable[..., Path], Callable[[Path], Path], int, float, float]] = {
    "sd15": (build_sd15, build_blip, 50, 1.0, 5.0),
    "sd3": (build_sd3, build_blip, 28, 0.7, 4.5),
    "tiny": (build_tiny, models.build_tiny_captioner, 6, 1.0, 5.0),
}
