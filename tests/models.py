"""Genuine diffusers and transformers models with random weights, small enough to be built in a test."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import BertTokenizerFast, CLIPTokenizer, T5Tokenizer

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
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = _clip_tokenizer()
    text_encoder = _text_encoder(CLIPTextModel, tokenizer)
    unet = UNet2DConditionModel(
        sample_size=image_size // 2,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
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
        vae=_autoencoder(image_size),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(directory)
    return directory


def build_tiny_xl(directory: Path, seed: int = 0) -> Path:
    """Save a ``StableDiffusionXLPipeline`` of 16 px that predicts ε. Returns ``directory``."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = _clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * _TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + _TEXT_WIDTH,
    )
    StableDiffusionXLPipeline(
        vae=_autoencoder(16),
        text_encoder=_text_encoder(CLIPTextModel, tokenizer),
        text_encoder_2=_text_encoder(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            set_alpha_to_one=False,
            clip_sample=False,
        ),
        add_watermarker=False,
    ).save_pretrained(directory)
    return directory


def build_tiny_sd3(directory: Path, seed: int = 0, dynamic: bool = False) -> Path:
    """Save a ``StableDiffusion3Pipeline`` of 16 px without T5; ``dynamic``: whose times depend on the size of images.
    Returns ``directory``."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = _clip_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * _TEXT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        pos_embed_max_size=8,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
        vae=_autoencoder(16, shift_factor=0.1),
        text_encoder=_text_encoder(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_text_encoder(CLIPTextModelWithProjection, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(directory)
    return directory


def build_tiny_flux(directory: Path, guidance_embeds: bool = True, dynamic: bool = True, seed: int = 0) -> Path:
    """Save a ``FluxPipeline`` of 16 px whose times depend on the size of images. Returns ``directory``."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    clip, words = _clip_tokenizer(), _t5_tokenizer()
    shape = {"d_model": 2 * _TEXT_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * _TEXT_WIDTH,
        pooled_projection_dim=_TEXT_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic, base_image_seq_len=4),
        vae=_autoencoder(16, shift_factor=0.1),
        text_encoder=_text_encoder(CLIPTextModel, clip),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(words), **shape)),
        tokenizer_2=words,
        transformer=transformer,
    ).save_pretrained(directory)
    return directory


def build_tiny_video(directory: Path, frames: int = 3, seed: int = 0) -> Path:
    """Save an ``AnimateDiffPipeline`` of 16 px whose motion modules have places for so many ``frames``. Returns
    ``directory``."""
    import torch
    from diffusers import AnimateDiffPipeline, MotionAdapter, StableDiffusionPipeline

    still = StableDiffusionPipeline.from_pretrained(build_tiny_pipeline(directory / "still", seed=seed))
    torch.manual_seed(seed + 1)
    adapter = MotionAdapter(
        block_out_channels=(16,),
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        use_motion_mid_block=False,
        motion_max_seq_length=frames,
    )
    AnimateDiffPipeline(
        vae=still.vae,
        text_encoder=still.text_encoder,
        tokenizer=still.tokenizer,
        unet=still.unet,
        motion_adapter=adapter,
        scheduler=still.scheduler,
    ).save_pretrained(directory)
    return directory


def build_tiny_pixels(directory: Path, seed: int = 0) -> Path:
    """Save a ``DDPMPipeline`` of 8 px, without a prompt. Returns ``directory``."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        **blocks,
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(directory)
    return directory


def build_tiny_captioner(directory: Path, image_size: int = 16, seed: int = 0) -> Path:
    """Save a ``BlipForConditionalGeneration`` and its processor. Its captions are words, though not true ones."""
    import torch
    from transformers import BlipForConditionalGeneration, BlipProcessor

    torch.manual_seed(seed)
    tokenizer = _bert_tokenizer()
    model = BlipForConditionalGeneration(_blip_config(tokenizer, image_size))
    with torch.no_grad():  # a caption of special tokens alone would be empty
        model.text_decoder.get_output_embeddings().bias[: len(_SPECIAL)] = -1e4
    model.save_pretrained(directory)
    BlipProcessor(image_processor=_blip_images(image_size), tokenizer=tokenizer).save_pretrained(directory)
    return directory


def build_tiny_vqa(directory: Path, seed: int = 0) -> Path:
    """Save a ``BlipForQuestionAnswering`` of 16 px, whose answers start with [DEC], and its processor."""
    import torch
    from transformers import BlipForQuestionAnswering, BlipProcessor

    torch.manual_seed(seed)
    tokenizer = _bert_tokenizer()
    config = _blip_config(tokenizer, 16, initializer_range=0.2, bos_token_id=tokenizer.convert_tokens_to_ids("[DEC]"))
    BlipForQuestionAnswering(config).save_pretrained(directory)
    BlipProcessor(image_processor=_blip_images(16), tokenizer=tokenizer).save_pretrained(directory)
    return directory


def build_tiny_blip2(directory: Path, seed: int = 0) -> Path:
    """Save a ``Blip2ForConditionalGeneration`` of 16 px around an OPT, and its processor."""
    import torch
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )

    torch.manual_seed(seed)
    tokenizer = _bert_tokenizer()
    processor = Blip2Processor(image_processor=_blip_images(16), tokenizer=tokenizer, num_query_tokens=2)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    wide = shape | {"intermediate_size": 32, "initializer_range": 1.0}
    text = OPTConfig(
        **shape,
        ffn_dim=32,
        word_embed_proj_dim=16,
        vocab_size=len(tokenizer),
        max_position_embeddings=32,
        init_std=1.0,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**wide, image_size=16, patch_size=4).to_dict(),
        qformer_config=Blip2QFormerConfig(**wide, vocab_size=len(tokenizer)).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=2,
        image_token_index=len(tokenizer) - 1,
        initializer_range=1.0,
    )
    Blip2ForConditionalGeneration(config).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def build_tiny_clip(directory: Path, seed: int = 0) -> Path:
    """Save a ``CLIPModel`` of 16 px, 12 numbers wide, and its processor."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPVisionConfig

    torch.manual_seed(seed)
    tokenizer = _clip_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**shape, image_size=16, patch_size=4, initializer_factor=10.0)
    text = _text_encoder(CLIPTextModel, tokenizer).config
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    CLIPModel(config).save_pretrained(directory)
    size = {"shortest_edge": 16}
    CLIPImageProcessorPil(size=size, crop_size={"height": 16, "width": 16}).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def build_tiny_encoder(directory: Path, seed: int = 0) -> Path:
    """Save a ``BertModel`` of three layers and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    tokenizer = _bert_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    BertModel(BertConfig(**shape, vocab_size=len(tokenizer), initializer_range=0.5)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")


def _bert_tokenizer() -> "BertTokenizerFast":
    from transformers import BertTokenizerFast

    return BertTokenizerFast(
        vocab={token: index for index, token in enumerate((*_SPECIAL, *WORDS))},
        model_max_length=_TEXT_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def _blip_images(image_size: int) -> Any:
    from transformers import BlipImageProcessorPil

    size = {"height": image_size, "width": image_size}
    return BlipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def _blip_config(
    tokenizer: "BertTokenizerFast",
    image_size: int,
    initializer_range: float = 1.0,
    bos_token_id: int | None = None,  # [CLS]
) -> Any:
    from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    # The default range of BLIP's vision weights, 1e-10, would make it blind.
    vision = BlipVisionConfig(**shape, image_size=image_size, patch_size=image_size // 4, initializer_range=1.0)
    text = BlipTextConfig(
        **shape,
        vocab_size=len(tokenizer),
        projection_dim=16,
        max_position_embeddings=32,  # it never ends a caption by itself
        initializer_range=initializer_range,
        bos_token_id=tokenizer.cls_token_id if bos_token_id is None else bos_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    configs = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    return BlipConfig(**configs, projection_dim=16, image_text_hidden_size=16)


def _autoencoder(image_size: int, shift_factor: float | None = None) -> "AutoencoderKL":
    """Its latents are half as wide as its images."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=image_size,
        shift_factor=shift_factor,
    )


def _text_encoder(kind: Any, tokenizer: "CLIPTokenizer") -> Any:
    from transformers import CLIPTextConfig

    return kind(
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


def _t5_tokenizer() -> "T5Tokenizer":
    """A T5 tokenizer of ``WORDS`` and letters."""
    from string import ascii_lowercase

    from transformers import T5Tokenizer

    pieces = [*(f"▁{word}" for word in WORDS), "▁", *ascii_lowercase]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((each, -1.0 - len(each)) for each in pieces)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=_TEXT_LENGTH)


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
