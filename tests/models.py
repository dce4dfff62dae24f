"""Genuine diffusers and transformers models with random weights, small enough to be built in a test."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

WORDS = (
    *("a", "an", "on", "background", "red", "green", "blue", "orange", "black", "white", "gray"),
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
)
PROMPTS = (
    "a red seven on a black background",
    "an orange two on a gray background",
    "a blue nine on a white background",
)

_TEXT_WIDTH = 16
_TEXT_LENGTH = 12


def build_tiny_pipeline(
    directory: Path,
    image_size: int = 16,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    seed: int = 0,
) -> Path:
    """Save a ``StableDiffusionPipeline`` whose latents are half as wide as its images. Returns ``directory``.

    With ``epsilon`` the scheduler is Stable Diffusion's, every step of which is stochastic; with ``v_prediction`` it is
    the default models', whose last step lands on the image and has no density.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = _clip_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=2 * _TEXT_WIDTH,
            projection_dim=_TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=_TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=10.0,  # CLIP starts so close to zero that all prompts would look alike
        )
    )
    unet = UNet2DConditionModel(
        sample_size=image_size // 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=image_size,
    )
    spacing = {
        "epsilon": {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
        "v_prediction": {"timestep_spacing": "trailing", "steps_offset": 1, "set_alpha_to_one": True},
    }[prediction_type]
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear" if prediction_type == "epsilon" else "squaredcos_cap_v2",
        prediction_type=prediction_type,
        clip_sample=False,
        **spacing,
    )
    StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)
    return directory


def build_tiny_captioner(directory: Path, image_size: int = 16, seed: int = 0) -> Path:
    """Save a ``BlipForConditionalGeneration`` and its processor. Its captions are words, though not true ones."""
    import torch
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
        BlipTextConfig,
        BlipVisionConfig,
    )

    torch.manual_seed(seed)
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
    tokenizer = BertTokenizerFast(
        vocab={token: index for index, token in enumerate((*special, *WORDS))},
        model_max_length=_TEXT_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )
    image_processor = BlipImageProcessorPil(
        size={"height": image_size, "width": image_size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    # The default range of BLIP's vision weights, 1e-10, would make it blind.
    vision = BlipVisionConfig(**shape, image_size=image_size, patch_size=image_size // 4, initializer_range=1.0)
    text = BlipTextConfig(
        **shape,
        vocab_size=len(tokenizer),
        projection_dim=16,
        max_position_embeddings=32,  # it never ends a caption by itself
        initializer_range=1.0,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BlipForConditionalGeneration(
        BlipConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16, image_text_hidden_size=16
        )
    )
    with torch.no_grad():  # a caption of special tokens alone would be empty
        model.text_decoder.get_output_embeddings().bias[: len(special)] = -1e4
    model.save_pretrained(directory)
    BlipProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(directory)
    return directory


def _clip_tokenizer() -> "CLIPTokenizer":
    """A CLIP tokenizer that knows ``WORDS`` as wholes and spells everything else."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            parts[:2] = ["".join(pair)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=_TEXT_LENGTH)
