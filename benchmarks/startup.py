"""How long small things take before they begin: now beside an earlier commit, in one run.

    python -m benchmarks.startup [--commit 4f89436] [--rounds 3] [--whole]

The earlier commit is checked out into a temporary directory and run by the same Python and libraries, and those of its
lock that are no longer in this one's. In each round, one after the other: the demonstration until its first step is
done, then interrupted; a sweep of the Gaussian family of ``configs/sweeps/gaussian_phase.yaml`` with two trials and one
with six, whose difference is what four more trials take (two at a time, so a trial takes half of it); ``generate`` of
eight images with the default model. Wall seconds and CPU seconds of all processes, as medians over the rounds, and
their ratios; beside them what the libraries' import takes alone, below which nothing that draws can come. ``--whole``
runs the whole phase diagram, now only. To be run on idle cores.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import psutil

from orchestration.runs.manifest import git_commit
from pipelines.storage.locations import CHECKOUT

DEMO, TRIAL, GENERATE, WHOLE = 15.0, 2.0, 4.0, 60.0  # seconds, at most
_NOT_PASSED_ON = ("RAY_ADDRESS", "OUROBOROS_FORKS", "PYTHONDONTWRITEBYTECODE")  # what is compiled is to be kept
_LIBRARIES = ".only_here"  # of a checkout of the earlier commit
_FEW, _MORE = "space.fresh_fraction=[0.1]", "space.fresh_fraction=[0.1, 0.2, 0.4]"
_SWEEP = ["sweep", "--config", "configs/sweeps/gaussian_phase.yaml"]
_GENERATE = ["generate", "models/digits/pipeline", "--prompt", "a red three on a blue ground", "--count", "8"]


class Command:
    """``ouroboros`` of a checkout, running, and the CPU seconds of its processes, as far as they were seen."""

    def __init__(self, checkout: Path, arguments: list[str]) -> None:
        alone = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
        path = os.pathsep.join(map(str, (checkout, checkout / _LIBRARIES)))
        self._began, self._used = time.monotonic(), dict[psutil.Process, float]()
        self._process = psutil.Popen(
            [sys.executable, "-m", "orchestration.cli", *arguments],
            cwd=checkout,
            env=alone | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        os.set_blocking(self._process.stdout.fileno(), False)
        self.out = b""

    def until(self, word: bytes = b"") -> float:
        """Wall seconds from its start until it has printed ``word``, or has ended. Raises RuntimeError if it ends
        without the word."""
        while self._process.poll() is None and not (word and word in self.out):
            self.out += self._process.stdout.read() or b""
            for each in [self._process, *self._process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    self._used[each] = sum(each.cpu_times()[:2])
            time.sleep(0.05)
        if word and word not in self.out:
            raise RuntimeError(f"{self._process.args}: {self._process.stderr.read().decode()}")
        return time.monotonic() - self._began

    def end(self, interrupted: bool) -> float:
        """Wait for its end; returns CPU seconds. Raises RuntimeError if it went wrong."""
        if interrupted:
            self._process.send_signal(signal.SIGINT)
        rest, errors = self._process.communicate()
        if self._process.returncode != (130 if interrupted else 0):
            raise RuntimeError(f"{' '.join(self._process.args)}: {errors.decode()}")
        self.out += rest or b""
        self.quiet = not errors
        return sum(self._used.values())


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """The checkout of ``commit``, in a directory of its own."""
    with tempfile.TemporaryDirectory() as parent:
        place = Path(parent) / "old"
        subprocess.run(["git", "worktree", "add", "--detach", str(place), commit], cwd=CHECKOUT, check=True)
        try:
            then, now = (set((where / "requirements.lock").read_text().split()) for where in (place, CHECKOUT))
            names = {each.partition("==")[0] for each in now}
            gone = [each for each in then if "==" in each and each.partition("==")[0] not in names]
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", _LIBRARIES]
            subprocess.run([*install, *gone], cwd=place, check=True)
            yield place
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(place)], cwd=CHECKOUT, check=True)


def imports_alone() -> float:
    """Wall seconds of a process that imports the class of the default model's pipeline and does nothing."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "from diffusers import StableDiffusionPipeline"], check=True)
    return time.monotonic() - began


def measure(checkout: Path, scratch: Path) -> tuple[dict[str, float], bool]:
    """Seconds of each thing, wall and CPU, and whether ``generate`` was quiet."""
    found: dict[str, float] = {}
    demo = Command(checkout, ["ddpo", "--config", "configs/ddpo/digits.yaml", f"output_dir={scratch / 'demo'}"])
    found["demo to its first step"] = demo.until(b"step  1/")
    found["demo to its first step, CPU"] = demo.end(interrupted=True)
    spent = []
    for name, space in (("few", _FEW), ("more", _MORE)):
        sweep = Command(checkout, [*_SWEEP, space, "space.sampling_bias=[0.9]", f"output_dir={scratch / name}"])
        spent.append((sweep.until(), sweep.end(interrupted=False)))
    found["a trial of a sweep"] = (spent[1][0] - spent[0][0]) / 2  # four more, two at a time
    found["a trial of a sweep, CPU"] = (spent[1][1] - spent[0][1]) / 4
    drawing = Command(checkout, [*_GENERATE, "--output", str(scratch / "images")])
    found["generate of 8"] = drawing.until()
    found["generate of 8, CPU"] = drawing.end(interrupted=False)
    return found, drawing.quiet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="4f89436")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args()
    print(f"commit {git_commit()}, before {options.commit}", flush=True)
    taken: dict[str, dict[str, list[float]]] = {"old": defaultdict(list), "new": defaultdict(list)}
    quiet, floor = True, []
    with checked_out(options.commit) as old:
        for _ in range(options.rounds):
            floor.append(imports_alone())
            for name, checkout in (("old", old), ("new", CHECKOUT)):
                with tempfile.TemporaryDirectory() as scratch:
                    found, said_nothing = measure(checkout, Path(scratch))
                quiet &= said_nothing or name == "old"
                for what, seconds in found.items():
                    taken[name][what].append(seconds)
    print(f"{'seconds, medians of ' + str(options.rounds):32}{'old':>8}{'new':>8}{'new/old':>9}")
    new = {what: median(values) for what, values in taken["new"].items()}
    for what, value in new.items():
        before = median(taken["old"][what])
        print(f"{what:32}{before:8.1f}{value:8.1f}{value / before:9.2f}")
    print(f"a process that only imports diffusers' StableDiffusionPipeline: {median(floor):.1f} s")
    kept = {
        f"demo to its first step in {DEMO:g} s": new["demo to its first step"] <= DEMO,
        f"a trial in {TRIAL:g} s": new["a trial of a sweep"] <= TRIAL,
        f"generate in {GENERATE:g} s": new["generate of 8"] <= GENERATE,
        "generate is quiet": quiet,
    }
    if options.whole:
        with tempfile.TemporaryDirectory() as scratch:
            whole = Command(CHECKOUT, [*_SWEEP, f"output_dir={Path(scratch) / 'whole'}"])
            seconds = whole.until()
            whole.end(interrupted=False)
        print(f"gaussian_phase, 30 trials: {seconds:.1f} s")
        kept[f"gaussian_phase in {WHOLE:g} s"] = seconds <= WHOLE
    for promise, held in kept.items():
        print(f"{'kept  ' if held else 'MISSED'}  {promise}")
    sys.exit(not all(kept.values()))


if __name__ == "__main__":
    main()
