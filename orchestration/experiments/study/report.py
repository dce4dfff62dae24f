"""What a study leaves to look at: summary.json, its claims, figures, report.html, and what the terminal says."""

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from orchestration.experiments.study.run import StudyRun
from orchestration.runs.html_report import conclude
from orchestration.runs.tables import claim_lines
from policies.common.claims import OUTCOMES, judge
from policies.common.intervals import interval, scale_of
from policies.loops.verdicts import plain

_MOST_PANELS = 12


def report(run: StudyRun) -> Path:
    """Judge the claims, write figures and summary.json, hand them to MLflow, say what came out. Returns the summary's
    path."""
    summary = summarise(run)
    path = run.summarise(summary)
    run.flush()
    lines = claim_lines(summary["claims"])
    run.tracker.tags({f"claim/{number:02d}": line for number, line in enumerate(lines, 1)})
    counts = Counter(claim["outcome"] for claim in summary["claims"])
    run.tracker.metrics(0, {f"claims/{outcome}": counts[outcome] for outcome in OUTCOMES}, int(1000 * time.time()))
    return conclude(
        run, path, draw(run), lines=lines, products=sorted(path for of_arm in run.products.values() for path in of_arm)
    )


def draw(run: StudyRun) -> Path:
    """The values of every arm and seed, claimed metrics first. Returns the directory of all figures."""
    from pipelines.figures.mad import arm_values

    directory, values = run.directory / "figures", run.values()
    directory.mkdir(exist_ok=True)
    names = dict.fromkeys(
        [*(claim.metric for claim in run.plan.claims), *(name for arm in values.values() for name in arm)]
    )
    metrics = {name: {arm: np.array(held[name]) for arm, held in values.items() if name in held} for name in names}
    if shown := {name: arms for name, arms in [*metrics.items()][:_MOST_PANELS] if arms}:
        arm_values(directory / "arms.png", shown)
    return directory


def summarise(run: StudyRun) -> dict[str, Any]:
    """What machines read of a study."""
    values = run.values()
    arms = {
        arm: {
            "metrics": {name: _metric(name, of_seeds) for name, of_seeds in values[arm].items()},
            "products": sorted(run.products[arm]),
        }
        for arm in run.config.arms
    }
    claims = [asdict(claim) | asdict(judge(claim, values)) for claim in run.plan.claims]
    found = {"name": run.config.name, "study": run.config.study, "seeds": run.config.seed_list}
    content: dict[str, Any] = plain(found | {"arms": arms, "claims": claims})
    return content


def _metric(name: str, of_seeds: list[float]) -> dict[str, Any]:
    """A metric's ``values``, one a seed, their mean and its 95 % interval."""
    mean, low, high = map(float, interval(np.array(of_seeds), scale_of(name)))
    return {"values": of_seeds, "mean": mean, "low": low, "high": high}
