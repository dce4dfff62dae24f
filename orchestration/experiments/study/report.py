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
from policies.common.intervals import summary_of
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
    products = sorted(path for of_arm in run.products.values() for path in of_arm)
    draw(run)
    found = "claims: " + ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES)
    return conclude(run, path, found, lines=lines, products=products)


def draw(run: StudyRun) -> None:
    """The values of every arm and seed, claimed metrics first."""
    from pipelines.figures.arms import arm_values

    directory, values = run.directory / "figures", run.values()
    directory.mkdir(exist_ok=True)
    names = dict.fromkeys([*run.first, *(name for held in values.values() for name in held)])
    metrics = {name: {arm: np.array(held[name]) for arm, held in values.items() if name in held} for name in names}
    if shown := {name: arms for name, arms in [*metrics.items()][:_MOST_PANELS] if arms}:
        arm_values(directory / "arms.png", shown, run.scale)
        arm_values(directory / "glance.png", dict([*shown.items()][:3]), run.scale, glance=True)


def summarise(run: StudyRun) -> dict[str, Any]:
    """What machines read of a study: of each metric the values, one a seed, and their mean with its interval."""
    config, values = run.config, run.values()
    arms = {
        arm: {
            "metrics": {name: summary_of(name, np.array(of), run.scale(name)) for name, of in values[arm].items()},
            "products": sorted(run.products[arm]),
        }
        for arm in config.arms
    }
    claims = [asdict(claim) | asdict(judge(claim, values)) for claim in run.plan.claims]
    found = {"name": config.name, "study": config.study, "seeds": config.seed_list, "arms": arms, "claims": claims}
    content: dict[str, Any] = plain(found)
    return content
