"""Ouroboros, TRL 0.23.1 and the bare network on the same pipelines with the same settings, alternating in one run.

    python -m benchmarks.ddpo_vs_trl [--out runs/ddpo-vs-trl] [--rounds 5] [--guidance 5]

An epoch is 64 images × 10 denoising steps and 4 updates of 16 images. TRL is given sampling and training batches of
64/16, 4/4 and 1/1, and accumulates gradients so that each update has its 16 images; Ouroboros has no such setting:
it finds its calls by itself, so one measurement a round stands beside all three. One thread each, a reward that costs
nothing. Rounds already on record in ``--out`` are not run again. Prints CPU seconds (medians) and ratios, and writes
``table.json``.
"""

import argparse
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from actors.worker import keep_memory
from benchmarks.floor import Floor, Seconds, timed
from benchmarks.peer import PACKAGES, Trl, environment
from benchmarks.shared_pipelines import SIZES, random_pipeline
from orchestration.runs.manifest import git_commit
from pipelines.rl.learning import DiffusionLearner
from pipelines.rl.policy import DiffusionPolicy
from pipelines.settings import ModelSettings
from policies.rl.settings import SamplingSettings, TrainingSettings

IMAGES, STEPS, UPDATES, RANK = 64, 10, 4, 4  # TRL's LoRA has rank 4
BATCHES = ((64, 16), (4, 4), (1, 1))
ASKED = {  # at least so many times faster than TRL, by CPU time
    ("whole", 64): 1.10,
    ("LoRA", 64): 1.15,
    ("whole", 4): 1.5,
    ("LoRA", 4): 1.8,
    ("LoRA", 1): 2.8,
}
FLOOR_SHARE = 0.95
PROMPTS = [
    f"a {ink} {digit} on a black background" for ink in ("red", "blue") for digit in ("one", "two", "six", "ten")
]
Times = dict[str, float]


class Ours:
    """Sampler and learner in one process."""

    def __init__(self, model: ModelSettings, sampling: SamplingSettings) -> None:
        training = TrainingSettings(images_per_step=IMAGES, images_per_prompt=8, updates_per_step=UPDATES)
        self._sampler, self._learner = DiffusionPolicy(model, sampling), DiffusionLearner(model, sampling, training, 0)
        self.parameters = sum(each.numel() for each in self._learner.parameters.values())
        self._steps = 0

    def epoch(self) -> Times:
        """Sample, learn, publish."""
        prompts = [prompt for prompt in PROMPTS for _ in range(IMAGES // len(PROMPTS))]
        seeds = [self._steps * IMAGES + image for image in range(IMAGES)]
        drawn: list[Any] = []
        version = self._learner.weights_version
        sample = timed(lambda: drawn.extend(self._sampler.rollout(prompts, seeds, version)))
        images, trajectory = drawn
        reward = images.mean(axis=(1, 2, 3))
        advantage = (reward - reward.mean()) / (reward.std() + 1e-8)
        learn = timed(lambda: self._learner.learn(trajectory, np.asarray(advantage), self._steps))
        publish = timed(lambda: self._sampler.load(self._learner.weights()))
        self._steps += 1
        return _named("sample", sample) | _named("learn", learn + publish)


def _named(stage: str, seconds: Seconds) -> Times:
    return {f"{stage} cpu": seconds.cpu, f"{stage} wall": seconds.wall}


def trl_settings(pipeline: Path, lora: bool, batches: tuple[int, int], guidance: float) -> dict[str, Any]:
    """What the worker needs to do the same."""
    sample, train = batches
    ddpo = {
        "sample_num_steps": STEPS,
        "sample_eta": 1.0,
        "sample_guidance_scale": guidance,
        "train_cfg": guidance > 1,
        "sample_batch_size": sample,
        "sample_num_batches_per_epoch": IMAGES // sample,
        "train_batch_size": train,
        "train_gradient_accumulation_steps": IMAGES // UPDATES // train,
        "train_learning_rate": 1e-4,
        "train_adam_weight_decay": 1e-4,
        "train_clip_range": 1e-4,
        "per_prompt_stat_tracking": False,
    }
    return {"pipeline": str(pipeline), "lora": lora, "ddpo": ddpo, "prompts": PROMPTS, "images_per_prompt": 8}


def measure(out: Path, rounds: int, guidance: float) -> list[dict[str, Any]]:
    """Rounds of every setting: those on record, and what is missing."""
    record = out / f"rounds-{guidance:g}.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    python = environment(out / "trl")
    for size, channels in SIZES.items():
        pipeline = out / size
        if not (pipeline / "model_index.json").exists():
            random_pipeline(channels, pipeline)
        for kind in ("whole", "LoRA"):
            done = sum(line["size"] == size and line["kind"] == kind for line in lines)
            if done >= rounds:
                continue
            model = ModelSettings(path=str(pipeline), lora_rank=RANK * (kind == "LoRA"))
            sampling = SamplingSettings(steps=STEPS, guidance_scale=guidance)
            floor, ours = Floor(model, sampling, IMAGES, IMAGES // UPDATES * STEPS), Ours(model, sampling)
            with ExitStack() as stack:
                peers = {
                    f"TRL {sample}/{train}": stack.enter_context(
                        Trl(
                            python,
                            trl_settings(pipeline, kind == "LoRA", (sample, train), guidance),
                            out / f"trl-{size}-{kind}-{sample}.log",
                        )
                    )
                    for sample, train in BATCHES
                }
                assert {peer.parameters for peer in peers.values()} == {ours.parameters}
                for number in range(done - (done == 0), rounds):  # the first of all is thrown away: caches are cold
                    times: dict[str, Times] = {
                        "floor": _named("sample", floor.sampling()) | _named("learn", floor.learning()),
                        "ours": ours.epoch(),
                    }
                    for name, peer in peers.items():
                        times[name] = _trl_times(peer.epoch())
                    if number < 0:
                        continue
                    calls = {"sample": floor.sampling_call, "learn": floor.learning_call}
                    line = {"size": size, "kind": kind, "commit": git_commit(), "calls": calls, "times": times}
                    lines.append(line)
                    with record.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    print(f"{size} {kind} round {number + 1}/{rounds}: {told(times)}", flush=True)
    return lines


def _trl_times(answer: Mapping[str, float]) -> Times:
    rest = {
        clock: answer[f"all {clock}"] - answer[f"sample {clock}"] - answer[f"reward {clock}"]
        for clock in ("cpu", "wall")
    }
    sample = {key: value for key, value in answer.items() if key.startswith("sample")}
    return sample | {f"learn {clock}": seconds for clock, seconds in rest.items()}


def told(times: Mapping[str, Times]) -> str:
    """A round for people."""
    return "  ".join(f"{name} {total(each):.2f}" for name, each in times.items()) + " CPU s"


def total(times: Times, clock: str = "cpu") -> float:
    """Sampling and learning."""
    return times[f"sample {clock}"] + times[f"learn {clock}"]


def table(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each setting: medians, and medians of the ratios of each round."""
    rows = []
    for size in SIZES:
        for kind in ("whole", "LoRA"):
            found = [line["times"] for line in lines if line["size"] == size and line["kind"] == kind]
            for batches in BATCHES if found else ():
                name = f"TRL {batches[0]}/{batches[1]}"
                rows.append(
                    {
                        "pipeline": size,
                        "trained": kind,
                        "batches": f"{batches[0]}/{batches[1]}",
                        "rounds": len(found),
                        **{key: median(total(times[key]) for times in found) for key in ("floor", "ours")},
                        "TRL": median(total(times[name]) for times in found),
                        "floor / ours": median(total(times["floor"]) / total(times["ours"]) for times in found),
                        "TRL / ours": median(total(times[name]) / total(times["ours"]) for times in found),
                        "TRL / ours wall": median(
                            total(times[name], "wall") / total(times["ours"], "wall") for times in found
                        ),
                        "asked": ASKED.get((kind, batches[0])),
                    }
                )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ddpo-vs-trl"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=5.0, help="1: none, half the work")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    lines = measure(out, arguments.rounds, arguments.guidance)
    rows = table(lines)
    (out / "table.json").write_text(json.dumps({"commit": git_commit(), "packages": PACKAGES, "rows": rows}, indent=1))
    measured = ", ".join(sorted({line["commit"][:9] for line in lines}))
    print(f"commit {git_commit()} (rounds measured at {measured}), guidance {arguments.guidance:g}")
    print("CPU seconds an epoch, one thread: medians; ratios: medians over rounds")
    names = ("pipeline", "trained", "batches", "floor", "ours", "TRL", "floor / ours", "TRL / ours", "TRL / ours wall")
    print("  ".join(f"{name:>12}" for name in names))
    missed = 0
    for row in rows:
        print("  ".join(f"{_shown(row[name]):>12}" for name in names))
        missed += row["floor / ours"] < FLOOR_SHARE
        missed += row["asked"] is not None and row["TRL / ours"] < row["asked"]
    print(f"{'kept' if not missed else 'MISSED'}: floor / ours ≥ {FLOOR_SHARE}; TRL / ours ≥ {sorted(ASKED.items())}")
    return missed


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
