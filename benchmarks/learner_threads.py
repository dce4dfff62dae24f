"""How the learner's forward and backward pass fares with one and two threads, on idle and on busy cores, by spin count.

    python -m benchmarks.learner_threads [--rounds 2]

Each case is a process of its own, as OpenMP reads its environment once; busy means that one more process computes on
every second core. Cases alternate; the median wall time of a call on 320 transitions is printed.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections import defaultdict

from orchestration.runs.manifest import git_commit
from pipelines.limits import cpu_limit

WORK = """
import statistics, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
from pipelines.rl.policy import DiffusionPolicy
from pipelines.settings import ModelSettings
from policies.rl.settings import SamplingSettings
policy = DiffusionPolicy(ModelSettings(), SamplingSettings())
policy.network.requires_grad_(True)
latents = torch.randn(320, *policy.family.latent_shape)
steps, conditions = torch.full((320,), 500), policy.embed([""] * 320)
def call():
    started = time.monotonic()
    policy.predict(latents, steps, conditions).sum().backward()
    return time.monotonic() - started
call()
print(statistics.median(call() for _ in range(6)))
"""
CASES = {"1 thread": (1, None), "2 threads": (2, None), "2 threads, spin 1000": (2, "1000")}


def seconds(threads: int, spin: str | None) -> float:
    """Median wall time of a call, in a fresh process."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if spin:
        environment["GOMP_SPINCOUNT"] = spin
    command = [sys.executable, "-c", WORK, str(threads)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for state in ("idle", "busy"):
            busy = max(1, cpu_limit() // 2) if state == "busy" else 0
            hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
            try:
                for name, (threads, spin) in CASES.items():
                    times[state, name].append(seconds(threads, spin))
            finally:
                for hog in hogs:
                    hog.kill()
                    hog.wait()
    conditions = f"commit {git_commit()}, {cpu_limit()} cores, {rounds} rounds"
    print(f"{conditions}; median seconds of a call on 320 transitions")
    for name in CASES:
        idle, busy = (statistics.median(times[state, name]) for state in ("idle", "busy"))
        print(f"{name:<22} idle {idle:.3f}   busy {busy:.3f}")


if __name__ == "__main__":
    main()
