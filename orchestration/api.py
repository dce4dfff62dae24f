"""The commands from Python, for notebooks and scripts: docs/python.md shows them at work. Light to import."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import BaseModel

from orchestration.cluster import forks
from orchestration.experiments.registry import EXPERIMENTS, experiment_of
from orchestration.runs.browse import find_run
from orchestration.runs.config import ConfigError, load_config
from orchestration.runs.manifest import open_run, read_manifest
from orchestration.runs.run import Run
from policies.common.user_code import giving
from policies.rl.settings import known_keys, nearest

Source = str | Path | Mapping[str, Any]  # of settings: a YAML file, or what one would hold
Config = Source | BaseModel | Sequence[Source]  # of several the later wins, key by key


class Result:
    """What a run has left in its directory, done or not: ``run`` is that directory, or its name under ``root``."""

    def __init__(self, run: str | Path, root: str | Path = "runs") -> None:
        self._run = find_run(str(run), Path(root))
        self.directory = self._run.directory.resolve()

    def __repr__(self) -> str:
        return f"Result({str(self.directory)!r})"

    @property
    def summary(self) -> dict[str, Any]:
        """What came out, as in summary.json; empty before the end."""
        return self._run.summary

    @property
    def metrics(self) -> Any:
        """A pandas frame: of DDPO a row a step, of arms a row for each arm, seed and step, of a sweep a row a trial."""
        import pandas as pd

        return pd.DataFrame(experiment_of(self._run.loop).rows(self._run))

    @property
    def images(self) -> dict[str, Path]:
        """The figures by name, such as before_after."""
        return {path.stem: path for path in sorted(self.directory.glob("figures/*.png"))}

    @property
    def report(self) -> Path:
        """The page that shows all of it."""
        return self.directory / "report.html"

    def pipeline(self, place: str = "pipeline", trust: bool = False) -> Any:
        """What was trained, as a diffusers pipeline: that at a ``place`` in the directory, a study's below products.

        Raises ConfigError if there is none, or if another began the run, without ``trust``."""
        open_run(self.directory, trust)
        if not (self.directory / place / "model_index.json").is_file():
            raise ConfigError(f"{self.directory / place} holds no pipeline: is the run done, and one that trains such?")
        from diffusers import DiffusionPipeline

        from pipelines.storage.model_files import quieten

        quieten()
        return DiffusionPipeline.from_pretrained(self.directory / place)


def run_ddpo(config: Config = (), reward: str | Callable[..., Any] | Mapping | None = None, **given: Any) -> Result:
    """Train a diffusion model with a ``reward``: a function of this program's own, a name as in ``reward.function``, or
    several with their weights. For the rest see :func:`run_mad`."""
    with contextlib.ExitStack() as stack:
        names: Any = reward
        if isinstance(reward, Mapping):
            names = {stack.enter_context(giving(k)) if callable(k) else k: weight for k, weight in reward.items()}
        elif callable(reward):
            names = stack.enter_context(giving(reward))
        return _run("ddpo", config, {} if reward is None else {"reward.function": names}, **given)


def run_mad(config: Config = (), **given: Any) -> Result:
    """Train generators on their own samples (MAD).

    ``given`` are settings beyond ``config``: ``name="mine"``, blocks of which some keys are changed, as in
    ``workers={"device": "cpu"}``, and dotted keys in ``**{"tracking.uri": …}``. Or ``resume``: a run to go on with,
    whose settings stand, with ``trust`` if another began it and ``accept_changes`` if what it reads has changed.
    Raises ConfigError before anything is started, and KeyboardInterrupt when it is stopped: its last commit stands.
    """
    return _run("mad", config, {}, **given)


def run_sweep(config: Config = (), /, **given: Any) -> Result:
    """Run an experiment many times over a space of its settings. See :func:`run_mad`."""
    return _run("sweep", config, {}, **given)


def run_study(config: Config = (), **given: Any) -> Result:
    """Run a study, which the setting ``study`` names: arms, controls, seeds and claims. See :func:`run_mad`."""
    return _run("study", config, {}, **given)


def _run(
    loop: str, config: Config, more: Any, /, trust: bool = False, accept_changes: bool = False, **own: Any
) -> Result:
    Run.begins_now()
    resume = own.pop("resume", None)
    try:
        with stopped_once():
            if resume is None:
                return Result(EXPERIMENTS[loop].run(read(loop, config, given=own | more)).parent)
            if config or own:
                raise ConfigError(f"{resume} goes on with the settings that it has: give no others with resume")
            directory = find_run(str(resume), Path("runs")).directory
            if (held := read_manifest(directory)["loop"]) != loop:
                raise ConfigError(f"{directory} is a {held} run: go on with run_{held}")
            return Result(EXPERIMENTS[loop].resume(directory, trust, accept_changes).parent)
    except ConfigError as error:  # one line says it all: how it was found out is of no use
        raise error.with_traceback(None) from None
    finally:
        forks.end()  # this process may live for days


def read(name: str, config: Config, overrides: Sequence[str] = (), given: Mapping[str, Any] | None = None) -> Any:
    """The configuration of the experiment ``name``, changed by ``overrides`` as on the command line and by what is
    ``given`` by key. Raises ConfigError, which says so if files are another's."""
    one = isinstance(config, str | Path | Mapping | BaseModel)
    layers: Any = [config] if one else config
    sources = [each.model_dump() if isinstance(each, BaseModel) else each for each in layers]
    try:
        return load_config(EXPERIMENTS[name].schema, [*sources, given or {}], overrides)
    except ConfigError as error:
        for key in [*(each.partition("=")[0] for each in overrides), *(given or ())]:
            owners = [each for each in EXPERIMENTS if key in known_keys(EXPERIMENTS[each].schema)]
            if owners and str(error).startswith((f"unknown key {key!r}", f"unknown key {key.partition('.')[0]!r}")):
                near = nearest(key, [*known_keys(EXPERIMENTS[name].schema)])
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{key} is a setting of {' and '.join(owners)}, not of {name}{hint}") from None
        fitting = [each for each in EXPERIMENTS if sources and _reads(each, sources)]
        if not fitting or name in fitting:
            raise
        files, other = ", ".join(str(each) for each in sources if not isinstance(each, Mapping)), fitting[0]
        raise ConfigError(f"{files or 'this'} configures {other}: give it to 'ouroboros {other}'") from None


def _reads(name: str, sources: Sequence[Source]) -> bool:
    with contextlib.suppress(ConfigError):
        load_config(EXPERIMENTS[name].schema, sources)
        return True
    return False


@contextlib.contextmanager
def stopped_once() -> Iterator[None]:
    """In this block SIGINT and SIGTERM stop what runs, once: closing takes seconds, and a second signal must not leave
    it half done."""
    hears = threading.current_thread() is threading.main_thread()  # no other thread may
    meanings = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM) if hears}
    try:
        yield
    finally:  # a program that called this goes on
        for number, meaning in meanings.items():
            signal.signal(number, meaning or signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt
