"""Images into captions with a BLIP captioning model, greedily, so that a caption is a function of the image."""

import numpy as np
import torch

from pipelines.locations import resolve_model
from pipelines.settings import CaptionerSettings
from policies.health import SickNumbers


class Captioner:
    """Any ``BlipForConditionalGeneration`` with its own image processor and tokenizer."""

    def __init__(self, settings: CaptionerSettings, device: str = "cpu") -> None:
        from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipImageProcessorPil

        if settings.path is None:
            raise ValueError("captioner.path is null: there is no captioner to load")
        path = resolve_model(settings.path)
        self.device = torch.device(device)
        self.model = BlipForConditionalGeneration.from_pretrained(path, use_safetensors=True).eval().to(self.device)
        self.image_processor = BlipImageProcessorPil.from_pretrained(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.max_new_tokens = settings.max_new_tokens

    @torch.inference_mode()
    def caption(self, images: np.ndarray) -> list[str]:
        """Captions of ``images`` (batch, height, width, 3) uint8. Raises SickNumbers if a caption is empty."""
        pixels = self.image_processor(list(images), return_tensors="pt")["pixel_values"].to(self.device)
        tokens = self.model.generate(
            pixel_values=pixels, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1
        )
        captions = [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        captions = [text.removeprefix("[DEC]").strip() for text in captions]  # BLIP's own start token survives decoding
        if not all(captions):
            raise SickNumbers(f"the captioner returned nothing for image {captions.index('')} of {len(captions)}")
        return captions
