"""What stands behind each ready-made configuration: run to its end here, in part, or as a dry run only.

    python -m benchmarks.evidence DIRECTORY [--minutes 40] [--only NAME …]

runs every configuration of configs/ as it is, or smaller where it takes hours, and those of other machines' sizes and
models as a dry run, cheap ones first, and prints the table of docs/configs.md. What was done is kept in DIRECTORY and
not done again; a run that time ended goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.runs.manifest import git_commit
from pipelines.storage.locations import CHECKOUT

LEVELS = {"whole": "run to its end", "part": "run in part", "dry": "dry run only"}
DRY = ("--dry-run",)
GPUS = ("--dry-run", "--gpus", "8")
MAIN = ("fid", "w2_squared", "total_variation")
RECIPES, SCALES = "configs/recipes", "configs/scale"


@dataclass(frozen=True)
class Case:
    """A configuration (with others over it), what is asked of it, and the words that make it smaller."""

    loop: str
    files: tuple[str, ...]
    level: str = "whole"
    words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " + ".join(file.removeprefix("configs/").removesuffix(".yaml") for file in self.files)


def cases() -> Iterator[Case]:
    """In the order of what they take."""
    for task in ("compressibility", "incompressibility", "alignment"):
        yield Case("ddpo", (f"configs/ddpo/{task}.yaml",), "dry", DRY)
    for scale in ("1-gpu", "8-gpus"):
        yield Case("ddpo", ("configs/ddpo/compressibility.yaml", f"{SCALES}/{scale}.yaml"), "dry", GPUS)
    large = ("configs/ddpo/compressibility.yaml", f"{SCALES}/64-gpus.yaml")
    yield Case("ddpo", large, "dry", ("--dry-run", "--gpus", "64"))
    for recipe in ("ddpo-pytorch", "sdxl", "flow-grpo", "without-guidance", "without-guidance-flow"):
        yield Case("ddpo", ("configs/ddpo/alignment.yaml", f"{RECIPES}/{recipe}.yaml"), "dry", GPUS)
    for name in ("categorical", "gaussian", "gaussian_loops", "mixture", "effective_sample_size", "memory"):
        yield Case("mad", (f"configs/mad/{name}.yaml",))
    yield Case("ddpo", ("configs/ddpo/digits.yaml",))
    yield Case("ddpo", ("configs/ddpo/digits-lora.yaml",))
    for recipe in ("noisier-half", "diffusion-nft", "diffusion-nft-5-steps", "three-calls"):
        yield Case("ddpo", ("configs/ddpo/digits.yaml", f"{RECIPES}/{recipe}.yaml"))
    for recipe in ("noise-at-first", "five-calls"):  # the second is the demonstration
        yield Case("ddpo", ("configs/ddpo/digits.yaml", f"{RECIPES}/{recipe}.yaml"), "whole", ("training.steps=25",))
    yield Case("sweep", ("configs/sweeps/gaussian_phase.yaml",))
    yield Case("mad", ("configs/mad/neon.yaml",))
    yield Case("mad", ("configs/mad/digits.yaml",), "part", ("generations=2", "seeds=1"))
    yield Case("mad", ("configs/mad/digits_strong_bias.yaml",), "part", ("generations=3", "seeds=1"))
    yield Case("mad", ("configs/mad/fresh_fraction.yaml",), "part", ("generations=3", "seeds=1"))
    yield Case("mad", ("configs/mad/gan.yaml",), "part", ("generations=3", "seeds=2"))
    for name in ("caption_shares", "text_to_image"):
        yield Case("mad", (f"configs/mad/{name}.yaml",), "part", ("generations=2", "seeds=1"))
    for name in ("joined_loops", "reward_gap"):
        yield Case("mad", (f"configs/mad/{name}.yaml",))
    for name, words in {
        "ddpo_asha": ("trials=2", "fixed={training.steps: 10, evaluation.every: 5}", "confirm_seeds=0"),
        "ddpo_pbt": ("trials=4", "fixed={training.steps: 20, evaluation.every: 10}"),
        "rewards": ("fixed={training.steps: 4}", "seeds=1"),
        "digits_phase": ("fixed={arms: {}, generations: 2}", "seeds=1", "space.sampling_bias=[1.0, 0.5]"),
    }.items():
        yield Case("sweep", (f"configs/sweeps/{name}.yaml",), "part", words)
    yield Case("sweep", ("configs/sweeps/aligned_phase.yaml",))
    for path in sorted((CHECKOUT / "configs/studies").glob("*.yaml")):
        yield Case("study", (f"configs/studies/{path.name}",))


def run(case: Case, directory: Path, seconds: float) -> dict[str, Any]:
    """What came of it: its outcome, seconds, and figures."""
    place = directory / f"{case.name.replace('/', '-').replace(' + ', '--')}-{git_commit()[:7]}"
    files = [word for file in case.files for word in ("--config", file)]
    own = [] if case.level == "dry" else [f"output_dir={place}"]
    words = [case.loop, *files, *own, *case.words]
    if (place / "manifest.json").exists() and case.loop == "ddpo":
        words = ["resume", str(place)]
    began, log = time.monotonic(), directory / "log.txt"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "orchestration.cli", *words]
        process = subprocess.Popen(command, cwd=CHECKOUT, stdout=file, stderr=file)
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(timeout=60)
            status = 124
    found = {"status": status, "seconds": round(time.monotonic() - began), "commit": git_commit()[:7]}
    summary = place / "summary.json"
    if status:
        return found | {"figures": log.read_text(errors="replace").strip().splitlines()[-1:]}
    return found | {"figures": figures(json.loads(summary.read_text()), case.loop) if summary.exists() else ""}


def figures(summary: dict[str, Any], loop: str) -> str:
    """The one or two numbers that a run is about."""
    if loop == "ddpo":
        before, after = (summary[f"evaluator_accuracy_{when}"] for when in ("before", "after"))
        return f"accuracy {before:.3f} → {after:.3f}"
    if loop == "mad":
        arms = list(summary["arms"].values())
        known = arms[0]["metrics"]
        metric = next(name for name in (*MAIN, *known) if name in known)
        last = sorted(float(np.mean([row[-1] for row in arm["metrics"][metric]["values"]])) for arm in arms)
        return f"last {metric} {last[0]:.3g}" + (f" to {last[-1]:.3g} in {len(arms)} arms" if len(arms) > 1 else "")
    if loop == "sweep":
        best = summary["best"]["point"]
        at = ", ".join(f"{name.split('.')[-1]} {v:.3g}" if isinstance(v, float) else f"{v}" for name, v in best.items())
        return f"{len(summary['trials'])} trials, best {summary['metric']} {summary['best']['mean']:.3g} at {at}"
    return f"{len(summary['claims'])} claims"


def table(done: dict[str, Any]) -> str:
    """For docs/configs.md."""
    lines = ["| configuration | evidence | commit | seconds | what came out |", "|---|---|---|---|---|"]
    for case in cases():
        known = done.get(case.name)
        if known is None or known["status"]:
            level = "nothing" if known is None else f"failed: {known['figures']}"
            lines.append(f"| `{case.name}` | {level} | | | |")
            continue
        smaller = f": `{' '.join(case.words)}`" if case.level == "part" else ""
        level = f"{LEVELS[case.level]}{smaller}"
        lines.append(f"| `{case.name}` | {level} | {known['commit']} | {known['seconds']} | {known['figures']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--only", nargs="+", default=[])
    chosen = parser.parse_args()
    chosen.directory.mkdir(parents=True, exist_ok=True)
    kept = chosen.directory / "evidence.json"
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    end = time.monotonic() + 60 * chosen.minutes
    for case in cases():
        wanted = not chosen.only or case.name in chosen.only
        left = end - time.monotonic()
        if wanted and left > 5 and done.get(case.name, {}).get("status") != 0:
            found = run(case, chosen.directory.resolve(), left)
            if found["status"] != 124:
                done[case.name] = found
                kept.write_text(json.dumps(done, indent=1))
            print(f"{case.name}: {found}", flush=True)
    print(table(done))
    return 1 if any(known["status"] for known in done.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
