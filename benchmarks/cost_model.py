"""Does the cost model foresee the throughput of runs that it has not seen?

    python -m benchmarks.cost_model [--out runs/cost-model] [--rounds 5] [--only NAME …]

Stage costs are measured in this process, as ``ouroboros plan`` does, and corrected by two cases: one sampler at depth 0
(what Ray and the driver add to each stage), and at depth 1 (what the threads of a learner lose to a sampler beside
them). The others, with more samplers or another workload, are foreseen and then run: real runs in a Ray of this
machine, in alternation, ``--rounds`` times each. Compared are images a second between the first step and the last but
one, medians over the rounds. What is on record is not run again. Ends with 1 if a case that nothing was corrected by is
off by more than 20 %. ``others``: share of the cores that other processes took meanwhile, at most; above some percent
the figures mean little.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from scipy.optimize import minimize_scalar

from orchestration.cluster.ray_cluster import connected
from orchestration.experiments.ddpo.config import DdpoConfig
from orchestration.experiments.ddpo.preflight import preflight_ddpo
from orchestration.planning.cost_model import Forecast
from orchestration.planning.plan import foresee
from orchestration.planning.stage_costs import StageCosts, measure
from orchestration.runs.config import load_config
from orchestration.runs.manifest import git_commit
from pipelines.limits import cpu_limit

CONFIG = Path("configs/ddpo/digits.yaml")
TOLERANCE = 0.2
STEPS = 8  # six are compared: as many commits are in them as come in the long run
COMMON = [
    f"training.steps={STEPS}",
    "training.images_per_step=128",
    "checkpoint.every=3",
    "evaluation.evaluator=null",
    "evaluation.every=0",
    "evaluation.images=16",
    "evaluation.interim_images=16",
]
OTHER = ["sampling.steps=16", "training.updates_per_step=2", "actors.images_per_call=32"]
LORA = ["model.lora_rank=8", "training.updates_per_step=2"]
CASES = {  # the first two correct the costs
    "1 sampler": ["actors.samplers=1"],
    "1 sampler, depth 1": ["actors.samplers=1", "training.depth=1"],
    "2 samplers": ["actors.samplers=2"],
    "2 samplers, depth 1": ["actors.samplers=2", "training.depth=1"],
    "2 samplers, longer denoising": ["actors.samplers=2", *OTHER],
    "1 sampler, LoRA, depth 1": ["actors.samplers=1", "training.depth=1", *LORA],
}
SEEN = tuple(CASES)[:2]
STAGES = ("sample", "reward", "learn", "publish", "commit")


@dataclass(frozen=True)
class Correction:
    """Factors of what stages cost in one process, and what they cost the driver of a run."""

    sample: float = 1.0
    learn: float = 1.0
    publish: float = 1.0
    commit: float = 1.0
    driver: float = 0.0
    coupling: float = 1.0

    def of(self, known: StageCosts) -> StageCosts:
        """Corrected costs."""
        costs = known.costs.scaled(["sample"], self.sample).scaled(["gradient", "update", "learn"], self.learn)
        costs = costs.scaled(["publish"], self.publish).scaled(["commit"], self.commit)
        costs = costs.model_copy(update={"driver": self.driver})
        return known.model_copy(update={"costs": costs, "coupling": self.coupling})


def configured(case: str, *own: str) -> DdpoConfig:
    """The configuration of a case."""
    return load_config(DdpoConfig, CONFIG, [*COMMON, *CASES[case], *own])


def foreseen(case: str, known: StageCosts) -> Forecast:
    """The forecast of a case."""
    config = configured(case)
    plan = preflight_ddpo(config)
    return foresee(config, plan.roles, plan.offers, known, config.training.depth).forecast


def costs_of(out: Path, case: str) -> StageCosts:
    """Costs that are measured, or on record, for the models of a case."""
    config = configured(case)
    path = out / f"costs-lora{config.model.lora_rank}.json"
    if not path.exists():
        path.write_text(measure(config, preflight_ddpo(config)).model_dump_json(indent=1))
    return StageCosts.read(path, config)


def record_of(out: Path, case: str, number: int) -> Path:
    """Where a run is on record."""
    return out / f"{case.replace(', ', '-').replace(' ', '_')}-{number}.json"


def run(out: Path, case: str, number: int) -> dict[str, Any]:
    """One run of a case, or its record: images a second, what the driver waited for, and who else was at work."""
    from orchestration.experiments.ddpo.loop import run_ddpo

    record = record_of(out, case, number)
    directory = record.with_suffix("")
    if not record.exists():
        shutil.rmtree(directory, ignore_errors=True)
        before = _busy() - time.process_time()  # a summary counts all that this process used since it began
        began = time.monotonic()
        own = [f"seed={number}", f"output_dir={directory}", f"tracking.uri=sqlite:///{out.resolve()}/mlflow.db"]
        summary = json.loads(run_ddpo(configured(case, *own)).read_text())
        others = (_busy() - before - summary["cpu_seconds"]) / cpu_limit() / (time.monotonic() - began)
        lines = [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]
        kept = _observed(lines, summary["images"] / summary["steps"])
        record.write_text(json.dumps({"commit": git_commit(), "others": others, **kept}))
        shutil.rmtree(directory)
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def _busy() -> float:
    """CPU seconds of all processes of this machine so far."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.softirq


def _observed(lines: Sequence[Mapping[str, float]], images: float) -> dict[str, Any]:
    """Of the steps between the first line and the last but one."""
    steps = lines[1:-1]
    seconds = (steps[-1]["timestamp_ms"] - lines[0]["timestamp_ms"]) / 1000
    waits = {stage: sum(line.get(f"seconds/{stage}", 0.0) for line in steps) / len(steps) for stage in STAGES}
    waits["driver"] = seconds / len(steps) - sum(waits.values())
    return {"images_per_second": images * len(steps) / seconds, "waits": waits}


def corrected(known: StageCosts, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Correction:
    """What makes the forecasts of the cases ``SEEN`` what was measured."""
    synchronous, overlapped = SEEN
    seen = {
        stage: statistics.median(each["waits"][stage] for each in runs[synchronous]) for stage in (*STAGES, "driver")
    }
    found = Correction()
    for _ in range(4):  # stages that share cores hang together
        now = foreseen(synchronous, found.of(known)).waits
        late = seen["driver"] + seen["reward"] - now["driver"] - now["reward"]
        factors = {name: getattr(found, name) * seen[name] / now[name] for name in STAGES if name != "reward"}
        found = replace(found, **factors, driver=max(0.0, found.driver + late))
    speed = statistics.median(each["images_per_second"] for each in runs[overlapped])

    def wrong(coupling: float) -> float:
        tried = replace(found, coupling=coupling).of(known)
        return math.log(foreseen(overlapped, tried).images_per_second / speed) ** 2

    return replace(found, coupling=float(minimize_scalar(wrong, bounds=(1, 4), method="bounded").x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/cost-model"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="cases besides the two that correct")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if case in SEEN or not chosen.only or case in chosen.only]
    known = {case: costs_of(chosen.out, case) for case in cases}
    runs: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    missing = any(not record_of(chosen.out, case, n).exists() for case in cases for n in range(chosen.rounds))
    with connected(gpus=0) if missing else nullcontext():
        for number in range(chosen.rounds):
            for case in cases:
                runs[case].append(run(chosen.out, case, number))
                print(
                    f"{case} {number}: {runs[case][-1]['images_per_second']:.1f} images/s", file=sys.stderr, flush=True
                )
    correction = corrected(known[SEEN[0]], runs)
    path = chosen.out / "costs.json"
    path.write_text(correction.of(known[SEEN[0]]).model_dump_json(indent=1))
    print(f"commit {git_commit()}, {cpu_limit()} cores, medians of {chosen.rounds}; corrected costs: {path}")
    print(correction)
    print(f"{'case':<32}{'foreseen':>9}{'measured':>9}   images/s      others")
    failed = False
    for case in cases:
        speed = statistics.median(each["images_per_second"] for each in runs[case])
        error = foreseen(case, correction.of(known[case])).images_per_second / speed - 1
        verdict = "corrected by it" if case in SEEN else "kept" if abs(error) <= TOLERANCE else "MISSED"
        failed |= verdict == "MISSED"
        others = max(each["others"] for each in runs[case])
        print(f"{case:<32}{speed * (1 + error):>9.1f}{speed:>9.1f}  {error:>+8.1%}  {others:>8.0%}  {verdict}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
