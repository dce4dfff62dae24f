"""Can a reward teach anything? Its means over images that fit their prompts, over the same with others, over noise."""

from collections.abc import Sequence

import numpy as np

from orchestration.crew import Crew
from policies.streams import derive_seed


def calibrate(crew: Crew, prompts: Sequence[str], images: np.ndarray) -> dict[str, float]:
    """calibration/true, /shuffled and /noise for ``images`` (n, height, width, 3) uint8 that fit ``prompts``."""
    rng = np.random.default_rng(derive_seed(0, "calibration"))
    shift = int(rng.integers(1, len(prompts))) if len(prompts) > 1 else 0
    cases = {
        "true": (images, list(prompts)),
        "shuffled": (images, [*prompts[shift:], *prompts[:shift]]),
        "noise": (rng.integers(0, 256, images.shape, dtype=np.uint8), list(prompts)),
    }
    means = {}
    for name, (pictures, words) in cases.items():
        chunks = crew.put(pictures, words)
        crew.score(chunks)
        means[f"calibration/{name}"] = float(crew.rewarded(chunks, f"calibration: {name}").mean())
    return means
