"""Models tried out without their numbers: the libraries' own loaders, the network's first step with a prompt, LoRA and
the autoencoder on torch's meta device, in the memory of the code alone; and rewards with zeros for weights."""

from collections.abc import Sequence

import numpy as np
import torch

from pipelines.captioner import Captioner
from pipelines.measures.evaluator import load_evaluator
from pipelines.rewards import load_reward
from pipelines.rl.policy import DiffusionPolicy
from pipelines.rl.weights import prepare
from pipelines.settings import CaptionerSettings, ModelSettings, RewardSettings
from pipelines.storage.locations import find
from pipelines.storage.model_files import reading
from pipelines.videos import apart
from policies.rl.settings import SamplingSettings


def rehearse(
    model: ModelSettings,
    sampling: SamplingSettings,
    captioner: CaptionerSettings,
    reward: RewardSettings,
    evaluator: str | None,
    prompts: Sequence[str],
) -> None:
    """Try out what lies here, with a blank image. Raises ModelFilesError where files or models do not fit together."""
    height, width, channels, frames = _video_shape(model, sampling, prompts) if find(model.path) else (512, 512, 3, 1)
    video = np.zeros((1, height, width, channels), np.uint8)
    images = apart(video, frames)[:, 0]
    if captioner.path and find(captioner.path):
        words = Captioner(captioner, "meta")
        with reading(captioner.path), torch.no_grad():
            words.model.vision_model(words.pixels(images))
    for name, options in reward.functions.items():
        paths = options.model_paths.values()
        if paths and all(map(find, paths)):
            with reading(", ".join(paths)), np.errstate(all="ignore"):
                function = load_reward(name, options, "meta")
                for part in vars(function).values():
                    if isinstance(part, torch.nn.Module):  # zeros that take no memory
                        part._apply(lambda held: torch.zeros((), dtype=held.dtype).expand(held.shape))
                function(apart(video, frames) if options.of_videos else images, prompts[:1], ["an image"])
    if evaluator and (directory := find(evaluator)):
        with reading(directory):  # it is small
            load_evaluator(directory).judge(images, prompts[:1])


def _video_shape(model: ModelSettings, sampling: SamplingSettings, prompts: Sequence[str]) -> tuple[int, ...]:
    """(frames · height, width, 3, frames), of images with one frame."""
    policy = DiffusionPolicy(model, sampling, "meta")
    family, home, parts = policy.family, policy.family.files.directory, policy.family.pipeline.components
    for name in (name for name, part in parts.items() if name.startswith("tokenizer") and part is not None):
        with reading(home / name):
            ids = parts[name](["", *prompts], padding="max_length", max_length=77, truncation=True)["input_ids"]
            known = parts[name.replace("tokenizer", "text_encoder")].get_input_embeddings().num_embeddings
            if max(map(max, ids)) >= known:
                raise ValueError(f"it makes token {max(map(max, ids))}, and its text encoder knows {known}")
    with torch.no_grad():
        with reading(home):
            prepare(policy.network, model)
            conditions = policy.embed(["an image"] * 2)
        latents = torch.empty(2, *family.latent_shape, device="meta")
        with reading(home / family.network_name / "config.json"):
            output = policy.predict(latents, policy.schedule.timesteps[:1].repeat(2), conditions)
            if output.shape != latents.shape:
                raise ValueError(f"its network makes {tuple(output.shape[1:])} of {tuple(latents.shape[1:])}")
        with reading(home / "vae" / "config.json"):
            channels, *sides = family.decode(output.to(policy.dtype)).shape[1:]
            return (*sides, channels, family.files.frames)
