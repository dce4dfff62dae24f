"""What language, reward and reinforcement do to a self-consuming loop: the claims of docs/joined_loops.md.

``python -m benchmarks.joined_loops DIRECTORY [NAME]`` runs configs/mad/joined_loops.yaml there, or the one of ``NAME``,
or goes on with it, and prints each arm generation by generation, seconds, and each claim with its 95 % interval over
paired seeds. Names: joined_loops, caption_shares, reward_gap, neon.
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

ACCURACY = "prompt_accuracy"
METRICS = (ACCURACY, "caption_agreement", "reward", "fid", "precision", "recall")
Metrics = dict[str, dict[str, np.ndarray]]  # arm → metric → (seeds, generations)


def main(directory: Path, name: str = "joined_loops") -> None:
    """Run and print."""
    config = Path("configs/mad", f"{name}.yaml")
    summary = json.loads(run_mad(load_config(MadConfig, config, [f"output_dir={directory}"])).read_text())
    arms = {
        arm: {metric: np.array(known["values"], float) for metric, known in told["metrics"].items()}
        for arm, told in summary["arms"].items()
    }
    print(f"\ncommit {git_commit()}, {len(summary['seeds'])} seeds, {summary['wall_seconds']:.0f} s wall")
    cpu = {stage: seconds for stage, seconds in summary["seconds_by_stage"].items() if stage.endswith("/cpu")}
    print("CPU seconds: " + ", ".join(f"{stage.removesuffix('/cpu')} {seconds:.0f}" for stage, seconds in cpu.items()))
    print(f"real against real: {summary['floor']}\n")
    for metric in METRICS:
        for arm, known in arms.items():
            if metric in known:
                means = "".join(f"{value:8.3f}" for value in known[metric].mean(axis=0))
                print(f"{metric:<18}{arm:<26}{means}")
    print()
    values: Any = {arm: dict(_told(known)) for arm, known in arms.items()}
    for claim in CLAIMS[name]():
        found = judge(claim, values)
        interval = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        print(f"{found.outcome:<10} {claim.sentence}: {interval} {found.reason}".rstrip())


def _told(known: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """What claims speak of, a value a seed: at the last generation, and how it changed since the first."""
    for metric, values in known.items():
        yield metric, values[:, -1]
        yield f"change of {metric}", values[:, -1] - values[:, 0]
    if "reward" in known:
        gap = known["reward"] - known[ACCURACY]
        yield "change of gap", gap[:, -1] - gap[:, 0]


def _against(
    sentence: str, metric: str, arm: str, direction: Any, control: str, bound: float = 0.0, kind: Any = "difference"
) -> Claim:
    return Claim(sentence, metric, arm, direction, bound, control, kind)


def joined() -> Iterator[Claim]:
    """Each says which way it goes; what is expected was written down before the run."""
    yield Claim("plain: words lose their meaning", f"change of {ACCURACY}", "plain", "at most", -0.05)
    for arm in ("recaptioned", "curated", "aligned"):
        sentence = f"{arm}: more images show their prompt than in the plain loop"
        yield _against(sentence, ACCURACY, arm, "at least", "plain")
    yield _against("aligned: more than with shuffled rewards", ACCURACY, "aligned", "at least", "shuffled")
    for arm in ("recaptioned", "curated", "aligned", "shuffled"):
        sentence = f"{arm}: farther from real images than the plain loop"
        yield _against(sentence, "fid", arm, "at least", "plain", 1.0, "ratio")
        yield _against(f"{arm}: less diverse", "recall", arm, "at most", "plain")
    for arm in ("curated", "aligned"):
        yield Claim(f"{arm}: the gap of reward and judge grows", "change of gap", arm, "at least", 0.0)


def shares() -> Iterator[Claim]:
    """Of a captioner's words."""
    for share in ("0.65", "0.8", "0.95", "1"):
        yield _against(f"{share}: more images show their prompt than with none", ACCURACY, share, "at least", "0")
        yield _against(f"{share}: less diverse than with none", "recall", share, "at most", "0")
    sentence = "a captioner that is trained on with what it is fed holds less than a frozen one"
    yield _against(sentence, ACCURACY, "1, refitted", "at most", "1")


def gap() -> Iterator[Claim]:
    """Of reward and judge, by the share of real data."""
    shares = ("0.25", "0.5", "0.25 fresh", "0.5 fresh", "0.75 fresh")
    for share in ("0", *shares):
        yield Claim(f"{share} real: the gap of reward and judge grows", "change of gap", share, "at least", 0.0)
    for share in shares:
        yield _against(f"{share} real: it grows less than with none", "change of gap", share, "at most", "0")
        yield _against(f"{share} real: more images show their prompt", ACCURACY, share, "at least", "0")


def neon() -> Iterator[Claim]:
    """Against the same fit as it is, and against a longer one of as many updates."""
    for weight in ("0.5", "1"):
        for control in ("seeks modes", "seeks modes, longer"):
            sentence = f"neon {weight} is nearer to real images than '{control}'"
            yield _against(sentence, "fid", f"seeks modes, {weight}", "at most", control, 1.0, "ratio")
        yield _against(f"neon {weight}: more diverse", "recall", f"seeks modes, {weight}", "at least", "seeks modes")
    for sampler in ("seeks modes", "unbiased"):
        sentence = f"{sampler}: trained on with its own samples it is farther"
        yield _against(sentence, "fid", f"{sampler}, own samples", "at least", sampler, 1.0, "ratio")
    yield _against("unbiased: neon 0.5 gains nothing", "fid", "unbiased, 0.5", "at least", "unbiased", 1.0, "ratio")


CLAIMS = {"joined_loops": joined, "caption_shares": shares, "reward_gap": gap, "neon": neon}


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
