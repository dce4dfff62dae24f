"""Images into captions with a BLIP or BLIP-2 model, greedily, so that a caption is a function of the image."""

import numpy as np
import torch

from pipelines.locations import resolve_model
from pipelines.model_files import load_whole, quieten, reading
from pipelines.settings import CaptionerSettings
from policies.health import SickNumbers


class Captioner:
    """Any ``BlipForConditionalGeneration`` or ``Blip2ForConditionalGeneration`` with its processor and tokenizer."""

    def __init__(self, settings: CaptionerSettings, device: str = "cpu") -> None:
        quieten()
        import transformers

        path = resolve_model(str(settings.path))
        self.device = torch.device(device)
        options = {"device_map": "meta"} if device == "meta" else {}  # shapes alone
        with reading(path):
            kind = transformers.AutoConfig.from_pretrained(path).model_type
            if kind not in ("blip", "blip-2"):
                raise ValueError(f"captioner.path: {kind} is no captioner; name a model of BLIP or BLIP-2")
            model = load_whole(transformers.AutoModelForImageTextToText, path, use_safetensors=True, **options)
            self.model = model.eval().to(self.device)
            self.image_processor = transformers.BlipImageProcessorPil.from_pretrained(path)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.max_new_tokens = settings.max_new_tokens

    @torch.inference_mode()
    def caption(self, images: np.ndarray) -> list[str]:
        """Captions of ``images`` (batch, height, width, 3) uint8. Raises SickNumbers if a caption is empty."""
        pixels = self.image_processor(list(images), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.device, self.model.vision_model.dtype)
        tokens = self.model.generate(
            pixel_values=pixels, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1
        )
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        captions = [text.strip().removeprefix("[DEC]").strip() for text in texts]  # BLIP's own start token stays
        if not all(captions):
            raise SickNumbers(f"the captioner returned nothing for image {captions.index('')} of {len(captions)}")
        return captions
