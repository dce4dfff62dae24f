"""Runs under fire: processes are killed and stopped at random, and the end has to be that of an undisturbed run.

``python -m tests.chaos --faults 100 --seed 0`` makes runs of both loops, on this machine alone and on a cluster whose
second node is lost again and again, disturbs each several times, and compares weights, manifests and every point and
image in MLflow with a run that nobody touched. It goes on where it was interrupted, prints a table of faults and
outcomes, and returns how many runs ended otherwise than they should.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from orchestration.runs.manifest import git_commit
from orchestration.tracking.outbox import undelivered
from tests.models import build_tiny_captioner, build_tiny_pipeline
from tests.nodes import Nodes, environment
from tests.processes import start, wait_until
from tests.servers import MlflowServer

MARK = "OUROBOROS_CHAOS"  # in the environment of everything that a run starts
ROLES = {"sampler": "ray::Sampler", "captioner": "ray::CaptionerActor", "reward": "ray::RewardActor"}
ROLES |= {"learner": "ray::LearnerActor", "worker": "ray::perform", "raylet": "raylet"}
EVERYWHERE = [("driver", "SIGKILL"), ("driver", "SIGSTOP"), ("MLflow", "SIGKILL"), ("raylet", "SIGKILL")]
FAULTS = {
    "ddpo": [(role, how) for role in ("sampler", "captioner", "reward", "learner") for how in ("SIGKILL", "SIGSTOP")],
    "mad": [("worker", "SIGKILL"), ("worker", "SIGSTOP")],
    "ddpo on two nodes": [("node", "SIGKILL")],
}
FAULTS["ddpo"] += EVERYWHERE
FAULTS["mad"] += EVERYWHERE
TURNS = ("ddpo", "mad", "ddpo", "ddpo on two nodes", "ddpo")
FAULTS_PER_RUN = {"ddpo": 12, "mad": 6, "ddpo on two nodes": 6}
_RUN_SECONDS = 900.0  # the longest life of a run, faults and all
_TOGETHER = 0.15  # of the faults come right after another, before the run recovers from it
_STRUCK_UNTIL = 0.8  # of a run: what is hit has still to do something


@dataclass
class Strike:
    """One fault: what is hit, how, and once how much of the run is committed. ``seconds`` is how long it was until the
    run came further; None: another fault came first, or the run ended."""

    target: str
    how: str
    due: int
    seconds: float | None = None


@dataclass
class Stage:
    """What all runs of one chaos share."""

    directory: Path
    server: MlflowServer
    arguments: dict[str, list[str]]
    random: random.Random
    nodes: Nodes | None = None
    strikes: list[Strike] = field(default_factory=list)
    mends: list[tuple[float, int, Callable[[], object]]] = field(default_factory=list)

    def mend_later(self, strike: Strike, mend: Callable[[], object]) -> None:
        """After some seconds or, as a quick run would be over by then, some commits."""
        self.mends.append((time.monotonic() + self.random.uniform(0.0, 10.0), strike.due + 5, mend))

    def mend(self, committed: float = float("inf")) -> None:
        """What it is time for; by default all."""
        for moment in [each for each in self.mends if time.monotonic() >= each[0] or committed >= each[1]]:
            self.mends.remove(moment)
            moment[2]()

    def replace_node(self) -> None:
        """A new second node for one that was lost."""
        assert self.nodes is not None
        self.nodes.end("second")
        self.nodes.begin("second")


def main(arguments: list[str] | None = None) -> int:
    """Returns how many runs did not end as the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    elsewhere = Path(tempfile.gettempdir()) / "ouroboros-chaos"  # what is below runs/ does not go to other nodes
    parser.add_argument("--directory", type=Path, default=elsewhere)
    chosen = parser.parse_args(arguments)
    directory = chosen.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    os.environ[MARK] = str(directory)
    record = directory / "rounds.jsonl"
    rounds = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    server = MlflowServer(directory).start()
    try:
        arguments_of = {"ddpo": ddpo_arguments(directory, server.uri), "mad": mad_arguments(server.uri)}
        expected = {loop: undisturbed(directory / loop, arguments_of[loop], server) for loop in arguments_of}
        arguments_of["ddpo on two nodes"], expected["ddpo on two nodes"] = arguments_of["ddpo"], expected["ddpo"]
        while sum(len(each["strikes"]) for each in rounds) < chosen.faults:
            number, began = len(rounds), time.monotonic()
            loop = TURNS[number % len(TURNS)]
            dice = random.Random(f"{chosen.seed} {number}")
            strikes = planned(loop, rounds, expected[loop]["committed"], dice)
            place = directory / f"{loop.replace(' ', '-')}-{number}"
            with Nodes() if "nodes" in loop else nullcontext() as nodes:
                stage = Stage(directory, server, arguments_of, dice, nodes)
                for name in ("first", "second") if nodes else ():
                    nodes.begin(name)
                found = disturbed(stage, loop, place, strikes)
            wrong = differences(place, found, expected[loop])
            line = {"loop": loop, "strikes": [vars(strike) for strike in stage.strikes], "wrong": wrong}
            line["minutes"] = (time.monotonic() - began) / 60
            rounds.append(line)
            with record.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(
                f"round {number}: {loop}, {len(stage.strikes)} faults: {'; '.join(wrong) or 'as undisturbed'}",
                flush=True,
            )
    finally:
        server.kill()
    tell(rounds, json.loads((directory / "ddpo" / "typical.json").read_text())["seconds"])
    return sum(bool(each["wrong"]) for each in rounds)


def planned(loop: str, rounds: Sequence[dict[str, Any]], committed: int, dice: random.Random) -> list[Strike]:
    """The faults of a run: those that were timed least in the loop's runs, at random moments, some of them together."""
    before = [strike for each in rounds if each["loop"] == loop for strike in each["strikes"]]
    had = Counter((strike["target"], strike["how"]) for strike in before if strike["seconds"] is not None)
    kinds: list[tuple[str, str]] = []
    for _ in range(FAULTS_PER_RUN[loop]):
        least = min(had[kind] for kind in FAULTS[loop])
        kinds.append(dice.choice([kind for kind in FAULTS[loop] if had[kind] == least]))
        had[kinds[-1]] += 1
    moments = sorted(dice.sample(range(1, round(_STRUCK_UNTIL * committed)), len(kinds)))
    for number in range(1, len(moments)):
        if dice.random() < _TOGETHER:
            moments[number] = moments[number - 1]
    dice.shuffle(kinds)
    return [Strike(*kind, due) for kind, due in zip(kinds, moments, strict=True)]


def ddpo_arguments(directory: Path, uri: str, steps: int = 60) -> list[str]:
    """A run of a minute: tiny random models, a reward that needs no language."""
    (directory / "prompts.txt").write_text("a red seven\na blue two\na green one\na red two")
    if not (directory / "pipeline").exists():
        build_tiny_pipeline(directory / "pipeline")
        build_tiny_captioner(directory / "captioner")
    return [
        "ddpo",
        "name=chaos",
        f"prompts={directory / 'prompts.txt'}",
        f"model.path={directory / 'pipeline'}",
        f"captioner.path={directory / 'captioner'}",
        "reward.function=tests.rewards:redness",
        "evaluation.evaluator=null",
        "evaluation.images=12",
        "evaluation.interim_images=6",
        "evaluation.every=8",
        "sampling.steps=6",
        f"training.steps={steps}",
        "training.images_per_step=48",
        "training.images_per_prompt=12",
        "training.updates_per_step=2",
        "training.learning_rate=1e-3",
        "checkpoint.every=1",
        "actors.images_per_call=6",
        "actors.threads.learner=1",
        "tracking.system_metrics=false",
        f"tracking.uri={uri}",
    ]


def mad_arguments(uri: str) -> list[str]:
    """An experiment of a minute: two loops of a small diffusion model."""
    loops = [
        "arms.plain={rule: fully_synthetic, n_ini: 60}",
        "arms.fresh={rule: fresh, n_ini: 60, n_real: 20, n_synthetic: 40}",
    ]
    small = "{channels: 8, training_steps: 60, sampling_steps: 4}"
    size = ["name=chaos", "family=diffusion", f"diffusion={small}", "generations=10", "seeds=2", "data.reference=120"]
    return ["mad", *size, *loops, "tracking.system_metrics=false", f"tracking.uri={uri}"]


def undisturbed(directory: Path, arguments: list[str], server: MlflowServer) -> dict[str, Any]:
    """What a run leaves that nobody touches. Kept, so that it is made once."""
    kept = directory / "expected.json"
    if not kept.exists():
        directory.mkdir(exist_ok=True)
        began = time.monotonic()
        process = start([*arguments, f"output_dir={directory / 'run'}"], directory / "log")
        assert process.wait(timeout=_RUN_SECONDS) == 0, (directory / "log").read_text()
        steps = committed(directory / "run")
        (directory / "typical.json").write_text(json.dumps({"seconds": (time.monotonic() - began) / steps}))
        kept.write_text(json.dumps(leavings(directory / "run", server) | {"committed": steps}))
    content: dict[str, Any] = json.loads(kept.read_text())
    return content


def disturbed(stage: Stage, loop: str, directory: Path, strikes: Sequence[Strike]) -> dict[str, Any]:
    """A run with faults, resumed as often as its driver ends by one. Returns what it leaves."""
    log, deadline = Path(f"{directory}.log"), time.monotonic() + _RUN_SECONDS
    cluster = environment(stage.nodes.address) if stage.nodes else None
    process = start([*stage.arguments[loop], f"output_dir={directory}"], log, cluster)
    coming, struck, stood = list(strikes), 0.0, 0
    while process.poll() is None or process.poll() in _ends(stage.strikes):  # else it is done, or stopped by itself
        assert time.monotonic() < deadline, f"{directory} does not end; see {log}"
        if process.poll() is not None:
            process = start(["resume", str(directory)], log, cluster)
        now = committed(directory)
        if stage.strikes and stage.strikes[-1].seconds is None and now > stood:
            stage.strikes[-1].seconds = time.monotonic() - struck
        if coming and now >= coming[0].due:
            time.sleep(stage.random.uniform(0.0, 0.5))  # anywhere within a step
            if process.poll() is None and hit(stage, process, coming[0]):
                stage.strikes.append(coming.pop(0))
                struck, stood = time.monotonic(), committed(directory)
        stage.mend(now)
        time.sleep(0.05)
    stage.mend()
    wait_until(stage.server.answers, 120, "the MLflow server")
    if process.wait() != 0:
        return {"exit code": process.returncode}
    subprocess.run([sys.executable, "-m", "orchestration.cli", "sync", str(directory)], check=True, capture_output=True)
    return leavings(directory, stage.server)


def _ends(strikes: Sequence[Strike]) -> list[int]:
    """Exit codes that the last fault explains: Ray ends whoever uses the object store of a dead raylet."""
    return [-signal.SIGKILL, *([1] if strikes and strikes[-1].target == "raylet" else [])]


def hit(stage: Stage, process: subprocess.Popen[bytes], strike: Strike) -> bool:
    """Do it. Returns whether there was something to hit."""
    if strike.target == "MLflow":
        stage.mend()
        stage.server.kill()
        stage.mend_later(strike, stage.server.begin)
    elif strike.target == "node":
        assert stage.nodes is not None
        stage.mend()
        stage.nodes.lose("second")
        stage.mend_later(strike, stage.replace_node)
    else:
        victim = process.pid if strike.target == "driver" else _one_of(stage, process, ROLES[strike.target])
        if victim is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(victim, getattr(signal, strike.how))
            if strike.target == "driver" and strike.how == "SIGSTOP":
                time.sleep(stage.random.uniform(1.0, 12.0))
                os.kill(victim, signal.SIGCONT)
            if strike.target == "driver" and strike.how == "SIGKILL":
                process.wait()
            return True
        return False
    return True


def _one_of(stage: Stage, process: subprocess.Popen[bytes], title: str) -> int | None:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error, IndexError):
            if child.cmdline()[0].startswith(title) or child.name() == title:
                found.append(child.pid)
    return stage.random.choice(sorted(found)) if found else None


def committed(directory: Path) -> int:
    """How far a run has come: commits, or tasks that are done."""
    commits = [int(path.name.removeprefix("step-")) for path in directory.glob("checkpoints/step-*")]
    return max(commits, default=0) + len(list(directory.glob("tasks/*/manifest.json")))


def leavings(directory: Path, server: MlflowServer) -> dict[str, Any]:
    """Everything of a run that has to be the same, however it came about."""
    from mlflow import MlflowClient

    summary = json.loads((directory / "summary.json").read_text())
    manifest = json.loads((directory / "manifest.json").read_text())
    client = MlflowClient(server.uri)
    runs = {"run": manifest["mlflow_run_id"], **manifest.get("mlflow_children", {})}
    told: dict[str, Any] = {}
    for name, run_id in runs.items():
        run = client.get_run(run_id)
        keys = [key for key in run.data.metrics if not key.startswith("seconds/")]  # a step's time is what it was
        points = {key: sorted(p.step for p in client.get_metric_history(run_id, key)) for key in keys}
        images = [Path(each.path).name.split("+timestamp+")[0] for each in client.list_artifacts(run_id, "images")]
        told[name] = {"status": run.info.status, "points": points, "images": sorted(images)}
    results = {
        task["kind"] + " " + path.parent.name: task["sha256"]
        for path in sorted(directory.glob("tasks/*/manifest.json"))
        for task in [json.loads(path.read_text())]
    }
    files = {
        str(path.relative_to(directory)): sha256(path.read_bytes()).hexdigest()
        for path in [*directory.glob("pipeline/**/*.safetensors"), *directory.glob("evaluations/*.npz")]
    }
    return {
        "weights": summary.get("weights_sha256"),
        "arms": summary.get("arms"),
        "tasks": results,
        "files": files,
        "MLflow": told,
    }


def differences(directory: Path, found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What is not as it should be, in words."""
    found = json.loads(json.dumps(found))
    wrong = [f"{key} differ" for key in expected if key != "committed" and found.get(key) != expected[key]]
    wrong += [f"exit code {found['exit code']}"] if "exit code" in found else []
    wrong += [f"left over: {path}" for path in directory.rglob("*.partial")]
    outbox = directory / "outbox"
    wrong += [f"not delivered: {path}" for path in outbox.glob("*.png")]
    wrong += [f"not delivered, or refused: {outbox}"] if undelivered(outbox, "refused") else []
    deadline = time.monotonic() + 120
    while (orphans := [*_orphans()]) and time.monotonic() < deadline:
        time.sleep(1)
    return wrong + [f"orphan: {name}" for name in orphans]


def _orphans() -> Iterator[str]:
    """Processes that a run started and that are still there, but for the server's."""
    mine = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            started = process.pid in mine or process.ppid() == os.getpid()  # what a fork lives for is not among these
            if not started and process.environ().get(MARK) == os.environ[MARK]:
                yield f"{process.name()} ({process.pid})"


def tell(rounds: list[dict[str, Any]], step_seconds: float) -> None:
    """The table."""
    table: dict[tuple[str, str, str], list[Any]] = defaultdict(list)
    for each in rounds:
        for strike in each["strikes"]:
            table[each["loop"], strike["target"], strike["how"]].append((strike["seconds"], not each["wrong"]))
    faults, minutes = sum(len(each["strikes"]) for each in rounds), sum(each["minutes"] for each in rounds)
    print(f"\ncommit {git_commit()}\n{len(rounds)} runs, {faults} faults, {minutes:.0f} minutes")
    print(f"an undisturbed DDPO run takes {step_seconds:.1f} s a step, its start and end included")
    print(f"{'loop':<20}{'what':<12}{'fault':<10}{'times':>6}{'as undisturbed':>16}{'median s until it goes on':>28}")
    for (loop, target, how), outcomes in sorted(table.items()):
        times = [seconds for seconds, _ in outcomes if seconds is not None]
        typical = f"{median(times):.1f} (of {len(times)})" if times else ""
        good = sum(good for _, good in outcomes)
        print(f"{loop:<20}{target:<12}{how:<10}{len(outcomes):>6}{good:>16}{typical:>28}")
    for number, each in enumerate(rounds):
        for wrong in each["wrong"]:
            print(f"WRONG  round {number} ({each['loop']}): {wrong}")


if __name__ == "__main__":
    sys.exit(main())
