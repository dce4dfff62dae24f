"""Images into captions with a BLIP or BLIP-2 model, greedily, so that a caption is a function of the image."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipelines.precision import in_half
from pipelines.processing import preprocessed
from pipelines.settings import CaptionerSettings
from pipelines.storage.locations import resolve_model
from pipelines.storage.model_files import load_tokenizer, load_whole, quieten, reading
from pipelines.videos import BREAK, frames_of
from policies.rl.health import DegenerateBatch


class Captioner:
    """Any ``BlipForConditionalGeneration`` or ``Blip2ForConditionalGeneration`` with its processor and tokenizer."""

    def __init__(self, settings: CaptionerSettings, device: str = "cpu", half: bool = False, frames: int = 1) -> None:
        """``half``: whether it computes in half precision on a card; ``frames``: of a video, if it captions videos."""
        quieten()
        import transformers

        path = resolve_model(str(settings.path))
        self.device = torch.device(device)
        with reading(path):
            kind = transformers.AutoConfig.from_pretrained(path).model_type
            if kind not in ("blip", "blip-2"):
                raise ValueError(f"captioner.path: {kind} is no captioner; name a model of BLIP or BLIP-2")
            self.model = load_whole(transformers.AutoModelForImageTextToText, path, device)
            self.image_processor = transformers.BlipImageProcessorPil.from_pretrained(path)
            self.tokenizer = load_tokenizer(path)
        self.kind, self.max_new_tokens, self.frames = kind, settings.max_new_tokens, frames
        # The T5 of some BLIP-2 has numbers beyond float16's.
        self.precision = partial(in_half, device, half, "float16" if kind == "blip" else "bfloat16")

    def pixels(self, images: np.ndarray) -> Tensor:
        """What the model sees of ``images`` (batch, height, width, 3) uint8: (batch, 3, its height, its width)."""
        pixels = self.image_processor(list(images), return_tensors="pt")["pixel_values"]
        return pixels.to(self.device, self.model.vision_model.dtype)

    def caption(self, images: np.ndarray) -> list[str]:
        """Captions of ``images`` (batch, height, width, 3) uint8; of a video those of its frames, a line each. Raises
        DegenerateBatch if a caption is empty."""
        each = self._captions(frames_of(images, self.frames))
        return [BREAK.join(each[at : at + self.frames]) for at in range(0, len(each), self.frames)]

    @torch.inference_mode()
    def _captions(self, images: np.ndarray) -> list[str]:
        pixels, limit = self.pixels(images), self.max_new_tokens
        with self.precision():
            tokens = self.model.generate(pixel_values=pixels, max_new_tokens=limit, do_sample=False, num_beams=1)
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        # BLIP's own start token stays, and a caption is a line.
        captions = [" ".join(text.strip().removeprefix("[DEC]").split(BREAK)).strip() for text in texts]
        if not all(captions):
            raise DegenerateBatch(f"the captioner returned nothing for image {captions.index('')} of {len(captions)}")
        return captions

    @torch.inference_mode()
    def chances(self, images: np.ndarray, words: Sequence[str]) -> np.ndarray:
        """For ``images`` (batch, height, width, 3) uint8 the largest probability (batch,) that one of ``words``, by its
        first token, has at any place of the caption."""
        tokenizer, limit = self.tokenizer, self.max_new_tokens
        wanted = sorted({tokenizer(word, add_special_tokens=False).input_ids[0] for word in words})
        marks = tokenizer.sep_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        ends = [each for each in marks if each is not None]
        how = {"do_sample": False, "num_beams": 1, "output_scores": True, "return_dict_in_generate": True}
        with self.precision():
            found = self.model.generate(pixel_values=self.pixels(images), max_new_tokens=limit, **how)
        chance = torch.stack([step.float().softmax(dim=-1)[:, wanted].sum(dim=-1) for step in found.scores], dim=1)
        ended = torch.isin(found.sequences[:, -len(found.scores) :], torch.tensor(ends, device=chance.device))
        chance[:, 1:][ended.cumsum(dim=1)[:, :-1] > 0] = 0  # what is said after the end is not said
        return chance.amax(dim=1).cpu().numpy()

    def log_probability(self) -> "Callable[[Tensor, Sequence[str]], Tensor] | None":
        """That it says a text of an image, as a function of images (batch, 3, height, width) in [0, 1] and texts →
        (batch,), of which gradients with respect to the images are known; None of a BLIP-2."""
        return self._log_probability if self.kind == "blip" else None

    def _log_probability(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Σ log p over the tokens of each text and the end token, each given those before it, as ``generate`` draws."""
        config = self.model.config.text_config
        said = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        said = [[config.bos_token_id, *ids, config.sep_token_id] for ids in said]
        most = max(map(len, said))
        tokens = torch.tensor([ids + [config.pad_token_id] * (most - len(ids)) for ids in said], device=images.device)
        counts = torch.tensor([[place < len(ids) for place in range(1, most)] for ids in said], device=images.device)
        pixels = preprocessed(self.image_processor, images).to(self.model.vision_model.dtype)
        seen = self.model.vision_model(pixel_values=pixels).last_hidden_state
        # What stands behind a text's end is seen by no token before it, as the decoder is causal.
        logits = self.model.text_decoder(input_ids=tokens[:, :-1], encoder_hidden_states=seen).logits.float()
        each = logits.log_softmax(dim=-1).gather(2, tokens[:, 1:, None])[..., 0]
        return (each * counts).sum(dim=1)
