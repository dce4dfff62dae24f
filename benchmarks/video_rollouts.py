"""Reinforcement learning of videos: does a reward of each frame teach what is in them, and a reward of the whole video
what changes from frame to frame?

``python -m benchmarks.video_rollouts VIDEOS [DIRECTORY] [--seeds 3]`` trains VIDEOS, an ``AnimateDiffPipeline`` of
digits such as the product ``videos`` of the study edit_videos, with three rewards, or goes on where it was interrupted:
``frames``, what a captioner says of each frame's square around the ink; ``video``, steadiness and travel of the video;
``both``. An evaluator, which takes no part, says in how many held-out videos every frame shows what was asked for.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.one_process import train
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit
from pipelines.captioner import Captioner
from pipelines.measures.places import columns, squares
from pipelines.rewards import load_reward, parse_options
from pipelines.settings import CaptionerSettings
from pipelines.storage.locations import CHECKOUT
from policies.common.intervals import summary_of

FACTS = "benchmarks.video_rollouts:Facts"
OF_VIDEOS = {"steadiness": 5.0, "travel": 0.25}
ARMS: dict[str, dict[str, float]] = {"frames": {FACTS: 1.0}, "video": OF_VIDEOS, "both": {FACTS: 1.0, **OF_VIDEOS}}
RUN = [
    "captioner.path=null",
    "sampling.steps=[10, 2]",
    "sampling.eta=[1.0, 0, 0.3]",
    "training={steps: 15, images_per_step: 64, timestep_fraction: 1.0, learning_rate: 3e-4, clip_range: 6e-4}",
    "evaluation={images: 90, interim_images: 90, every: 15, patience: 0}",
]
SHOWN = ("evaluator/full", f"rewards/{FACTS}", "rewards/steadiness", "rewards/travel", "evaluation/diversity")


class Facts:
    """A reward of frames: the share of the prompt's facts that a captioner names of the square around the ink."""

    def __init__(self) -> None:
        self.captioner = Captioner(CaptionerSettings(path=str(CHECKOUT / "models/digits/captioner")))
        self.facts = load_reward("strict", parse_options("strict", {}))

    def __call__(self, images: np.ndarray, prompts: Sequence[str], captions: Sequence[str] | None) -> np.ndarray:
        seen = squares(images, columns(images))
        return np.asarray(self.facts(seen, prompts, self.captioner.caption(seen)))


def configured(videos: Path, arm: str, seed: int) -> DdpoConfig:
    """A run of an arm; what it is not trained on is measured."""
    reward = {"function": ARMS[arm], "held_out": [name for name in ARMS["both"] if name not in ARMS[arm]]}
    own = [f"model.path={videos}", f"reward={json.dumps(reward)}", f"seed={seed}"]
    return load_config(DdpoConfig, CHECKOUT / "configs/ddpo/digits.yaml", [*RUN, *own])


def curve(record: Path, config: DdpoConfig) -> list[dict[str, float]]:
    """The evaluations of a run, before and after, made once."""
    if not record.exists():
        lines = list(train(config))
        record.write_text(json.dumps({"commit": git_commit(), "lines": lines}))
    found: list[dict[str, float]] = json.loads(record.read_text())["lines"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos", type=Path)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("runs/video_rollouts"))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    print(f"commit {git_commit()}, {arguments.seeds} seeds: mean [95 % interval] before → after")
    runs = {
        (arm, seed): curve(arguments.directory / f"{arm}-{seed}.json", configured(arguments.videos, arm, seed))
        for seed in range(arguments.seeds)
        for arm in ARMS
    }
    print("".join(f"{name.rpartition('/')[2].rpartition(':')[2]:<34}" for name in ("reward", *SHOWN)))
    for arm in ARMS:
        cells = []
        for name in SHOWN:
            ends = np.array([[runs[arm, seed][at][name] for seed in range(arguments.seeds)] for at in (0, -1)])
            change = summary_of(name, ends[1] - ends[0], "plain")
            interval = f" [{change['low']:+.3f}, {change['high']:+.3f}]" if change["low"] is not None else ""
            cells.append(f"{ends[0].mean():.3f} → {ends[1].mean():.3f}{interval}")
        print(f"{arm:<34}" + "".join(f"{cell:<34}" for cell in cells))
    spent = np.median([lines[-1]["cpu_seconds"] for lines in runs.values()])
    print(f"CPU seconds of a run, median: {spent:.0f}")


if __name__ == "__main__":
    main()
