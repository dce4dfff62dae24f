"""What language, reward and reinforcement do to a self-consuming loop: the claims of docs/joined_loops.md.

``python -m benchmarks.joined_loops DIRECTORY [CONFIG]`` runs configs/mad/joined_loops.yaml there, or goes on with it,
and prints each arm generation by generation, seconds, and each claim with its 95 % interval over paired seeds.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.experiments.mad.config import MadConfig
from orchestration.experiments.mad.loop import run_mad
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit
from policies.common.claims import Claim, judge

METRICS = ("prompt_accuracy", "caption_agreement", "reward", "fid", "precision", "recall")
Metrics = dict[str, dict[str, np.ndarray]]  # arm → metric → (seeds, generations)


def main(directory: Path, config: Path) -> None:
    """Run and print."""
    summary = json.loads(run_mad(load_config(MadConfig, config, [f"output_dir={directory}"])).read_text())
    arms = {
        name: {metric: np.array(known["values"], float) for metric, known in arm["metrics"].items()}
        for name, arm in summary["arms"].items()
    }
    print(f"\ncommit {git_commit()}, {len(summary['seeds'])} seeds, {summary['wall_seconds']:.0f} s wall")
    cpu = {stage: seconds for stage, seconds in summary["seconds_by_stage"].items() if stage.endswith("/cpu")}
    print("CPU seconds: " + ", ".join(f"{stage.removesuffix('/cpu')} {seconds:.0f}" for stage, seconds in cpu.items()))
    print(f"real against real: {summary['floor']}\n")
    for metric in METRICS:
        for name, known in arms.items():
            if metric in known:
                means = "".join(f"{value:8.3f}" for value in known[metric].mean(axis=0))
                print(f"{metric:<18}{name:<14}{means}")
    print()
    values: Any = {name: dict(_told(known)) for name, known in arms.items()}
    for claim in claims():
        found = judge(claim, values)
        interval = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        print(f"{found.outcome:<10} {claim.sentence}: {interval} {found.reason}".rstrip())


def _told(known: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """What claims speak of, a value a seed: at the last generation, and how it changed since the first."""
    for metric, values in known.items():
        yield metric, values[:, -1]
        yield f"change of {metric}", values[:, -1] - values[:, 0]
    if "reward" in known:
        gap = known["reward"] - known["prompt_accuracy"]
        yield "change of gap", gap[:, -1] - gap[:, 0]


def claims() -> Iterator[Claim]:
    """Each says which way it goes; what is expected was written down before the run."""
    accuracy = "prompt_accuracy"
    yield Claim("plain: words lose their meaning", f"change of {accuracy}", "plain", "at most", -0.05)
    for arm in ("recaptioned", "curated", "aligned"):
        difference: Any = {"direction": "at least", "bound": 0.0, "control": "plain", "kind": "difference"}
        yield Claim(f"{arm}: more images show their prompt than in the plain loop", accuracy, arm, **difference)
    yield Claim(
        "aligned: more than with shuffled rewards", accuracy, "aligned", "at least", 0.0, "shuffled", "difference"
    )
    for arm in ("recaptioned", "curated", "aligned", "shuffled"):
        yield Claim(
            f"{arm}: farther from real images than the plain loop", "fid", arm, "at least", 1.0, "plain", "ratio"
        )
        yield Claim(f"{arm}: less diverse", "recall", arm, "at most", 0.0, "plain", "difference")
    for arm in ("curated", "aligned"):
        yield Claim(f"{arm}: the gap of reward and judge grows", "change of gap", arm, "at least", 0.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "configs/mad/joined_loops.yaml"))
