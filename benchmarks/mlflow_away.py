"""What an MLflow server that is away costs a run: one with it against one that cannot reach it in its middle third.

``python -m benchmarks.mlflow_away [DIRECTORY] [PAIRS]`` runs pairs of DDPO runs, the one or the other first in turn, or
goes on with them, and prints each pair's wall times, the median ratio, and whether MLflow holds the same afterwards.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

from orchestration.runs.manifest import git_commit
from tests.chaos import committed, ddpo_arguments, leavings
from tests.processes import start, wait_until
from tests.servers import Gate, MlflowServer

STEPS = 60
BOUND = 1.05  # on the median ratio


def main(directory: Path, pairs: int) -> int:
    """Run what is missing and print. Returns how many promises are not kept."""
    directory.mkdir(parents=True, exist_ok=True)
    record = directory / "pairs.jsonl"
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    server = MlflowServer(directory).start()
    gate = Gate(server).open()
    try:
        for number in range(len(done), pairs):
            pair = {}
            for away in (False, True) if number % 2 == 0 else (True, False):
                pair["away" if away else "present"] = run(directory / f"{number}-{away}", gate, away=away)
            done.append(pair)
            with record.open("a") as file:
                file.write(json.dumps(pair) + "\n")
    finally:
        server.kill()
    ratios = [pair["away"]["seconds"] / pair["present"]["seconds"] for pair in done]
    print(f"commit {git_commit()}\n{STEPS} steps\n{'pair':>4}{'present s':>12}{'away s':>12}{'ratio':>8}")
    for number, (pair, ratio) in enumerate(zip(done, ratios, strict=True)):
        print(f"{number:>4}{pair['present']['seconds']:>12.1f}{pair['away']['seconds']:>12.1f}{ratio:>8.3f}")
    complete = len({pair[kind]["left"] for pair in done for kind in pair}) == 1
    kept = {f"median ratio {median(ratios):.3f}, at most {BOUND}": median(ratios) <= BOUND}
    kept["weights, points and images are the same in all runs"] = complete
    for promise, good in kept.items():
        print(f"{'kept' if good else 'MISSED':<8}{promise}")
    return sum(not good for good in kept.values())


def run(directory: Path, gate: Gate, *, away: bool) -> dict[str, object]:
    """One run: its wall time, and all it left."""
    for old in (directory, Path(f"{directory}.log")):  # of a benchmark that was interrupted
        if old.exists():
            old.rename(f"{old}.{time.time_ns()}")
    words = ddpo_arguments(gate.server.directory, gate.uri, STEPS)
    began = time.monotonic()
    process = start([*words, f"output_dir={directory}"], Path(f"{directory}.log"))

    def reach(share: float) -> None:
        wait_until(lambda: committed(directory) >= share * STEPS or process.poll() is not None, 600, "a third")

    if away:
        reach(1 / 3)
        gate.shut()
        reach(2 / 3)
        gate.open()
    assert process.wait(timeout=600) == 0, Path(f"{directory}.log").read_text()
    return {"seconds": time.monotonic() - began, "left": json.dumps(leavings(directory, gate.server), sort_keys=True)}


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main(Path(given[0] if given else "runs/mlflow-away"), int(given[1]) if len(given) > 1 else 5))
