"""One generation of a text-to-image loop on a pipeline of Stable Diffusion 1.5's true shape, with random weights.

``python -m benchmarks.text_to_image_sd15 DIRECTORY [--device cuda] [--lora-rank 4]`` builds the pipeline there (4 GB)
unless it is there, fits it in a few updates to captioned images of 512 pixels, draws an image as the next generation
would, and prints seconds and memory.
"""

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.erase_sd15 import build
from orchestration.runs.manifest import git_commit
from pipelines.generators.text_to_image import TextToImageGenerator, TextToImageSettings
from pipelines.storage.atomic import packed, unpacked
from policies.loops.samples import Samples

CAPTIONS = ("a red seven on a black background", "a blue two on a white background")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--lora-rank", type=int, default=0)
    given = parser.parse_args()
    if not (given.directory / "model_index.json").exists():
        build(given.directory)
    known: dict[str, Any] = {"path": str(given.directory), "from_scratch": False, "captioner": None, "evaluator": None}
    known |= {"training_steps": given.updates, "batch_size": 1, "sampling_steps": 2, "lora_rank": given.lora_rank}
    settings = TextToImageSettings(**known, learning_rate=1e-5)
    images = np.random.default_rng(0).integers(0, 256, (1, 2, 512, 512, 3), dtype=np.uint8)
    data, began = Samples(images, captions=np.array(CAPTIONS)[None]), time.perf_counter()

    def told(what: str) -> None:
        nonlocal began
        memory, now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, time.perf_counter()
        print(f"{what}: {now - began:.0f} s, {memory:.1f} GiB at most", flush=True)
        began = now

    print(f"commit {git_commit()}, LoRA rank {given.lora_rank}, {given.updates} updates on {given.device}")
    model = TextToImageGenerator.fit(settings, data, [0], device=given.device)
    told("fit, with loading")
    files = packed(model.save)
    print(f"kept of a generation: {sum(map(len, files.values())) / 1e6:,.0f} MB")
    again = unpacked(files, lambda directory: TextToImageGenerator.load(directory, given.device))
    told("saved and loaded")
    drawn = again.sample(1, [1], 1.0)
    told(f"drew {drawn.values.shape} for {drawn.captions[0, 0]!r}" if drawn.captions is not None else "drew")


if __name__ == "__main__":
    main()
