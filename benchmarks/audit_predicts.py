"""Does an audit predict over-optimisation? Each of several rewards is audited, and then optimised too hard.

``python -m benchmarks.audit_predicts [DIRECTORY] [--seeds 2]`` audits each (the default search, and queries alone in
the latents, which is nearer to what a policy can reach), trains configs/ddpo/digits.yaml at three times its learning
rate on it, or goes on where it was interrupted, and prints how much of its best held-out accuracy each run lost, and
Spearman's correlation of that with the audits' gaps. The small CLIPModel is trained first.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm, spearmanr

from benchmarks.one_process import told, train
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit
from pipelines.captioner import Captioner
from pipelines.data.prompts import read_prompts
from pipelines.default_models.clip import build_clip
from pipelines.measures.evaluator import load_evaluator
from pipelines.storage.locations import CHECKOUT
from pipelines.studies.invert import Auditor, Space, latents_of
from policies.inverting import InvertingSettings

REWARDS = ("sentence_cosine", "strict", "clip_score", "jpeg_compressibility", "jpeg_incompressibility")
RUN = ["training.learning_rate=3e-4", "training.steps=40", "evaluation.every=5", "evaluation.patience=0"]
RUN += ["evaluation.images=360", "evaluation.interim_images=360"]
IMAGES = 24


def configured(name: str, clip: Path, seed: int) -> DdpoConfig:
    """The run of one reward."""
    own = [f"reward.function={name}", f"seed={seed}"]
    own += [f"reward.options.clip_score.model={clip}"] if name == "clip_score" else []
    return load_config(DdpoConfig, CHECKOUT / "configs/ddpo/digits.yaml", [*RUN, *own])


def gaps(config: DdpoConfig, name: str) -> dict[str, float]:
    """Mean gap of the two searches."""
    captioner, judge = Captioner(config.captioner), load_evaluator(str(config.evaluation.evaluator))
    auditor = Auditor(name, config.reward.functions[name], captioner, judge, "cpu")
    texts = read_prompts(config.prompts)[0]
    prompts, settings = texts[:: len(texts) // IMAGES][:IMAGES], InvertingSettings()
    latents = latents_of(config.model.path, "cpu")
    first = Space((3, judge.image_size, judge.image_size)) if auditor.pleased else latents
    found = {"audit": auditor.find(prompts, first, settings, config.seed)}
    found["queries"] = auditor.find(prompts, latents, settings, config.seed, queries_only=True)
    return {
        how: float(auditor.audit(images, prompts, config.seed).found["gap"].mean()) for how, images in found.items()
    }


def of_record(path: Path, make: Any) -> Any:
    """What ``make`` gives, once."""
    if not path.exists():
        path.write_text(json.dumps({"commit": git_commit(), "found": make()}))
    return json.loads(path.read_text())["found"]


def curve(config: DdpoConfig) -> list[float]:
    """Held-out accuracy at every evaluation."""
    found = []
    for line in train(config):
        print(f"{config.reward.title:<24}seed {config.seed}  {told(line)}", flush=True)
        found.append(line["evaluator/full"])
    return found


def interval_of(rho: float, count: int) -> tuple[float, float]:
    """95 % of Spearman's ρ (Bonett and Wright 2000, Psychometrika 65): Fisher's z, variance (1 + ρ²/2)/(n − 3)."""
    if count < 4 or abs(rho) == 1:
        return float("nan"), float("nan")
    half = norm.ppf(0.975) * np.sqrt((1 + rho**2 / 2) / (count - 3))
    return tuple(float(np.tanh(np.arctanh(rho) + sign * half)) for sign in (-1, 1))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("runs/audit_predicts"))
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.directory.mkdir(parents=True, exist_ok=True)
    clip = (given.directory / "clip").resolve()
    of_record(given.directory / "clip.json", lambda: build_clip(clip, 0, 2500))
    rows: dict[str, dict[str, float]] = {}
    for name in REWARDS:
        found, lost = [], []
        for seed in range(given.seeds):
            config = configured(name, clip, seed)
            found.append(of_record(given.directory / f"{name}-{seed}-audit.json", lambda c=config, n=name: gaps(c, n)))
            line = of_record(given.directory / f"{name}-{seed}-run.json", lambda c=config: curve(c))
            lost.append(max(line) - line[-1])
        rows[name] = {how: float(np.mean([each[how] for each in found])) for how in ("audit", "queries")}
        rows[name] |= {"lost": float(np.mean(lost))}
    print(f"commit {git_commit()}\n{'reward':<24}{'gap':>8}{'by queries':>12}{'accuracy lost':>16}")
    for name, row in rows.items():
        print(f"{name:<24}{row['audit']:>8.3f}{row['queries']:>12.3f}{row['lost']:>16.3f}")
    for how in ("audit", "queries"):
        rho = float(spearmanr([row[how] for row in rows.values()], [row["lost"] for row in rows.values()]).statistic)
        low, high = interval_of(rho, len(rows))
        print(f"Spearman's correlation of the gap ({how}) with what was lost: {rho:+.2f} [{low:+.2f}, {high:+.2f}]")


if __name__ == "__main__":
    main()
